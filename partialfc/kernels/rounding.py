"""Rounding to 16 bits at random, so that what is stored is right in the mean.

A number between two 16-bit neighbours goes to one of them, to the upper one with a probability that is the share of the
gap below it. The random bits of an element are a function of the key of its row and of its column, and of nothing else.

Shapes: c rows of a tile, D row length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.kernels.dispatch import runs_in_triton

__all__ = [
    "COLUMN_WORD",
    "FIRST_MULTIPLIER",
    "FLOAT16_FACTOR_BITS",
    "FLOAT16_GRID_BITS",
    "LARGEST",
    "random_bits",
    "stochastic_round_",
]

# Elements that the twin takes at a time: its scratch then stays in the cache.
CHUNK_ELEMENTS = 1 << 18

# Odd and below 2**31, so that they are int32 everywhere: digits of the square roots of 2 and of 5.
COLUMN_WORD = 0x6A09E667
FIRST_MULTIPLIER = 0x3C6EF373

LARGEST = {torch.float16: 65504.0, torch.bfloat16: (2.0 - 2.0**-7) * 2.0**127}

# float16 has 11 significant bits; with the sign, 19 more fit into an int32, and one sum of two such numbers.
FLOAT16_GRID_BITS = 19
# Less exponent bits of float32, this is the exponent bits of 2**19 / gap. It is written as the int32 to which it wraps.
FLOAT16_FACTOR_BITS = ((127 + 127 + 10 + FLOAT16_GRID_BITS) << 23) - (1 << 32)


def stochastic_round_(out_cD: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    """Writes `values_cD` to `out_cD`, each number rounded to one of its two 16-bit neighbours.

    A number that 16 bits hold exactly stays as it is. A finite one beyond the largest 16-bit number becomes that; nan
    and infinities stay. The mean over keys is the number itself; only in float16, bits below 2**-43 are cut off first.

    Args:
        out_cD: [c, D] float16 or bfloat16, contiguous; written.
        values_cD: [c, D] float32, contiguous.
        keys_c: [c] int64, a hash for each row (`keyed.hash64`). Where two quantities of one row are rounded, each needs
            keys of its own, or their errors go together.
    """
    _check(out_cD, values_cD, keys_c)
    if runs_in_triton(values_cD):
        from partialfc.kernels._triton_rounding import stochastic_round_triton_

        stochastic_round_triton_(out_cD, values_cD, keys_c)
    else:
        stochastic_round_twin_(out_cD, values_cD, keys_c)


def _check(out_cD: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    assert out_cD.dtype in LARGEST, out_cD.dtype
    assert values_cD.dtype == torch.float32, values_cD.dtype
    assert keys_c.dtype == torch.int64, keys_c.dtype
    assert out_cD.shape == values_cD.shape, (out_cD.shape, values_cD.shape)
    assert keys_c.shape == values_cD.shape[:1], (keys_c.shape, values_cD.shape)
    assert out_cD.is_contiguous()
    assert values_cD.is_contiguous()
    assert keys_c.is_contiguous()


def stochastic_round_twin_(out_cD: Tensor, values_cD: Tensor, keys_c: Tensor) -> None:
    """As `stochastic_round_`, in plain torch."""
    round_rows_ = _to_float16_ if out_cD.dtype == torch.float16 else _to_bfloat16_
    rows = max(1, CHUNK_ELEMENTS // max(1, values_cD.shape[1]))
    parts = zip(out_cD.split(rows), values_cD.split(rows), keys_c.split(rows), strict=True)
    for out, values, keys in parts:
        round_rows_(out, values, keys)
        # Not finite is rare; a sum sees it without a mask, and where it overflows the answer is the same, only slower.
        if not values.sum().isfinite():
            torch.where(values.isfinite(), out, values.to(out.dtype), out=out)


def random_bits(keys_c: Tensor, columns: int) -> Tensor:
    """[c, columns] int32 from 0 to 2**31 - 1: 31 random bits for each element of rows with these keys [c] int64.

    A product with a word of the row and one round of mixing; the words of the row are taken to be good hashes already.
    Shifts are arithmetic, as int32 has no other, so each loses the top bit; the other 31 stay uniform.
    """
    words = keys_c.contiguous().view(torch.int32).view(-1, 2)
    low, high = words[:, :1], words[:, 1:]
    column_words = torch.arange(columns, dtype=torch.int32, device=keys_c.device).mul_(COLUMN_WORD)
    bits = torch.bitwise_xor(low, column_words).mul_(high | 1)
    shifted = bits >> 15
    bits.bitwise_xor_(shifted).mul_(FIRST_MULTIPLIER)
    torch.bitwise_right_shift(bits, 16, out=shifted)
    return bits.bitwise_xor_(shifted)


def _to_bfloat16_(out: Tensor, values: Tensor, keys: Tensor) -> None:
    """As the upper half of float32: adds up to a gap to the bits and cuts, at denormal numbers just so."""
    bits = random_bits(keys, values.shape[1]).bitwise_and_(0xFFFF)
    largest = LARGEST[torch.bfloat16]
    bits.add_(values.clamp(-largest, largest).view(torch.int32)).bitwise_and_(-0x10000)
    out.copy_(bits.view(torch.float32))


def _to_float16_(out: Tensor, values: Tensor, keys: Tensor) -> None:
    """In units of the gap, as fixed-point numbers: then the denormal numbers of float16 are nothing special.

    The gap is a power of 2, made from the exponent bits of the number; below 2**-14 it is 2**-24.
    """
    exponent = (values.view(torch.int32) & 0x7F800000).clamp_(113 << 23, 142 << 23)
    factor = torch.rsub(exponent, FLOAT16_FACTOR_BITS).view(torch.float32)
    fixed = values.clamp(-LARGEST[torch.float16], LARGEST[torch.float16]).mul_(factor).to(torch.int32)
    fixed.add_(random_bits(keys, values.shape[1]).bitwise_and_((1 << FLOAT16_GRID_BITS) - 1))
    steps = factor.copy_(fixed.bitwise_right_shift_(FLOAT16_GRID_BITS))
    out.copy_(steps.mul_(exponent.sub_(10 << 23).view(torch.float32)))
