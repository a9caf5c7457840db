"""Loaders on torch DataLoader workers: whole batches, in order, as a pure function of the position in the stream."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from partialfc.data.augment import horizontal_flips
from partialfc.data.batch import Batch, read_batch
from partialfc.data.index import ShardIndex
from partialfc.data.plan import SamplePlan, rank_slice

__all__ = ["SequentialLoader", "TorchLoader"]

_PREFETCHED_BATCHES = 4  # Per worker: enough to bridge a slow read, little memory as images are uint8.


class TorchLoader:
    """The training batches of one rank: step t holds this rank's slice of [consumed + t * global_batch, ...).

    What a step holds is a function of the index, the plan, the seed and the stream position alone: the number of
    workers changes nothing, and the slices of all ranks make up the same global batch whatever their number. To go on
    after an interruption, pass the number of samples consumed. Iterating again starts over at `consumed`.

    Args:
        index: the split to read.
        plan: the order of its samples.
        global_batch: samples of a step over all ranks.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        consumed: samples of the stream consumed before the first step.
        num_batches: number of steps.
        image_size: height and width of the images in pixels; others are resized.
        horizontal_flip: whether to mirror half of the images, drawn anew each epoch.
        num_workers: worker processes; 0 reads in the calling process.
        seed: key of the augmentation.

    Raises:
        ValueError: if the plan is not one of this index, or a number is out of its range.
    """

    def __init__(
        self,
        *,
        index: ShardIndex,
        plan: SamplePlan,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed: int,
        num_batches: int,
        image_size: int,
        horizontal_flip: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        if plan.num_samples != index.num_samples:
            raise ValueError(
                f"TorchLoader: the plan orders {plan.num_samples} samples, but {index.directory} has "
                f"{index.num_samples}; make the plan from index.shard_sizes"
            )
        if global_batch < 1 or num_batches < 0:
            raise ValueError(
                f"TorchLoader: global_batch={global_batch} must be at least 1, and num_batches={num_batches} "
                "not negative"
            )
        rank_slice(consumed, global_batch, rank=rank, world_size=world_size)  # Refuses what is out of range.
        steps = _TrainingSteps(
            index=index,
            plan=plan,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            consumed=consumed,
            num_batches=num_batches,
            image_size=image_size,
            flip_seed=seed if horizontal_flip else None,
        )
        self._num_batches = num_batches
        self._loader = _whole_batch_loader(steps, num_workers)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


class SequentialLoader:
    """Every sample once, in the order of the index, for evaluation. No augmentation.

    The ranks take contiguous parts of the index, whose lengths differ by at most one; nothing is dropped or repeated,
    so ranks may make different numbers of steps, and the last batch may be short.

    Args:
        index: the split to read.
        batch_size: samples of a step on this rank.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        image_size: height and width of the images in pixels; others are resized.
        num_workers: worker processes; 0 reads in the calling process.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        index: ShardIndex,
        batch_size: int,
        rank: int,
        world_size: int,
        image_size: int,
        num_workers: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"SequentialLoader: batch_size is {batch_size}, but must be at least 1")
        part = rank_slice(0, index.num_samples, rank=rank, world_size=world_size)
        steps = _SequentialSteps(index=index, part=part, batch_size=batch_size, image_size=image_size)
        self._num_batches = len(steps)
        self._loader = _whole_batch_loader(steps, num_workers)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


class _TrainingSteps(Dataset[Batch]):
    """Step number -> batch of one rank."""

    def __init__(
        self,
        *,
        index: ShardIndex,
        plan: SamplePlan,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed: int,
        num_batches: int,
        image_size: int,
        flip_seed: int | None,
    ) -> None:
        self.index = index
        self.plan = plan
        self.global_batch = global_batch
        self.rank = rank
        self.world_size = world_size
        self.consumed = consumed
        self.num_batches = num_batches
        self.image_size = image_size
        self.flip_seed = flip_seed

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, step: int) -> Batch:
        start = self.consumed + step * self.global_batch
        part = rank_slice(start, self.global_batch, rank=self.rank, world_size=self.world_size)
        positions = torch.arange(part.start, part.stop)
        ids = self.plan.sample_ids(positions)
        flips = None
        if self.flip_seed is not None:
            flips = horizontal_flips(self.plan.epochs(positions), ids, seed=self.flip_seed)
        return read_batch(self.index, ids, image_size=self.image_size, flips=flips)


class _SequentialSteps(Dataset[Batch]):
    """Step number -> consecutive samples of a part of the index."""

    def __init__(self, *, index: ShardIndex, part: range, batch_size: int, image_size: int) -> None:
        self.index = index
        self.part = part
        self.batch_size = batch_size
        self.image_size = image_size

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        here = self.part[step * self.batch_size : (step + 1) * self.batch_size]
        return read_batch(self.index, torch.arange(here.start, here.stop), image_size=self.image_size)


def _whole_batch_loader(steps: _TrainingSteps | _SequentialSteps, num_workers: int) -> DataLoader[Batch]:
    """A DataLoader whose items are batches already; it hands them out in the order of the steps."""
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(len(steps)),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        prefetch_factor=_PREFETCHED_BATCHES if num_workers else None,
        persistent_workers=num_workers > 0,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A scheduler sends its warning to every process of a job. The trainer answers it by saving a checkpoint, for
    # which the batches under way must still arrive; so workers leave these signals to it.
    for warning in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _spare_once)


def _spare_once(number: int, frame: FrameType | None) -> None:
    """Lets one SIGTERM pass, which may be such a warning; the next one, sent when the parent ends, counts."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
