"""What supervision concludes from what ranks say, without any ranks."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from partialfc.distributed.mesh import ShardMesh
from partialfc.supervision.agreement import agree, exit_code_of
from partialfc.supervision.exit_codes import EXIT_RETRY, EXIT_STOPPED
from partialfc.supervision.heartbeats import Beat, Place, suspects
from partialfc.supervision.preflight import clock_warning, disagreements, preflight
from partialfc.supervision.signals import StopSignals
from partialfc.supervision.supervisor import Supervisor
from partialfc.supervision.watchdog import Watchdog

BEAT = Beat(
    count=5, step=7, phase="", collectives=30, collective="all_reduce", waits=True, code="a.py:1 (f)", still_seconds=9.0
)


def _found(before: list[Beat], after: list[Beat]) -> list[tuple[int, str]]:
    return [(found.rank, found.why) for found in suspects(dict(enumerate(before)), dict(enumerate(after)))]


def _later(*beats: Beat) -> list[Beat]:
    return [replace(beat, count=beat.count + 1) for beat in beats]


def test_who_says_nothing_new_comes_first():
    behind = replace(BEAT, collectives=29)
    assert _found([BEAT, behind, BEAT], [*_later(BEAT, behind), BEAT]) == [
        (2, "no longer answers: it is stopped, dead or cut off")
    ]


def test_who_has_left_with_an_error_comes_next_and_who_left_because_of_others_does_not_count():
    left = replace(BEAT, end="ValueError: no", blameless=False)
    fled = replace(BEAT, end="communication failed", blameless=True)
    assert _found([left, fled, BEAT], [left, fled, *_later(BEAT)]) == [(0, "has left: ValueError: no")]


def test_who_is_behind_in_steps_or_collectives_comes_next():
    behind = replace(BEAT, collectives=29)
    assert _found([BEAT, behind, BEAT], _later(BEAT, behind, BEAT)) == [(1, "is behind the others")]
    behind = replace(BEAT, step=6, collectives=31)
    assert _found([BEAT, behind, behind], _later(BEAT, behind, behind)) == [
        (1, "is behind the others"),
        (2, "is behind the others"),
    ]


def test_who_does_not_wait_while_others_do_comes_last():
    busy = replace(BEAT, waits=False)
    assert _found([busy, BEAT], _later(busy, BEAT)) == [(0, "does not wait for the others, as they do for it")]
    assert _found([busy, busy], _later(busy, busy)) == []
    assert _found([BEAT, BEAT], _later(BEAT, BEAT)) == []


def test_a_process_of_this_machine_can_be_looked_at():
    place = Place.here()
    assert place.state() in {"R", "S"}
    assert replace(place, pid=2**22 + 1).state() == "Z"
    assert replace(place, machine="another").state() == ""


def test_disagreements_are_grouped_by_value():
    hosts = [f"node{rank // 4}" for rank in range(8)]
    facts = [{"torch": "2.13.0", "data": "abc"} for _ in range(8)]
    assert disagreements(facts, hosts) == []
    facts[7] = {"torch": "2.11.0"}
    facts[2] = {"torch": "2.12.0", "data": "abc"}
    assert disagreements(facts, hosts) == [
        "torch: 2.13.0 on ranks 0-1, 3-6, 2.12.0 on rank 2 (node0), 2.11.0 on rank 7 (node1)",
        "data: abc on ranks 0-6, none on rank 7 (node1)",
    ]


def test_clocks_far_from_the_middle_one_are_named():
    hosts = ["a", "a", "b", "c"]
    assert clock_warning([100.0, 100.1, 104.0, 99.0], hosts) == []
    (warning,) = clock_warning([100.0, 100.1, 100.2, 40.0], hosts)
    assert warning.startswith("the clock of rank 3 (c) is -60.1 seconds from those of the others")


def test_one_process_goes_through_the_same_preflight(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = tmp_path / "runs" / "first"
    with caplog.at_level(logging.INFO):
        preflight(ShardMesh.single(), torch.device("cpu"), facts={"data": "abc"}, directory=directory)
    assert caplog.messages == [f"preflight: 1 process, cpu, torch {torch.__version__}"]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_said_before_the_first_step(tmp_path: Path):
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "run"
    with pytest.raises(OSError, match=f"run.directory {directory} cannot be written: "):
        preflight(ShardMesh.single(), torch.device("cpu"), facts={}, directory=directory)


def test_storage_that_fails_at_the_start_may_do_better_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "touch", stale)
    directory = tmp_path / "runs" / "first"
    with pytest.raises(OSError, match="cannot be written") as caught:
        preflight(ShardMesh.single(), torch.device("cpu"), facts={}, directory=directory)
    told = f"run.directory {directory} cannot be written: {os.strerror(errno.ESTALE)}: {tmp_path}"
    assert str(caught.value) == f"[Errno {errno.ESTALE}] {told}"
    assert exit_code_of(caught.value) == EXIT_RETRY


def test_agreement_of_one_process():
    assert not agree(ShardMesh.single(), signal=0, error=None).stop
    assert agree(ShardMesh.single(), signal=12, error=None).stop
    with pytest.raises(ValueError, match="no such class"):
        agree(ShardMesh.single(), signal=0, error=ValueError("no such class"))


def test_a_process_on_its_own_takes_the_same_path(tmp_path: Path):
    with Supervisor(
        ShardMesh.single(), directory=tmp_path, hang_timeout_seconds=60, signals=StopSignals()
    ) as supervisor:
        with supervisor.steps():
            for step in range(3):
                supervisor.beat(step)
                assert supervisor.together(lambda step=step: step * 2) == step * 2
                assert not supervisor.stopping
        with pytest.raises(OSError, match="no more"):
            supervisor.together(lambda: _raise(OSError("no more")))
    assert not any(thread.name in {"watchdog", "heartbeats"} for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


TOLD_TO_STOP = """
import os, signal, sys, time
from pathlib import Path
from partialfc.distributed.mesh import ShardMesh
from partialfc.supervision import supervisor
from partialfc.supervision.signals import StopSignals

def others_have_ended(values, mesh, **_):
    os.kill(os.getpid(), signal.SIGTERM)
    while not signals.received or sys.argv[2] == "or hang":
        time.sleep(0.01)
    return values

supervisor.is_agreed = lambda error: True
supervisor.max_over_ranks = others_have_ended
with StopSignals(grace_seconds=0.5 if sys.argv[2] == "or hang" else 300) as signals:
    try:
        with supervisor.Supervisor(
            ShardMesh.single(), directory=Path(sys.argv[1]), hang_timeout_seconds=60, signals=signals
        ):
            raise OSError("no such disk")
    except OSError as error:
        print(error)
"""


def test_a_rank_with_a_message_to_say_is_not_stopped_by_the_end_of_the_others(tmp_path: Path):
    command = [sys.executable, "-c", TOLD_TO_STOP, str(tmp_path), ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no such disk\n", "")


def test_its_grace_holds_all_the_same(tmp_path: Path):
    command = [sys.executable, "-c", TOLD_TO_STOP, str(tmp_path), "or hang"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_STOPPED
    assert "told to stop by SIGTERM, and the step did not end within 0.5 seconds" in done.stderr


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the watchdog would have ended this process."""
    reasons: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason, who: reasons.append(reason))
    return reasons


class Clock:
    """The time of a watchdog, which goes on when a test says so, however busy the machine is."""

    def __init__(self) -> None:
        self._now, self._looks = 100.0, 0

    def monotonic(self) -> float:
        if threading.current_thread().name == "watchdog":
            self._looks += 1
        return self._now

    def let_pass(self, seconds: float) -> None:
        """Until the watchdog has looked at the clock again."""
        self._now += seconds
        self.look()

    def look(self) -> None:
        """Until the watchdog has looked at the clock, and acted on it."""
        looks, deadline = self._looks, time.monotonic() + 60
        while self._looks < looks + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("partialfc.supervision.watchdog.time", clock)
    return clock


@contextmanager
def watched(directory: Path, limit_seconds: float) -> Iterator[Watchdog]:
    watchdog = Watchdog(ShardMesh.single(), directory=directory, limit_seconds=limit_seconds)
    try:
        yield watchdog
    finally:
        watchdog.close()


def test_the_limit_holds_between_steps_but_not_at_the_start_nor_in_phases(
    tmp_path: Path, ended: list[str], clock: Clock
):
    with watched(tmp_path, 0.5) as watchdog:
        clock.let_pass(0.8)
        watchdog.beat(7)
        clock.let_pass(0.8)  # the first step
        watchdog.beat(8)
        clock.let_pass(0.4)
        with watchdog.phase("save"):
            clock.let_pass(0.8)
            with watchdog.phase("evaluation"):
                clock.let_pass(0.1)
            clock.let_pass(0.8)
        clock.let_pass(0.4)
        watchdog.beat(9)
        clock.let_pass(0.5)
        assert ended == []
        clock.let_pass(0.1)
    assert set(ended) == {"no progress for 0.6 seconds after step 9 (supervision.hang_timeout_seconds=0.5)"}


def test_a_watched_process_that_was_stopped_as_a_whole_has_not_hung(tmp_path: Path, ended: list[str], clock: Clock):
    """As by Ctrl-Z: no time passes for it, whatever the clock says when it goes on."""
    with watched(tmp_path, 0.5) as watchdog:
        watchdog.beat(0)
        watchdog.beat(1)
        clock.let_pass(600)
        assert ended == []
        # What it counts from is not in a future that has to be waited for.
        clock.let_pass(0.6)
        assert ended


def test_a_step_that_ends_before_the_watchdog_wakes_is_where_it_counts_from(
    tmp_path: Path, ended: list[str], clock: Clock
):
    with watched(tmp_path, 0.5) as watchdog:
        watchdog.beat(0)
        watchdog.beat(1)
        clock._now += 600
        watchdog.beat(2)
        clock.look()
        assert ended == []
        clock.let_pass(0.6)
        assert set(ended) == {"no progress for 0.6 seconds after step 2 (supervision.hang_timeout_seconds=0.5)"}


def test_a_report_is_a_file_with_the_stacks(tmp_path: Path):
    watchdog = Watchdog(ShardMesh.single(), directory=tmp_path, limit_seconds=60)
    watchdog.beat(3)
    watchdog._write("what happened")
    watchdog.close()
    (path,) = (tmp_path / "faults").iterdir()
    assert path.name == "step-00000003-rank-00000.txt"
    text = path.read_text()
    assert text.startswith("what happened\n\nin first step after step 3, in supervision/watchdog.py:")
    assert "in test_a_report_is_a_file_with_the_stacks" in text


WITH_WORKERS = """
import multiprocessing, os, time
import torch
import torch.utils.data._utils.worker
from partialfc.data.loader import WholeBatchLoader
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 3600.0  # not by the look of torch at the parent
class Steps:
    def __len__(self):
        return 1000
    def __getitem__(self, step):
        return step
batches = iter(WholeBatchLoader(Steps(), num_workers=2))
next(batches)
os.write(1, " ".join(str(child.pid) for child in multiprocessing.active_children()).encode() + b"\\n")
time.sleep(600)
"""


def test_data_workers_end_with_a_rank_that_is_killed():
    """They hold its connections: while they live, other ranks wait for it."""
    parent = subprocess.Popen([sys.executable, "-c", WITH_WORKERS], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        workers = [replace(Place.here(), pid=int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    # torch looks at the parent every few seconds, which is switched off here: without ours they live on.
    deadline = time.monotonic() + 60
    try:
        while any(worker.state() != "Z" for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
