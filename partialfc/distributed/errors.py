"""How an error of one rank is told to the others."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Report", "describe", "first_line", "is_agreed", "is_passing", "join_reports", "name_hosts", "name_ranks"]

_MOST_SHOWN = 10
_MOST_HOSTS = 3
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
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux has it
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


def is_agreed(error: BaseException) -> bool:
    """Whether every rank raises it with the same message, so that one of them need say it."""
    return bool(getattr(error, "agreed", False))


def first_line(error: BaseException) -> str:
    """The beginning of `describe`, for where there is little room."""
    return describe(error).strip().partition("\n")[0]


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
    ranks, hosts = [report.rank for report in reports], [report.host for report in reports]
    return f"{name_ranks(ranks)} ({name_hosts(hosts)}): {text}"


def name_ranks(ranks: Iterable[int]) -> str:
    """Such as "rank 3" or "ranks 0-6, 9"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:_MOST_SHOWN]]
    text = ", ".join(shown) + (", ..." if len(runs) > _MOST_SHOWN else "")
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"


def name_hosts(hosts: Iterable[str]) -> str:
    """Such as "gpu01, gpu02, gpu03 and 5 more"; each once."""
    names = list(dict.fromkeys(hosts))
    more = f" and {len(names) - _MOST_HOSTS} more" if len(names) > _MOST_HOSTS else ""
    return ", ".join(names[:_MOST_HOSTS]) + more
