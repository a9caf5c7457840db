"""How all ranks come to know alike whether a stage of their common work has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from partialfc.distributed.errors import describe
from partialfc.distributed.mesh import ShardMesh

__all__ = ["CheckpointError", "agree"]

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, verified or loaded. Raised on all ranks alike; the message names the rank."""


def agree(what: str, stage: Callable[[], Result], mesh: ShardMesh) -> list[Result]:
    """Runs one stage on every rank.

    Args:
        what: what the stage does, for the message.
        stage: may itself communicate, as long as a failure of one rank is one of all.
        mesh: the ranks.

    Returns:
        The results of all ranks, in rank order.

    Raises:
        CheckpointError: on every rank, if the stage failed on any.
    """
    outcome: tuple[Result | None, str | None]
    cause: BaseException | None = None
    try:
        outcome = stage(), None
    except CheckpointException as error:  # derives from BaseException, and would end the process
        cause = error
        failures = error.failures.items()
        outcome = None, "; ".join(f"rank {rank}: {describe(failure)}" for rank, (failure, _) in failures)
    except Exception as error:
        cause = error
        outcome = None, f"rank {mesh.rank}: {describe(error)}"
    outcomes = [outcome]
    if mesh.group is not None:
        outcomes = [outcome] * mesh.size
        dist.all_gather_object(outcomes, outcome, group=mesh.group)
    # What DCP found out it tells every rank, so the same report may come many times.
    reports = dict.fromkeys(report for _, report in outcomes if report is not None)
    if reports:
        raise CheckpointError(f"{what}: {'; '.join(reports)}") from cause
    return cast(list[Result], [result for result, _ in outcomes])
