"""A run is verified again, as it was trained or with other data and settings."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import make_faces, steps_of, write_config
from support import run_distributed, running_ranks

from partialfc.checkpoint import CheckpointStore
from partialfc.checkpoint.directory import CheckpointDirectory
from partialfc.cli import main
from partialfc.config import load_config
from partialfc.data import synthesize
from partialfc.distributed.mesh import ShardMesh
from partialfc.evaluate import evaluate_run, load_backbone, verify_backbone
from partialfc.feeding import open_verification


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps, with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("evaluate")
    faces = make_faces(directory / "faces")
    assert main(["train", str(write_config(directory, faces, steps=4, checkpoint={"every_steps": 2}))]) == 0
    return directory / "run"


def test_it_says_which_checkpoint_it_verified(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert main(["evaluate", str(run)]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    trained = json.loads((run / "summary.json").read_text())["trained"]
    assert row.split() == [
        "step",
        "4",
        f"{trained['accuracy']:.4f}",
        "+-",
        f"{trained['accuracy_std']:.4f}",
        f"{trained['tar_at_far']:.4f}",
        f"{trained['auc']:.4f}",
        f"{trained['nearest_neighbor_accuracy']:.4f}",
    ]
    told = [record.getMessage() for record in caplog.records if record.name == "partialfc.evaluate"]
    assert told == [f"verifying {run}/checkpoints/step-00000004 on {run.parent}/faces/verification"]


def test_overrides_choose_other_data_and_pairs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    synthesize(other, identities=2, images_per_identity=4, seed=2, image_size=32, verification_identities=10)
    overrides = [f"data.directory={other}", "evaluation.num_pairs=40", "evaluation.far=0.1", "run.seed=3"]
    config = load_config(run / "config.yaml", overrides)
    backbone, index = load_backbone(run)[0], open_verification(config)
    expected = verify_backbone(backbone, index, config, mesh=ShardMesh.single(), device=torch.device("cpu"))
    assert expected.result.num_images == 40  # 10 identities of 4, where the run's own data has 12
    assert evaluate_run(run, overrides) == (4, expected)
    assert evaluate_run(run)[1].result.num_images == 48

    assert main(["evaluate", str(run), *overrides, "run.device=cpu"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "TAR@FAR=0.1 " in header
    assert f"{expected.result.accuracy:.4f} +- {expected.result.accuracy_std:.4f}" in row


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.name=mobilefacenet", "backbone.name: 'mobilefacenet' given, but the checkpoints of {run} are of"),
        ("backbone.embedding_dim=32", "backbone.embedding_dim: 32 given, but the checkpoints of {run} are of a run wi"),
        ("backbone.options.width=16", "a run with 8; leave this override out"),
        ("backbone.options.depth=16", "a run with 'not set'; leave this override out"),
        ("data.image_size=48", "data.image_size: 48 given, but the checkpoints of {run} are of a run with 32; leave"),
        ("run.directory=elsewhere", "run.directory: 'elsewhere' given, but the checkpoints of {run} are of a run with"),
        ("evaluation.num_pars=40", "evaluation.num_pars: unknown key; did you mean 'num_pairs'?"),
        ("evaluation.num_pairs", "override 'evaluation.num_pairs' must look like key.sub=value"),
    ],
)
def test_an_override_that_cannot_be_is_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["evaluate", str(run), override]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("partialfc: error: ")
    assert message.format(run=run) in output.err


def test_a_run_may_have_been_moved(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    shutil.rmtree(moved / "checkpoints" / "step-00000004")
    assert evaluate_run(moved, ["evaluation.num_pairs=40"])[0] == 2
    assert steps_of(run) == [2, 4]


# The rank with the mistake may be ready long before the other.
PATIENT = """
import sys
from partialfc.cli import run
from partialfc.distributed import meeting
meeting._TELL_SECONDS = 300.0
run()
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.num_pars=40", "evaluation.num_pars: unknown key; did you mean 'num_pairs'?"),
        ("data.directory={tmp_path}/only_train", "FileNotFoundError: {tmp_path}/only_train has no verification split:"),
    ],
)
def test_what_is_wrong_on_one_rank_ends_all_with_one_message(
    run: Path, tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "only_train" / "train").mkdir(parents=True)
    right = [sys.executable, "-c", PATIENT, "evaluate", str(run)]
    with running_ranks(tmp_path, [right, [*right, override.format(tmp_path=tmp_path)]]) as ranks:
        assert ranks.ended() == [2, 2]
    said = ranks.errors(0) + ranks.errors(1)
    assert said.count("error: ") == 1
    assert "partialfc: error: rank 1 (" in ranks.errors(0)
    assert message.format(tmp_path=tmp_path) in said


def test_a_checkpoint_may_be_removed_while_it_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that goes on does."""
    going_on = tmp_path / "going on"
    shutil.copytree(run, going_on)
    load = CheckpointStore.load

    def load_late(store: CheckpointStore, path: Path, state: dict[str, Any], *, verified: bool) -> dict[str, Any]:
        shutil.rmtree(going_on / "checkpoints" / "step-00000004", ignore_errors=True)
        return load(store, path, state, verified=verified)

    monkeypatch.setattr(CheckpointStore, "load", load_late)
    assert evaluate_run(going_on, ["evaluation.num_pairs=40"])[0] == 2


def _evaluate_while_saving(rank: int, _: int, run: Path) -> None:
    if rank == 0:
        # Its look at the folder comes before the last checkpoint is there, that of rank 1 after.
        CheckpointDirectory.steps = lambda self: [2]  # type: ignore[method-assign]
    step, found = evaluate_run(run)
    assert step == 2
    assert found.result.num_images == 48


def test_all_ranks_verify_the_same_checkpoint_while_the_run_goes_on(run: Path) -> None:
    run_distributed(_evaluate_while_saving, 2, run)
