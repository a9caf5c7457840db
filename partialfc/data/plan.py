"""Which sample is seen when: the order of the data as a pure function of (seed, position).

Epochs are laid end to end in one endless stream. Position p of epoch e is stream position e * num_samples + p, and a
global batch is the interval [consumed, consumed + global_batch), sorted by lane and cut into slices over the ranks. So
the whole state of a loader is the integer `consumed`, every rank makes the same number of steps, and a run may go on
with another number of ranks, another batch size or other workers: still each sample comes exactly once an epoch.

Within an epoch the data shards are laid one after the other in a keyed order (beyond 512 of them, in runs of
neighbours). That sequence is cut into `lanes` of equal length (they do not depend on the number of ranks), and each
lane into windows, permuted by a keyed bijection. Position p belongs to lane p mod lanes. A batch thus mixes samples of
all lanes, which lie far apart, while the reads of a lane stay within a window, and those of a rank within its lanes.
Nothing grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["Draws", "Plan", "RankSteps", "SamplePlan", "rank_slice"]

_SHARD_ORDER, _WINDOW_ORDER = 1, 2
_MOST_RUNS = 512  # of neighbouring data shards that change places: enough to mix, and a table that is quick to make


class Draws(NamedTuple):
    """What some stream positions hold.

    Attributes:
        ids: int64, sample ids.
        visits: int64 of the same shape, how often the sample was drawn before: with the id, the key of augmentation.
    """

    ids: Tensor
    visits: Tensor


class Plan(Protocol):
    """Which sample is seen when: a pure function of the stream position.

    Attributes:
        num_samples: stream positions of an epoch.
        lanes: places of the data set that are read side by side; position p belongs to lane p mod lanes.
    """

    num_samples: int
    lanes: int

    def draw(self, stream_positions: Tensor) -> Draws:
        """What int64 positions of any shape hold, each independently of the others.

        Raises:
            ValueError: if a position is negative.
        """


def rank_slice(consumed: int, global_batch: int, *, rank: int, world_size: int) -> range:
    """The stream positions of one rank in the global batch [consumed, consumed + global_batch).

    The slices of all ranks, one after the other, are the batch; their lengths differ by at most one.

    Args:
        consumed: stream position of the first sample of the batch: the number of samples consumed before it.
        global_batch: samples in the batch over all ranks.
        rank: the rank, in [0, world_size).
        world_size: number of ranks.

    Raises:
        ValueError: for a negative `consumed` or `global_batch`, or a rank outside [0, world_size).
    """
    if consumed < 0 or global_batch < 0:
        raise ValueError(
            f"rank_slice: consumed={consumed} and global_batch={global_batch}, but neither may be negative"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank_slice: rank is {rank}, but must be in [0, {world_size}) for world_size {world_size}")
    return range(
        consumed + global_batch * rank // world_size,
        consumed + global_batch * (rank + 1) // world_size,
    )


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """What one rank holds at each step: its slice of the global batch [consumed + step * global_batch, ...).

    The positions of a batch are sorted by lane before they are cut, so that a rank keeps reading the same lanes. The
    slices of all ranks, one after the other, are the same sequence whatever their number.

    Attributes:
        plan: the order of the samples.
        global_batch: samples of a step over all ranks, at least 1.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        consumed: samples of the stream consumed before the first step.
        num_batches: number of steps.

    Raises:
        ValueError: for a number out of its range.
    """

    plan: Plan
    global_batch: int
    rank: int
    world_size: int
    consumed: int
    num_batches: int

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.num_batches < 0:
            raise ValueError(
                f"RankSteps: global_batch={self.global_batch} must be at least 1, and num_batches={self.num_batches} "
                "not negative"
            )
        rank_slice(self.consumed, self.global_batch, rank=self.rank, world_size=self.world_size)

    def __len__(self) -> int:
        return self.num_batches

    def positions(self, step: int) -> Tensor:
        """[b] int64, the stream positions of a step."""
        start = self.consumed + step * self.global_batch
        batch = torch.arange(start, start + self.global_batch)
        batch = batch[(batch % self.plan.num_samples % self.plan.lanes).argsort(stable=True)]
        part = rank_slice(0, self.global_batch, rank=self.rank, world_size=self.world_size)
        return batch[part.start : part.stop]

    def draws(self, step: int) -> Draws:
        """[b] each: the samples of a step, and how often they were drawn before."""
        return self.plan.draw(self.positions(step))


class SamplePlan:
    """The order in which samples are seen.

    Args:
        shard_sizes: number of samples of each data shard, in index order. Empty shards are allowed.
        seed: key of the order.
        lanes: number of places of the data set that are read side by side.
        window: samples of a lane that are shuffled together.

    Raises:
        ValueError: for a negative shard size, no sample at all, or lanes or window below 1.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, lanes: int = 64, window: int = 65536) -> None:
        sizes = torch.as_tensor(np.asarray(shard_sizes, dtype=np.int64))
        if sizes.numel() == 0 or bool((sizes < 0).any()) or int(sizes.sum()) == 0:
            raise ValueError(
                f"SamplePlan: {sizes.numel()} data shards hold {int(sizes.sum())} samples, smallest shard "
                f"{int(sizes.min()) if sizes.numel() else None}; needed: at least 1 sample and no negative size"
            )
        if lanes < 1 or window < 1:
            raise ValueError(f"SamplePlan: lanes={lanes} and window={window}, but both must be at least 1")
        self.seed = seed
        self.num_samples = int(sizes.sum())
        self.lanes = min(lanes, self.num_samples)
        self.window = window
        starts = _starts_of_runs(sizes)
        self._run_starts, self._run_sizes = starts[:-1], starts.diff()
        self._lane_length, self._longer_lanes = divmod(self.num_samples, self.lanes)
        self._run_order = KeyedPermutation(len(self._run_sizes))
        lengths = {self._lane_length, self._lane_length + 1} if self._longer_lanes else {self._lane_length}
        window_sizes = {length % window for length in lengths} | ({window} if max(lengths) >= window else set())
        self._window_orders = {size: KeyedPermutation(size) for size in sorted(window_sizes - {0})}
        self._epoch_runs: tuple[int, Tensor, Tensor] | None = None

    def draw(self, stream_positions: Tensor) -> Draws:
        """The samples at some stream positions, and their epochs, which are how often they were drawn before.

        Args:
            stream_positions: int64, not negative, any shape and order; position p of epoch e is e * num_samples + p.

        Returns:
            ids in [0, num_samples), each once for the positions of an epoch.

        Raises:
            ValueError: if a position is negative.
        """
        positions = torch.as_tensor(stream_positions, dtype=torch.int64)
        check_positions(positions, "SamplePlan")
        epochs = positions // self.num_samples
        ids = torch.empty_like(positions)
        if positions.numel() == 0:
            return Draws(ids, epochs)
        first, last = (int(end) for end in epochs.aminmax())
        for epoch in range(first, first + 1) if first == last else epochs.unique().tolist():
            here = epochs == epoch
            ids[here] = self._ids_at(epoch, self._places(epoch, positions[here] - epoch * self.num_samples))
        return Draws(ids, epochs)

    def sample_ids(self, stream_positions: Tensor) -> Tensor:
        """The ids alone of `draw`."""
        return self.draw(stream_positions).ids

    def windows_of_lane(self, lane: int) -> int:
        """Number of windows of a lane in [0, lanes)."""
        return -(-(self._lane_length + (lane < self._longer_lanes)) // self.window)

    def window_ids(self, epoch: int, window: int, lane: int) -> list[range]:
        """The ids that a window of a lane holds in an epoch, as ranges: what to read ahead."""
        start = lane * self._lane_length + min(lane, self._longer_lanes) + window * self.window
        end = start + min(self.window, self._lane_length + (lane < self._longer_lanes) - window * self.window)
        order, ends = self._runs(epoch)
        ranges = []
        run = int(torch.searchsorted(ends, start, right=True))
        while start < end:
            stop = min(end, int(ends[run]))
            if stop > start:
                first = int(self._run_starts[order[run]]) + start - int(ends[run] - self._run_sizes[order[run]])
                ranges.append(range(first, first + stop - start))
                start = stop
            run += 1
        return ranges

    def _runs(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of the runs in an epoch, and where each ends. Kept for the next call, mostly of the same epoch."""
        if self._epoch_runs is None or self._epoch_runs[0] != epoch:
            order = self._run_order(torch.arange(len(self._run_sizes)), hash64(self.seed, epoch, _SHARD_ORDER))
            self._epoch_runs = (epoch, order, self._run_sizes[order].cumsum(0))
        return self._epoch_runs[1:]

    def _ids_at(self, epoch: int, places: Tensor) -> Tensor:
        order, ends = self._runs(epoch)
        # "right" steps over empty runs, whose end equals the end before them.
        number = torch.searchsorted(ends, places, right=True)
        run = order[number]
        return self._run_starts[run] + places - (ends[number] - self._run_sizes[run])

    def _places(self, epoch: int, positions: Tensor) -> Tensor:
        """Positions of an epoch -> places in its concatenated sequence of data shards."""
        lane, step = positions % self.lanes, positions // self.lanes
        lane_start = lane * self._lane_length + lane.clamp(max=self._longer_lanes)
        lane_end = lane_start + self._lane_length + (lane < self._longer_lanes).long()
        window_number = step // self.window
        window_start = lane_start + window_number * self.window
        window_size = (lane_end - window_start).clamp(max=self.window)
        keys = hash64(self.seed, epoch, _WINDOW_ORDER, lane, window_number)
        places = torch.empty_like(positions)
        for size, permutation in self._window_orders.items():
            here = window_size == size
            if not bool(here.any()):
                continue
            places[here] = window_start[here] + permutation(step[here] % self.window, keys[here])
        return places


def _starts_of_runs(sizes: Tensor) -> Tensor:
    """[R + 1] first sample ids of at most 512 runs of neighbouring data shards, and the end."""
    count = min(len(sizes), _MOST_RUNS)
    first_shards = torch.arange(count + 1) * len(sizes) // count
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])[first_shards]


def check_positions(positions: Tensor, name: str) -> None:
    """Refuses negative stream positions.

    Raises:
        ValueError: naming the plan.
    """
    if bool((positions < 0).any()):
        raise ValueError(f"{name}: stream position {int(positions.min())} is negative")
