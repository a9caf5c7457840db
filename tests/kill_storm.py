"""Trainings under launch/torchrun.sh that are killed at drawn moments, and what becomes of them.

    python tests/kill_storm.py kills.jsonl ...      sums up what tests/integration/test_kills.py has written

A run is one training from its first step to its last, in a directory of its own, that is killed once, and in every
fourth run once more while it starts again.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from support import checkpoint_tensors

from partialfc.telemetry import read_metrics

ROOT = Path(__file__).parents[1]
IDENTITIES, IMAGES_PER_IDENTITY, GLOBAL_BATCH = 24, 4, 16
STEPS, SAVE_EVERY, KEPT = 40, 5, 2
ORPHAN_SECONDS = 10.0  # that processes may outlive their agent
_SECONDS = 150.0  # for whatever should happen soon, on a busy machine
_MARK = "KILLED_RUN"

KINDS = ("rank 0", "rank 1", "agent", "all")
# More often in steps and saves, which is where a run spends its life.
_PHASES = ("start", "steps", "steps", "save", "save", "end")
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

    seed: int
    asynchronous: bool
    num_workers: int
    kills: tuple[Kill, ...]


def draw(seed: int) -> Plan:
    """The plan of a run: a function of the seed."""
    generator = random.Random(seed)
    phases = [generator.choice(_PHASES)] + (["recovery"] if seed % 4 == 3 else [])
    kills = []
    for phase in phases:
        if phase in ("start", "recovery"):
            at = generator.uniform(0.0, 1.0)
        elif phase == "steps":
            at = generator.randrange(1, STEPS)
        else:
            at = STEPS if phase == "end" else SAVE_EVERY * generator.randrange(1, STEPS // SAVE_EVERY + 1)
        kills.append(Kill(generator.choice(KINDS), phase, at, generator.uniform(0.0, _LATER[phase])))
    return Plan(seed, generator.random() < 0.5, generator.randrange(2), tuple(kills))


@dataclass
class Aftermath:
    """What a kill did.

    Attributes:
        done: steps that were done when all killed were dead.
        in_save: whether a save had begun and was not committed.
        resumed: the step from which the run went on.
        seconds: from the kill to the next step, None if all steps were done.
        orphan_seconds: that processes outlived their agent.
    """

    kind: str
    phase: str
    done: int
    in_save: bool
    resumed: int = 0
    seconds: float | None = None
    orphan_seconds: float | None = None

    @property
    def lost(self) -> int:
        """Steps that were done twice."""
        return self.done - self.resumed


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
        self.run, self.log = self.directory / "run", self.directory / "log"
        self._metrics = self.run / "metrics.jsonl"
        self.directory.mkdir()
        self.log.touch()
        values: dict[str, Any] = {
            "run": {"directory": str(self.run), "log_every_steps": 1, "device": "cpu"},
            "data": {"directory": str(self.data), "image_size": 32, "num_workers": self.num_workers},
            "backbone": {"name": "vit_tiny", "embedding_dim": 16, "options": {"final_norm": "none", "patch_size": 16}},
            "head": {"margin": {"name": "CosFace", "scale": 16.0}, "sample_rate": 0.5},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4, "max_gradient_norm": 1.0},
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
        """As a scheduler would, always with the same command."""
        environment = {
            **os.environ, _MARK: str(self.directory), "PARTIALFC_PYTHON": sys.executable,
            "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with self.log.open("ab") as log:
            self._agent = subprocess.Popen(
                [str(ROOT / "launch" / "torchrun.sh"), str(self._config)], env=environment, stdout=log, stderr=log
            )
        self.starts += 1

    def until(self, condition: Callable[[], object], *, seconds: float = _SECONDS) -> None:
        """Until it holds. It is an error if that takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-8000:]
            time.sleep(0.002)

    def steps(self) -> int:
        """Those in the metrics."""
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0

    def ended(self) -> bool:
        """Whether the agent has."""
        return self._agent.poll() is not None

    def finish(self) -> int:
        """The exit code of the agent."""
        self.until(self.ended)
        return self._agent.wait()

    def kill(self, kill: Kill, start_seconds: float) -> None:
        """At its moment; then sees how the run goes on, starting it again if its agent is gone."""
        self._wait_for(kill, start_seconds)
        time.sleep(kill.later_seconds)
        if kill.kind.startswith("rank"):
            rank = int(kill.kind[-1])
            self.until(lambda: self._ranks().get(rank) or self.ended())
        assert not self.ended(), f"the run was over before {kill}"
        metrics, said = self._identity(), self.log.stat().st_size
        killed_at = time.monotonic()
        done, in_save, orphan_seconds = self._shoot(kill.kind)
        aftermath = Aftermath(kill.kind, kill.phase, done, in_save, orphan_seconds=orphan_seconds)
        self.aftermaths.append(aftermath)
        if kill.kind in ("agent", "all"):
            self.start()
        self._watch(aftermath, metrics, said, killed_at)

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
        """Whatever state it is in."""
        while found := self.processes():
            _kill(found)
        self._agent.wait()

    def _wait_for(self, kill: Kill, start_seconds: float) -> None:
        step, saves = int(kill.at), self.run / "checkpoints"
        if kill.phase in ("start", "recovery"):
            time.sleep(kill.at * start_seconds)
        elif kill.phase == "steps":
            self.until(lambda: self.steps() >= step)
        elif kill.phase == "save":
            committed = saves / f"step-{step:08d}"
            self.until(lambda: committed.exists() or any(saves.glob(f"tmp-{step:08d}-*")))
        else:
            self.until((saves / f"step-{step:08d}").exists)

    def _shoot(self, kind: str) -> tuple[int, bool, float | None]:
        orphan_seconds = None
        if kind.startswith("rank"):
            _kill([self._ranks()[int(kind[-1])]])
        elif kind == "agent":
            self._agent.kill()
            killed_at = time.monotonic()
            self.until(lambda: not self.processes(), seconds=ORPHAN_SECONDS)
            orphan_seconds = time.monotonic() - killed_at
        else:
            while found := self.processes():
                _kill(found)
        return self.steps(), any((self.run / "checkpoints").glob("tmp-????????-*")), orphan_seconds

    def _watch(self, aftermath: Aftermath, metrics: int | None, said: int, killed_at: float) -> None:
        """Until the run has done a step that it had not done from where it went on, or is over."""
        while self._identity() == metrics and not self.ended():
            aftermath.done = max(aftermath.done, self.steps())  # by a rank that is about to end
            assert time.monotonic() < killed_at + _SECONDS, self.log.read_text()[-8000:]
            time.sleep(0.002)
        with self.log.open("rb") as log:
            log.seek(said)
            resumed = re.findall(rb"going on from \S+, step (\d+) of", log.read())
        aftermath.resumed = int(resumed[-1]) if resumed else 0
        self.until(lambda: self.steps() > aftermath.resumed or self.ended())
        if aftermath.resumed < STEPS:
            aftermath.seconds = time.monotonic() - killed_at

    def _identity(self) -> int | None:
        """Of the file of metrics: a run that goes on replaces it."""
        return self._metrics.stat().st_ino if self._metrics.exists() else None

    def _ranks(self) -> dict[int, int]:
        """By rank, its process."""
        return {
            int(environment["RANK"]): pid
            for pid, environment in self.processes().items()
            if "RANK" in environment and _parent(pid) == self._agent.pid
        }


def _kill(pids: Any) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
