"""`unit_rows` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from partialfc.kernels.unit_rows import SMALLEST_NORM

__all__ = ["inverse_norms", "load_unit_rows_triton_"]

# Numbers of a program: several short rows, or one long one.
BLOCK_NUMBERS = 2048

_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)


@triton.jit
def inverse_norms(rows: tl.tensor) -> tl.tensor:
    """1 / max(|row|, 1e-12) of [c, D] float32, for each row."""
    norms = tl.sqrt_rn(tl.sum(rows * rows, axis=1))
    # The numerator is a tensor, as a division that rounds like IEEE takes no number.
    return tl.div_rn(norms * 0.0 + 1.0, tl.maximum(norms, _SMALLEST_NORM))


@triton.jit
def _unit_rows_kernel(
    unit_ptr: tl.tensor,  # [c, D], OUT
    inverse_norm_ptr: tl.tensor,  # [c] float32, OUT
    table_ptr: tl.tensor,  # [N, D]
    rows_ptr: tl.tensor,  # [c] int64
    c: int,
    D: int,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.arange(0, BLOCK_D)
    rows = tl.load(rows_ptr + places, mask=places < c, other=-1)
    present = (rows >= 0)[:, None] & (columns < D)[None, :]
    values = tl.load(table_ptr + rows[:, None] * D + columns[None, :], mask=present, other=0.0).to(tl.float32)
    inverse = tl.where(rows >= 0, inverse_norms(values), 0.0)
    unit = (values * inverse[:, None]).to(unit_ptr.dtype.element_ty)
    tl.store(inverse_norm_ptr + places, inverse, mask=places < c)
    tl.store(
        unit_ptr + places[:, None] * D + columns[None, :], unit, mask=(places < c)[:, None] & (columns < D)[None, :]
    )


def load_unit_rows_triton_(unit_cD: Tensor, inverse_norm_c: Tensor, table_ND: Tensor, rows_c: Tensor) -> None:
    """As `unit_rows.load_unit_rows_`."""
    if unit_cD.numel() == 0:
        return
    c, D = unit_cD.shape
    block_D = triton.next_power_of_2(D)
    block_c = max(1, BLOCK_NUMBERS // block_D)
    grid = (triton.cdiv(c, block_c),)
    _unit_rows_kernel[grid](unit_cD, inverse_norm_c, table_ND, rows_c, c, D, BLOCK_C=block_c, BLOCK_D=block_D)
