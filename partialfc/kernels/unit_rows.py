"""Rows of a table, divided by their length.

Shapes: c rows of a tile, D row length, N rows of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.kernels.dispatch import runs_in_triton

__all__ = ["SMALLEST_NORM", "load_unit_rows_"]

SMALLEST_NORM = 1e-12


def load_unit_rows_(unit_cD: Tensor, inverse_norm_c: Tensor, table_ND: Tensor, rows_c: Tensor) -> None:
    """Writes row / max(|row|, 1e-12) for some rows of a table, and 1 / max(|row|, 1e-12).

    Args:
        unit_cD: [c, D] float32 or bfloat16, contiguous; written.
        inverse_norm_c: [c] float32, contiguous; written.
        table_ND: [N, D] float32, float16 or bfloat16, contiguous. What is computed from it is float32.
        rows_c: [c] int64; -1 is no row, its unit and its inverse norm are 0.
    """
    c = len(rows_c)
    assert unit_cD.dtype in (torch.float32, torch.bfloat16), unit_cD.dtype
    assert table_ND.dtype in (torch.float32, torch.float16, torch.bfloat16), table_ND.dtype
    assert inverse_norm_c.dtype == torch.float32, inverse_norm_c.dtype
    assert rows_c.dtype == torch.int64, rows_c.dtype
    assert unit_cD.shape == (c, table_ND.shape[1]), (unit_cD.shape, table_ND.shape, c)
    assert inverse_norm_c.shape == (c,), inverse_norm_c.shape
    assert all(tensor.is_contiguous() for tensor in (unit_cD, inverse_norm_c, table_ND, rows_c))
    if runs_in_triton(table_ND):
        from partialfc.kernels._triton_unit_rows import load_unit_rows_triton_

        load_unit_rows_triton_(unit_cD, inverse_norm_c, table_ND, rows_c)
    else:
        load_unit_rows_twin_(unit_cD, inverse_norm_c, table_ND, rows_c)


def load_unit_rows_twin_(unit_cD: Tensor, inverse_norm_c: Tensor, table_ND: Tensor, rows_c: Tensor) -> None:
    """As `load_unit_rows_`, in plain torch."""
    absent_c = rows_c < 0
    # One row more than nothing is needed for -1 to point to.
    if not len(table_ND):
        assert bool(absent_c.all())
        unit_cD.zero_()
        inverse_norm_c.zero_()
        return
    row_cD = table_ND.index_select(0, rows_c.clamp(min=0)).to(torch.float32)
    norm_c = torch.linalg.vector_norm(row_cD, dim=1).clamp_(min=SMALLEST_NORM)
    torch.reciprocal(norm_c, out=inverse_norm_c).masked_fill_(absent_c, 0.0)
    unit_cD.copy_(row_cD.mul_(inverse_norm_c[:, None]))
    # Not 0 times what the row that -1 was read from has: that may be nan.
    unit_cD.masked_fill_(absent_c[:, None], 0.0)
