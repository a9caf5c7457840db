"""Loaders on torch DataLoader workers: whole batches, in order, as a pure function of the position in the stream."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import active_children, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from partialfc.data.augment import Augmentation
from partialfc.data.batch import Batch, read_batch
from partialfc.data.errors import DataError
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedIndex
from partialfc.data.plan import RankSteps, rank_slice
from partialfc.data.read_ahead import WarmSteps

__all__ = ["AugmentedSteps", "Loader", "SequentialLoader", "StepsDataset", "TorchLoader", "WholeBatchLoader"]

_PREFETCHED_BATCHES = 4  # Per worker: enough to bridge a slow read, little memory as images are uint8.
_LOOK_EVERY_SECONDS = 2.0  # Whether a worker died.
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Python 3.14 would start workers from a server, whose children they then are: the end of the trainer would not be
# theirs, and the index would be sent to each instead of shared.
_START_METHOD = "fork" if sys.platform == "linux" else None


class Loader(Protocol):
    """The batches of one rank, in order. Iterating again starts over."""

    def __len__(self) -> int:
        """Number of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches."""


class StepsDataset(Protocol):
    """Step number -> batch of one rank; it must be possible to send it to a worker process."""

    def __len__(self) -> int:
        """Number of steps."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, in [0, len)."""


class WholeBatchLoader:
    """Hands out the batches of a `StepsDataset` in order, read by worker processes.

    Args:
        steps: what to read.
        num_workers: worker processes; 0 reads in the calling process.
        timeout_seconds: how long to wait for a batch of the workers before giving up.
        order: the numbers of all steps, which may come with delays; left out, without.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        steps: StepsDataset,
        *,
        num_workers: int,
        timeout_seconds: float = 600.0,
        order: Iterable[int] | None = None,
    ) -> None:
        if num_workers < 0 or timeout_seconds <= 0:
            raise ValueError(
                f"loader: num_workers={num_workers} must not be negative, timeout_seconds={timeout_seconds} positive"
            )
        self._num_workers, self._timeout_seconds = num_workers, timeout_seconds
        self._num_batches = len(steps)
        self._loader: DataLoader[Any] = DataLoader(
            _Caught(steps),
            batch_size=None,
            sampler=range(len(steps)) if order is None else order,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            prefetch_factor=_PREFETCHED_BATCHES if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            timeout=min(_LOOK_EVERY_SECONDS, timeout_seconds) if num_workers else 0,
            multiprocessing_context=_START_METHOD if num_workers else None,
        )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            DataError: if a data shard cannot be used, or a worker process died or no longer answers.
        """
        batch = None
        batches, workers = self._start()
        try:
            for number in range(self._num_batches):
                batch = self._next(batches, workers, number)
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            # They may leave a request to end to this process, which is about to wait for their end.
            for worker in workers:
                worker.kill()
            # An error refers to this frame: with these names, to itself and to the processes of torch too.
            del batch, batches, workers

    def _start(self) -> tuple[Any, list[BaseProcess]]:
        """The iterator of torch, and its processes."""
        others, handler = active_children(), signal.getsignal(signal.SIGCHLD)
        in_main_thread = threading.current_thread() is threading.main_thread()
        # What the system takes for the end of the parent is that of the thread which has started a worker.
        self._loader.worker_init_fn = _start_worker_bound if in_main_thread else _start_worker
        batches: Any = iter(self._loader)
        if self._loader.num_workers:
            # A worker that is killed as it looks at this event has its lock for ever, and torch would wait for it.
            batches._event_of_workers = batches._workers_done_event  # to stay, for those that are starting
            batches._workers_done_event = threading.Event()
        if in_main_thread:
            # torch raises from this signal, wherever the program is at the moment. Here `_next` looks for the dead.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        return batches, [child for child in active_children() if child not in others]

    def _next(self, batches: Any, workers: list[BaseProcess], number: int) -> Any:
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            try:
                return next(batches)
            except (RuntimeError, EOFError, OSError) as error:  # Those of data come as values.
                if workers and "timed out" not in str(error):
                    # The connection of one that is being killed breaks before its end is known.
                    wait([worker.sentinel for worker in workers], _LOOK_EVERY_SECONDS)
                for worker in workers:
                    worker.join(_LOOK_EVERY_SECONDS / 100)
                dead = [f"pid {worker.pid}, {_end_of(worker)}" for worker in workers if not worker.is_alive()]
                if dead:
                    raise DataError(
                        f"a data worker of this rank died before batch {number} ({'; '.join(dead)}). It may have run "
                        f"out of memory (see dmesg) or of shared memory; {len(workers)} workers were running "
                        "(data.num_workers)"
                    ) from None
                if "timed out" not in str(error):
                    raise
            if time.monotonic() >= deadline:
                raise DataError(
                    f"no batch came from {len(workers)} data workers within {self._timeout_seconds:g} seconds, waiting "
                    f"for batch {number}: storage or a worker hangs (data.num_workers, data.timeout_seconds)"
                )


class TorchLoader(WholeBatchLoader):
    """The training batches of one rank.

    What a step holds is a function of the index, the plan, the seed and the stream position alone: the number of
    workers changes nothing, and the slices of all ranks make up the same global batch whatever their number. To go on
    after an interruption, pass the number of samples consumed. Iterating again starts over.

    Args:
        index: the data to read.
        steps: which samples each step of this rank holds.
        image_size: height and width of the images in pixels; others are resized.
        augmentation: random changes of the images.
        num_workers: worker processes; 0 reads in the calling process.
        seed: key of the augmentation.
        timeout_seconds: how long to wait for a batch of the workers before giving up.
        read_ahead: whether to read the windows of the plan in large pieces before they are needed; see `ReadAhead`.

    Raises:
        ValueError: if a number is out of its range, or the plan has no windows to read ahead.
    """

    def __init__(
        self,
        *,
        index: ShardIndex | JoinedIndex,
        steps: RankSteps,
        image_size: int,
        augmentation: Augmentation,
        num_workers: int,
        seed: int,
        timeout_seconds: float = 600.0,
        read_ahead: bool = False,
    ) -> None:
        super().__init__(
            _TrainingSteps(index, steps, image_size=image_size, augmentation=augmentation, seed=seed),
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            order=WarmSteps(index, steps) if read_ahead else None,
        )


class SequentialLoader(WholeBatchLoader):
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
        super().__init__(_SequentialSteps(index, part, batch_size, image_size), num_workers=num_workers)


class AugmentedSteps:
    """What the batches of training steps are made from; how, is said by those that inherit it.

    Args:
        index: the data to read.
        steps: which samples each step of this rank holds.
        image_size: height and width of the images in pixels.
        augmentation: random changes of the images.
        seed: key of the augmentation.
    """

    def __init__(
        self,
        index: ShardIndex | JoinedIndex,
        steps: RankSteps,
        *,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.index, self.steps, self.image_size = index, steps, image_size
        self.augmentation, self.seed = augmentation, seed

    def __len__(self) -> int:
        return len(self.steps)


class _TrainingSteps(AugmentedSteps):
    """Step number -> batch of one rank."""

    def __getitem__(self, step: int) -> Batch:
        draws = self.steps.draws(step)
        augmentation = self.augmentation.draw(draws, seed=self.seed)
        return read_batch(self.index, draws.ids, image_size=self.image_size, augmentation=augmentation)


class _SequentialSteps:
    """Step number -> consecutive samples of a part of the index."""

    def __init__(self, index: ShardIndex, part: range, batch_size: int, image_size: int) -> None:
        self.index, self.part, self.batch_size, self.image_size = index, part, batch_size, image_size

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        here = self.part[step * self.batch_size : (step + 1) * self.batch_size]
        return read_batch(self.index, torch.arange(here.start, here.stop), image_size=self.image_size)


class _Caught(Dataset[Any]):
    """The batch of a step, or the error of a user or of storage: raised in a worker, torch would wrap its message."""

    def __init__(self, steps: StepsDataset) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.steps[step]
        except (OSError, ValueError) as error:
            return error


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A scheduler sends its warning to every process of a job. The trainer answers it by saving a checkpoint, for
    # which the batches under way must still arrive; so workers leave these signals to it.
    for warning in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _spare_once)


def _start_worker_bound(worker: int) -> None:
    """The worker ends with its parent, also where that is killed: it holds the parent's connections to other ranks."""
    _start_worker(worker)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it was killed before the system had been asked
            os._exit(1)


def _spare_once(number: int, frame: FrameType | None) -> None:
    """Lets one SIGTERM pass, which may be such a warning; the next one, sent when the parent ends, counts."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
