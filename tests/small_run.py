"""A training small enough for tests: 24 identities with 4 images each, 16 images a step, and few channels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from partialfc.data import synthesize
from partialfc.telemetry import read_metrics

__all__ = ["GLOBAL_BATCH", "IDENTITIES", "IMAGES", "losses_of", "make_faces", "set_back", "steps_of", "write_config"]

IDENTITIES = 24
IMAGES = IDENTITIES * 4
GLOBAL_BATCH = 16


def make_faces(directory: Path) -> Path:
    """The data, with 12 more identities to verify on; returns its directory."""
    synthesize(
        directory, identities=IDENTITIES, images_per_identity=4, seed=1, image_size=32, verification_identities=12
    )
    return directory


def write_config(directory: Path, faces: Path, *, steps: int, **sections: dict[str, Any]) -> Path:
    """`directory/config.yaml` of a run of some steps in `directory/run`; values of `sections` replace single ones."""
    values: dict[str, Any] = {
        "run": {"directory": str(directory / "run"), "log_every_steps": 1, "device": "cpu"},
        "data": {"directory": str(faces), "image_size": 32, "num_workers": 0},
        "backbone": {"name": "iresnet10", "embedding_dim": 16, "options": {"width": 8, "dropout": 0.2}},
        "head": {"margin": {"name": "ArcFace", "scale": 16.0}, "sample_rate": 0.5},
        "training": {"epochs": steps * GLOBAL_BATCH / IMAGES, "global_batch_size": GLOBAL_BATCH},
        "evaluation": {"num_pairs": 100, "batch_size": 10},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    directory.mkdir(exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses_of(run: Path) -> list[float]:
    """Those that were written, in order."""
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def steps_of(run: Path) -> list[int]:
    """Of the checkpoints that are committed, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def set_back(run: Path, step: int) -> None:
    """As if the run had been killed after this checkpoint; its metrics are ahead of it."""
    for other in steps_of(run):
        if other > step:
            shutil.rmtree(run / "checkpoints" / f"step-{other:08d}")
