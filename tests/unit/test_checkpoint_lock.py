"""The lock of a run, between real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from partialfc.checkpoint import RunLock, RunLockedError
from partialfc.distributed.mesh import ShardMesh


def lock(directory: Path, wait_seconds: float = 0.0) -> RunLock:
    return RunLock(directory, mesh=ShardMesh.single(), wait_seconds=wait_seconds)


class Holder:
    """Another process that has the lock, and a child of that, such as a data worker, which outlives it.

    Attributes:
        pid: of the holder.
        child: of its child.
    """

    def __init__(self, directory: Path, **environment: str) -> None:
        own, other = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.environ.update(environment)
                lock(directory).acquire()
                child = os.fork()
                if child:
                    os.write(other, str(child).encode())
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(other)
        self.child = int(os.read(own, 100))
        os.close(own)
        self._ended = False

    def kill(self) -> None:
        """Until it is dead."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._ended = True

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        self.kill()


class Clock:
    """The time of a lock that waits: it goes on with each look, and at once.

    Attributes:
        looks: how often the lock was not free.
        on_look: called with their number.
    """

    def __init__(self) -> None:
        self.looks, self._now = 0, 1000.0
        self.on_look: Callable[[int], None] = lambda looks: None

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        self.looks += 1
        self.on_look(self.looks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("partialfc.checkpoint.lock.time", clock)
    monkeypatch.setattr("partialfc.checkpoint.lock._POLL_SECONDS", 0.25)
    return clock


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "run", SLURM_JOB_ID="4711")
    yield holder
    holder.end()


def test_a_second_job_is_told_who_has_the_run(tmp_path: Path, holder: Holder, clock: Clock) -> None:
    content = (tmp_path / "run" / "lock").read_bytes()
    with pytest.raises(RunLockedError) as caught:
        lock(tmp_path / "run", wait_seconds=0.5).acquire()
    assert clock.looks == 2
    host, since = os.uname().nodename, json.loads(content)["since"]
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is in use by process {holder.pid} on {host} (Slurm job 4711), since {since}; stop "
        "that job, or give this one another run.directory"
    )
    assert (tmp_path / "run" / "lock").read_bytes() == content
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_it_is_free_as_soon_as_its_holder_is_dead_whatever_became_of_its_children(
    tmp_path: Path, holder: Holder
) -> None:
    holder.kill()
    os.kill(holder.child, 0)  # lives
    with lock(tmp_path / "run"):
        held = json.loads((tmp_path / "run" / "lock").read_bytes())
        assert held["pid"] == os.getpid()
    os.kill(holder.child, 0)


def test_the_end_of_a_child_does_not_free_it(tmp_path: Path, holder: Holder) -> None:
    os.kill(holder.child, signal.SIGKILL)
    time.sleep(0.1)
    with pytest.raises(RunLockedError):
        lock(tmp_path / "run").acquire()


def test_a_job_that_is_ending_is_waited_for(
    tmp_path: Path, holder: Holder, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clock.on_look = lambda looks: holder.kill() if looks == 3 else None
    with lock(tmp_path / "run", wait_seconds=60):
        assert clock.looks == 3
    assert caplog.text.count("waiting up to 60 s for process") == 1


def test_it_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "run"):
            # Once more in the same process, where the system would see no conflict; by another way to the directory.
            (tmp_path / "same").unlink(missing_ok=True)
            (tmp_path / "same").symlink_to(tmp_path / "run")
            for path in (tmp_path / "run", tmp_path / "same"):
                with pytest.raises(RunLockedError, match="in use by another run in this process"):
                    lock(path).acquire()
            with lock(tmp_path / "other"):
                pass
    holder = Holder(tmp_path / "run")
    try:
        with pytest.raises(RunLockedError, match=rf"process {holder.pid} on \S+, since"):
            lock(tmp_path / "run").acquire()
    finally:
        holder.end()


def test_a_holder_that_has_not_written_who_it_is(tmp_path: Path, holder: Holder) -> None:
    (tmp_path / "run" / "lock").write_bytes(b"")
    with pytest.raises(RunLockedError, match="in use by a process that has not said who it is; stop that job"):
        lock(tmp_path / "run").acquire()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def not_supported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", not_supported)
    with lock(tmp_path / "run"):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'run' / 'lock'} cannot be locked (No locks available): see to it that no two jobs write to "
        f"{tmp_path / 'run'}"
    ]


@pytest.mark.parametrize("own", ["run 7", "run 8"])
def test_an_earlier_start_of_the_same_job_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, caplog: pytest.LogCaptureFixture, own: str
) -> None:
    """On a machine that is gone, its lock stays for a while: then another start may help."""
    caplog.set_level("INFO")
    same, limit = own == "run 7", 135 if own == "run 7" else 15
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)  # one job of it would have both
    holder = Holder(tmp_path, TORCHELASTIC_RUN_ID="run 7")
    try:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", own)
        with pytest.raises(RunLockedError) as refused:
            lock(tmp_path, wait_seconds=15).acquire()
        assert refused.value.by_same_job == same
        assert clock.looks == limit * 4
        assert f"waiting up to {limit} s for process {holder.pid} on" in caplog.text
    finally:
        holder.kill()
        holder.end()
