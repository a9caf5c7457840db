"""Pieces of remote files, kept in a folder of this machine for all of its processes.

A piece appears there whole or not at all. One process fetches it while the others that need it wait, and the least
recently used pieces go when the limit is reached.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from partialfc.data.errors import DataError

__all__ = ["LONGEST_WAIT_SECONDS", "PIECE_BYTES", "CacheSettings", "PieceCache"]

PIECE_BYTES = 4 * 2**20
LONGEST_WAIT_SECONDS = 30.0
"""How long at most is waited between two tries of a request."""

_OLD_PART_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How remote data shards are read, and kept on this machine.

    Attributes:
        directory: folder of the pieces, on a disk of this machine; all processes should share it.
        max_bytes: size that the pieces may take; each process may overshoot it by 1/16, and by at least one piece.
        attempts: how often a request is tried, at least 1.
        first_wait_seconds: wait before the second try; it doubles with each further one, up to 30 s.
        timeout_seconds: time limit of one try.

    Raises:
        ValueError: for a number out of its range.
    """

    directory: Path = field(default_factory=lambda: Path.home() / ".cache" / "partialfc")
    max_bytes: int = 64 * 2**30
    attempts: int = 5
    first_wait_seconds: float = 0.5
    timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.max_bytes < 16 * PIECE_BYTES:
            raise ValueError(f"cache: max_bytes is {self.max_bytes}, but must be at least {16 * PIECE_BYTES}")
        if self.attempts < 1:
            raise ValueError(f"cache: attempts is {self.attempts}, but must be at least 1")
        if self.first_wait_seconds < 0.0 or self.timeout_seconds <= 0.0:
            raise ValueError(
                f"cache: first_wait_seconds is {self.first_wait_seconds} and timeout_seconds "
                f"{self.timeout_seconds}, but the first must not be negative, and the second positive"
            )


class PieceCache:
    """Pieces of files in a folder that processes and threads share."""

    def __init__(self, settings: CacheSettings) -> None:
        self._directory, self._max_bytes = settings.directory, settings.max_bytes
        # A holder of the lock gives up after so long.
        self._patience_seconds = settings.attempts * (settings.timeout_seconds + LONGEST_WAIT_SECONDS)
        self._check_every = max(1, min(64, self._max_bytes // PIECE_BYTES // 16))
        self._fetched = 0

    def path(self, key: str, piece: int) -> Path:
        """The file of a piece."""
        return self._directory / key / f"{piece:06d}"

    def open(self, key: str, piece: int, *, size: int, fetch: Callable[[], bytes]) -> int:
        """A descriptor of a piece, which is fetched first if it is not there. The caller closes it.

        Raises:
            DataError: if the cache cannot be written, and what `fetch` raises.
        """
        path = self.path(key, piece)
        part = path.with_suffix(".part")
        try:
            while True:
                if (descriptor := _open_whole(path, size)) is not None:
                    return descriptor
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    self._lock(descriptor, part)
                    if _is_open_file(part, descriptor):
                        _fill_part(descriptor, part, path, fetch)
                        break
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)  # Another process was done with it meanwhile.
        except DataError:
            raise
        except OSError as error:
            raise DataError(
                f"{part}: the cache of remote data cannot be written: {error.strerror}; make room, or choose another "
                "folder for the cache"
            ) from error
        self._fetched += 1
        if self._fetched % self._check_every == 1 or self._check_every == 1:
            self._evict()
        return descriptor

    def _lock(self, descriptor: int, part: Path) -> None:
        """Waits while another process fetches the piece."""
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{part}: another process has been fetching this piece for {self._patience_seconds:.0f} s; "
                        "look for a stopped one"
                    ) from None
            time.sleep(0.01)

    def _evict(self) -> None:
        """Removes the least recently used pieces beyond the limit, unless another process is at it."""
        with open(self._directory / "evict.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            found = []
            for path in self._directory.glob("*/*"):
                try:
                    status = path.stat()
                except FileNotFoundError:  # A part that took its final name.
                    continue
                in_work = path.suffix == ".part" and time.time() - status.st_mtime < _OLD_PART_SECONDS
                if not in_work:
                    found.append((status.st_mtime_ns, status.st_size, path))
            excess = sum(size for _, size, _ in found) - self._max_bytes
            for _, size, path in sorted(found):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)  # Processes that have it open can still read it.
                excess -= size


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor of a file, marked as used; None if it is missing or, after a crash of the machine, cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size == size:
        os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    path.unlink(missing_ok=True)
    return None


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _fill_part(descriptor: int, part: Path, path: Path, fetch: Callable[[], bytes]) -> None:
    """Fetches a piece into the file that is locked, which then takes its final name and is unlocked."""
    try:
        data = memoryview(fetch())
        os.ftruncate(descriptor, 0)
        while data:
            data = data[os.write(descriptor, data) :]
        os.rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fcntl.flock(descriptor, fcntl.LOCK_UN)
