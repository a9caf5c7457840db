"""Which sample is seen when: the order of the data as a pure function of (seed, position).

Epochs are laid end to end in one endless stream. Position p of epoch e is stream position e * num_samples + p, and a
global batch is the interval [consumed, consumed + global_batch), cut into slices over the ranks. So the whole state of
a loader is the integer `consumed`, every rank makes the same number of steps, and a run may go on with another number
of ranks, another batch size or other workers: still each sample comes exactly once an epoch.

Within an epoch the data shards are laid one after the other in a keyed order. That sequence is cut into `lanes` of
equal length (they do not depend on the number of ranks), and each lane into windows, permuted by a keyed bijection.
Position p belongs to lane p mod lanes. A batch thus mixes samples of all lanes, which lie far apart, while the reads
of a lane stay within a window. Nothing of size num_samples is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["SamplePlan", "rank_slice"]

_SHARD_ORDER, _WINDOW_ORDER = 1, 2


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
        self._sizes = sizes
        self._first_ids = sizes.cumsum(0) - sizes
        self._lane_length, self._longer_lanes = divmod(self.num_samples, self.lanes)
        self._shard_order = KeyedPermutation(len(sizes))
        lengths = {self._lane_length, self._lane_length + 1} if self._longer_lanes else {self._lane_length}
        window_sizes = {length % window for length in lengths} | ({window} if max(lengths) >= window else set())
        self._window_orders = {size: KeyedPermutation(size) for size in sorted(window_sizes - {0})}

    def sample_ids(self, stream_positions: Tensor | np.ndarray) -> Tensor:
        """The ids of the samples at some stream positions.

        Args:
            stream_positions: int64, not negative, any shape and order; position p of epoch e is e * num_samples + p.

        Returns:
            int64 tensor of the same shape, in [0, num_samples); each id once for the positions of an epoch.

        Raises:
            ValueError: if a position is negative.
        """
        positions = torch.as_tensor(stream_positions, dtype=torch.int64)
        if bool((positions < 0).any()):
            raise ValueError(f"SamplePlan: stream position {int(positions.min())} is negative")
        epochs = self.epochs(positions)
        ids = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            ids[here] = self._ids_of_epoch(epoch, positions[here] - epoch * self.num_samples)
        return ids

    def epochs(self, stream_positions: Tensor) -> Tensor:
        """The epoch, int64, of each stream position."""
        return stream_positions // self.num_samples

    def _ids_of_epoch(self, epoch: int, positions: Tensor) -> Tensor:
        places = self._places(epoch, positions)
        order = self._shard_order(torch.arange(len(self._sizes)), hash64(self.seed, epoch, _SHARD_ORDER))
        ends = self._sizes[order].cumsum(0)
        # "right" steps over empty shards, whose end equals the end before them.
        rank_in_order = torch.searchsorted(ends, places, right=True)
        shard = order[rank_in_order]
        return self._first_ids[shard] + places - (ends - self._sizes[order])[rank_in_order]

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
            places[here] = window_start[here] + permutation(step[here] % self.window, keys[here])
        return places
