"""What each rank last said of itself, where all others can read it when something is wrong.

A store of torch.distributed on the first rank holds one small text for each rank. A rank writes its own every second,
and reads those of others only when it waits in vain. The first that finds out who is the cause writes that there too,
and all others, who look for it every second, have it from there. So the traffic is two small messages a second and
rank. It is a store of its own: the process group's belongs to the launcher, and calls of torch may be waiting in it. A
file for each rank in the run directory would need no server, but others may see only a minute later what one host
writes to a shared file system.

If the first rank itself stops, nobody can read anything any more; but that tells just who has stopped.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from torch.distributed import TCPStore

from partialfc.distributed.collectives import gather_objects
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.ranks import launched, meeting_host

__all__ = ["BEAT_SECONDS", "Beat", "Cause", "Heartbeats", "Place", "Suspicion", "suspects"]

Result = TypeVar("Result")

BEAT_SECONDS = 1.0
_LISTEN_SECONDS = 3.5  # Without a new beat in between a rank is silent: a busy machine may delay a few.
_ASK_SECONDS = 4.0
_LEAVE_SECONDS = 5.0
_SHOWN = 10
_CAUSE, _NO_CAUSE = "cause", "none"


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        host: its name.
        pid: of the process.
        machine: equal if the pids of two ranks mean processes of the same system.
    """

    host: str
    pid: int
    machine: str

    @classmethod
    def here(cls) -> Place:
        """That of this process."""
        machine = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            machine = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
        return cls(socket.gethostname(), os.getpid(), machine)

    def state(self) -> str:
        """That of the process if it is on this machine: a letter as ps shows it, "Z" also if it is gone; else ""."""
        if not self.machine or self.machine != Place.here().machine:
            return ""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "Z"
        return status.rpartition(")")[2].split()[0]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        count: of its beats.
        step: finished steps.
        phase: what it does; "" for steps.
        collectives: how many it has begun.
        collective: the newest of them.
        waits: whether its main thread is in communication.
        code: where its main thread is, as file, line and function.
        still_seconds: since its last progress.
        end: why it ends; "" while it runs.
        blameless: whether it ends because of other ranks.
        done: whether it has read all it needs.
    """

    count: int
    step: int
    phase: str
    collectives: int
    collective: str
    waits: bool
    code: str
    still_seconds: float
    end: str = ""
    blameless: bool = False
    done: bool = False

    def doing(self) -> str:
        """In words."""
        what = f"in {self.phase} after step {self.step}" if self.phase else f"after step {self.step}"
        where = f"waiting in {self.code}" if self.waits else f"in {self.code}"
        last = f"last collective {self.collective}" if self.collective else "no collective yet"
        return f"{what}, {where}, {last}, {self.still_seconds:.1f} seconds since its last progress"


@dataclass(frozen=True)
class Suspicion:
    """A rank that seems to be what the others wait for.

    Attributes:
        rank: which.
        why: in words.
        answers: whether it still writes its beats.
    """

    rank: int
    why: str
    answers: bool = False


@dataclass(frozen=True)
class Cause:
    """What all ranks have as the cause of their end.

    Attributes:
        gone: the ranks that no longer answer.
        text: who is to blame, why, and what they were last seen in.
    """

    gone: list[int]
    text: str


class Heartbeats:
    """Writes this rank's beats, and reads those of all. Made by all ranks together.

    Args:
        mesh: the ranks.
        beat: gives the present one. Called from another thread.

    Attributes:
        places: of all ranks.
        cause: why the run ends, as found by any rank; None while it does not.
    """

    def __init__(self, mesh: ShardMesh, beat: Callable[[], Beat]) -> None:
        self._mesh, self._beat = mesh, beat
        self._store = _start_store(mesh)
        self._end, self._blameless, self._done = "", False, False
        self._store_lost = False
        self.cause: Cause | None = None
        self._closed = threading.Event()
        # All ranks may ask at once, each for the beats of all.
        self._pause = max(0.5, mesh.size / 250)
        self._say()
        # Whoever has the places of all knows too that all have said something.
        self.places: list[Place] = gather_objects(Place.here(), mesh)
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def end(self, why: str, *, blameless: bool) -> None:
        """Tells the others why this rank ends, and whether because of them; waits a moment at most."""
        self._end, self._blameless = why, blameless
        self._ask(self._say)

    def find_cause(self) -> Cause | None:
        """Whom all ranks are waiting for; None if that cannot be told. Takes some seconds.

        It takes no time if a rank on this machine is dead or stopped, or another has found the cause.
        """
        found = self._listen()
        if self.cause is None and found:
            cause = Cause([suspect.rank for suspect in found if not suspect.answers], self._say_who(found))
            # The first one counts, so that all tell the same.
            text = json.dumps(asdict(cause))
            settled = self._ask(lambda: self._store.compare_set(_CAUSE, _NO_CAUSE, text))
            self.cause = cause if settled is None else Cause(**json.loads(settled))
        return self.cause

    def leave(self) -> None:
        """This rank is about to end, and has read all it needs. The first has the store: it waits for the others."""
        self._done = True
        self._ask(self._say)
        gone = [] if self.cause is None else self.cause.gone
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self._mesh.rank == 0 and time.monotonic() < deadline:
            beats = self._read()
            if beats is None or all(beat.done or rank in gone for rank, beat in beats.items()):
                return
            time.sleep(self._pause)

    def close(self) -> None:
        """Ends the beats."""
        self._closed.set()
        self._thread.join(_ASK_SECONDS)

    def describe_all(self) -> str:
        """A line for each rank."""
        beats = self._read()
        if beats is None:
            return "What the ranks do is not known: rank 0, which keeps it, does not answer."
        return "\n".join(f"{self._name(rank)}: {beat.doing()}" for rank, beat in beats.items())

    def _read(self) -> dict[int, Beat] | None:
        """The last beats of all ranks, from rank 0's store; None if that does not answer in time."""
        keys = [_key(rank) for rank in range(self._mesh.size)]
        texts = self._ask(lambda: self._store.multi_get(keys))
        return None if texts is None else {rank: Beat(**json.loads(text)) for rank, text in enumerate(texts)}

    def _listen(self) -> list[Suspicion]:
        before = after = self._read()
        deadline = time.monotonic() + _LISTEN_SECONDS
        while self.cause is None:
            found = self._dead_or_stopped_here(after)
            if found:
                return found
            if before is None or after is None:
                why = "no longer answers: it is stopped or dead, or this host is cut off from it"
                return [Suspicion(0, why)] if self._mesh.rank else []
            if not silent_ranks(before, after) or time.monotonic() >= deadline:
                return suspects(before, after)
            time.sleep(self._pause)
            after = self._read()
        return []

    def _name(self, rank: int) -> str:
        place = self.places[rank]
        return f"rank {rank} ({place.host}, pid {place.pid})"

    def _say_who(self, found: list[Suspicion]) -> str:
        beats = self._read() or {}
        names = []
        for suspicion in found[:_SHOWN]:
            text = f"{self._name(suspicion.rank)} {suspicion.why}"
            if suspicion.rank in beats:
                text += f"; last seen {beats[suspicion.rank].doing()}"
            names.append(text)
        more = f", and {len(found) - _SHOWN} more ranks" if len(found) > _SHOWN else ""
        return ", and ".join(names) + more

    def _dead_or_stopped_here(self, beats: dict[int, Beat] | None) -> list[Suspicion]:
        found = []
        for rank, place in enumerate(self.places):
            beat = None if beats is None else beats[rank]
            # Without the store it is not known who left because of others; but then rank 0 was the first.
            if rank == self._mesh.rank or (rank if beat is None else beat.blameless):
                continue
            state = place.state()
            if state in {"Z", "X"}:
                end = "" if beat is None else beat.end
                found.append(Suspicion(rank, f"has left: {end}" if end else "is dead"))
            elif state in {"T", "t"}:
                found.append(Suspicion(rank, "is stopped (SIGSTOP, or a debugger)"))
        return found

    def _ask(self, call: Callable[[], Result]) -> Result | None:
        """The result of a call of the store, which may wait without end; None if it fails or takes too long."""
        results: list[Result] = []

        def run() -> None:
            with suppress(RuntimeError):
                results.append(call())

        if not self._store_lost:
            thread = threading.Thread(target=run, name="question to the store", daemon=True)
            thread.start()
            thread.join(_ASK_SECONDS)
            self._store_lost = not results
        return results[0] if results else None

    def _run(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                self._say()
                text = self._store.get(_CAUSE)
            except RuntimeError:  # the store is gone; who asks it will find that out
                return
            if text != _NO_CAUSE.encode() and self.cause is None:
                self.cause = Cause(**json.loads(text))

    def _say(self) -> None:
        beat = replace(self._beat(), end=self._end, blameless=self._blameless, done=self._done)
        self._store.set(_key(self._mesh.rank), json.dumps(asdict(beat)))


def silent_ranks(before: dict[int, Beat], after: dict[int, Beat]) -> list[int]:
    """Those that have said nothing new."""
    return [rank for rank, beat in after.items() if beat.count == before[rank].count and not beat.end]


def suspects(before: dict[int, Beat], after: dict[int, Beat]) -> list[Suspicion]:
    """Whom all ranks are waiting for, by what they said of themselves at two moments.

    Ranks that said nothing new; else those that have left; else those that are behind in steps or collectives; else
    those that do not wait in communication while others do.
    """
    if silent := silent_ranks(before, after):
        return [Suspicion(rank, "no longer answers: it is stopped, dead or cut off") for rank in silent]
    left = [rank for rank, beat in after.items() if beat.end and not beat.blameless]
    if left:
        return [Suspicion(rank, f"has left: {after[rank].end}") for rank in left]
    progress = {rank: (beat.step, beat.collectives) for rank, beat in after.items()}
    behind = [rank for rank in after if progress[rank] < max(progress.values())]
    if behind:
        return [Suspicion(rank, "is behind the others", answers=True) for rank in behind]
    busy = [rank for rank, beat in after.items() if not beat.waits]
    if 0 < len(busy) < len(after):
        return [Suspicion(rank, "does not wait for the others, as they do for it", answers=True) for rank in busy]
    return []


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _start_store(mesh: ShardMesh) -> TCPStore:
    # The address at which rank 0 was found for the process group is good for this too; only the port is another.
    host, timeout = meeting_host(launched(os.environ)), timedelta(seconds=60)
    store = None
    if mesh.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        store.set(_CAUSE, _NO_CAUSE)
    port = gather_objects(store.port if store is not None else None, mesh)[0]
    if store is None:
        store = TCPStore(host, port, is_master=False, timeout=timeout)
    return store
