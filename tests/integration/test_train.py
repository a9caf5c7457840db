"""The whole trainer on real tar shards: what a run leaves, resume bit for bit, and what bad input does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import IDENTITIES, losses_of, make_faces, write_config
from support import checkpoint_tensors

from partialfc.cli import main
from partialfc.distributed.mesh import ShardMesh
from partialfc.evaluate import Verification, load_backbone, verify_backbone
from partialfc.telemetry import read_metrics

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("data") / "faces")


def _config(tmp_path: Path, faces: Path, **sections: dict[str, Any]) -> Path:
    evaluation = {"at_start": True, **sections.pop("evaluation", {})}
    checkpoint = {"every_steps": 3, **sections.pop("checkpoint", {})}
    return write_config(tmp_path, faces, steps=STEPS, evaluation=evaluation, checkpoint=checkpoint, **sections)


def _torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "partialfc.cli", *arguments], capture_output=True, text=True, timeout=600, env=environment
    )


def _assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, f"{name} differs"


def test_a_run_leaves_everything_and_resumes_bit_for_bit(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = _config(tmp_path, data), tmp_path / "run"
    assert main(["train", str(config)]) == 0
    assert "TAR@FAR=0.01" in capsys.readouterr().out

    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["untrained"]["accuracy"] <= 1
    assert 0 <= summary["trained"]["tar_at_far"] <= 1
    assert summary["steps"] == STEPS
    assert summary["num_classes"] == IDENTITIES
    assert summary["images_per_second"] > 0
    for name in ("config.yaml", "loss.png", "roc.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").glob("events.*"))
    assert len(losses_of(run)) == STEPS
    straight, losses = checkpoint_tensors(run, "step-00000006"), losses_of(run)

    # As if killed after step 4: the checkpoint of step 3 is the last, metrics are ahead of it.
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "summary.json").unlink()
    assert main(["train", str(config)]) == 0
    assert losses_of(run) == losses
    _assert_same(checkpoint_tensors(run, "step-00000006"), straight)

    # A finished run started again does nothing but say so again.
    before = json.loads((run / "summary.json").read_text())
    assert main(["train", str(config)]) == 0
    assert json.loads((run / "summary.json").read_text()) == before
    assert losses_of(run) == losses

    backbone, _ = load_backbone(run)
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["step", "6", f"{summary['trained']['accuracy']:.4f}"]


def test_bf16_adamw_cosine_resumes_bit_for_bit(tmp_path: Path, data: Path) -> None:
    config = _config(
        tmp_path,
        data,
        backbone={"name": "mobilefacenet", "options": {"width": 8}},
        head={"margin": {"name": "CosFace", "scale": 16.0}, "optimizer": {"name": "adamw", "learning_rate": 0.01}},
        optimizer={"name": "adamw", "learning_rate": 0.01, "max_gradient_norm": 0.5},
        training={"precision": "bf16", "schedule": {"name": "cosine", "minimum": 0.01}, "warmup_epochs": 0.4},
        evaluation={"every_steps": 2},
    )
    run = tmp_path / "run"
    assert main(["train", str(config)]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[:2] == [0.005, 0.01]
    assert rates[-1] < 0.003
    assert [line["step"] for line in lines if "verification_accuracy" in line] == [2, 4]
    straight = checkpoint_tensors(run, "step-00000006")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main(["train", str(config)]) == 0
    _assert_same(checkpoint_tensors(run, "step-00000006"), straight)


def test_two_ranks_train_and_resume_bit_for_bit(tmp_path: Path, data: Path) -> None:
    config, run = _config(tmp_path, data), tmp_path / "run"
    first = _torchrun(2, "train", str(config))
    assert first.returncode == 0, first.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    straight, losses = checkpoint_tensors(run, "step-00000006"), losses_of(run)
    assert all(torch.tensor(losses).isfinite())
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    second = _torchrun(2, "train", str(config))
    assert second.returncode == 0, second.stderr
    assert "going on from" in second.stderr
    assert losses_of(run) == losses
    _assert_same(checkpoint_tensors(run, "step-00000006"), straight)
    verified = _torchrun(2, "evaluate", str(run), "evaluation.far=0.1")
    assert verified.returncode == 0, verified.stderr
    header, row = verified.stdout.splitlines()
    assert "TAR@FAR=0.1 " in header
    assert row.split()[:3] == ["step", "6", f"{summary['trained']['accuracy']:.4f}"]
    assert verified.stderr.count(f"verifying {run}/checkpoints/step-00000006") == 1


def test_the_last_step_is_verified_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `keep_best` its score comes with the checkpoint, and the summary has that verification."""
    found = []

    def count(*arguments: Any, **settings: Any) -> Verification:
        found.append(verify_backbone(*arguments, **settings))
        return found[-1]

    monkeypatch.setattr("partialfc.train.verify_backbone", count)
    summaries = []
    for keep_best in (False, True):
        directory = tmp_path / f"keep_best_{keep_best}"
        evaluation = {"at_start": False, "every_steps": 3}
        config = _config(directory, data, evaluation=evaluation, checkpoint={"keep_best": keep_best})
        found.clear()
        assert main(["train", str(config)]) == 0
        summaries.append(json.loads((directory / "run" / "summary.json").read_text()))
        assert len(found) == 2  # after step 3 and after step 6
        assert summaries[-1]["trained"] == found[1].to_dict()
        assert found[1].result != found[0].result
        del summaries[-1]["images_per_second"]
    assert summaries[0] == summaries[1]
    # Started again, it has no step to verify after.
    assert main(["train", str(config)]) == 0
    assert json.loads((directory / "run" / "summary.json").read_text())["trained"] == summaries[1]["trained"]
    assert len(found) == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_state_of_a_loss_survives_a_resume(tmp_path: Path, data: Path, ranks: int) -> None:
    """A-Softmax: lambda goes on falling from where it was. And beside it all else that a head can remember."""
    tasks = {
        "second": {
            "data_directory": str(data),
            "global_batch_size": 6,
            "head": {
                "margin": {"name": "UniFace", "scale": 16.0},
                "num_subcenters": 2,
                "sample_rate": 0.5,
                "optimizer": {"name": "adamw"},
            },
        },
        "third": {
            "data_directory": str(data),
            "global_batch_size": 4,
            "head": {
                "margin": {"name": "AdaFace", "scale": 16.0},
                "variational": {"start_step": 1},
                "auxiliaries": [{"name": "CenterLoss", "weight": 0.1}, {"name": "TripletLoss"}],
                "loss_weight": 0.5,
            },
        },
    }
    config = _config(tmp_path, data, head={"margin": {"name": "SphereFace"}}, tasks=tasks)
    run = tmp_path / "run"
    arguments = ("train", str(config), "run.device=cpu")

    def train() -> None:
        if ranks == 1:
            assert main([*arguments]) == 0
        else:
            finished = _torchrun(ranks, *arguments)
            assert finished.returncode == 0, finished.stderr

    train()
    straight, losses = checkpoint_tensors(run, "step-00000006"), losses_of(run)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["main/iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["third/norm_mean"] != 20.0
    assert lines[-1]["second/bias"] != lines[0]["second/bias"]
    for name in (
        "second.learned.value_bias",
        "second.learned.updates_bias",
        "third.prototypes.seen",
        "main.class_centers.momentum",
    ):
        assert f"/head/head_{name}" in straight
    assert bool(straight["/head/head_third.auxiliaries.0.centers.weight"].any())
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train()
    assert losses_of(run) == losses
    _assert_same(checkpoint_tensors(run, "step-00000006"), straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("head.margin={name: AdaFace}", "was saved with margin_with_memory None, but this run has 'AdaFace'"),
        ("head.num_subcenters=2", "was saved with num_subcenters 1, but this run has 2"),
        ("head.auxiliaries=[{name: CenterLoss}]", "was saved with auxiliaries [], but this run has ['CenterLoss']"),
        ("head.variational={}", "was saved with variational False, but this run has True"),
        ("head.optimizer.name=adamw", "was saved with center_optimizer 'CenterSGD', but this run has 'CenterAdamW'"),
    ],
)
def test_a_run_does_not_go_on_with_another_memory(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    evaluation = {"at_start": False, "enabled": False}
    config = _config(tmp_path, data, evaluation=evaluation, training={"epochs": 0.1})
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "give the run the old value, or another run.directory" in error


def test_a_run_does_not_go_on_without_one_of_its_tasks(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"data_directory": str(data), "global_batch_size": 4, "head": {"margin": {"name": "CosFace"}}}
    evaluation = {"at_start": False, "enabled": False}
    config = _config(tmp_path, data, evaluation=evaluation, training={"epochs": 0.1}, tasks={"second": task})
    assert main(["train", str(config)]) == 0
    alone = _config(tmp_path, data, evaluation=evaluation, training={"epochs": 0.1})
    assert main(["train", str(alone)]) == 2
    assert "was saved with tasks ['main', 'second'], but this run has ['main']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"sampel_rate": 0.1}}, "head.sampel_rate: unknown key; did you mean 'sample_rate'?"),
        ({"training": {"global_batch_size": "many"}}, "training.global_batch_size: 'many' given"),
        ({"head": {"sample_rate": 0}}, "head.sample_rate: 0 given; must be greater than 0"),
        ({"head": {"sample_rate": 1.5}}, "head.sample_rate: 1.5 given; must be less than or equal to 1"),
        ({"head": {"num_classes": 5}}, "head.num_classes is 5, but"),
        ({"data": {"directory": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"run": {"directory": "/dev/null/run"}}, "/dev/null/run cannot be written"),
        ({"backbone": {"options": {"widht": 8}}}, "widht"),
        ({"evaluation": {"num_pairs": 6000}}, "6000"),
        (
            {"backbone": {"options": {"width": "wide"}}},
            "backbone.options.width is 'wide', but must be an integer of at least 1",
        ),
        ({"backbone": {"options": {"embedding_dim": 4}}}, "set backbone.embedding_dim"),
        ({"head": {"margin": {"name": "CosFace", "scale": float("inf")}}}, "CosFace.scale is inf"),
        ({"training": {"epochs": float("inf")}}, "training.epochs"),
        ({"training": {"global_batch_size": 1}}, "at least 2 for each of the 1 ranks"),
        (
            {"head": {"margin": {"name": "UniFace"}, "sampling_correction": False}},
            "head: sampling_correction is False, but UniFace depends on the level of the sum",
        ),
        (
            {"head": {"margin": {"name": "Softmax"}, "interclass_filtering_threshold": 0.4}},
            "head: interclass_filtering_threshold is 0.4, but must be None: Softmax compares no cosines",
        ),
        (
            {
                "tasks": {
                    "x": {"data_directory": "/no/x", "global_batch_size": 4, "head": {"margin": {"name": "CosFace"}}}
                }
            },
            "tasks.x.data_directory: /no/x/train",
        ),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], message: str
) -> None:
    assert main(["train", str(_config(tmp_path, data, **sections))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("partialfc: error: ")
    assert message in error
    assert error.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_data_without_verification_says_what_to_do(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_train = tmp_path / "only_train"
    shutil.copytree(data / "train", only_train / "train")
    assert main(["train", str(_config(tmp_path, only_train))]) == 2
    assert "evaluation.enabled=false" in capsys.readouterr().err
    config = _config(tmp_path, only_train, evaluation={"enabled": False, "at_start": False})
    assert main(["train", str(config)]) == 0
    assert "trained" not in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_changed_seed_does_not_resume(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path, data, training={"epochs": 0.1})
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "run.seed=5"]) == 2
    assert "was saved with seed 0, but this run has 5" in capsys.readouterr().err


def test_a_refused_resume_leaves_the_configuration(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = _config(tmp_path, data), tmp_path / "run"
    assert main(["train", str(config)]) == 0
    before = (run / "config.yaml").read_text()
    for override in ("backbone.options.width=16", "optimizer.momentum=0.0"):
        capsys.readouterr()
        assert main(["train", str(config), override, "run.log_every_steps=2"]) == 2
        name, _, value = override.partition("=")
        error = capsys.readouterr().err
        assert re.search(
            rf"since it was saved, {re.escape(name)} was \S+ and is {value}; give the run the old", error
        ), error
    assert main(["train", str(config), "training.epochs=0.1"]) == 2
    assert "is at step 6, but training.epochs=0.1 ends at step 1" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    assert main(["evaluate", str(run)]) == 0


def test_a_resumed_run_has_its_own_optimizer_settings(tmp_path: Path, data: Path) -> None:
    config, run = _config(tmp_path, data, evaluation={"at_start": False}), tmp_path / "run"
    assert main(["train", str(config)]) == 0
    other = tmp_path / "other"
    shutil.copytree(run, other)
    longer = ["train", str(config), "training.epochs=2"]
    assert main(longer) == 0
    assert main([*longer, f"run.directory={other}", "optimizer.weight_decay=0", "optimizer.momentum=0.5"]) == 0
    assert losses_of(run)[:STEPS] == losses_of(other)[:STEPS]
    assert losses_of(run)[-1] != losses_of(other)[-1]


def test_a_run_that_ends_without_a_number_fails(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tmp_path, data, optimizer={"learning_rate": 1e30, "max_gradient_norm": None})
    assert main(["train", str(config)]) == 2
    assert "loss or gradient was not finite" in capsys.readouterr().err
    skipped = [message for message in caplog.messages if "did not move" in message]
    said = "the backbone did not move in step 2, as not all is finite: loss nan, gradient norm nan; 1 in a row"
    assert skipped[0].startswith(said)
    assert len(skipped) == STEPS - 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_data_that_cannot_be_read_stops_the_run(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shard = broken / "train" / "shard-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main(["train", str(_config(tmp_path, broken))]) == 2
    error = capsys.readouterr().err
    assert "32 of 32 samples could not be used (32 checksum), which is more than data.max_bad_share=0.01" in error
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1] * 16 + [2] * 16
    assert "shard-000000.tar, sample" in json.loads(lines[0])["message"]


def test_single_mesh_needs_no_group() -> None:
    assert ShardMesh.from_group() == ShardMesh.single()
