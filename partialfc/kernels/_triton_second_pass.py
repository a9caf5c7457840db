"""`second_pass` in Triton: a program has some rows and their gradients in registers, and goes over the batch."""

from __future__ import annotations

import triton
import triton.language as tl

from partialfc.kernels._triton_rounding import round_to
from partialfc.kernels._triton_unit_rows import inverse_norms
from partialfc.kernels.second_pass import RowGradients, SGDStep, StoredRows

__all__ = ["second_pass_sgd_triton_"]

# A matrix product takes 16 at least. Registers: 2 * 4 * BLOCK_C * D bytes and the logits; shared memory: the operands.
BLOCK_V = 32
BLOCK_C = 16
SMALLEST_BLOCK = 16
NUM_WARPS = 8
NUM_STAGES = 1


@triton.jit
def _logit_gradient_sums(
    unit: tl.tensor,  # [BLOCK_C, BLOCK_D] float32
    places: tl.tensor,  # [BLOCK_C] in the tile
    columns: tl.tensor,  # [BLOCK_D]
    operand_ptr: tl.tensor,  # [V, D]
    shift_ptr: tl.tensor,  # [V]
    factor_ptr: tl.tensor,  # [V]
    own_column_ptr: tl.tensor,  # [V] int64
    own_ptr: tl.tensor,  # [V]
    V: int,
    D: int,
    BLOCK_V: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_C, BLOCK_D], the gradient by the unit rows."""
    operand_type = operand_ptr.dtype.element_ty
    right = tl.trans(unit.to(operand_type))
    if WIDEN:
        right = right.to(tl.float32)
    total = tl.zeros_like(unit)
    for start in range(0, V, BLOCK_V):
        cases = start + tl.arange(0, BLOCK_V)
        inside = cases < V
        addresses = operand_ptr + cases.to(tl.int64)[:, None] * D + columns[None, :]
        operand = tl.load(addresses, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        if WIDEN:
            operand = operand.to(tl.float32)
        logits = tl.dot(operand, right, input_precision="ieee")
        # Cases beyond the batch have exp(-inf).
        shift = tl.load(shift_ptr + cases, mask=inside, other=float("inf"))
        factor = tl.load(factor_ptr + cases, mask=inside, other=0.0)
        own_column = tl.load(own_column_ptr + cases, mask=inside, other=-1)
        own = tl.load(own_ptr + cases, mask=inside, other=0.0)
        slopes = tl.exp(logits - shift[:, None]) * factor[:, None]
        slopes = tl.where(own_column[:, None] == places[None, :], own[:, None], slopes)
        left = tl.trans(slopes.to(operand_type))
        if WIDEN:
            left = left.to(tl.float32)
        total += tl.dot(left, operand, input_precision="ieee")
    return total


@triton.jit
def _stored(
    values: tl.tensor,
    keys_ptr: tl.tensor,
    places: tl.tensor,
    present: tl.tensor,
    columns: tl.tensor,
    TYPE: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_C, BLOCK_D] float32, rounded if the table is in 16 bits."""
    if TYPE == tl.float32:
        result = values
    else:
        keys = tl.load(keys_ptr + places, mask=present, other=0)
        result = round_to(values, keys[:, None], columns[None, :], TYPE)
    return result


@triton.jit
def _second_pass_kernel(
    table_ptr: tl.tensor,  # [N, D], IN and OUT
    momentum_ptr: tl.tensor,  # [N, D], IN and OUT, or anything
    rows_ptr: tl.tensor,  # [c] int64
    keys_ptr: tl.tensor,  # [c] int64
    momentum_keys_ptr: tl.tensor,  # [c] int64
    operand_ptr: tl.tensor,  # [V, D]
    shift_ptr: tl.tensor,  # [V]
    factor_ptr: tl.tensor,  # [V]
    own_column_ptr: tl.tensor,  # [V] int64
    own_ptr: tl.tensor,  # [V]
    steps_ptr: tl.tensor,  # [] bool
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    c: int,
    V: int,
    D: int,
    HAS_MOMENTUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    if tl.load(steps_ptr).to(tl.int32) == 0:
        return
    places = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.arange(0, BLOCK_D)
    rows = tl.load(rows_ptr + places, mask=places < c, other=-1)
    present = rows >= 0
    inside = present[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    center = tl.load(table_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    inverse = inverse_norms(center)
    unit = center * inverse[:, None]
    gradient = _logit_gradient_sums(
        unit, places, columns, operand_ptr, shift_ptr, factor_ptr, own_column_ptr, own_ptr, V, D, BLOCK_V, WIDEN
    )
    radial = tl.sum(gradient * unit, axis=1)
    direction = (gradient - unit * radial[:, None]) * inverse[:, None] + weight_decay * center
    if HAS_MOMENTUM:
        direction += momentum * tl.load(momentum_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        kept = _stored(direction, momentum_keys_ptr, places, present, columns, momentum_ptr.dtype.element_ty)
        tl.store(momentum_ptr + offsets, kept, mask=inside)
    moved = center - learning_rate * direction
    tl.store(
        table_ptr + offsets, _stored(moved, keys_ptr, places, present, columns, table_ptr.dtype.element_ty), mask=inside
    )


def second_pass_sgd_triton_(stored: StoredRows, gradients: RowGradients, step: SGDStep) -> None:
    """As `second_pass.second_pass_sgd_`."""
    c, (V, D) = len(stored.rows_c), gradients.operand_VD.shape
    if c == 0 or D == 0:
        return
    _second_pass_kernel[(triton.cdiv(c, BLOCK_C),)](
        stored.table_ND,
        stored.table_ND if stored.momentum_ND is None else stored.momentum_ND,
        stored.rows_c,
        stored.rows_c if stored.keys_c is None else stored.keys_c,
        stored.rows_c if stored.momentum_keys_c is None else stored.momentum_keys_c,
        gradients.operand_VD,
        gradients.shift_V,
        gradients.factor_V,
        gradients.own_column_V,
        gradients.own_V,
        step.steps,
        float(step.learning_rate),
        float(step.momentum),
        float(step.weight_decay),
        c,
        V,
        D,
        HAS_MOMENTUM=stored.momentum_ND is not None,
        BLOCK_C=BLOCK_C,
        BLOCK_V=BLOCK_V,
        BLOCK_D=max(SMALLEST_BLOCK, triton.next_power_of_2(D)),
        # Triton's interpreter multiplies the bits of bfloat16 operands as if they were integers.
        WIDEN=not gradients.operand_VD.is_cuda,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
