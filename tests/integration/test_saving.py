"""What a run saves, what it keeps, and what it does when it cannot save."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import flip
from small_run import make_faces, set_back, steps_of, write_config
from support import SOON_SECONDS, checkpoint_tensors

from partialfc.assembly import assemble, open_inputs
from partialfc.checkpoint import CheckpointStore, store
from partialfc.cli import main
from partialfc.config import load_config
from partialfc.distributed.mesh import ShardMesh
from partialfc.evaluate import load_backbone
from partialfc.saving import Saver
from partialfc.supervision.exit_codes import EXIT_RETRY
from partialfc.telemetry import read_metrics

STEPS = 6


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("data") / "faces")


def config_file(tmp_path: Path, faces: Path, **sections: dict[str, Any]) -> str:
    evaluation = {"enabled": False, **sections.pop("evaluation", {})}
    checkpoint = {"every_steps": 3, **sections.pop("checkpoint", {})}
    return str(write_config(tmp_path, faces, steps=STEPS, evaluation=evaluation, checkpoint=checkpoint, **sections))


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The system refuses to write more into one file, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


_HOLD = """
import sys, time
from partialfc.checkpoint import RunLock
from partialfc.distributed.mesh import ShardMesh
with RunLock(sys.argv[1], mesh=ShardMesh.single()):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_job_on_a_run_is_refused_and_changes_nothing(
    tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(run)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert main(["train", config]) == 2
            assert f"in use by process {holder.pid} on {socket.gethostname()}" in capsys.readouterr().err
            assert [path.name for path in run.iterdir()] == ["lock"]
        finally:
            holder.kill()
    # The lock goes with the one that had it.
    assert main(["train", config]) == 0


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, faces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    assert main(["train", config]) == 0
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    before = checkpoint_tensors(run, newest.name)
    caplog.set_level(logging.INFO)
    largest = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    flip(largest, largest.stat().st_size // 2, 3)
    assert main(["train", config]) == 0
    assert any(
        "passing over a damaged checkpoint: " in said and f"{largest.name} has sha256" in said
        for said in caplog.messages
    )
    assert f"going on from {newest.with_name('step-00000003')}, step 3 of {STEPS}" in caplog.messages
    after = checkpoint_tensors(run, newest.name)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert value.equal(after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


def test_a_killed_data_worker_ends_the_run_so_that_it_starts_again(
    tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, faces, data={"num_workers": 2}, training={"epochs": 1e5})
    command = [sys.executable, "-m", "partialfc.cli", "train", config]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as training:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(read_metrics(metrics)) > 2, training)
        workers = subprocess.run(["pgrep", "-P", str(training.pid)], capture_output=True, text=True, check=True)
        os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
        _, errors = training.communicate(timeout=SOON_SECONDS)
    assert training.returncode == EXIT_RETRY
    assert "killed by SIGKILL" in errors


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_refused_resume_leaves_everything(tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    assert main(["train", config]) == 0
    set_back(run, 3)
    (run / "bad_samples.jsonl").write_text("no line of a run\n{}\n")
    # The lock says who has it.
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "lock"}
    assert main(["train", config, "head.margin.scale=8.0"]) == 2
    assert "bad_samples.jsonl, line 1: not a line of a run" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_whose_checkpoints_are_gone_says_so(
    tmp_path: Path, faces: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    assert main(["train", config]) == 0
    shutil.rmtree(run / "checkpoints")
    # It is another matter if the file system with them is not mounted.
    (run / "checkpoints").symlink_to(tmp_path / "mount")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", config]) == 2
    assert f"is a link to {tmp_path / 'mount'}, which is not there" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "checkpoints").unlink()
    assert main(["train", config]) == 0
    assert any("has metrics, but" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stop_at_a_step_that_is_saved_leaves_its_score(tmp_path: Path, faces: Path, asynchronous: bool) -> None:
    settings = {"keep_best": True, "asynchronous": asynchronous}
    path = config_file(tmp_path, faces, checkpoint=settings, evaluation={"enabled": True, "every_steps": 3})
    config = load_config(path)
    run = assemble(config, open_inputs(config, num_ranks=1), ShardMesh.single(), torch.device("cpu"))
    run.progress.step = 3
    saver = Saver(run, saved_step=None)
    saver.save(score=0.9)
    saver.save_last()
    manifest = tmp_path / "run" / "checkpoints" / "step-00000003" / "MANIFEST.json"
    written = manifest.read_bytes()
    assert run.store.metadata(manifest.parent)["score"] == 0.9
    # Nor does one that has gone on from it write it again, but it does save what comes after.
    resumed = Saver(run, saved_step=3)
    resumed.save_last()
    assert manifest.read_bytes() == written
    run.progress.step = 4
    resumed.save_last()
    assert steps_of(tmp_path / "run") == [3, 4]


def test_an_overflow_at_the_end_of_fp16_is_no_divergence(tmp_path: Path, faces: Path) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    assert main(["train", config]) == 0
    set_back(run, 3)
    # The scale of a network that has just begun with fp16 is still too large in all of the last steps.
    fp16 = ["train", config, "training.precision=fp16", "head.loss_weight=100"]
    assert main(fp16) == 0
    scales = [line["loss_scale"] for line in read_metrics(run / "metrics.jsonl") if "loss_scale" in line]
    assert scales == [65536.0, 32768.0, 16384.0]
    assert main(fp16) == 0


def test_the_best_is_kept_besides_the_last(tmp_path: Path, faces: Path) -> None:
    config, run = (
        config_file(
            tmp_path,
            faces,
            evaluation={"enabled": True, "every_steps": 1},
            checkpoint={"every_steps": None, "keep_last": 1, "keep_best": True},
        ),
        tmp_path / "run",
    )
    assert main(["train", config]) == 0
    verified = {
        int(line["step"]): line["verification_accuracy"]
        for line in read_metrics(run / "metrics.jsonl")
        if "verification_accuracy" in line
    }
    assert list(verified) == [1, 2, 3, 4, 5, 6]
    best = max(verified, key=lambda step: (verified[step], step))
    assert steps_of(run) == sorted({best, STEPS})
    store = CheckpointStore(run / "checkpoints", mesh=ShardMesh.single())
    path = store.best()
    assert path == run / "checkpoints" / f"step-{best:08d}"
    assert store.metadata(path)["score"] == verified[best]


def test_the_best_of_nothing_is_refused(tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config_file(tmp_path, faces, checkpoint={"keep_best": True})]) == 2
    assert "checkpoint.keep_best needs evaluation.enabled and evaluation.every_steps" in capsys.readouterr().err


def test_going_on_reads_a_checkpoint_once_to_verify_it(
    tmp_path: Path, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file(tmp_path, faces)
    assert main(["train", config]) == 0
    verified: list[str] = []

    def check_files(path: Path, *arguments: Any, **options: Any) -> None:
        verified.append(path.name)
        original(path, *arguments, **options)

    original = store.check_files
    monkeypatch.setattr(store, "check_files", check_files)
    assert main(["train", config]) == 0
    assert verified == [f"step-{STEPS:08}"]


def test_other_settings_are_told_when_a_run_goes_on(
    tmp_path: Path, faces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    assert main(["train", config]) == 0
    set_back(run, 3)
    with caplog.at_level(logging.WARNING):
        assert main(["train", config, "head.margin.scale=8.0", "optimizer.learning_rate=0.05"]) == 0
    told = [record.getMessage() for record in caplog.records if "was saved" in record.getMessage()]
    assert told == [
        "head.margin.scale was 16.0 when the run was saved, and is 8.0 from here on",
        "optimizer.learning_rate was 0.1 when the run was saved, and is 0.05 from here on",
    ]


def test_an_average_of_weights_may_begin_later_and_is_what_is_evaluated(tmp_path: Path, faces: Path) -> None:
    config, run = config_file(tmp_path, faces), tmp_path / "run"
    assert main(["train", config]) == 0
    set_back(run, 3)
    weights = checkpoint_tensors(run, "step-00000003")
    assert not any(name.startswith("/ema") for name in weights)
    # So slow that it still is where it began.
    assert main(["train", config, "engine.ema_decay=0.99999999"]) == 0
    name = "output.weight" if "/backbone/output.weight" in weights else next(iter(weights)).removeprefix("/backbone/")
    backbone, _ = load_backbone(run)
    torch.testing.assert_close(backbone.state_dict()[name], weights[f"/backbone/{name}"], atol=1e-6, rtol=1e-5)
    trained = checkpoint_tensors(run, "step-00000006")
    assert not trained[f"/backbone/{name}"].allclose(weights[f"/backbone/{name}"], atol=1e-4)


def test_fp16_goes_on_bit_for_bit(tmp_path: Path, faces: Path) -> None:
    config, run = (
        config_file(tmp_path, faces, training={"precision": "fp16", "accumulation_steps": 2}),
        tmp_path / "run",
    )
    assert main(["train", config]) == 0
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    straight = checkpoint_tensors(run, "step-00000006")
    assert any(name.startswith("/loss_scale") for name in straight)
    set_back(run, 3)
    assert main(["train", config]) == 0
    assert [line["loss"] for line in read_metrics(run / "metrics.jsonl")] == losses
    for name, value in checkpoint_tensors(run, "step-00000006").items():
        assert value.equal(straight[name]) if isinstance(value, torch.Tensor) else value == straight[name], name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_that_fail_are_told_and_at_last_end_the_run(
    tmp_path: Path,
    faces: Path,
    asynchronous: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"every_steps": 1, "max_failures": 3, "asynchronous": asynchronous}
    config, run = config_file(tmp_path, faces, checkpoint=settings), tmp_path / "run"
    with files_of_at_most(30_000):
        assert main(["train", config]) == EXIT_RETRY
    warnings = [record.getMessage() for record in caplog.records if "save" in record.getMessage()]
    assert [text[:28] for text in warnings] == ["save 1 in a row has failed; ", "save 2 in a row has failed; "]
    assert "File too large" in capsys.readouterr().err
    assert list((run / "checkpoints").iterdir()) == []
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] >= 3
    # With room again it begins anew, for nothing was saved.
    assert main(["train", config]) == 0
    assert steps_of(run) == [4, 5, 6]


def test_a_last_save_that_fails_ends_the_run(tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file(tmp_path, faces, checkpoint={"every_steps": None, "max_failures": 100})
    with files_of_at_most(30_000):
        assert main(["train", config]) == EXIT_RETRY
    assert "saving step 6" in (error := capsys.readouterr().err) or "writing" in error
    assert "File too large" in error
    assert main(["train", config]) == 0
