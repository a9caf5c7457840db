"""How all ranks come to know alike whether a stage of their common work has failed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from partialfc.distributed.errors import Report, describe, is_passing, join_reports
from partialfc.distributed.mesh import ShardMesh

__all__ = ["CheckpointError", "agree"]

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, verified or loaded. Raised on all ranks alike; the message names the ranks.

    Args:
        message: the same on all ranks.
        passing: whether another start of the same may do without this error.

    Attributes:
        agreed: every rank raises it with the same message, so that one of them need say it.
    """

    agreed = True

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class _Outcome:
    """Of a stage on one rank: the result, or by rank what is wrong, and whether it passes."""

    host: str
    result: Any = None
    failures: dict[int, tuple[str, bool]] | None = None


def agree(what: str, stage: Callable[[], Result], mesh: ShardMesh) -> list[Result]:
    """Runs one stage on every rank.

    Args:
        what: what the stage does, for the message; equal on all ranks.
        stage: may itself communicate, as long as a failure of one rank is one of all.
        mesh: the ranks.

    Returns:
        The results of all ranks, in rank order.

    Raises:
        CheckpointError: on every rank, if the stage failed on any; passing if what failed is so on each.
    """
    host = socket.gethostname()
    cause: BaseException | None = None
    try:
        outcome = _Outcome(host, stage())
    except CheckpointException as error:  # derives from BaseException, and would end the process
        cause = error
        outcome = _Outcome(host, failures={rank: _told(failure) for rank, (failure, _) in error.failures.items()})
    except Exception as error:
        cause = error
        outcome = _Outcome(host, failures={mesh.rank: _told(error)})
    outcomes = [outcome]
    if mesh.group is not None:
        outcomes = [outcome] * mesh.size
        # Not by gather_objects: a thread does this too, and what the trail tells of is the training beside it.
        dist.all_gather_object(outcomes, outcome, group=mesh.group)
    # What DCP found out it tells every rank, so the same failure may come many times.
    failures = {rank: told for one in outcomes for rank, told in (one.failures or {}).items()}
    if any(one.failures is not None for one in outcomes):
        reports = [Report(rank, outcomes[rank].host, failures[rank][0]) for rank in sorted(failures)]
        passing = all(passes for _, passes in failures.values())
        raise CheckpointError(f"{what}: {join_reports(reports, size=mesh.size)}", passing=passing) from cause
    return cast(list[Result], [one.result for one in outcomes])


def _told(error: BaseException) -> tuple[str, bool]:
    """(text, whether it passes). An error of ours may have that of the system for its cause."""
    return describe(error), is_passing(error) or (error.__cause__ is not None and is_passing(error.__cause__))
