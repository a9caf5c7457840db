"""What an operating system's error leaves out: which file system it was, how full it is, how it is mounted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_room", "explained", "format_bytes"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Adds to an OSError that comes out of writing into `directory` what helps to mend it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = f"{_describe(directory)} has {_room(directory)}; make room there"
        elif error.errno in _REFUSED:
            hint = f"{_describe(directory)} cannot be written to by user {os.geteuid()}"
        else:
            raise
        place = f": {error.filename}" if error.filename else ""
        raise OSError(error.errno, f"{error.strerror}{place} ({hint})") from error


def check_room(directory: Path, needed_bytes: int) -> None:
    """Before much is written in vain.

    Args:
        directory: an existing one.
        needed_bytes: what is likely to be written there.

    Raises:
        OSError: (ENOSPC) if there is less room than that.
    """
    usage = shutil.disk_usage(directory)
    if usage.total == 0 or usage.free >= needed_bytes:  # some network file systems know nothing of their size
        return
    raise OSError(
        errno.ENOSPC,
        f"{os.strerror(errno.ENOSPC)}: the newest checkpoint has {format_bytes(needed_bytes)}, but "
        f"{_describe(directory)} has {_room(directory)}; make room there",
    )


def format_bytes(count: int) -> str:
    """As 1.5 MiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _room(directory: Path) -> str:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return "an unknown number of bytes free"
    return f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"


def _describe(directory: Path) -> str:
    """Of the mount that `directory` is on."""
    path = directory.resolve()
    best: tuple[str, str, str] | None = None
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        fields, _, source = line.partition(" - ")
        # See proc(5). Spaces in paths are written as \040.
        place = fields.split()[4].replace("\\040", " ")
        if path.is_relative_to(place) and (best is None or len(place) >= len(best[0])):
            # Of a mount and of what is mounted, each may be read-only.
            options = f"{fields.split()[5]},{source.split()[-1]}"
            best = place, source.split()[0], options
    if best is None:
        return f"the file system of {directory}"
    read_only = ", mounted read-only," if "ro" in best[2].split(",") else ""
    return f"the {best[1]} file system at {best[0]}{read_only}"
