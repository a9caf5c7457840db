"""A thread that sees when a rank no longer gets on, says which, and ends the run so that it can start again."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.trail import TRAIL
from partialfc.supervision.exit_codes import EXIT_RETRY, leave_at_once, say
from partialfc.supervision.heartbeats import BEAT_SECONDS, Beat, Heartbeats

__all__ = ["FAULTS_DIRECTORY", "Watchdog"]

logger = logging.getLogger(__name__)

FAULTS_DIRECTORY = "faults"
_FIRST_STEP = "first step"
_WRITE_SECONDS = 3.0  # The file system may be what hangs.
_OVERSLEPT_SECONDS = 5.0
_COMMUNICATION_FRAMES = 8


class Watchdog:
    """Watches this rank's progress, and knows of the others'. Made by all ranks together.

    When no step ends for `limit_seconds`, this rank asks what the others do, writes who seems to be the cause, what
    each rank is in and the stacks of its own threads to standard error and to `faults/`, and ends with `EXIT_RETRY`.
    All ranks see it at about the same time, since they wait for each other; the one that is stopped altogether does
    not, and is named by the others.

    There is no limit before the second step ends (the first compiles), nor within a `phase`: nobody knows how long an
    evaluation or a save may take. Ranks that wait there for one that hangs have the timeout of collectives. Time in
    which this process was stopped as a whole does not count.

    Args:
        mesh: the ranks.
        directory: of the run.
        limit_seconds: without progress.
    """

    def __init__(self, mesh: ShardMesh, *, directory: Path, limit_seconds: float) -> None:
        self._mesh, self._directory, self._limit_seconds = mesh, directory, limit_seconds
        self._step, self._count = 0, 0
        self._phases: list[str] = ["start"]
        self._progressed_at = time.monotonic()
        self._main = threading.main_thread().ident
        self._closing = threading.Event()
        self.heartbeats = Heartbeats(mesh, self._beat) if mesh.size > 1 else None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """This rank is at the end of step number `step`. From the second call on the limit holds."""
        self._step, self._progressed_at = step, time.monotonic()
        self._phases = [_FIRST_STEP] if self._phases == ["start"] else []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something that may take any time, such as an evaluation."""
        self._phases.append(name)
        yield
        self._progressed_at = time.monotonic()
        self._phases.remove(name)

    def close(self) -> None:
        """Ends the watch."""
        self._closing.set()
        self._thread.join()
        if self.heartbeats is not None:
            self.heartbeats.close()

    def tell_others(self, error: str) -> None:
        """This rank ends with an error of its own."""
        if self.heartbeats is not None:
            self.heartbeats.end(error, blameless=False)

    def communication_failed(self, error: str) -> None:
        """Ends this process, if that is because some ranks no longer take part, and names them; else returns."""
        if self.heartbeats is not None:
            self.heartbeats.end(error, blameless=True)
            if (cause := self.heartbeats.find_cause()) is not None:
                self._end(f"communication failed ({error})", cause.text, stacks=False)

    def _run(self) -> None:
        pause = min(BEAT_SECONDS, self._limit_seconds / 4)
        looked_at = time.monotonic()
        while not self._closing.wait(pause):
            now = time.monotonic()
            overslept, looked_at = now - looked_at - pause, now
            if overslept > _OVERSLEPT_SECONDS:
                # It may have progressed since it was woken.
                self._progressed_at = min(now, self._progressed_at + overslept)
            if self.heartbeats is not None and self.heartbeats.cause is not None:
                self._end("the run ends", self.heartbeats.cause.text)
            if not self._phases and now - self._progressed_at > self._limit_seconds:
                self._ask_who()

    def _ask_who(self) -> None:
        step = self._step
        reason = f"no progress for {time.monotonic() - self._progressed_at:.1f} seconds after step {step}"
        who = "the stacks tell in what"
        if self.heartbeats is not None:
            self.heartbeats.end(reason, blameless=True)
            cause = self.heartbeats.find_cause()
            who = "it cannot be told which rank is the cause" if cause is None else cause.text
            if self._step != step or self._phases:  # it went on after all
                self.heartbeats.end("", blameless=False)
                return
        self._end(f"{reason} (supervision.hang_timeout_seconds={self._limit_seconds:g})", who)

    def _end(self, reason: str, who: str, *, stacks: bool = True) -> None:
        message = f"{reason}: {who}"
        say(message, stacks=stacks)
        thread = threading.Thread(target=self._write, args=(message,), daemon=True)
        thread.start()
        thread.join(_WRITE_SECONDS)
        if self.heartbeats is not None:
            self.heartbeats.leave()
        leave_at_once(EXIT_RETRY)

    def _write(self, message: str) -> None:
        directory = self._directory / FAULTS_DIRECTORY
        path = directory / f"step-{self._step:08d}-rank-{self._mesh.rank:05d}.txt"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                ranks = self._beat().doing() if self.heartbeats is None else self.heartbeats.describe_all()
                file.write(f"{message}\n\n{ranks}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.error("cannot write %s: %s", path, error)

    def _beat(self) -> Beat:
        self._count += 1
        phases = tuple(self._phases)  # the main thread changes them meanwhile
        waits, code = _main_thread(self._main)
        return Beat(
            count=self._count,
            step=self._step,
            phase=phases[-1] if phases else "",
            collectives=TRAIL.calls.total(),
            collective=TRAIL.last,
            waits=waits,
            code=code,
            still_seconds=time.monotonic() - self._progressed_at,
        )


def _main_thread(ident: int | None) -> tuple[bool, str]:
    """Whether the main thread is in communication, and the line of code outside of torch that it is in."""
    frame = sys._current_frames().get(ident or 0)
    waits, code = False, ""
    for depth in range(10**3):
        if frame is None:
            break
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        in_torch = "/torch/" in path
        if depth < _COMMUNICATION_FRAMES and ("/torch/distributed/" in path or function == "_engine_run_backward"):
            waits = True
        if not in_torch:
            code = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} ({function})"
            break
        frame = frame.f_back
    return waits, code
