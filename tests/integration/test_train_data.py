"""Training on what data offers: every loader and sampling, bad samples, elastic order, mixed sets."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_faults import BROKEN, SIDE, good_files, write_split

from partialfc.cli import main
from partialfc.data import ShardIndex
from partialfc.telemetry import read_lines, read_metrics

GLOBAL_BATCH = 20
IMAGES = 200
BAD = 2


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images of 50 identities, one in a hundred of them broken."""
    directory = tmp_path_factory.mktemp("data") / "faces"
    files = good_files(IMAGES)
    for place, (data, extension, _) in zip((7, 151), list(BROKEN.values())[5:], strict=False):
        files[place] = (data, extension)
    write_split(directory / "train", files, per_shard=30)
    return directory


def config_file(tmp_path: Path, directory: Path, name: str, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "run": {"directory": str(tmp_path / name), "log_every_steps": 1, "device": "cpu"},
        "data": {"directory": str(directory), "image_size": SIDE, "num_workers": 0, "max_bad_share": 0.05},
        # Without batch norm, so that ranks do not matter to it.
        "backbone": {"name": "vit_tiny", "embedding_dim": 16, "options": {"final_norm": "none", "patch_size": 16}},
        "head": {"margin": {"name": "CosFace", "scale": 16.0}, "sample_rate": 0.5},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "training": {"epochs": 1.0, "global_batch_size": GLOBAL_BATCH},
        "evaluation": {"enabled": False},
    }
    for section, settings in sections.items():
        values[section] = {**values.get(section, {}), **settings}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(tmp_path: Path, directory: Path, name: str, **sections: dict[str, Any]) -> list[float]:
    """The loss of each step."""
    assert main(["train", str(config_file(tmp_path, directory, name, **sections))]) == 0
    return losses_of(tmp_path / name)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def torchrun(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "partialfc.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def reference(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process with the torch loader."""
    return train(tmp_path_factory.mktemp("reference"), faces, "run")


def test_bad_samples_are_listed_and_training_ends_well(faces: Path, tmp_path: Path) -> None:
    losses = train(tmp_path, faces, "run")
    assert len(losses) == IMAGES // GLOBAL_BATCH
    assert losses[-1] < losses[0]
    lines = read_lines(tmp_path / "run" / "bad_samples.jsonl")
    assert sorted(line["sample_id"] for line in lines) == [7, 151]
    assert Counter(line["reason"] for line in lines) == Counter({"damaged image": BAD})
    index = ShardIndex.open(faces / "train")
    assert all(line["message"].startswith(index.describe(line["sample_id"])) for line in lines)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["bad_samples"] == BAD


def test_with_bad_images_the_losses_are_those_of_two_ranks(faces: Path, tmp_path: Path, reference: list[float]) -> None:
    torchrun(2, "train", str(config_file(tmp_path, faces, "two", data={"num_workers": 1})))
    assert losses_of(tmp_path / "two") == pytest.approx(reference, rel=1e-5)
    lines = read_lines(tmp_path / "two" / "bad_samples.jsonl")
    assert sorted(line["sample_id"] for line in lines) == [7, 151]


@pytest.mark.parametrize("loader", ["webdataset", "dali"])
def test_every_loader_trains_alike(faces: Path, tmp_path: Path, reference: list[float], loader: str) -> None:
    assert train(tmp_path, faces, "run", data={"loader": loader}) == reference


def test_resumed_with_another_loader_the_losses_go_on(faces: Path, tmp_path: Path, reference: list[float]) -> None:
    half = {"training": {"epochs": 1.0}, "checkpoint": {"every_steps": 4}}
    train(tmp_path, faces, "run", **half)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert train(tmp_path, faces, "run", **half, data={"loader": "dali", "num_workers": 1}) == reference
    lines = read_lines(tmp_path / "run" / "bad_samples.jsonl")
    assert sorted(line["sample_id"] for line in lines) == [7, 151]


@pytest.mark.parametrize(
    "sampling",
    [
        {"name": "balanced"},
        {"name": "identity_groups", "images_per_identity": 4},
        {"name": "repeat_rare", "at_least": 6},
        {"name": "shuffled", "lanes": 2, "window": 16},
    ],
    ids=lambda sampling: sampling["name"],
)
def test_every_sampling_trains(faces: Path, tmp_path: Path, sampling: dict[str, Any]) -> None:
    losses = train(tmp_path, faces, "run", data={"sampling": sampling})
    assert len(losses) == (20 if sampling["name"] == "repeat_rare" else 10)
    assert all(math.isfinite(loss) for loss in losses)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert sampling.items() <= config["data"]["sampling"].items()


def test_a_run_does_not_go_on_in_another_order(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, faces, "run")
    path = config_file(tmp_path, faces, "run", data={"sampling": {"name": "balanced"}})
    assert main(["train", str(path)]) == 2
    assert "was saved with data_order 'Shuffled(lanes=64, window=65536)" in capsys.readouterr().err


def test_mixed_sets_train_with_one_head(faces: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "train"
    write_split(other, good_files(40)[::-1])
    losses = train(tmp_path, faces, "run", data={"mix": [{"directory": str(other.parent), "share": 0.5}]})
    assert len(losses) == (IMAGES + 40) // GLOBAL_BATCH
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["num_classes"], summary["num_images"]) == (60, 240)


@pytest.mark.parametrize("loader", ["webdataset", "dali"])
def test_streaming_trains_for_the_same_number_of_steps(faces: Path, tmp_path: Path, loader: str) -> None:
    good = tmp_path / "good" / "train"
    write_split(good, good_files(IMAGES), per_shard=30)
    losses = train(tmp_path, good.parent, "run", data={"loader": loader, "exact": False})
    assert len(losses) == IMAGES // GLOBAL_BATCH
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loader": "torch", "exact": False}, "data.exact=false is plain streaming, which data.loader=webdataset"),
        ({"stages": "a:b"}, "data.stages needs data.loader=webdataset"),
        ({"sampling": {"name": "weighted"}}, "has no weights; pack it from a list with a column `weight`"),
        ({"sampling": {"name": "identity_groups", "images_per_identity": 3}}, "a global batch of 20 does not consist"),
        ({"sampling": {"name": "shufled"}}, "did you mean 'shuffled'?"),
        ({"mix": [{"directory": "a", "shares": 0.3}]}, "data.mix.0.shares: unknown key; did you mean 'share'?"),
        ({"sampling": {"name": "balanced", "lanes": 2}}, "balanced has no setting 'lanes'; it has none"),
        ({"loader": "webdataset", "stages": "nomod:f"}, "nomod"),
        ({"mix": [{"directory": "nowhere"}]}, "data.mix.0.directory: nowhere/train: no such folder"),
        ({"mix": [{"directory": "a", "share": 0.7}, {"directory": "b"}]}, "must be given for all sets or for none"),
        ({"loader": "dali", "dali": {"device": "gpu"}}, "data.dali.device is gpu, but this run is on the cpu"),
        ({"max_bad_share": 0.0}, "1 of 20 samples could not be used (1 damaged image)"),
    ],
)
def test_what_cannot_be_is_refused(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert main(["train", str(config_file(tmp_path, faces, "run", data=settings))]) == 2
    assert message in capsys.readouterr().err
