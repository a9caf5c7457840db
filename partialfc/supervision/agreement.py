"""Decisions that all ranks take alike, and the errors that tell of them."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from signal import Signals

from partialfc.distributed.collectives import gather_objects, max_over_ranks
from partialfc.distributed.mesh import ShardMesh
from partialfc.supervision.exit_codes import EXIT_STOPPED, EXIT_USER_ERROR

__all__ = ["RankError", "StoppedError", "SupervisionError", "Verdict", "agree"]

logger = logging.getLogger(__name__)

_EXIT_BUG = 1
_USER_ERRORS = (ValueError, OSError, ImportError)
_SHOWN = 10


class SupervisionError(RuntimeError):
    """Why a run of many ranks ends.

    Attributes:
        exit_code: with which the process should end.
        agreed: whether every rank raises it with the same message, so that one of them need say it.
    """

    exit_code: int = _EXIT_BUG
    agreed: bool = False


class RankError(SupervisionError):
    """Some ranks have an error of their own. Raised on all ranks alike, and names them."""

    agreed = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(SupervisionError):
    """All ranks have agreed to stop since some were told to, and have saved. Raised on all ranks alike."""

    exit_code = EXIT_STOPPED
    agreed = True

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"told to stop by {Signals(number).name}; saved after step {step}, start again to go on")


@dataclass(frozen=True)
class Verdict:
    """What all ranks have agreed on.

    Attributes:
        signal: the largest number of a signal that some rank has received; 0 if none has.
    """

    signal: int

    @property
    def stop(self) -> bool:
        """Whether to save and leave."""
        return self.signal != 0


def agree(mesh: ShardMesh, *, signal: int, error: BaseException | None) -> Verdict:
    """One small all-reduce over the host: is any rank told to stop, and does any have an error?

    Args:
        mesh: the ranks. All must call it.
        signal: number of the signal that this rank has received; 0 for none.
        error: what keeps this rank from going on; None for nothing.

    Raises:
        RankError: on all ranks, if any has an error; a process on its own raises the error itself.
    """
    kind = 0 if error is None else 1 if isinstance(error, _USER_ERRORS) else 2
    highest, worst = max_over_ranks([signal, kind], mesh, what="signals and errors")
    if worst == 0:
        return Verdict(highest)
    if error is not None and mesh.size == 1:
        raise error
    if kind == 2:
        logger.error("this rank cannot go on", exc_info=error)
    mine = None if error is None else f"rank {mesh.rank} ({socket.gethostname()}): {describe(error)}"
    messages = [message for message in gather_objects(mine, mesh, what="errors") if message is not None]
    shown = "\n".join(messages[:_SHOWN])
    more = f"\nand {len(messages) - _SHOWN} more ranks" if len(messages) > _SHOWN else ""
    raise RankError(shown + more, EXIT_USER_ERROR if worst == 1 else _EXIT_BUG) from error


def describe(error: BaseException) -> str:
    """The text of an error; of those that were not written for users, their kind too."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
