"""Trainings under launch/torchrun.sh that are killed at drawn moments, and what becomes of them.

    python tests/kill_storm.py kills.jsonl ...      sums up what tests/integration/test_kills.py has written

A run is one training from its first step to its last, in a directory of its own, that is killed once or more often.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
IDENTITIES, IMAGES_PER_IDENTITY, GLOBAL_BATCH = 24, 4, 16
STEPS, SAVE_EVERY, KEPT = 40, 5, 2
ORPHAN_SECONDS = 120.0  # that processes may outlive their agent: on a busy machine, and below any limit of the run
_SECONDS = 300.0  # for whatever should happen soon, on a busy machine
_MARK = "KILLED_RUN"
_STORM = 346  # another number is another storm

KINDS = ("rank 0", "rank 1", "agent", "all")
# More often in steps and saves, which is where a run spends its life.
_FIRST_PHASES = ("start", "steps", "steps", "save", "save", "end")
_LATER_PHASES = ("recovery", "recovery", "recovery", "steps", "save")
# Seconds, at most, from what a kill waits for to the kill.
_LATER = {"start": 0.0, "recovery": 0.0, "steps": 0.05, "save": 0.15, "end": 0.4}


@dataclass(frozen=True)
class Kill:
    """A SIGKILL.

    Attributes:
        kind: what gets it, of `KINDS`.
        phase: "start" and "recovery" are a time after the run was started or killed; "steps" is after a step, "save"
            after a save has begun, "end" after the last one was committed.
        at: the time, as a share of how long a start takes; or the step.
        later_seconds: that pass first.
    """

    kind: str
    phase: str
    at: float
    later_seconds: float


@dataclass(frozen=True)
class Plan:
    """What is drawn for a run."""

    asynchronous: bool
    num_workers: int
    kills: tuple[Kill, ...]


def draw(seed: int, *, kills: int) -> Plan:
    """The plan of a run: a function of the seed and the number of kills."""
    generator = random.Random(f"{_STORM} {seed} {kills}")
    drawn = []
    for number in range(kills):
        phase = generator.choice(_LATER_PHASES if number else _FIRST_PHASES)
        if phase in ("start", "recovery"):
            at = generator.uniform(0.0, 1.0)
        elif phase == "steps":
            at = generator.randrange(1, STEPS)
        else:
            at = STEPS if phase == "end" else SAVE_EVERY * generator.randrange(1, STEPS // SAVE_EVERY + 1)
        drawn.append(Kill(generator.choice(KINDS), phase, at, generator.uniform(0.0, _LATER[phase])))
    in_time = sorted((kill for kill in drawn if kill.phase != "recovery"), key=_moment)
    moments = list(in_time)
    for number, kill in enumerate(kill for kill in drawn if kill.phase == "recovery"):
        in_time.insert(in_time.index(moments[number % len(moments)]) + 1, kill)
    return Plan(generator.random() < 0.5, generator.randrange(2), tuple(in_time))


def _moment(kill: Kill) -> tuple[float, bool]:
    return (0.0, False) if kill.phase == "start" else (kill.at, kill.phase == "end")


@dataclass
class Aftermath:
    """What a kill did.

    Attributes:
        done: steps that were done when all that was killed, or ended because of it, was dead.
        in_save: whether a save had begun and was not committed.
        resumed: the step from which the run went on; None if it was killed again before.
        seconds: from the kill to the next step; None if there was none.
        orphan_seconds: that processes outlived their agent.
    """

    kind: str
    phase: str
    asynchronous: bool
    in_save: bool = False
    done: int = 0
    resumed: int | None = None
    seconds: float | None = None
    orphan_seconds: float | None = None

    @property
    def lost(self) -> int | None:
        """Steps that were done twice."""
        return None if self.resumed is None else self.done - self.resumed


@dataclass
class Training:
    """One run: its directory, its processes, and what they have said."""

    directory: Path
    data: Path
    asynchronous: bool = False
    num_workers: int = 0
    aftermaths: list[Aftermath] = field(default_factory=list)
    starts: int = 0

    def __post_init__(self) -> None:
        self._done, self._old_metrics, self._said = 0, None, 0  # of the start before this one
        self.run, self.log = self.directory / "run", self.directory / "log"
        self._metrics, self._saves = self.run / "metrics.jsonl", self.run / "checkpoints"
        self.directory.mkdir()
        values: dict[str, Any] = {
            "run": {"directory": str(self.run), "log_every_steps": 1, "device": "cpu"},
            "data": {"directory": str(self.data), "image_size": 32, "num_workers": self.num_workers},
            "backbone": {"name": "iresnet10", "embedding_dim": 16, "options": {"width": 8, "dropout": 0.2}},
            "head": {"margin": {"name": "AdaFace", "scale": 16.0}, "sample_rate": 0.5},
            "training": {
                "epochs": STEPS * GLOBAL_BATCH / (IDENTITIES * IMAGES_PER_IDENTITY),
                "global_batch_size": GLOBAL_BATCH,
            },
            "evaluation": {"enabled": False},
            "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": KEPT, "asynchronous": self.asynchronous},
        }
        self._config = self.directory / "config.yaml"
        self._config.write_text(yaml.safe_dump(values))

    def start(self) -> None:
        """As a scheduler would, always with the same command. Nothing of the run is alive."""
        self._note()
        environment = {
            **os.environ, _MARK: str(self.directory), "PARTIALFC_PYTHON": sys.executable,
            "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "10",
        }  # fmt: skip
        with self.log.open("ab") as log:
            self._agent = subprocess.Popen(
                [str(ROOT / "launch" / "torchrun.sh"), str(self._config)], env=environment, stdout=log, stderr=log
            )
        self.starts += 1
        self._started_at = time.monotonic()

    def until(
        self, condition: Callable[[], object], *, seconds: float = _SECONDS, every_seconds: float = 0.002
    ) -> None:
        """Until it holds. It is an error if that takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-8000:]
            time.sleep(every_seconds)

    def steps(self) -> int:
        """Those in the metrics."""
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0

    def ended(self) -> bool:
        """Whether the agent has."""
        return self._agent.poll() is not None

    def finish(self) -> int:
        """The exit code of the agent."""
        self._see_it_go_on()
        self.until(self.ended)
        return self._agent.wait()

    def kill(self, kill: Kill, start_seconds: float) -> None:
        """At its moment; starts the run again if its agent is gone.

        Args:
            kill: which.
            start_seconds: that a run takes to its first step.
        """
        if kill.phase != "recovery":
            self._see_it_go_on()
        leftovers = set(self._saves.glob("tmp-*"))
        self._wait_for(kill, start_seconds)
        time.sleep(kill.later_seconds)
        if kill.kind.startswith("rank"):
            self.until(lambda: self._rank(kill.kind) or self.ended())
        if self.ended():  # there is nothing left to kill
            return
        aftermath = Aftermath(kill.kind, kill.phase, self.asynchronous)
        before, self._killed_at = self.processes(), time.monotonic()
        if kill.kind.startswith("rank"):
            victim = self._rank(kill.kind)
            if victim is None:  # it has just ended
                return
            self._note()
            _kill([victim])
        elif kill.kind == "agent":
            self._agent.kill()
        else:
            self.end()
        aftermath.in_save = any(path not in leftovers for path in self._saves.glob("tmp-[0-9]*"))
        if kill.kind == "agent":
            self.until(lambda: not self.processes(), seconds=ORPHAN_SECONDS, every_seconds=0.05)
            aftermath.orphan_seconds = time.monotonic() - self._killed_at
        if kill.kind in ("agent", "all"):
            self._agent.wait()
            self.start()
        else:
            self.until(lambda: self._replaced(before), every_seconds=0.05)
            self._started_at = time.monotonic()
        aftermath.done = self._done
        self.aftermaths.append(aftermath)

    def processes(self) -> dict[int, dict[str, str]]:
        """Those of this run that live, whoever their parent is, with their environment."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                text = (path / "environ").read_text(errors="replace")
            except OSError:
                continue
            if f"{_MARK}={self.directory}\0" in text:
                found[int(path.name)] = dict(entry.partition("=")[::2] for entry in text.split("\0"))
        return found

    def end(self) -> None:
        """Kills what is left of it."""
        while found := self.processes():
            _kill(found)
        self._agent.wait()

    def _note(self) -> None:
        """What the dead have left, by which what comes after is told apart."""
        said = self.log.stat().st_size if self.log.exists() else 0
        self._done, self._old_metrics, self._said = self.steps(), self._identity(), said

    def _replaced(self, before: Iterable[int]) -> bool:
        """Whether there are new ranks, or never will be. Notes what the old ones have left, if there are not."""
        old = self._done, self._old_metrics, self._said
        self._note()
        if self._ranks_after(before):
            # They may have written already.
            self._done, self._old_metrics, self._said = old
            return True
        return self.ended()

    def _wait_for(self, kill: Kill, start_seconds: float) -> None:
        committed = self._saves / f"step-{int(kill.at):08d}"
        if kill.phase in ("start", "recovery"):
            due = self._started_at + kill.at * start_seconds
            self.until(lambda: time.monotonic() > due or self._works())
        elif kill.phase == "steps":
            self.until(lambda: self.steps() >= kill.at)
        elif kill.phase == "save":
            # Asleep, this process may miss it, and it is not kept for long.
            begun = f"tmp-{int(kill.at):08d}-*"
            self.until(lambda: committed.exists() or any(self._saves.glob(begun)) or self.steps() > kill.at)
        else:
            self.until(committed.exists)

    def _see_it_go_on(self) -> None:
        """After the last kill."""
        if not self.aftermaths or (aftermath := self.aftermaths[-1]).resumed is not None:
            return
        self.until(lambda: self._works() or self.ended())
        if not self._works():
            return
        with self.log.open("rb") as log:
            log.seek(self._said)
            resumed = re.findall(rb"going on from \S+, step (\d+) of", log.read())
        aftermath.resumed = step = int(resumed[-1]) if resumed else 0
        if step < STEPS:
            self.until(lambda: self.steps() > step or self.ended())
            aftermath.seconds = time.monotonic() - self._killed_at

    def _works(self) -> bool:
        """Whether the run has got so far since its start that it writes metrics."""
        return self._identity() != self._old_metrics

    def _identity(self) -> int | None:
        """Of the file of metrics: a run that goes on replaces it."""
        return self._metrics.stat().st_ino if self._metrics.exists() else None

    def _rank(self, kind: str) -> int | None:
        return self._ranks().get(kind)

    def _ranks(self) -> dict[str, int]:
        """By "rank 0" and so on, its process."""
        return {
            f"rank {environment['RANK']}": pid
            for pid, environment in self.processes().items()
            if "RANK" in environment and _parent(pid) == self._agent.pid
        }

    def _ranks_after(self, before: Iterable[int]) -> bool:
        ranks = set(self._ranks().values())
        return bool(ranks) and ranks.isdisjoint(before)


def _kill(pids: Iterable[int | None]) -> None:
    for pid in pids:
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def write_down(training: Training, path: Path) -> None:
    """Appends what became of a run to a file."""
    with path.open("a", encoding="utf-8") as file:
        kills = [asdict(aftermath) for aftermath in training.aftermaths]
        file.write(json.dumps({"starts": training.starts, "kills": kills}) + "\n")


def summary(paths: Iterable[Path]) -> str:
    """What became of the runs in some files."""
    runs = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    kills = [Aftermath(**kill) for run in runs for kill in run["kills"]]
    phases = list(dict.fromkeys((*_FIRST_PHASES, *_LATER_PHASES)))
    counts = Counter((kill.kind, kill.phase) for kill in kills)
    lines = [f"{len(runs)} runs, {len(kills)} kills, {sum(kill.in_save for kill in kills)} of them in mid-save"]
    lines.append(" " * 8 + "".join(f"{phase:>10}" for phase in phases))
    lines += [f"{kind:8}" + "".join(f"{counts[kind, phase]:10}" for phase in phases) for kind in KINDS]
    by_agent = sum(kill.kind.startswith("rank") for kill in kills)
    lines.append(f"started again by torchrun: {by_agent}, by the command: {len(kills) - by_agent}")
    for kind in KINDS:
        seconds = [kill.seconds for kill in kills if kill.kind == kind and kill.seconds is not None]
        if seconds:
            middle, most = statistics.median(seconds), max(seconds)
            lines.append(f"{kind}: seconds from the kill to the next step: median {middle:.1f}, maximum {most:.1f}")
    orphans = [kill.orphan_seconds for kill in kills if kill.orphan_seconds is not None]
    if orphans:
        lines.append(f"seconds that processes outlived their agent: maximum {max(orphans):.1f}")
    for name, asynchronous in (("blocking", False), ("asynchronous", True)):
        lost = Counter(kill.lost for kill in kills if kill.asynchronous == asynchronous and kill.lost is not None)
        if lost:
            table = ", ".join(f"{steps}: {lost[steps]}" for steps in sorted(lost))
            lines.append(f"steps lost of {SAVE_EVERY}, {name} saves: maximum {max(lost)} ({table})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(map(Path, sys.argv[1:])))  # noqa: T201
