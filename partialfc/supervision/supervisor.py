"""What a training loop holds of all this: one object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from partialfc.distributed.collectives import max_over_ranks
from partialfc.distributed.errors import first_line, is_agreed
from partialfc.distributed.mesh import ShardMesh
from partialfc.supervision.agreement import StoppedError, agree
from partialfc.supervision.preflight import preflight
from partialfc.supervision.signals import StopSignals
from partialfc.supervision.watchdog import Watchdog

__all__ = ["Supervisor"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_OF_COMMUNICATION = ("gloo", "NCCL", "TCPStore", "ProcessGroup")


class Supervisor:
    """Keeps the ranks of a run together: they stop together, fail together, and name the one that hangs or is lost.

    All ranks make it and enter it together, inside of the process group; a process on its own takes the same path:

        with Supervisor(mesh, directory=..., hang_timeout_seconds=300, signals=signals) as supervisor:
            data = supervisor.together(open_data)           # what may fail on one rank without communication
            supervisor.preflight(device, facts={...})
            with supervisor.steps():                        # from here on a signal waits for the end of a step
                while step < total_steps:
                    supervisor.beat(step)
                    batch = supervisor.together(lambda: next(batches))
                    if supervisor.stopping:
                        save(step)
                        raise supervisor.stopped(step, saved=True)
                    ...
                    with supervisor.phase("evaluation"):    # the limit of hangs does not hold
                        ...

    If an error of communication leaves the block and ranks are missing, they are named, and this process ends at once
    with `EXIT_RETRY`: nothing can be done together any more. Other errors pass, and the other ranks are told of them.

    Args:
        mesh: the ranks.
        directory: of the run; `faults/` in it gets the reports of hangs.
        hang_timeout_seconds: without the end of a step.
        signals: that tell the run to stop.
    """

    def __init__(
        self,
        mesh: ShardMesh,
        *,
        directory: Path,
        hang_timeout_seconds: float,
        signals: StopSignals,
    ) -> None:
        self._mesh, self._directory, self._signals = mesh, directory, signals
        self._watchdog = Watchdog(mesh, directory=directory, limit_seconds=hang_timeout_seconds)
        self._signal = 0

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            # Before another rank can end: a launcher that sees it tells this one to stop, which may have the message.
            self._signals.defer()
        if error is not None and not is_agreed(error):
            if _is_of_communication(error):
                self._watchdog.communication_failed(first_line(error))
            self._watchdog.tell_others(first_line(error))
        self._watchdog.close()
        if error is None or is_agreed(error):
            # The first rank has the store of heartbeats: it stays until no other writes there.
            with suppress(RuntimeError) if error is not None else nullcontext():
                max_over_ranks([0], self._mesh)

    @property
    def stopping(self) -> bool:
        """Whether all ranks have agreed, in the last `together()`, to save and leave."""
        return self._signal != 0

    def steps(self) -> AbstractContextManager[None]:
        """The loop over steps: in it a signal to stop waits for the next `together()`, outside it ends the process."""
        return self._signals.deferred()

    def beat(self, step: int) -> None:
        """Step number `step` has ended. Between two of these the limit of hangs holds, from the second on."""
        self._watchdog.beat(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something in which the limit of hangs does not hold, such as "evaluation" or "save"."""
        with self._watchdog.phase(name):
            yield

    def together(self, call: Callable[[], Result]) -> Result:
        """Runs something without communication on all ranks, which may fail on some. Collective.

        Sets `stopping`. In the call no rank may wait for another.

        Returns:
            This rank's result.

        Raises:
            RankError: on all ranks, if it failed on any; it names them.
        """
        failure: Exception | None = None
        result: Any = None
        try:
            result = call()
        except Exception as error:
            failure = error
        verdict = agree(self._mesh, signal=self._signals.received, error=failure)
        if verdict.stop:
            self._signals.answered()
        self._signal = verdict.signal
        checked: Result = result
        return checked

    def stopped(self, step: int, *, saved: bool) -> StoppedError:
        """To be raised when all is saved, or could not be, after `stopping`."""
        return StoppedError(self._signal, step, saved=saved)

    def preflight(self, device: torch.device, *, facts: dict[str, Any]) -> None:
        """Compares the ranks before the first step; see `partialfc.supervision.preflight`. Collective.

        Raises:
            RankError: on all ranks, if they cannot train together.
        """
        preflight(self._mesh, device, facts=facts, directory=self._directory)


def _is_of_communication(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, ValueError | OSError):  # which may quote anything
        return False
    text = str(error)
    return any(word in text for word in _OF_COMMUNICATION)
