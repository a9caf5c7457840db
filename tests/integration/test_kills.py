"""Runs that are killed, wherever they are, and end as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_storm import (
    IDENTITIES,
    IMAGES_PER_IDENTITY,
    KEPT,
    ORPHAN_SECONDS,
    SAVE_EVERY,
    STEPS,
    Plan,
    Training,
    draw,
    summary,
    write_down,
)
from support import checkpoint_tensors

from partialfc.data import synthesize
from partialfc.telemetry import read_metrics


@dataclass
class Undisturbed:
    """A run that nobody kills."""

    data: Path
    start_seconds: float
    losses: list[float]
    tensors: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    directory = tmp_path_factory.mktemp("undisturbed")
    synthesize(
        directory / "faces", identities=IDENTITIES, images_per_identity=IMAGES_PER_IDENTITY, seed=1, image_size=32
    )
    training = Training(directory / "run", directory / "faces")
    training.start()
    seconds = _seconds_until_first_step(training)
    assert training.finish() == 0, training.log.read_text()
    return Undisturbed(directory / "faces", seconds, _losses(training), _tensors(training))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file for what became of each run; summed up at the end."""
    path = tmp_path_factory.mktemp("kills") / "kills.jsonl"
    path.touch()
    yield path
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        request.config.get_terminal_writer().write(f"\n{path}\n{summary([path])}\n")


def _seconds_until_first_step(training: Training) -> float:
    started = time.monotonic()
    training.until(lambda: training.steps() > 0 or training.ended())
    return time.monotonic() - started


def _losses(training: Training) -> list[float]:
    lines = read_metrics(training.run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def _tensors(training: Training) -> dict[str, Any]:
    return checkpoint_tensors(training.run, f"step-{STEPS:08d}")


def _run(directory: Path, plan: Plan, undisturbed: Undisturbed, records: Path) -> None:
    training = Training(directory, undisturbed.data, asynchronous=plan.asynchronous, num_workers=plan.num_workers)
    training.start()
    try:
        for kill in plan.kills:
            training.kill(kill, undisturbed.start_seconds)
        assert training.finish() == 0, training.log.read_text()[-8000:]
        training.until(lambda: not training.processes(), seconds=ORPHAN_SECONDS)
        _check(training, undisturbed)
    except BaseException as error:
        error.add_note(f"{plan}\n{training.log.read_text()[-8000:]}")
        raise
    finally:
        training.end()
        write_down(training, records)


def _check(training: Training, undisturbed: Undisturbed) -> None:
    assert _losses(training) == undisturbed.losses
    tensors = _tensors(training)
    assert tensors.keys() == undisturbed.tensors.keys()
    for name, value in undisturbed.tensors.items():
        same = torch.equal(value, tensors[name]) if isinstance(value, torch.Tensor) else value == tensors[name]
        assert same, f"{name} differs"
    names = sorted(path.name for path in (training.run / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in range(STEPS - SAVE_EVERY * (KEPT - 1), STEPS + 1, SAVE_EVERY)]
    assert "damaged checkpoint" not in training.log.read_text()
    for aftermath in training.aftermaths:
        # A save that is under way with training going on is waited for before the next one begins: the one before it
        # is then two intervals back.
        bound = SAVE_EVERY * (2 if training.asynchronous else 1)
        assert aftermath.lost is None or 0 <= aftermath.lost <= bound, aftermath


# Two that have every kind of kill, in every phase, with saves of both kinds.
QUICK = (5, 7)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed in QUICK else pytest.mark.soak) for seed in range(20)]
)
def test_a_run_that_is_killed_five_times_ends_as_if_undisturbed(
    tmp_path: Path, undisturbed: Undisturbed, records: Path, seed: int
) -> None:
    _run(tmp_path / "run", draw(seed, kills=5), undisturbed, records)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_runs_that_are_killed_end_as_if_undisturbed(
    tmp_path: Path, undisturbed: Undisturbed, records: Path, seed: int
) -> None:
    _run(tmp_path / "run", draw(seed, kills=2 if seed % 4 == 3 else 1), undisturbed, records)
