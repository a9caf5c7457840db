"""Randomness as a pure function of integer keys.

Everything random in this project (class centers, negative samples, data order, augmentation, synthetic images) is a
function of keys such as (seed, step, class id). So it does not depend on the number of ranks, workers or threads, it
needs no state to be checkpointed, and any element can be computed alone. The functions are our own integer
arithmetic, because the streams of library generators may change between versions.

This file is the floor of the package: every folder may import it, and it imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor

__all__ = ["KeyedPermutation", "hash64", "normal", "randint", "uniform"]

Word = TypeVar("Word", int, Tensor, int | Tensor)

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits as `value`."""
    return ((value + 2**63) % 2**64) - 2**63


def _shift_right(value: Word, bits: int) -> Word:
    """Logical shift: int64 shifts in torch and Python are arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Word) -> Word:
    """The SplitMix64 finalizer: a bijection of 64-bit integers. A tensor is changed in place."""
    if isinstance(value, Tensor):
        shifted = torch.empty_like(value)
        for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
            torch.bitwise_right_shift(value, bits, out=shifted)
            value.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1))
            if factor != 1:
                value.mul_(_signed(factor))
        return value
    value = _signed((value ^ _shift_right(value, 30)) * _MIX_1)
    value = _signed((value ^ _shift_right(value, 27)) * _MIX_2)
    return value ^ _shift_right(value, 31)


@overload
def hash64(*words: int) -> int: ...  # type: ignore[overload-overlap]
@overload
def hash64(*words: int | Tensor) -> Tensor: ...
def hash64(*words: int | Tensor) -> int | Tensor:
    """Hashes a tuple of 64-bit integers to one.

    Args:
        *words: Python integers (their low 64 bits count) or int64 tensors, broadcast against each other.

    Returns:
        An int if every word is an int, else an int64 tensor of the broadcast shape; the same bits either way.
    """
    state: int | Tensor = len(words)
    for word in words:
        state = _mix(state) ^ (word if isinstance(word, Tensor) else _signed(word))
        state += _signed(_GOLDEN_GAMMA)
        if not isinstance(state, Tensor):
            state = _signed(state)
    return _mix(state)


def uniform(*words: int | Tensor) -> Tensor:
    """Float64 numbers in [0, 1), one for each element of the broadcast words (see `hash64`)."""
    bits = torch.as_tensor(hash64(*words))
    return _shift_right(bits, 11).double() * 2.0**-53


def normal(*words: int | Tensor) -> Tensor:
    """Float64 standard normal numbers (Box-Muller), one for each element of the broadcast words (see `hash64`)."""
    radius = (-2.0 * torch.log1p(-uniform(*words, 0))).sqrt()
    return radius * torch.cos(2.0 * math.pi * uniform(*words, 1))


def randint(high: int, *words: int | Tensor) -> Tensor:
    """Int64 numbers in [0, high), one for each element of the broadcast words (see `hash64`)."""
    return _shift_right(torch.as_tensor(hash64(*words)), 1) % high


class KeyedPermutation:
    """A permutation of [0, size) for each key, evaluated element by element, and invertible.

    A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002) on pairs
    (left, right) in [0, a) x [0, b). Where size = a * b with a and b alike, that is the whole domain; for other sizes
    the domain is slightly larger and a value outside [0, size) is sent through again ("cycle walking").

    Args:
        size: the number of elements, at least 1.
        static: whether the number of times that values are sent through depends on the size alone, so that nothing
            is read back from a device. The elements are the same: that a walk is not at its end by then is impossible
            for sizes below 145, and beyond about as likely as 2^-64 for each element.

    Raises:
        ValueError: if size < 1.
    """

    def __init__(self, size: int, *, static: bool = False) -> None:
        if size < 1:
            raise ValueError(f"KeyedPermutation: size is {size}, but must be at least 1")
        self.size, self.static = size, static
        self.left_size, self.right_size = _feistel_domain(size)
        # Measured: pairs of elements are uniform (chi-square per degree 0.9 to 1.1) after 6 rounds, on tiny domains
        # after 12.
        self.rounds = 6 if size >= 64 else 12
        self.longest_walk = _longest_walk(self.left_size * self.right_size, size)

    def __call__(self, position: Tensor, key: int | Tensor) -> Tensor:
        """The elements at `position`: int64 in [0, size), any shape, broadcast against an int64 tensor of keys."""
        return self._walk(position, key, self._forward)

    def inverse(self, element: Tensor, key: int | Tensor) -> Tensor:
        """The positions of `element`: `inverse(self(p, key), key) == p`."""
        return self._walk(element, key, self._backward)

    def for_each_key(self, position_d: Tensor, key_c: Tensor) -> Tensor:
        """[c, d] int64: `self(position_d, key_c[:, None])`, with less work where many positions share a key.

        Args:
            position_d: [d] int64 in [0, size).
            key_c: [c] int64.
        """
        halves = max(self.left_size, self.right_size)
        if self.longest_walk or halves > len(position_d):
            return self(position_d, key_c[:, None])
        # What a round adds depends on the key and one half alone, and there are fewer halves than positions.
        half_h = torch.arange(halves, device=key_c.device)
        offset_r = torch.arange(1, self.rounds + 1, device=key_c.device) * _signed(_GOLDEN_GAMMA)
        added_crh = (key_c[:, None, None] ^ half_h).add(offset_r[:, None])
        if self.left_size == self.right_size:
            _mix_modulo_(added_crh, self.left_size)
        else:
            added_crh[:, 0::2] = _mix_modulo_(added_crh[:, 0::2].contiguous(), self.left_size)
            added_crh[:, 1::2] = _mix_modulo_(added_crh[:, 1::2].contiguous(), self.right_size)
        left, right = (half.expand(len(key_c), -1) for half in self._halves(position_d))
        for number, added_ch in enumerate(added_crh.unbind(1)):
            if number % 2 == 0:
                left = _modulo_(added_ch.gather(1, right).add_(left), self.left_size)
            else:
                right = _modulo_(added_ch.gather(1, left).add_(right), self.right_size)
        return (left * self.right_size).add_(right)

    def _walk(self, value: Tensor, key: int | Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        key_tensor = torch.as_tensor(key, dtype=torch.int64, device=value.device)
        value = step(value, key_tensor)
        if self.static:
            for _ in range(self.longest_walk):
                value = torch.where(value >= self.size, step(value, key_tensor), value)
        elif self.longest_walk:
            while bool((outside := value >= self.size).any()):
                value = torch.where(outside, step(value, key_tensor), value)
        return value

    def _forward(self, value: Tensor, key: Tensor) -> Tensor:
        left, right = self._halves(value)
        for number in range(self.rounds):
            if number % 2 == 0:
                left = _modulo_(self._round(right, key, number, self.left_size).add_(left), self.left_size)
            else:
                right = _modulo_(self._round(left, key, number, self.right_size).add_(right), self.right_size)
        return (left * self.right_size).add_(right)

    def _backward(self, value: Tensor, key: Tensor) -> Tensor:
        left, right = self._halves(value)
        for number in reversed(range(self.rounds)):
            if number % 2 == 0:
                left = _modulo_(self._round(right, key, number, self.left_size).neg_().add_(left), self.left_size)
            else:
                right = _modulo_(self._round(left, key, number, self.right_size).neg_().add_(right), self.right_size)
        return (left * self.right_size).add_(right)

    def _halves(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value // self.right_size, value % self.right_size

    @staticmethod
    def _round(half: Tensor, key: Tensor, number: int, modulus: int) -> Tensor:
        return _mix_modulo_((key ^ half).add_(_signed(_GOLDEN_GAMMA * (number + 1))), modulus)


def _modulo_(value: Tensor, modulus: int) -> Tensor:
    """`value % modulus` in place; without a division, which is most of the cost, where a mask does."""
    return value.bitwise_and_(modulus - 1) if modulus & (modulus - 1) == 0 else value.remainder_(modulus)


def _mix_modulo_(value: Tensor, modulus: int) -> Tensor:
    """`_shift_right(_mix(value), 1) % modulus` in place."""
    value = _mix(value).bitwise_right_shift_(1)
    # A power of two takes the low bits alone, which an arithmetic shift has right.
    return _modulo_(value if modulus & (modulus - 1) == 0 else value.bitwise_and_((1 << 63) - 1), modulus)


def _longest_walk(domain: int, size: int) -> int:
    """How often a value may have to be sent through again: as often as there are values outside [0, size), at most.

    Where that is many, it is cut to where a walk through a random permutation ends but for a probability of 2^-64.
    """
    outside = domain - size
    return min(outside, math.ceil(64 / math.log2(domain / outside))) if outside else 0


def _feistel_domain(size: int) -> tuple[int, int]:
    """(a, b) with a * b >= size: a factorisation of size if a balanced one exists, else the next square."""
    root = math.isqrt(size)
    for right in range(root, max(1, root // 2), -1):
        if size % right == 0:
            return size // right, right
    side = root if root * root == size else root + 1
    return side, side
