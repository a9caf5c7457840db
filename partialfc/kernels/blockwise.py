"""Numbers in 8 bits, by blocks of a row: an integer from -127 to 127 for each, times a scale of the block.

Shapes: c rows of a tile, D row length, S blocks of a row, the last of which may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.kernels.dispatch import runs_in_triton
from partialfc.kernels.rounding import CHUNK_ELEMENTS, random_bits

__all__ = ["BLOCK", "LARGEST_CODE", "SMALLEST", "dequantize_", "num_scales", "quantize_"]

BLOCK = 64
LARGEST_CODE = 127

# A block with nothing larger becomes zero: the scales of still smaller ones would have few bits left, and the
# reciprocal of a scale could be infinite.
SMALLEST = 2.0**-100


def num_scales(row_length: int) -> int:
    """S, the blocks of a row of that length."""
    return -(-row_length // BLOCK)


def quantize_(codes_cD: Tensor, scales_cS: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    """Writes `values_cD` as codes and scales, rounded at random, so that what is read back is right in the mean.

    The scale of a block is its largest absolute value / 127. Zeros stay zeros, and blocks with nothing above 2**-100
    become zeros. A block with nan or infinity has codes 0 and scale nan, and reads back as nan.

    The Triton version gives the same codes and scales: division and rounding are those of IEEE in both, and no sum
    depends on an order.

    Args:
        codes_cD: [c, D] int8, contiguous; written.
        scales_cS: [c, S] float32, contiguous; written.
        values_cD: [c, D] float32, contiguous.
        keys_c: [c] int64, a hash for each row, of its own for each quantity, as in `rounding.stochastic_round_`.
    """
    _check(codes_cD, scales_cS, values_cD)
    assert keys_c.dtype == torch.int64, keys_c.dtype
    assert keys_c.shape == values_cD.shape[:1], (keys_c.shape, values_cD.shape)
    assert keys_c.is_contiguous()
    if runs_in_triton(values_cD):
        from partialfc.kernels._triton_blockwise import quantize_triton_

        quantize_triton_(codes_cD, scales_cS, values_cD, keys_c)
    else:
        quantize_twin_(codes_cD, scales_cS, values_cD, keys_c)


def dequantize_(out_cD: Tensor, codes_cD: Tensor, scales_cS: Tensor) -> None:
    """Writes the numbers that codes and scales stand for: code * scale of the block.

    Args:
        out_cD: [c, D] float32, contiguous; written.
        codes_cD: [c, D] int8, contiguous.
        scales_cS: [c, S] float32, contiguous.
    """
    _check(codes_cD, scales_cS, out_cD)
    if runs_in_triton(out_cD):
        from partialfc.kernels._triton_blockwise import dequantize_triton_

        dequantize_triton_(out_cD, codes_cD, scales_cS)
    else:
        dequantize_twin_(out_cD, codes_cD, scales_cS)


def _check(codes_cD: Tensor, scales_cS: Tensor, values_cD: Tensor) -> None:
    assert codes_cD.dtype == torch.int8, codes_cD.dtype
    assert scales_cS.dtype == torch.float32, scales_cS.dtype
    assert values_cD.dtype == torch.float32, values_cD.dtype
    assert codes_cD.shape == values_cD.shape, (codes_cD.shape, values_cD.shape)
    assert scales_cS.shape == (len(values_cD), num_scales(values_cD.shape[1])), (scales_cS.shape, values_cD.shape)
    assert codes_cD.is_contiguous()
    assert scales_cS.is_contiguous()
    assert values_cD.is_contiguous()


def _full_and_last(row_length: int) -> list[tuple[slice, slice, int]]:
    """(columns, scales, width) of the full blocks of a row, and of the shorter last one; only what there is."""
    full = row_length // BLOCK
    parts = [(slice(0, full * BLOCK), slice(0, full), BLOCK)] if full else []
    if row_length % BLOCK:
        parts.append((slice(full * BLOCK, row_length), slice(full, full + 1), row_length % BLOCK))
    return parts


def quantize_twin_(codes_cD: Tensor, scales_cS: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    """As `quantize_`, in plain torch."""
    D = values_cD.shape[1]
    rows = max(1, CHUNK_ELEMENTS // max(1, D))
    split = (tensor.split(rows) for tensor in (codes_cD, scales_cS, values_cD, keys_c))
    for codes, scales, values, keys in zip(*split, strict=True):
        # The random bits as numbers from -1/2 to 1/2.
        shift = random_bits(keys, D).to(torch.float32).mul_(2.0**-31).sub_(0.5)
        for columns, blocks, width in _full_and_last(D):
            code, value, part = (matrix[:, columns].unflatten(1, (-1, width)) for matrix in (codes, values, shift))
            _quantize_blocks_(code, scales[:, blocks, None], value, part)


def _quantize_blocks_(codes: Tensor, scales: Tensor, values: Tensor, shift: Tensor) -> None:
    """For blocks [c, S, width] with scales [c, S, 1]; overwrites the shift."""
    largest = values.abs().amax(-1, keepdim=True)
    filled, finite = largest > SMALLEST, largest.isfinite()
    used = (largest / LARGEST_CODE).where(filled & finite, 1.0)
    rounded = shift.add_(values * used.reciprocal()).round_()
    # The largest value times a rounded reciprocal may come out a little above 127.
    rounded.clamp_(-LARGEST_CODE, LARGEST_CODE).masked_fill_(~(filled & finite), 0.0)
    codes.copy_(rounded)
    scales.copy_(used.where(filled, 0.0).where(finite, torch.nan))


def dequantize_twin_(out_cD: Tensor, codes_cD: Tensor, scales_cS: Tensor) -> None:
    """As `dequantize_`, in plain torch."""
    out_cD.copy_(codes_cD)
    for columns, blocks, width in _full_and_last(out_cD.shape[1]):
        out_cD[:, columns].unflatten(1, (-1, width)).mul_(scales_cS[:, blocks, None])
