"""Signals to stop: heard wherever the main thread is, and answered at the end of a step, or at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from partialfc.supervision.exit_codes import EXIT_RETRY, EXIT_STOPPED
from partialfc.supervision.signals import AGENT

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost"}
PRELUDE = """
import os, signal, sys, threading, time
from partialfc.supervision.signals import StopSignals
def say(text):
    os.write(1, (text + "\\n").encode())
def hear(signals):
    while not signals.received:
        time.sleep(0.01)
"""


@contextmanager
def _running(body: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "ready"."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, **environment},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def _ended(process: subprocess.Popen[str], timeout: float = 120.0) -> tuple[int, str, str]:
    code = process.wait(timeout)  # what these processes write fits into their pipes
    assert process.stdout is not None
    assert process.stderr is not None
    return code, process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_outside_of_steps_the_process_leaves_at_once(number):
    with _running("with StopSignals():\n say('ready')\n threading.Lock().acquire(); time.sleep(60)") as process:
        process.send_signal(number)
        code, _, errors = _ended(process)
    assert code == EXIT_STOPPED
    assert f"told to stop by {number.name}; leaving" in errors


def test_nothing_but_the_standard_library_is_needed_to_hear():
    with _running(
        "with StopSignals():\n say('ready')\n print('torch' in sys.modules, 'numpy' in sys.modules)"
    ) as process:
        assert _ended(process)[:2] == (0, "False False\n")


def test_within_steps_it_waits_for_the_answer_and_then_takes_its_time():
    body = """
with StopSignals(grace_seconds=0.5) as signals:
    with signals.deferred():
        say("ready")
        hear(signals)
        signals.answered()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        say(signal.Signals(signals.received).name)
say("end")
"""
    with _running(body) as process:
        process.send_signal(signal.SIGUSR2)
        assert _ended(process)[:2] == (0, "SIGUSR2\nend\n")


def test_an_early_warning_has_no_limit_until_the_order_follows():
    body = """
with StopSignals(grace_seconds=0.3) as signals:
    with signals.deferred():
        say("ready")
        hear(signals)
        say("warned")
        time.sleep(600)
"""
    with _running(body) as process:
        process.send_signal(signal.SIGUSR2)
        assert process.stdout is not None
        assert process.stdout.readline() == "warned\n"
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        code, _, errors = _ended(process)
    assert code == EXIT_STOPPED
    assert "told to stop by SIGUSR2, and the step did not end within 0.3 seconds" in errors


def test_an_answered_signal_costs_nothing_more():
    """Nobody looks for a moment that has passed over and over again."""
    body = """
import select
looks, look, clock = [], select.select, [100.0]
def counted(*arguments):
    looks.append(arguments[-1])
    return look(*arguments)
select.select = counted
time.monotonic = lambda: clock[0]
with StopSignals(grace_seconds=60) as signals:
    with signals.deferred():
        say("ready")
        hear(signals)
        signals.answered()
        clock[0] += 61
        while len(looks) < 4:
            time.sleep(0.01)
        say(f"{looks[-1]:g}")
"""
    with _running(body) as process:
        process.send_signal(signal.SIGTERM)
        assert _ended(process)[:2] == (0, "1\n")


def test_a_step_that_does_not_end_is_left_with_its_stacks():
    body = """
def wait_for_others():
    lock = threading.Lock(); lock.acquire()
    say("ready")
    lock.acquire()  # no Python handler runs here
with StopSignals(grace_seconds=0.5) as signals:
    with signals.deferred():
        wait_for_others()
"""
    with _running(body, **LAUNCHED) as process:
        process.send_signal(signal.SIGTERM)
        code, _, errors = _ended(process)
    assert code == EXIT_STOPPED
    assert "(rank 3): told to stop by SIGTERM, and the step did not end within 0.5 seconds" in errors
    assert "in wait_for_others" in errors


def test_a_signal_that_waits_when_the_steps_end_is_obeyed_there():
    body = """
with StopSignals() as signals:
    with signals.deferred():
        say("ready")
        hear(signals)
    say("not reached")
"""
    with _running(body) as process:
        process.send_signal(signal.SIGTERM)
        assert _ended(process)[:2] == (EXIT_STOPPED, "")


def test_after_an_error_the_message_still_comes_out():
    body = """
with StopSignals() as signals:
    try:
        with signals.deferred():
            raise ValueError
    except ValueError:
        say("ready")
        hear(signals)
        say("explained")
        sys.exit(7)
"""
    with _running(body) as process:
        process.send_signal(signal.SIGTERM)
        assert _ended(process)[:2] == (7, "explained\n")


def test_a_second_interrupt_leaves_but_one_keystroke_heard_twice_does_not():
    body = """
clock = [100.0]
time.monotonic = lambda: clock[0]  # goes on with signals alone
with StopSignals(grace_seconds=60) as signals:
    hear_one = signals._hear
    def heard(number):
        hear_one(number)
        clock[0] += 1.5
        say("heard")
    signals._hear = heard
    with signals.deferred():
        say("ready")
        time.sleep(600)
"""
    with _running(body) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGINT)
        code, _, errors = _ended(process)
    assert code == EXIT_STOPPED
    assert "SIGINT, and again" in errors


def test_what_a_forked_worker_hears_is_not_taken_for_its_parents():
    body = """
with StopSignals(grace_seconds=60) as signals:
    with signals.deferred():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"forked")
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                time.sleep(0.01)
            os.write(writer, b"heard")
            time.sleep(60)
            os._exit(0)
        assert os.read(reader, 10) == b"forked"
        for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
            os.kill(child, number)
        assert os.read(reader, 10) == b"heard"
        time.sleep(0.2)
        say("ready")
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it leaves the first of each to its parent
        os.kill(child, signal.SIGTERM)
        say(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])} {signals.received}")
"""
    with _running(body) as process:
        assert _ended(process)[:2] == (0, "-15 0\n")


def test_leaving_takes_worker_processes_along():
    body = """
import multiprocessing
with StopSignals() as signals:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    say("ready")
    say(str(child.pid))
    time.sleep(60)
"""
    with _running(body) as process:
        assert process.stdout is not None
        output = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        code, _, _ = _ended(process)
    assert code == EXIT_STOPPED
    deadline = time.monotonic() + 30  # the child would sleep for 60
    while _runs(int(output)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_when_the_launcher_dies_its_processes_leave():
    body = """
import subprocess
child = '''
import os, time
from partialfc.supervision.signals import StopSignals
with StopSignals() as signals, signals.deferred():
    os.write(1, b"ready\\\\n")
    time.sleep(60)
'''
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""
    with _running(body, TORCHELASTIC_RUN_ID="test", **LAUNCHED) as launcher:
        launcher.kill()
        launcher.wait()
        assert launcher.stderr is not None
        started = time.monotonic()
        errors = launcher.stderr.read()  # ends when the child has closed it too
    assert f"(rank 3): the launcher (pid {launcher.pid}) is gone" in errors
    assert time.monotonic() - started < 45  # the child would sleep for 60


def test_a_process_whose_agent_died_while_python_started_leaves():
    with subprocess.Popen(["true"]) as dead:
        pass
    command = [sys.executable, "-c", f"{PRELUDE}with StopSignals():\n time.sleep(600)"]
    assert subprocess.run(command, env={**os.environ, AGENT: str(dead.pid)}, timeout=120).returncode == EXIT_RETRY


def test_handlers_are_put_back():
    body = """
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
with StopSignals():
    pass
assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
assert signal.set_wakeup_fd(-1) == -1
assert threading.active_count() == 1
say("ready")
"""
    with _running(body) as process:
        assert _ended(process)[:2] == (0, "")


LEAVES = """
import atexit, multiprocessing, sys, time
from partialfc.supervision.exit_codes import leave

class Held:
    def __del__(self):
        print("taken down")

held = Held()
if sys.argv[1:]:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
atexit.register(print, "cleaned up")
print("said", end=" ")
leave(75)
"""


@pytest.mark.parametrize(
    ("environment", "said"), [({}, "said cleaned up\ntaken down\n"), (LAUNCHED, "said cleaned up\n")]
)
def test_a_rank_of_several_ends_without_taking_its_interpreter_down(environment: dict[str, str], said: str):
    """In which a thread of gloo would abort the process, one time in ten."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
    done = subprocess.run([sys.executable, "-c", LEAVES], env=clean | environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (EXIT_RETRY, said)


def test_a_rank_that_ends_does_not_wait_for_its_data_workers():
    command = [sys.executable, "-c", LEAVES, "with a child"]
    done = subprocess.run(command, env=os.environ | LAUNCHED, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (EXIT_RETRY, "said cleaned up\n")
