"""Real processes that hang, stop, die, fail and disagree: all others say which, in bounded time."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support import SOON_SECONDS, Ranks, running_ranks

from partialfc.supervision.exit_codes import EXIT_RETRY, EXIT_STOPPED, EXIT_USER_ERROR

PRELUDE = """
import os, signal, sys, threading, time, traceback
from pathlib import Path
from partialfc.supervision.signals import StopSignals
from partialfc.distributed.collectives import max_over_ranks
from partialfc.distributed.launch import process_group
from partialfc.distributed.trail import TRAIL
from partialfc.supervision.agreement import SupervisionError
from partialfc.supervision.exit_codes import leave
from partialfc.supervision.supervisor import Supervisor
import torch

directory, limit = Path(sys.argv[1]), float(sys.argv[2])

def say(text):
    os.write(1, (text + "\\n").encode())

def limit_hangs_when(condition):
    # Not from the start: until then a busy machine may take any time.
    def wait():
        while not condition():
            time.sleep(0.01)
        supervisor._watchdog._limit_seconds = 2.0
    threading.Thread(target=wait, daemon=True).start()

def run(mesh, device, supervisor):
    rank = mesh.rank
{body}

try:
    with StopSignals(grace_seconds=10) as signals, process_group("cpu") as (mesh, device):
        with Supervisor(mesh, directory=directory, hang_timeout_seconds=limit, signals=signals) as supervisor:
            run(mesh, device, supervisor)
except SupervisionError as error:
    sys.stderr.write(f"{error}\\n")
    leave(error.exit_code)
except BaseException:
    traceback.print_exc()
    leave(1)
leave(0)
"""

STEPS = """
    with supervisor.steps():
        for step in range(10**6):
            supervisor.beat(step)
            supervisor.together(lambda: load(rank, step))
            if supervisor.stopping:
                say(f"saved {step}")
                raise supervisor.stopped(step, saved=True)
            if step == 3:
                say("ready")
            compute(rank, step)
            max_over_ranks([step], mesh)
"""


def _program(body: str, functions: str = "") -> str:
    defaults = "def load(rank, step):\n    time.sleep(0.02)\ndef compute(rank, step):\n    pass\n"
    return defaults + functions + PRELUDE.replace("{body}", "    " + body.strip().replace("\n", "\n"))


def _running(directory: Path, program: str, *, ranks: int, limit: float = 60.0) -> AbstractContextManager[Ranks]:
    command = [sys.executable, "-c", program, str(directory / "run"), str(limit)]
    return running_ranks(directory, [command] * ranks)


def test_all_ranks_stop_together_after_a_signal_to_one(tmp_path):
    with _running(tmp_path, _program(STEPS), ranks=2) as ranks:
        ranks.wait_until_ready()
        ranks.processes[1].send_signal(signal.SIGUSR2)
        assert ranks.ended() == [EXIT_STOPPED, EXIT_STOPPED]
        saved = [process.communicate()[0] for process in ranks.processes]
    assert re.fullmatch(rb"saved \d+\n", saved[0])
    assert saved[0] == saved[1]
    assert "told to stop by SIGUSR2; saved after step" in ranks.errors(0)


def test_an_error_of_one_rank_is_that_of_all(tmp_path):
    load = "def load(rank, step):\n    if rank == 1 and step == 5:\n        raise OSError('no such disk')\n"
    with _running(tmp_path, _program(STEPS, load), ranks=2) as ranks:
        assert ranks.ended() == [EXIT_USER_ERROR] * 2
    messages = [ranks.errors(rank) for rank in range(2)]
    assert re.fullmatch(r"rank 1 \(\S+\): OSError: no such disk\n", messages[0])
    assert messages[0] == messages[1]


@pytest.mark.soak
def test_a_bug_in_one_rank_ends_all_and_shows_where(tmp_path):
    load = "def load(rank, step):\n    if rank == 1 and step == 5:\n        [][0]\n"
    with _running(tmp_path, _program(STEPS, load), ranks=2) as ranks:
        assert ranks.ended() == [1, 1]
    assert "rank 1 (" in ranks.errors(0)
    assert "IndexError: list index out of range" in ranks.errors(0)
    assert "Traceback" not in ranks.errors(0)
    assert ", in load" in ranks.errors(1)


NAMED_WITHIN_SECONDS = 60.0  # on a busy machine; test_faults.py has the figure for one that is not
# In what a watchdog may take for each part of its report.
PATIENT = """
from partialfc.supervision import heartbeats, watchdog
heartbeats._ASK_SECONDS = heartbeats._LEAVE_SECONDS = heartbeats._LISTEN_SECONDS = watchdog._WRITE_SECONDS = 60.0
"""
BOTH_CULPRITS = pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.soak), 1])


@BOTH_CULPRITS
def test_a_rank_that_sleeps_is_named_by_all(tmp_path, culprit):
    load = f"""
def load(rank, step):
    if step == 5 and rank == {culprit}:
        say("ready")
        time.sleep(600)
    if step == 5:
        calls = TRAIL.calls.total()
        limit_hangs_when(lambda: TRAIL.calls.total() > calls)
"""
    steps = STEPS.replace("if step == 3", f"if step == 3 and rank != {culprit}")
    with _running(tmp_path, _program(steps, PATIENT + load), ranks=2, limit=600) as ranks:
        ranks.wait_until_ready()
        named = rf"rank {culprit} \(\S+, pid \d+\) is behind the others; last seen after step 5"
        assert ranks.seconds_until(1 - culprit, named) < NAMED_WITHIN_SECONDS
        assert ranks.ended() == [EXIT_RETRY] * 2
    for rank in range(2):
        assert re.search(named, ranks.errors(rank)), ranks.errors(rank)
    # Where, only the one that sleeps can show.
    assert re.search(r"line \d+ in load\n", ranks.errors(culprit))
    reports = sorted((tmp_path / "run" / "faults").iterdir())
    assert [report.name for report in reports] == [f"step-00000005-rank-0000{rank}.txt" for rank in range(2)]
    text = reports[culprit].read_text()
    assert re.search(rf"\nrank {1 - culprit} \(\S+, pid \d+\): after step 5, waiting in .*max_over_ranks", text)
    assert re.search(rf"\nrank {culprit} \(\S+, pid \d+\): after step 5, in \S+ \(load\), last collective \S+", text)
    assert re.search(r"line \d+ in load\n", text)


@BOTH_CULPRITS
@pytest.mark.parametrize("elsewhere", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_stopped_rank_is_named_by_the_others(tmp_path, culprit, elsewhere):
    """On this machine its state can be seen; elsewhere it is known by its silence, or by that of the store."""
    blind = "from partialfc.supervision.heartbeats import Place\nPlace.state = lambda place: ''\n"
    compute = """
def compute(rank, step):
    if step == 3:
        limit_hangs_when((directory / "stopped").exists)
"""
    with _running(tmp_path, _program(STEPS, blind * elsewhere + compute), ranks=2, limit=600) as ranks:
        ranks.wait_until_ready()
        ranks.processes[culprit].send_signal(signal.SIGSTOP)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "stopped").touch()
        why = "no longer answers: it is stopped" if elsewhere else r"is stopped \(SIGSTOP"
        named = rf": rank {culprit} \(\S+, pid {ranks.processes[culprit].pid}\) {why}"
        assert ranks.seconds_until(1 - culprit, named) < NAMED_WITHIN_SECONDS
        assert ranks.processes[1 - culprit].wait(SOON_SECONDS) == EXIT_RETRY


@pytest.mark.soak
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_killed_rank_is_named_by_all_others(tmp_path, culprit):
    with _running(tmp_path, _program(STEPS), ranks=3) as ranks:
        ranks.wait_until_ready()
        ranks.processes[culprit].kill()
        others = [rank for rank in range(3) if rank != culprit]
        assert [ranks.processes[rank].wait(SOON_SECONDS) for rank in others] == [EXIT_RETRY] * 2
    for rank in others:
        assert re.search(rf": rank {culprit} \(\S+, pid {ranks.processes[culprit].pid}\) is dead", ranks.errors(rank))


def test_a_rank_that_leaves_with_an_error_of_its_own_is_quoted(tmp_path):
    compute = "def compute(rank, step):\n    if rank == 1 and step == 5:\n        raise RuntimeError('out of memory')\n"
    with _running(tmp_path, _program(STEPS, compute), ranks=2) as ranks:
        assert ranks.ended() == [EXIT_RETRY, 1]
    assert re.search(r": rank 1 \(\S+, pid \d+\) has left: RuntimeError: out of memory", ranks.errors(0))


@pytest.mark.soak
@pytest.mark.parametrize("culprit", [0, 1])
def test_whom_a_collective_waited_for_in_vain_is_named(tmp_path, culprit):
    """In phases there is no limit of hangs, but collectives have theirs."""
    compute = f"def compute(rank, step):\n    if rank == {culprit} and step == 5:\n        time.sleep(600)\n"
    steps = STEPS.replace(
        "compute(rank, step)",
        "\n".join(
            [
                "with supervisor.phase('save'):",
                " " * 16 + "compute(rank, step)",
                " " * 16 + "max_over_ranks([step], mesh)",
            ]
        ),
    )
    # They may come to the start further apart than that.
    meet = """
from datetime import timedelta
from partialfc.distributed import launch
meet = launch.meet
launch.meet = lambda place, timeout, **options: meet(place, timedelta(seconds=300), **options)
"""
    program = _program(steps, compute + meet).replace('process_group("cpu")', 'process_group("cpu", timeout_seconds=5)')
    with _running(tmp_path, program, ranks=2) as ranks:
        assert ranks.ended() == [EXIT_RETRY] * 2
    named = (
        rf": rank {culprit} \(\S+, pid \d+\) is behind the others; last seen in save after step 5, in \S+ \(compute\)"
    )
    assert re.search("communication failed .*" + named, ranks.errors(1 - culprit)), ranks.errors(1 - culprit)
    assert re.search("the run ends" + named, ranks.errors(culprit)), ranks.errors(culprit)
    assert re.search(r"line \d+ in compute\n", ranks.errors(culprit))
