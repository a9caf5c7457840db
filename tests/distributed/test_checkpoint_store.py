"""Checkpoints of a process on its own; those of several are in test_checkpoint_ranks.py."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_states import assert_is_state, disk_full, flip, names, single_store, state_at

from partialfc.checkpoint import CheckpointError, CheckpointStore, storage
from partialfc.checkpoint.manifest import MANIFEST_NAME


def test_a_process_alone_saves_and_loads(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path / "new" / "run")
    assert checkpoints.latest() is None
    mesh = checkpoints.mesh
    assert checkpoints.save(120, state_at(120, mesh), metadata={"config_hash": "abc"}).name == "step-00000120"
    latest = checkpoints.latest()
    assert latest == tmp_path / "new" / "run" / "step-00000120"

    state = state_at(0, mesh)
    weight = state["backbone"]["layer.weight"]
    metadata = checkpoints.load(latest, state)
    assert_is_state(state, 120, mesh)
    assert state["backbone"]["layer.weight"] is weight, "tensors are filled in place"
    assert metadata == {
        "config_hash": "abc",
        "step": 120,
        "score": None,
        "world_size": 1,
        "torch_version": torch.__version__,
    }


def test_what_was_verified_a_moment_ago_is_not_compared_again(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path, 5)
    latest = checkpoints.latest()
    assert latest is not None
    name = next(name for name in names(latest) if name.endswith(".distcp"))
    last_byte = (latest / name).stat().st_size - 1  # of the padding of a zip: what is read is as it was
    flip(latest / name, last_byte, 0)
    state = state_at(0, checkpoints.mesh)
    assert checkpoints.load(latest, state, verified=True)["step"] == 5
    assert_is_state(state, 5, checkpoints.mesh)
    with pytest.raises(CheckpointError, match=f"{name} has sha256"):
        checkpoints.load(latest, state_at(0, checkpoints.mesh))
    (latest / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        checkpoints.load(latest, state, verified=True)


def test_every_file_is_on_disk_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, int] = {}
    renamed_to: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        fsync(descriptor)

    def recording_rename(self: Path, target: Path) -> Path:
        if Path(target).name.startswith("step-"):
            for path in (self, *self.iterdir()):
                assert synced.get(path.stat().st_ino) == path.stat().st_size, path.name
            renamed_to.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    single_store(tmp_path, 5)
    assert renamed_to == ["step-00000005"]
    assert tmp_path.stat().st_ino in synced


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path, 2)
    target = tmp_path / "step-00000002"
    manifest = target / MANIFEST_NAME
    for place in range(manifest.stat().st_size):
        flip(manifest, place, place % 8)
        with pytest.raises(CheckpointError, match=MANIFEST_NAME):
            checkpoints._verify(target)
        flip(manifest, place, place % 8)
    assert checkpoints.latest() == target


@pytest.mark.parametrize("kind", ["truncated", "grown", "missing", "no manifest", "other step's file", "empty"])
def test_structural_damage_is_found(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = single_store(tmp_path, 1, 2)
    target, file = tmp_path / "step-00000002", tmp_path / "step-00000002" / "__0_0.distcp"
    if kind == "truncated":
        os.truncate(file, file.stat().st_size - 1)
        reason = f"__0_0.distcp has {file.stat().st_size} bytes instead of {file.stat().st_size + 1}"
    elif kind == "grown":
        file.write_bytes(file.read_bytes() + b"\0")
        reason = "__0_0.distcp has"
    elif kind == "missing":
        file.unlink()
        reason = "__0_0.distcp cannot be read: No such file"
    elif kind == "no manifest":
        (target / MANIFEST_NAME).unlink()
        reason = "MANIFEST.json cannot be read: No such file"
    elif kind == "other step's file":
        shutil.copy(tmp_path / "step-00000001" / file.name, file)
        reason = "__0_0.distcp has"
    else:
        (target / MANIFEST_NAME).write_bytes(b"")
        reason = "MANIFEST.json is damaged"
    assert checkpoints.latest() == tmp_path / "step-00000001"
    assert reason in caplog.text
    assert "step-00000002" in caplog.text


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path, 1, 2)
    for step in ("step-00000001", "step-00000002"):
        (tmp_path / step / ".metadata").unlink()
    with pytest.raises(
        CheckpointError, match=r"has 2 checkpoints and none is good; (?s:.*)step-00000002(?s:.*)00000001"
    ):
        checkpoints.latest()


def test_what_is_not_committed_is_ignored_and_swept(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / f"tmp-00000009-{'d' * 32}")
    (tmp_path / "step-00000010.partial").mkdir()
    assert checkpoints.latest() == tmp_path / "step-00000001"
    single_store(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000010.partial"]


def test_a_restart_sweeps_what_a_killed_save_has_left(tmp_path: Path) -> None:
    single_store(tmp_path, 1, 2, 3, 9, keep_last=4)
    (tmp_path / "step-00000009").rename(tmp_path / f"tmp-00000009-{'d' * 32}")
    checkpoints = single_store(tmp_path, keep_last=2)
    checkpoints.collect_garbage(3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    # Before there is any.
    (tmp_path / "empty" / f"tmp-00000001-{'d' * 32}").mkdir(parents=True)
    CheckpointStore(tmp_path / "empty", mesh=checkpoints.mesh).collect_garbage(0)
    assert names(tmp_path / "empty") == []
    CheckpointStore(tmp_path / "missing", mesh=checkpoints.mesh).collect_garbage(0)


def test_a_checkpoint_that_a_killed_save_was_replacing_is_put_back(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path, 1, 2, keep_last=4)
    (tmp_path / "step-00000002").rename(tmp_path / "tmp-replaced-step-00000002")
    (tmp_path / "tmp-replaced-notes").mkdir()  # somebody else's
    checkpoints.put_back()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "tmp-replaced-notes"]
    assert checkpoints.latest() == tmp_path / "step-00000002"
    # The one that replaced it has its name already.
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "tmp-replaced-step-00000001")
    checkpoints.put_back()
    assert "tmp-replaced-step-00000001" in names(tmp_path)


def test_what_is_no_checkpoint_but_has_the_name_of_one_gives_way(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    single_store(elsewhere, 2)
    run = tmp_path / "run"
    single_store(run, 1, keep_last=4)
    for put in (
        lambda place: place.symlink_to("nowhere"),
        lambda place: place.symlink_to(elsewhere),
        lambda place: place.write_text("a file"),
    ):
        put(run / "step-00000002")
        checkpoints = single_store(run, 2, keep_last=4)
        assert names(run) == ["step-00000001", "step-00000002"]
        assert checkpoints.latest() == run / "step-00000002"
        shutil.rmtree(run / "step-00000002")
    # A link went, not what it pointed to.
    assert names(elsewhere) == ["step-00000002"]


def test_a_folder_whose_file_system_is_not_mounted_is_no_fresh_start(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / "mount")
    checkpoints = single_store(folder)
    for call in (checkpoints.put_back, checkpoints.latest):
        with pytest.raises(
            CheckpointError, match=rf"is a link to {tmp_path}/mount, which is not there: mount it"
        ) as caught:
            call()
        assert not caught.value.passing
    (tmp_path / "mount").mkdir()
    assert checkpoints.latest() is None


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    single_store(tmp_path, 1, 2, 30, 100, keep_last=2)
    assert names(tmp_path) == ["step-00000030", "step-00000100"]
    single_store(tmp_path, 101, keep_last=1)
    assert names(tmp_path) == ["step-00000101"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        single_store(tmp_path, keep_last=0)


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path: Path) -> None:
    single_store(tmp_path, 1, 2, 5, 6, keep_last=4)
    for step in (2, 5, 6):
        (tmp_path / f"step-{step:08d}" / ".metadata").unlink()
    checkpoints = single_store(tmp_path, keep_last=2)
    assert checkpoints.latest() == tmp_path / "step-00000001"
    checkpoints.save(3, state_at(3, checkpoints.mesh), metadata={})
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 3, 5, 6)]
    assert checkpoints.latest() == tmp_path / "step-00000003"
    checkpoints.save(5, state_at(5, checkpoints.mesh), metadata={})
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 5, 6)]
    assert checkpoints.latest() == tmp_path / "step-00000005"


def test_a_run_set_back_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    single_store(tmp_path, 1, 2, 10, 11, keep_last=4)
    single_store(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 3, 10, 11)]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = single_store(tmp_path, 4)
    other = state_at(9, checkpoints.mesh)
    checkpoints.save(4, other, metadata={})
    assert names(tmp_path) == ["step-00000004"]
    checkpoints.load(tmp_path / "step-00000004", state := state_at(0, checkpoints.mesh))
    assert_is_state(state, 9, checkpoints.mesh)

    def failing_fsync(directory: Path) -> None:
        if directory == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("partialfc.checkpoint.directory.fsync_directory", failing_fsync)
    with pytest.raises(CheckpointError, match=r"committing .*Input/output error"):
        checkpoints.save(4, state_at(4, checkpoints.mesh), metadata={})
    assert names(tmp_path) == ["step-00000004"]
    checkpoints.load(tmp_path / "step-00000004", state := state_at(0, checkpoints.mesh))
    assert_is_state(state, 9, checkpoints.mesh)


@pytest.mark.parametrize("place", ["file", "close", "manifest"])
def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    checkpoints = single_store(tmp_path, 1)
    with monkeypatch.context() as patch:
        if place == "file":
            patch.setattr(storage._HashingFile, "write", disk_full)
        elif place == "close":
            patch.setattr(os, "fsync", disk_full)
        else:
            patch.setattr("partialfc.checkpoint.manifest.Manifest.write", disk_full)
        with pytest.raises(CheckpointError, match=r"\w: OSError.*No space left on device"):
            checkpoints.save(2, state_at(2, checkpoints.mesh), metadata={})
    assert names(tmp_path) == ["step-00000001"]
    checkpoints.save(2, state_at(2, checkpoints.mesh), metadata={})
    assert checkpoints.latest() == tmp_path / "step-00000002"


def test_a_save_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path)
    with pytest.raises(CheckpointError, match=r"state\['optimizer'\]\['state'\] has the key 0 of type int"):
        checkpoints.save(1, {"optimizer": {"state": {0: {"step": 1}}}}, metadata={})
    with pytest.raises(CheckpointError, match="step is -1"):
        checkpoints.save(-1, {}, metadata={})
    with pytest.raises(CheckpointError, match="metadata cannot be written as JSON"):
        checkpoints.save(1, {"a": 1}, metadata={"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoints = single_store(tmp_path)
    saved = {"model": {"weight": torch.ones(2, 3), "momentum": torch.ones(2, 3), "steps": 7}, "rest": {"x": 1}}
    path = checkpoints.save(1, saved, metadata={})
    for model, message in [
        ({"weight": torch.zeros(2, 3), "steps": 0}, "lacks, the first is model.momentum; create them before loading"),
        ({**saved["model"], "weight": torch.zeros(2, 3).bfloat16()}, "model.weight has dtype torch.float32 in the"),
        ({**saved["model"], "weight": torch.zeros(3, 3)}, "Size mismatch .* for model.weight"),
        ({**saved["model"], "weight": 1.0}, "model.weight is a tensor in the checkpoint but not a tensor in"),
        ({**saved["model"], "steps": torch.tensor(0)}, "model.steps is not a tensor in the checkpoint but a tensor in"),
        ({**saved["model"], "extra": torch.zeros(1)}, "Missing key in checkpoint state_dict: model.extra"),
        ({0: torch.zeros(1)}, r"state\['model'\] has the key 0"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path, {"model": model})
    part = {"rest": {"x": 0}}
    checkpoints.load(path, part)
    assert part == {"rest": {"x": 1}}, "whole sections may be left out"
