"""Decisions that all ranks take alike, and the errors that tell of them."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from signal import Signals

from partialfc.data.errors import DataError
from partialfc.distributed.collectives import gather_objects, max_over_ranks
from partialfc.distributed.errors import Report, describe, is_passing, join_reports
from partialfc.distributed.mesh import ShardMesh
from partialfc.supervision.exit_codes import EXIT_BUG, EXIT_OK, EXIT_RETRY, EXIT_STOPPED, EXIT_USER_ERROR

__all__ = ["RankError", "StoppedError", "SupervisionError", "Verdict", "agree", "exit_code_of"]

logger = logging.getLogger(__name__)

_KINDS = (EXIT_OK, EXIT_RETRY, EXIT_USER_ERROR, EXIT_BUG)  # where ranks have several, the last of them counts


class SupervisionError(RuntimeError):
    """Why a run of many ranks ends.

    Attributes:
        exit_code: with which the process should end.
        agreed: whether every rank raises it with the same message, so that one of them need say it.
    """

    exit_code: int = EXIT_BUG
    agreed: bool = False


class RankError(SupervisionError):
    """Some ranks have an error of their own. Raised on all ranks alike, and names them."""

    agreed = True

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(SupervisionError):
    """All ranks have agreed to stop since some were told to. Raised on all ranks alike.

    Args:
        number: of the signal.
        step: after which.
        saved: whether there is a checkpoint of that step.
    """

    exit_code = EXIT_STOPPED
    agreed = True

    def __init__(self, number: int, step: int, *, saved: bool = True) -> None:
        what = "saved" if saved else "could not be saved"
        super().__init__(f"told to stop by {Signals(number).name}; {what} after step {step}, start again to go on")


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
    code = EXIT_OK if error is None else exit_code_of(error)
    highest, kind = max_over_ranks([signal, _KINDS.index(code)], mesh, what="signals and errors")
    if kind == 0:
        return Verdict(highest)
    if error is not None and mesh.size == 1:
        raise error
    if code == EXIT_BUG:
        logger.error("this rank cannot go on", exc_info=error)
    mine = None if error is None else Report(mesh.rank, socket.gethostname(), describe(error))
    reports = [report for report in gather_objects(mine, mesh, what="errors") if report is not None]
    raise RankError(join_reports(reports, size=mesh.size), _KINDS[kind]) from error


def exit_code_of(error: BaseException) -> int:
    """With which a run should end because of an error: whether another start of the same may end better."""
    if isinstance(error, SupervisionError):
        return error.exit_code
    if isinstance(error, DataError) or is_passing(error):
        return EXIT_RETRY
    return EXIT_USER_ERROR if isinstance(error, ValueError | OSError | ImportError) else EXIT_BUG
