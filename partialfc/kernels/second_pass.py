"""The second pass over a tile of class centers whose logits are scaled cosines: gradient and SGD step at once.

Shapes: V rows of the batch, c classes of a tile, D row length, N rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.kernels.dispatch import runs_in_triton
from partialfc.kernels.exponentials import exponentials_twin_
from partialfc.kernels.rounding import LARGEST, stochastic_round_twin_
from partialfc.kernels.unit_rows import load_unit_rows_twin_

__all__ = ["LARGEST_ROW", "RowGradients", "SGDStep", "StoredRows", "second_pass_sgd_"]

# A row and its gradient are in registers.
LARGEST_ROW = 1024

_STORED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredRows:
    """Class centers and what belongs to them.

    Attributes:
        table_ND: [N, D] float32, float16 or bfloat16, contiguous.
        rows_c: [c] int64, which rows are in play, each once; -1 is no row.
        momentum_ND: [N, D], as the table; None without momentum.
        keys_c: [c] int64, a hash for each row, where the table is in 16 bits.
        momentum_keys_c: [c] int64, other hashes, where the momentum is in 16 bits.
    """

    table_ND: Tensor
    rows_c: Tensor
    momentum_ND: Tensor | None = None
    keys_c: Tensor | None = None
    momentum_keys_c: Tensor | None = None

    def check(self) -> None:
        """Asserts shapes and dtypes."""
        assert self.table_ND.ndim == 2
        assert self.table_ND.shape[1] <= LARGEST_ROW, self.table_ND.shape
        assert self.rows_c.dtype == torch.int64
        assert self.rows_c.is_contiguous()
        for stored, keys_c in ((self.table_ND, self.keys_c), (self.momentum_ND, self.momentum_keys_c)):
            if stored is None:
                continue
            assert stored.dtype in _STORED, stored.dtype
            assert stored.shape == self.table_ND.shape, (stored.shape, self.table_ND.shape)
            assert stored.is_contiguous()
            if stored.dtype in LARGEST:
                assert keys_c is not None, f"{stored.dtype} needs keys to be rounded"
                assert keys_c.dtype == torch.int64
                assert keys_c.shape == self.rows_c.shape
                assert keys_c.is_contiguous()


@dataclass(frozen=True)
class RowGradients:
    """What the gradient by the logits of a row is: exp(logit - shift) * factor, and at the own class another number.

    Attributes:
        operand_VD: [V, D] float32 or bfloat16, contiguous: embeddings times the scale. The matrix products take
            operands of this dtype; their sums are float32.
        shift_V: [V] float32; +inf if a row has no negatives.
        factor_V: [V] float32.
        own_column_V: [V] int64, the place of the own class in the tile; -1 if it is not there.
        own_V: [V] float32, the gradient there.
    """

    operand_VD: Tensor
    shift_V: Tensor
    factor_V: Tensor
    own_column_V: Tensor
    own_V: Tensor

    def check(self) -> None:
        """Asserts shapes and dtypes."""
        assert self.operand_VD.dtype in (torch.float32, torch.bfloat16), self.operand_VD.dtype
        assert self.own_column_V.dtype == torch.int64, self.own_column_V.dtype
        for name in ("shift_V", "factor_V", "own_V"):
            assert getattr(self, name).dtype == torch.float32, (name, getattr(self, name).dtype)
        for name in ("shift_V", "factor_V", "own_column_V", "own_V"):
            assert getattr(self, name).shape == self.operand_VD.shape[:1], name
        assert all(value.is_contiguous() for value in vars(self).values())


@dataclass(frozen=True)
class SGDStep:
    """m <- momentum * m + (gradient + weight_decay * w), w <- w - learning_rate * m.

    Attributes:
        steps: [] bool, on the device; if false, nothing is written.
    """

    steps: Tensor
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def check(self, stored: StoredRows) -> None:
        """Asserts that there is a place for momentum."""
        assert self.steps.dtype == torch.bool
        assert self.steps.numel() == 1
        assert (stored.momentum_ND is not None) == (self.momentum != 0)


def second_pass_sgd_(stored: StoredRows, gradients: RowGradients, step: SGDStep) -> None:
    """Moves the rows of a tile, each of them read once and written once, and nothing of size [V, c] or [c, D] stored.

    A center is used divided by its length, as `unit_rows` does it. The gradient by it is that by its direction, less
    what goes along it, divided by the length. The step is that of an SGD with momentum and L2 weight decay, in float32;
    what is stored in 16 bits is rounded as `rounding` does it.
    """
    stored.check()
    gradients.check()
    step.check(stored)
    assert gradients.operand_VD.shape[1] == stored.table_ND.shape[1]
    if runs_in_triton(stored.table_ND):
        from partialfc.kernels._triton_second_pass import second_pass_sgd_triton_

        second_pass_sgd_triton_(stored, gradients, step)
    else:
        second_pass_sgd_twin_(stored, gradients, step)


def second_pass_sgd_twin_(stored: StoredRows, gradients: RowGradients, step: SGDStep) -> None:
    """As `second_pass_sgd_`, in plain torch; it waits for the device to learn which rows are there."""
    places = (stored.rows_c >= 0).nonzero()[:, 0]
    rows = stored.rows_c[places]
    center_cD = stored.table_ND[rows].float()
    direction_cD = _center_gradient(stored, gradients)[places].add_(center_cD, alpha=step.weight_decay)
    if stored.momentum_ND is not None:
        direction_cD.add_(stored.momentum_ND[rows].float(), alpha=step.momentum)
        _store_(stored.momentum_ND, rows, direction_cD, stored.momentum_keys_c, places, step.steps)
    center_cD.sub_(direction_cD, alpha=step.learning_rate)
    _store_(stored.table_ND, rows, center_cD, stored.keys_c, places, step.steps)


def _center_gradient(stored: StoredRows, gradients: RowGradients) -> Tensor:
    """[c, D] float32; rows that are not there have something in it."""
    c, D = len(stored.rows_c), stored.table_ND.shape[1]
    unit_cD = torch.empty(c, D, dtype=torch.float32, device=stored.table_ND.device)
    inverse_norm_c = torch.empty(c, dtype=torch.float32, device=stored.table_ND.device)
    load_unit_rows_twin_(unit_cD, inverse_norm_c, stored.table_ND, stored.rows_c)
    operand_dtype = gradients.operand_VD.dtype
    # Products of 16-bit operands are exact in float32, and so the sums are in float32 on every device.
    operand_VD = gradients.operand_VD.float()
    logits_Vc = operand_VD @ unit_cD.to(operand_dtype).float().T
    own_V1 = gradients.own_column_V[:, None]
    exponentials_twin_(logits_Vc, shift_V=gradients.shift_V, columns_VP=own_V1, factor_V=gradients.factor_V)
    if c:
        own_values_V1 = gradients.own_V[:, None].where(own_V1 >= 0, 0.0)
        logits_Vc.scatter_add_(1, own_V1.clamp(min=0), own_values_V1)
    gradient_cD = logits_Vc.to(operand_dtype).float().T @ operand_VD
    radial_c = torch.linalg.vecdot(gradient_cD, unit_cD)
    return gradient_cD.addcmul_(unit_cD, radial_c[:, None], value=-1).mul_(inverse_norm_c[:, None])


def _store_(
    table_ND: Tensor, rows: Tensor, values_cD: Tensor, keys_c: Tensor | None, places: Tensor, steps: Tensor
) -> None:
    """Replaces rows, unless there is no step."""
    stored_cD = values_cD
    if table_ND.dtype in LARGEST:
        assert keys_c is not None
        stored_cD = torch.empty(values_cD.shape, dtype=table_ND.dtype, device=table_ND.device)
        stochastic_round_twin_(stored_cD, values_cD, keys_c[places])
    table_ND[rows] = torch.where(steps, stored_cD, table_ND[rows])
