"""Which sample is seen when, if some samples come more often than others: sampling weights, and repeats of the rare."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from partialfc.data.joined import Column
from partialfc.data.plan import Draws, SamplePlan, check_positions
from partialfc.keyed import hash64

__all__ = ["RepeatPlan", "WeightedPlan"]

_OFFSET = 21
_BLOCK = 128  # Samples whose units have one sum in memory: 1/16 byte a sample, and 1 KB to look at for a position.
_AT_ONCE = 1 << 18  # Samples of a pass over all; a multiple of _BLOCK.
_VIRTUAL_SHARD = 4096
_REPEAT_BIT = 40  # Above any epoch.
_TOTAL_BITS = 61  # Of the units of all samples, so that sums of two stay below 2^63.
_MOST_SLOTS = 2**31  # So that products of two slot numbers do, too.


class _SlotPlan(ABC):
    """An epoch as slots in the order of the samples, of which a sample has as many as its units are worth.

    With N samples of u_i units, U in all, and S slots, slot t stands at (t * U + offset) / S on a line on which the
    samples lie one after the other, each as long as its units. The offset, in [0, U), is drawn for each epoch: this is
    systematic sampling, and a sample has floor or ceil(S * u_i / U) slots. All of it is integer arithmetic.

    Slots are visited in the order of a `SamplePlan`. As they follow the samples, reads stay as local as they are there.
    """

    num_samples: int
    lanes: int

    def __init__(self, num_samples: int, *, seed: int, lanes: int, window: int, num_slots: int | None) -> None:
        """Lays out the slots; `num_slots` is None for one slot a unit."""
        self._stored, self._seed = num_samples, seed
        sums = []
        for start in range(0, num_samples, _AT_ONCE):
            units = self._units(np.arange(start, min(start + _AT_ONCE, num_samples)))
            sums.append(np.add.reduceat(units, np.arange(0, len(units), _BLOCK)))
        self._block_ends = torch.from_numpy(np.concatenate(sums)).cumsum(0)
        self._total = int(self._block_ends[-1])
        self._keeps_offset = num_slots is None
        self.num_samples = self._total if num_slots is None else num_slots
        if self.num_samples > _MOST_SLOTS:
            raise ValueError(
                f"{type(self).__name__}: an epoch of {self.num_samples} samples, but at most {_MOST_SLOTS} are possible"
            )
        full, rest = divmod(self.num_samples, _VIRTUAL_SHARD)
        self._slots = SamplePlan([_VIRTUAL_SHARD] * full + [rest], seed=seed, lanes=lanes, window=window)
        self.lanes = self._slots.lanes

    @abstractmethod
    def _units(self, ids: np.ndarray) -> np.ndarray:
        """The units of some samples: int64, not negative, of the shape of `ids`."""

    def draw(self, stream_positions: Tensor) -> Draws:
        """The samples at some stream positions, and their visits: the epoch + 2^40 times the repeat within the epoch.

        Args:
            stream_positions: int64, not negative, any shape and order; position p of epoch e is e * num_samples + p.

        Raises:
            ValueError: if a position is negative.
        """
        positions = torch.as_tensor(stream_positions, dtype=torch.int64)
        check_positions(positions, type(self).__name__)
        slots, epochs = (drawn.flatten() for drawn in self._slots.draw(positions))
        offsets = torch.zeros_like(slots)
        for epoch in [] if self._keeps_offset else epochs.unique().tolist():
            offsets[epochs == epoch] = (hash64(self._seed, _OFFSET, epoch) % 2**64) * self._total >> 64
        # Where the slots stand, as a whole number and a rest: t * U itself may exceed 64 bits.
        step, fraction = divmod(self._total, self.num_samples)
        parts = slots * fraction + offsets
        points, rests = slots * step + parts // self.num_samples, parts % self.num_samples
        ids, starts = self._samples_at(points)
        repeats = self._whole_steps(points - starts, rests)
        return Draws(ids.view(positions.shape), (epochs + (repeats << _REPEAT_BIT)).view(positions.shape))

    def _samples_at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that points [b] of the line lie in, and where these begin."""
        blocks = torch.searchsorted(self._block_ends, points, right=True)
        block_starts = torch.where(blocks > 0, self._block_ends[blocks - 1], 0)
        ids = blocks[:, None] * _BLOCK + torch.arange(_BLOCK)
        units = torch.from_numpy(self._units(ids.clamp(max=self._stored - 1).numpy()))
        ends = units.masked_fill_(ids >= self._stored, 0).cumsum(1)
        within = points - block_starts
        # "right" steps over samples without a unit, whose end equals the end before them.
        places = torch.searchsorted(ends, within[:, None], right=True)
        starts = block_starts + (ends - units).gather(1, places).squeeze(1)
        return (blocks * _BLOCK + places.squeeze(1)), starts

    def _whole_steps(self, distances: Tensor, rests: Tensor) -> Tensor:
        """floor((distance * S + rest) / U): how many slots of the same sample lie before a slot."""
        estimate = (distances.double() * self.num_samples / self._total).long()
        # The estimate is off by one at most, so what remains fits 64 bits, though the products may not: they wrap.
        remains = distances * self.num_samples + rests - estimate * self._total
        return estimate + (remains >= self._total).long() - (remains < 0).long()


class WeightedPlan(_SlotPlan):
    """Samples drawn in proportion to their weights, in epochs as long as the data.

    Sample i comes floor or ceil(N * w_i / sum of w) times in each of the epochs, N * w_i / sum of w in the mean over
    them. Weights count to 2^-61 of N times the largest. Reads of weights are local, as those of samples are.

    Args:
        weights: float32 [N], finite, not negative, and some positive.
        seed: key of the order.
        lanes: number of places of the data set that are read side by side.
        window: samples of a lane that are shuffled together.

    Attributes:
        num_samples: N, stream positions of an epoch.
        lanes: position p belongs to lane p mod lanes, as in `SamplePlan`.

    Raises:
        ValueError: if a weight is not allowed, there is none, or there are more than 2^31.
    """

    def __init__(self, weights: Column, *, seed: int, lanes: int = 64, window: int = 65536) -> None:
        self._weights = weights
        # A power of two: units are the weights themselves, but for bits far behind the point.
        exponent = math.frexp(_largest_weight(weights))[1]
        self._scale_exponent = _TOTAL_BITS - exponent - len(weights).bit_length()
        super().__init__(len(weights), seed=seed, lanes=lanes, window=window, num_slots=len(weights))

    def _units(self, ids: np.ndarray) -> np.ndarray:
        weights = np.asarray(self._weights[ids], dtype=np.float64)
        return np.rint(np.ldexp(weights, self._scale_exponent)).astype(np.int64)


class RepeatPlan(_SlotPlan):
    """Every sample once an epoch, but those of rare identities several times.

    The samples of an identity with n < at_least of them come ceil(at_least / n) times in each epoch, exactly, which
    makes an epoch longer.

    Args:
        labels: int64 [N].
        label_starts: int64 [C + 1], as in `ShardIndex`: label c has label_starts[c + 1] - label_starts[c] samples.
        at_least: samples an identity shall have in an epoch, repeats counted.
        seed: key of the order.
        lanes: number of places of the data set that are read side by side.
        window: samples of a lane, repeats counted, that are shuffled together.

    Attributes:
        num_samples: stream positions of an epoch: samples and their repeats.
        lanes: position p belongs to lane p mod lanes, as in `SamplePlan`.

    Raises:
        ValueError: if at_least is below 1, there is no sample, or an epoch would exceed 2^31 samples.
    """

    def __init__(
        self,
        labels: Column,
        label_starts: Column,
        *,
        at_least: int,
        seed: int,
        lanes: int = 64,
        window: int = 65536,
    ) -> None:
        if at_least < 1 or len(labels) == 0:
            raise ValueError(
                f"RepeatPlan: at_least is {at_least} and there are {len(labels)} samples, but both must be at least 1"
            )
        self._labels, self._label_starts, self._at_least = labels, label_starts, at_least
        super().__init__(len(labels), seed=seed, lanes=lanes, window=window, num_slots=None)

    def _units(self, ids: np.ndarray) -> np.ndarray:
        labels = np.asarray(self._labels[ids], dtype=np.int64)
        counts = self._label_starts[labels + 1] - self._label_starts[labels]
        return np.asarray(-(-self._at_least // counts), dtype=np.int64)


def _largest_weight(weights: Column) -> float:
    """The largest weight, after a look at all of them.

    Raises:
        ValueError: if one is not allowed, or none is positive.
    """
    largest = 0.0
    for start in range(0, len(weights), _AT_ONCE):
        piece = np.asarray(weights[start : start + _AT_ONCE])
        wrong = np.flatnonzero(~(np.isfinite(piece) & (piece >= 0)))
        if len(wrong):
            raise ValueError(
                f"WeightedPlan: the weight of sample {start + wrong[0]} is {piece[wrong[0]]}, but must be finite "
                "and not negative; 0 leaves a sample out"
            )
        largest = max(largest, float(piece.max()))
    if largest == 0.0:
        raise ValueError(f"WeightedPlan: none of the {len(weights)} weights is positive, so there is nothing to draw")
    return largest
