"""Signals that tell a run to stop, heard at any moment: while torch is imported, in a collective, in a save.

A Python handler runs in the main thread, between two of its instructions, so never while that waits in a collective.
Here the signal's number goes through a pipe to a thread that can act. Only the standard library is imported, for the
handlers must be in place before the seconds that the import of torch takes.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from partialfc.distributed.ranks import launched
from partialfc.supervision.exit_codes import EXIT_RETRY, EXIT_STOPPED, leave_at_once, say

__all__ = ["AGENT", "STOP_SIGNALS", "StopSignals"]

AGENT = "PARTIALFC_AGENT"  # the environment variable with the process number of launch/agent.py

# Not SIGUSR1, which NCCL may use for itself.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_LOOK_EVERY_SECONDS = 1.0
# One Ctrl-C arrives twice under torchrun: from the terminal, and handed on by the agent.
_SAME_KEYSTROKE_SECONDS = 2.0


class StopSignals:
    """Hears SIGTERM, SIGINT and SIGUSR2 inside of a `with` block, which must be entered in the main thread.

    At first a signal ends the process at once with `EXIT_STOPPED`: nothing is lost, since the last checkpoint stands,
    and one under way is whole or not there. Within `deferred()` it waits instead: `received` tells which came, and the
    ranks agree at the end of a step to save and leave. If that moment does not come within `grace_seconds`, as when
    another rank hangs, the process ends all the same with `EXIT_STOPPED`, and its stacks on standard error: what told
    it to stop would kill it soon, and the last checkpoint stands. SIGUSR2 has no such limit: it is a warning ahead of
    time, after which SIGTERM follows. A second Ctrl-C ends the process at once in any case.

    If a launcher started this process and dies, the process ends with `EXIT_RETRY`: nobody would end it any more, and
    its successor could already run.

    Args:
        grace_seconds: from SIGTERM or SIGINT to the end of the step; below the 30 seconds that Slurm (KillWait) and
            torchrun wait before they kill.

    Attributes:
        grace_seconds: as given; may be set later.
        received: the first signal's number; 0 before.
    """

    def __init__(self, *, grace_seconds: float = 20.0) -> None:
        self.received = 0
        self.grace_seconds = grace_seconds
        self._deferred = self._answered = False
        self._deadline = float("inf")
        self._interrupted_at: float | None = None
        self._lock = threading.Lock()
        self._launcher = _launcher()

    def __enter__(self) -> StopSignals:
        global _heard_here
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        _heard_here = os.getpid()
        # The pipe first: a signal whose handler finds none would be lost.
        self._previous_pipe = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, _heard) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_pipe)
        # A forked data worker may hold the pipe open: closing it here would not end what listens.
        self._writer.shutdown(socket.SHUT_RDWR)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for `answered()`. One that is still waiting at the end ends the process there.

        An error keeps it so to the end of the program, within the grace: what is to be said of it, is said.
        """
        self.defer()
        yield
        with self._lock:
            self._deferred = False
            if self.received and not self._answered:
                self._leave()

    def defer(self) -> None:
        """From here on a signal waits, within the grace: this process has something to say before it ends."""
        with self._lock:
            self._deferred = True

    def answered(self) -> None:
        """How this process ends is known, and what is left to do may take its time: of signals, only a second Ctrl-C
        changes that.
        """
        with self._lock:
            self._answered = True
            self._deadline = float("inf")

    def _listen(self) -> None:
        while True:
            pause = min(_LOOK_EVERY_SECONDS, max(0.0, self._deadline - time.monotonic()))
            if select.select([self._reader], [], [], pause)[0]:
                numbers = self._reader.recv(64)
                if not numbers:  # closed by __exit__
                    return
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._hear(number)
            if self._launcher is not None and os.getppid() != self._launcher:
                say(f"the launcher (pid {self._launcher}) is gone; leaving")
                leave_at_once(EXIT_RETRY)
            with self._lock:
                if time.monotonic() >= self._deadline:
                    self._leave(f", and the step did not end within {self.grace_seconds:g} seconds", stacks=True)

    def _hear(self, number: int) -> None:
        with self._lock:
            now = time.monotonic()
            self.received = self.received or number
            if number != signal.SIGUSR2 and not self._answered:
                self._deadline = min(self._deadline, now + self.grace_seconds)
            if not self._deferred and not self._answered:
                self._leave()
            if number == signal.SIGINT:
                if self._interrupted_at is not None and now > self._interrupted_at + _SAME_KEYSTROKE_SECONDS:
                    self._leave(", and again")
                self._interrupted_at = self._interrupted_at or now

    def _leave(self, why: str = "", *, stacks: bool = False) -> None:
        name = signal.Signals(self.received).name
        say(f"told to stop by {name}{why}; leaving; what was saved before stands", stacks=stacks)
        leave_at_once(EXIT_STOPPED)


def _launcher() -> int | None:
    """The parent, if it is one that outlives this process unless it dies; a shell may have left it on purpose."""
    if AGENT in os.environ:  # the parent of this moment is another if the agent has died in the moments before
        return int(os.environ[AGENT])
    with suppress(ValueError):
        if "TORCHELASTIC_RUN_ID" in os.environ or launched(os.environ).launcher in ("srun", "mpirun"):
            return os.getppid()
    return None


_LEFT_TO_PARENT_SECONDS = 60
_heard_here = 0  # The process in which signals go to a thread; in others, forked from it, there is none.


def _heard(number: int, frame: FrameType | None) -> None:
    """The pipe has it already. A data worker that is being forked leaves the first to its parent, which decides."""
    if os.getpid() != _heard_here and number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(_LEFT_TO_PARENT_SECONDS)  # the parent may be waiting for the end of this process


def _forget_pipe() -> None:
    # A forked process shares the pipe: what it hears would count as heard by its parent.
    if _heard_here:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_pipe)
