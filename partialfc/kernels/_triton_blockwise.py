"""`blockwise` in Triton. The arithmetic is that of the twin, so codes and scales are the same."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from partialfc.kernels._triton_rounding import random_bits
from partialfc.kernels.blockwise import BLOCK, LARGEST_CODE, SMALLEST

__all__ = ["dequantize_triton_", "quantize_triton_"]

MAX_BLOCKS_OF_PROGRAM = 16

_BLOCK = tl.constexpr(BLOCK)
_LARGEST_CODE = tl.constexpr(LARGEST_CODE)
_SMALLEST = tl.constexpr(SMALLEST)
# Added and taken away again, it leaves a small float32 rounded to an integer, half to even, as torch.round does.
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _quantize_kernel(
    codes_ptr: tl.tensor,  # [c, D] int8, OUT
    scales_ptr: tl.tensor,  # [c, S] float32, OUT
    values_ptr: tl.tensor,  # [c, D] float32
    keys_ptr: tl.tensor,  # [c] int64
    D: int,
    S: int,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = columns < D
    values = tl.load(values_ptr + row * D + columns, mask=inside, other=0.0)
    # Bits of absolute values are ordered as these are, and infinity and nan are the largest: a maximum misses neither.
    largest_bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = largest_bits.to(tl.float32, bitcast=True)
    finite = largest_bits < 0x7F800000
    filled = finite & (largest > _SMALLEST)
    used = tl.where(filled, tl.div_rn(tl.where(filled, largest, 1.0), _LARGEST_CODE * 1.0), 1.0)
    inverse = tl.div_rn(used * 0.0 + 1.0, used)
    shift = random_bits(tl.load(keys_ptr + row), columns).to(tl.float32) * 2.0**-31 - 0.5
    shifted = shift + tl.where(filled[:, None], values, 0.0) * inverse[:, None]
    rounded = (shifted + _TO_INTEGER) - _TO_INTEGER
    rounded = tl.minimum(tl.maximum(rounded, -_LARGEST_CODE * 1.0), _LARGEST_CODE * 1.0)
    codes = tl.where(filled[:, None], rounded, 0.0).to(tl.int8)
    tl.store(codes_ptr + row * D + columns, codes, mask=inside)
    scales = tl.where(filled, used, tl.where(finite, 0.0, float("nan")))
    tl.store(scales_ptr + row * S + blocks, scales, mask=blocks < S)


@triton.jit
def _dequantize_kernel(
    out_ptr: tl.tensor,  # [c, D] float32, OUT
    codes_ptr: tl.tensor,  # [c, D] int8
    scales_ptr: tl.tensor,  # [c, S] float32
    D: int,
    S: int,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = columns < D
    codes = tl.load(codes_ptr + row * D + columns, mask=inside, other=0).to(tl.float32)
    scales = tl.load(scales_ptr + row * S + blocks, mask=blocks < S, other=0.0)
    tl.store(out_ptr + row * D + columns, codes * scales[:, None], mask=inside)


def quantize_triton_(codes_cD: Tensor, scales_cS: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    """As `blockwise.quantize_`."""
    if codes_cD.numel():
        (c, D), S = codes_cD.shape, scales_cS.shape[1]
        blocks = min(MAX_BLOCKS_OF_PROGRAM, triton.next_power_of_2(S))
        grid = (c, triton.cdiv(S, blocks))
        # A product and a sum in one instruction would round once, where the twin rounds twice.
        options = {"BLOCKS": blocks, "enable_fp_fusion": False}
        _quantize_kernel[grid](codes_cD, scales_cS, values_cD, keys_c, D, S, **options)


def dequantize_triton_(out_cD: Tensor, codes_cD: Tensor, scales_cS: Tensor) -> None:
    """As `blockwise.dequantize_`."""
    if out_cD.numel():
        (c, D), S = codes_cD.shape, scales_cS.shape[1]
        blocks = min(MAX_BLOCKS_OF_PROGRAM, triton.next_power_of_2(S))
        _dequantize_kernel[c, triton.cdiv(S, blocks)](out_cD, codes_cD, scales_cS, D, S, BLOCKS=blocks)
