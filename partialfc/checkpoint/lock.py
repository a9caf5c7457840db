"""One job at a time writes to the directory of a run."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from partialfc.checkpoint.file_system import explained
from partialfc.checkpoint.rounds import Rounds
from partialfc.distributed.collectives import gather_objects
from partialfc.distributed.mesh import ShardMesh

__all__ = ["LOCK_NAME", "RunLock", "RunLockedError"]

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"

_HELD = {errno.EACCES, errno.EAGAIN}
_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_POLL_SECONDS = 0.2
_PREDECESSOR_SECONDS = 120.0  # A server of files keeps the lock of a machine that is gone for a minute or two.

_held_here: set[tuple[int, int]] = set()


class RunLockedError(ValueError):
    """Another job has the run. Raised on all ranks alike; the message says which.

    Attributes:
        by_same_job: whether it is an earlier start of this very job, on a machine that is gone, say, so that another
            start may find it gone.
        agreed: every rank raises it with the same message, so that one of them need say it.
    """

    by_same_job = False
    agreed = True


class RunLock:
    """The right to write to the directory of a run, while a `with` statement lasts. Collective.

    The first rank locks a file there. The lock is the process's own: it goes when that process ends, in whatever way,
    and child processes, such as data workers that outlive a killed parent by seconds, do not have it. Where the file
    system has no locks, a warning is all.

    Args:
        directory: of the run; made if it is missing.
        mesh: the ranks of the job.
        wait_seconds: for a job that is just ending; for an earlier start of this very job two minutes more.
    """

    def __init__(self, directory: str | Path, *, mesh: ShardMesh, wait_seconds: float = 15.0) -> None:
        self.path = Path(directory) / LOCK_NAME
        self.mesh, self.wait_seconds = mesh, wait_seconds
        self._descriptor: int | None = None
        self._key: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Takes the lock, on all ranks or none.

        Raises:
            RunLockedError: if another job has it, and does not end while this one waits.
            OSError: if the file cannot be made.
        """
        error: Exception | None = None
        rounds = Rounds(self.mesh, what="who still waits for the run")
        if self.mesh.rank == 0:
            try:
                self._lock(rounds)
            except (RunLockedError, OSError) as failure:
                error = failure
        rounds.finish()
        (first, *_) = gather_objects(error, self.mesh, what="lock of the run")
        if first is not None:
            raise first

    def release(self) -> None:
        """Gives it back; nothing to do if it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            assert self._key is not None
            _held_here.discard(self._key)
            os.close(descriptor)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _lock(self, rounds: Rounds) -> None:
        with explained(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            status = self.path.parent.stat()
            # The system would give a process its own lock again, and take it away when either file is closed.
            key = (status.st_dev, status.st_ino)
            if key in _held_here:
                raise RunLockedError(f"{self.path.parent} is in use by another run in this process")
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._wait_for(descriptor, rounds)
            _write_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._key = descriptor, key
        _held_here.add(key)

    def _wait_for(self, descriptor: int, rounds: Rounds) -> None:
        began, told = time.monotonic(), False
        while True:
            try:
                # Not flock, whose lock belongs to an open file, and so to every process that was forked meanwhile.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NOT_SUPPORTED:
                    logger.warning(
                        "%s cannot be locked (%s): see to it that no two jobs write to %s",
                        self.path,
                        error.strerror,
                        self.path.parent,
                    )
                    return
                if error.errno not in _HELD:
                    raise
            by_same_job = _job() is not None and _record(descriptor).get("job") == _job()
            limit = self.wait_seconds + (_PREDECESSOR_SECONDS if by_same_job else 0.0)
            if time.monotonic() >= began + limit:
                refusal = RunLockedError(
                    f"{self.path.parent} is in use by {_holder(descriptor)}; stop that job, or give this one another "
                    "run.directory"
                )
                refusal.by_same_job = by_same_job
                raise refusal
            if not told:
                logger.info("waiting up to %g s for %s to end", limit, _holder(descriptor))
                told = True
            rounds.working()
            time.sleep(_POLL_SECONDS)


def _write_holder(descriptor: int) -> None:
    text = json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "job": _job(),
        }
    )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (text + "\n").encode(), 0)
    os.fsync(descriptor)


def _holder(descriptor: int) -> str:
    """Who has the lock, in words."""
    try:
        known = _record(descriptor)
        job = f" ({known['job']})" if known["job"] else ""
        return f"process {known['pid']} on {known['host']}{job}, since {known['since']}"
    except KeyError:
        return "a process that has not said who it is"


def _record(descriptor: int) -> dict[str, Any]:
    try:
        known = json.loads(os.pread(descriptor, 2**16, 0))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _job() -> str | None:
    """What started this process, as far as the environment says."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"Slurm job {job}"
    if job := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun {job}"
    return None
