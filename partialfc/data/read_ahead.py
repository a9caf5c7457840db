"""Reads the windows of a plan ahead of need, in large pieces: for disks that are not cached, and for remote stores.

Within a window samples are read in random order. From a cold disk or a remote store that is slow, one small read after
the other; but all of the window will be needed, so a thread of the rank reads it from end to end before.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from partialfc.data.errors import DataError
from partialfc.data.piece_cache import PIECE_BYTES
from partialfc.data.plan import RankSteps, SamplePlan

if TYPE_CHECKING:
    from partialfc.data.index import ShardIndex
    from partialfc.data.joined import JoinedIndex

__all__ = ["ReadAhead", "WarmSteps"]

_PATIENCE_SECONDS = 5.0


class WarmSteps:
    """The numbers of the steps of a rank in order, each given out when what it needs is near. See `ReadAhead`.

    Args:
        index: what is read.
        steps: what the rank holds at each step.

    Raises:
        ValueError: if the order of the samples has no windows.
    """

    def __init__(self, index: ShardIndex | JoinedIndex, steps: RankSteps) -> None:
        _check_plan(steps)
        self._index, self._steps = index, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[int]:
        with ReadAhead(self._index, self._steps) as read_ahead:
            for step in range(len(self._steps)):
                read_ahead.advance(step)
                yield step


class ReadAhead:
    """Brings near what a rank will need: the present window of its lanes and the next one, not more. A context manager.

    Local shards end up in the page cache, which needs room for two windows of all ranks of the machine; remote ones
    in the cache of pieces, which needs as much. What cannot be read is left to whoever needs it, who gets the error.

    Args:
        index: what is read.
        steps: what the rank holds at each step.

    Raises:
        ValueError: if the order of the samples has no windows.
    """

    def __init__(self, index: ShardIndex | JoinedIndex, steps: RankSteps) -> None:
        self._index, self._steps = index, steps
        # A plan keeps the order of the epoch it was asked for last, so threads must not share it.
        self._plan = copy.copy(_check_plan(steps))
        self._shard_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(index.shard_sizes)])
        self._step = 0
        self._warm_steps = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def advance(self, step: int) -> None:
        """Says that a step is about to be read, and waits until what it needs is near. Steps must not go back."""
        with self._changed:
            assert step >= self._step, (step, self._step)
            self._step = step
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._error or self._warm_steps > step)
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Ends the thread; a read that hangs is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_PATIENCE_SECONDS)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for window in self._windows():
                with self._changed:
                    while not self._closed and self._step < window.from_step:
                        self._changed.wait()
                if self._closed:
                    return
                self._warm(window)
                with self._changed:
                    self._warm_steps = window.warm_steps
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _windows(self) -> Iterator[_Window]:
        """The windows that the steps go through."""
        plan, batch, consumed = self._plan, self._steps.global_batch, self._steps.consumed
        stop = consumed + batch * len(self._steps)
        span = plan.window * plan.lanes
        position, from_step = consumed, 0
        while position < stop:
            epoch, place = divmod(position, plan.num_samples)
            number = place // span
            start = epoch * plan.num_samples + number * span
            end = epoch * plan.num_samples + min((number + 1) * span, plan.num_samples)
            warm_steps = (end - consumed) // batch if end < stop else len(self._steps)
            yield _Window(epoch, number, position, min(end, stop), from_step, warm_steps)
            # The next window may be read from the first step on that needs this one.
            from_step = max(0, (start - consumed) // batch)
            position = end

    def _warm(self, window: _Window) -> None:
        for lane in self._lanes(window):
            for ids in self._plan.window_ids(window.epoch, window.number, lane):
                for shard, start, stop in self._byte_ranges(ids):
                    for piece in range(start, stop, PIECE_BYTES):
                        if self._closed:
                            return
                        try:
                            self._index.storage.warm(shard, piece, min(piece + PIECE_BYTES, stop))
                        except DataError:  # The store is away: asking it for the rest would take a time limit each.
                            return
                        except OSError:
                            break

    def _lanes(self, window: _Window) -> list[int]:
        """The lanes of this rank in a window. Which these are repeats after a few steps."""
        plan, batch, consumed = self._plan, self._steps.global_batch, self._steps.consumed
        first, last = (window.start - consumed) // batch, (window.end - 1 - consumed) // batch
        period = plan.lanes // math.gcd(batch, plan.lanes)
        lanes = set[int]()
        for step in range(first, min(last, first + period) + 1):
            positions = self._steps.positions(step)
            here = positions[(positions >= window.start) & (positions < window.end)]
            lanes |= set((here % plan.num_samples % plan.lanes).tolist())
        return sorted(lanes)

    def _byte_ranges(self, ids: range) -> Iterator[tuple[int, int, int]]:
        """(shard, first byte, end) of consecutive sample ids."""
        start = ids.start
        while start < ids.stop:
            shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
            stop = min(ids.stop, int(self._shard_starts[shard + 1]))
            _, offsets, sizes = self._index.locate(np.array([start, stop - 1]))
            yield shard, int(offsets[0]), int(offsets[1] + sizes[1])
            start = stop


class _Window(NamedTuple):
    """A window of all lanes: its epoch and number, and which stream positions of it the steps need.

    It may be read when step `from_step` begins, and when it is near, the first `warm_steps` steps can go.
    """

    epoch: int
    number: int
    start: int
    end: int
    from_step: int
    warm_steps: int


def _check_plan(steps: RankSteps) -> SamplePlan:
    if not isinstance(steps.plan, SamplePlan):
        raise ValueError(
            f"read_ahead: {type(steps.plan).__name__} draws samples from all places, so there is nothing to read "
            "ahead; use data.read_ahead=false, or the sampling that goes through the data in windows"
        )
    return steps.plan
