"""Independent pieces of work in worker processes, with results in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from partialfc.data.errors import DataError

__all__ = ["run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_AHEAD = 2  # Per worker: none waits for the next, and what tasks carry does not pile up.


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], *, num_workers: int) -> Generator[Result]:
    """The results of `function` for each task, in order. Closing the generator waits for the tasks that have begun.

    Args:
        function: a function of a module, so that workers find it.
        tasks: may be many: only a few for each worker are taken ahead.
        num_workers: worker processes; 0 works in the calling process.

    Raises:
        DataError: if a worker process dies.
    """
    if num_workers == 0:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_signals_to_parent
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) == num_workers * (1 + _TASKS_AHEAD):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died: the machine may have run out of memory (see dmesg); use fewer workers"
        ) from error
    finally:
        # What has begun is waited for: a worker killed in the middle could die while it holds a lock.
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_signals_to_parent() -> None:
    """Ctrl-C reaches all processes of a terminal; the parent decides what is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
