"""`rounding` in Triton. The arithmetic is that of the twin, so the bits are the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from partialfc.kernels.rounding import (
    COLUMN_WORD,
    FIRST_MULTIPLIER,
    FLOAT16_FACTOR_BITS,
    FLOAT16_GRID_BITS,
    LARGEST,
)

__all__ = ["random_bits", "round_to", "stochastic_round_triton_"]

MAX_BLOCK_COLUMNS = 1024

_COLUMN_WORD = tl.constexpr(COLUMN_WORD)
_FIRST_MULTIPLIER = tl.constexpr(FIRST_MULTIPLIER)
_FACTOR_BITS = tl.constexpr(FLOAT16_FACTOR_BITS)
_GRID_BITS = tl.constexpr(FLOAT16_GRID_BITS)
_GRID_MASK = tl.constexpr((1 << FLOAT16_GRID_BITS) - 1)
_LARGEST_FLOAT16 = tl.constexpr(LARGEST[torch.float16])
_LARGEST_BFLOAT16 = tl.constexpr(LARGEST[torch.bfloat16])


@triton.jit
def random_bits(keys: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """31 random bits of elements with these keys (int64) and columns (int32), which broadcast; see the twin."""
    bits = (keys.to(tl.int32) ^ (columns * _COLUMN_WORD)) * ((keys >> 32).to(tl.int32) | 1)
    bits = (bits ^ (bits >> 15)) * _FIRST_MULTIPLIER
    return bits ^ (bits >> 16)


@triton.jit
def round_to(values: tl.tensor, keys: tl.tensor, columns: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 values, rounded to tl.float16 or tl.bfloat16 with the random bits of keys and columns."""
    bits = values.to(tl.int32, bitcast=True)
    # Comparisons of bits, because compilers may take x == x for true.
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    if DTYPE == tl.float16:
        safe = tl.where(finite, values, 0.0)
        safe = tl.minimum(tl.maximum(safe, -_LARGEST_FLOAT16), _LARGEST_FLOAT16)
        exponent = tl.minimum(tl.maximum(bits & 0x7F800000, 113 << 23), 142 << 23)
        factor = (-exponent + _FACTOR_BITS).to(tl.float32, bitcast=True)
        fixed = (safe * factor).to(tl.int32) + (random_bits(keys, columns) & _GRID_MASK)
        steps = (fixed >> _GRID_BITS).to(tl.float32) * (exponent - (10 << 23)).to(tl.float32, bitcast=True)
        rounded = tl.where(finite, steps, values).to(tl.float16)
    else:
        safe = tl.minimum(tl.maximum(tl.where(finite, values, 0.0), -_LARGEST_BFLOAT16), _LARGEST_BFLOAT16)
        cut = safe.to(tl.int32, bitcast=True) + (random_bits(keys, columns) & 0xFFFF)
        # The upper half itself, and not a conversion, which may lose denormal numbers. A nan keeps a bit that is not 0.
        kept = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, bits)
        rounded = (tl.where(finite, cut, kept) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded


@triton.jit
def _round_kernel(
    out_ptr: tl.tensor,  # [c, D] float16 or bfloat16, OUT
    values_ptr: tl.tensor,  # [c, D] float32
    keys_ptr: tl.tensor,  # [c] int64
    D: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    values = tl.load(values_ptr + row * D + columns, mask=inside, other=0.0)
    rounded = round_to(values, tl.load(keys_ptr + row), columns, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + columns, rounded, mask=inside)


def stochastic_round_triton_(out_cD: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    """As `rounding.stochastic_round_`."""
    c, D = values_cD.shape
    if out_cD.numel() == 0:
        return
    block = min(MAX_BLOCK_COLUMNS, triton.next_power_of_2(D))
    _round_kernel[c, triton.cdiv(D, block)](out_cD, values_cD, keys_c, D, BLOCK=block)
