"""How an error of one rank is told to the others."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Report", "describe", "is_passing", "join_reports", "named"]

_MOST_NAMED = 20
_MOST_SHOWN = 10
# What a file system or a network may say today, and not tomorrow.
_PASSING = {
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENOTCONN,
    errno.EREMOTEIO,
}


@dataclass(frozen=True)
class Report:
    """What one rank says is wrong.

    Attributes:
        rank: in [0, world size).
        host: its machine.
        text: of the error.
    """

    rank: int
    host: str
    text: str


def describe(error: BaseException) -> str:
    """The text of an error; of those that were not written for users, their kind too."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def is_passing(error: BaseException) -> bool:
    """Whether another start of the same may do without this error: a file system or a network has had it."""
    return isinstance(error, OSError) and error.errno in _PASSING


def join_reports(reports: Iterable[Report], *, size: int) -> str:
    """A line for each text, with the ranks that say it; the text alone where all `size` ranks say the same."""
    by_text: dict[str, list[Report]] = {}
    for report in reports:
        by_text.setdefault(report.text, []).append(report)
    lines = [_line(text, same, size) for text, same in list(by_text.items())[:_MOST_SHOWN]]
    if len(by_text) > _MOST_SHOWN:
        lines.append(f"and {len(by_text) - _MOST_SHOWN} more messages")
    return "\n".join(lines)


def _line(text: str, reports: list[Report], size: int) -> str:
    if len(reports) == size:
        return text
    ranks = [report.rank for report in reports]
    return f"rank {ranks[0]} ({reports[0].host}): {text}" if len(ranks) == 1 else f"{named(ranks)}: {text}"


def named(ranks: Sequence[int]) -> str:
    """Ranks for a message: "rank 3", or "2 ranks (3, 5)"."""
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if len(ranks) > _MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"
