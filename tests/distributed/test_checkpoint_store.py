from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import run_distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from partialfc.checkpoint import CheckpointError, CheckpointStore, RunLock, RunLockedError, storage, store, verifying
from partialfc.checkpoint.manifest import MANIFEST_NAME
from partialfc.distributed.mesh import ShardMesh

# Rows over 1, 2, 3 ranks: even, uneven, and with a rank that has none.
SHARDED = {"nine": (9, torch.float32), "one": (1, torch.float64), "four": (4, torch.bfloat16), "ids": (7, torch.int64)}


def whole(name: str, step: int) -> Tensor:
    rows, dtype = SHARDED[name]
    generator = torch.Generator().manual_seed(step * 100 + rows)
    return (torch.randn(rows, 3, generator=generator) * 1000).to(dtype)


def own_rows(tensor: Tensor, mesh: ShardMesh) -> Tensor:
    size = -(-tensor.shape[0] // mesh.size)
    return tensor[mesh.rank * size : (mesh.rank + 1) * size].clone()


def state_at(step: int, mesh: ShardMesh) -> dict[str, Any]:
    """A state as a trainer has it; step 0 gives the same layout with nothing in it."""
    sharded = {name: whole(name, step) if step else torch.zeros_like(whole(name, 1)) for name in SHARDED}
    return {
        "head": {name: mesh.shard(own_rows(value, mesh), value.shape[0]) for name, value in sharded.items()},
        "backbone": {"layer.weight": torch.nn.Parameter(torch.full((4, 4), float(step)))},
        "nested": {"list": [torch.arange(3) * step, {"deep": torch.tensor(step / 7)}], "empty": {}},
        "progress": {"step": step, "rate": step / 3, "name": f"run {step}", "nothing": None, "pair": (step, [1, 2])},
    }


def assert_is_state(state: dict[str, Any], step: int, mesh: ShardMesh) -> None:
    for name in SHARDED:
        value = state["head"][name]
        local = value.to_local() if isinstance(value, DTensor) else value
        assert torch.equal(local, own_rows(whole(name, step), mesh)), name
    assert torch.equal(state["backbone"]["layer.weight"], torch.full((4, 4), float(step)))
    assert torch.equal(state["nested"]["list"][0], torch.arange(3) * step)
    assert torch.equal(state["nested"]["list"][1]["deep"], torch.tensor(step / 7))
    assert state["progress"] == state_at(step, ShardMesh.single())["progress"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def single_store(directory: Path, *steps: int, keep_last: int = 3) -> CheckpointStore:
    mesh = ShardMesh.single()
    checkpoints = CheckpointStore(directory, mesh=mesh, keep_last=keep_last)
    for step in steps:
        checkpoints.save(step, state_at(step, mesh), metadata={"config_hash": "abc"})
    return checkpoints


def disk_full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# One process


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


def flip(file: Path, place: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


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
        with pytest.raises(CheckpointError, match=r"rank 0: OSError.*No space left on device"):
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


# Several processes


def check_on_many_ranks(rank: int, world_size: int, directory: str) -> None:
    """Two ranks of three save and load; then all three load what the two saved."""
    pair = torch.distributed.new_group([0, 1])
    if rank < 2:
        check_on_two_ranks(ShardMesh.from_group(pair), directory)
    torch.distributed.barrier()
    mesh = ShardMesh.from_group()
    checkpoints = CheckpointStore(directory, mesh=mesh)
    path = checkpoints.latest()
    assert path is not None
    metadata = checkpoints.load(path, state := state_at(0, mesh))
    assert (metadata["world_size"], metadata["config_hash"]) == (2, "abc")
    assert_is_state(state, 30, mesh)


def check_on_two_ranks(mesh: ShardMesh, directory: str) -> None:
    checkpoints = CheckpointStore(directory, mesh=mesh, keep_last=2)
    first = checkpoints.save(10, state_at(10, mesh), metadata={"config_hash": "abc"})
    assert names(first) == [".metadata", MANIFEST_NAME, "__0_0.distcp", "__1_0.distcp"]
    state = state_at(0, mesh)
    assert checkpoints.load(first, state)["world_size"] == 2
    assert_is_state(state, 10, mesh)

    check_failures(checkpoints, first)
    checkpoints.save(20, state_at(20, mesh), metadata={})
    second = checkpoints.save(30, state_at(30, mesh), metadata={"config_hash": "abc"})
    torch.distributed.barrier(mesh.group)
    assert names(Path(directory)) == ["step-00000020", "step-00000030"]
    check_damage(checkpoints, second)
    assert checkpoints.latest() == second


def check_failures(checkpoints: CheckpointStore, first: Path) -> None:
    """A failure on one rank, in each stage, is one on all, names the rank, and leaves what was there."""
    mesh = checkpoints.mesh
    bad_state = state_at(15, mesh)
    if mesh.rank == 1:
        bad_state["backbone"][3] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"^saving step 15: rank 1: state\['backbone'\] has the key 3"):
        checkpoints.save(15, bad_state, metadata={})

    for failing_rank, patched, attribute in [
        (1, storage._HashingFile, "write"),
        (0, storage._HashingFileSystem, "rename"),
        (0, store.Manifest, "write"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            if mesh.rank == failing_rank:
                patch.setattr(patched, attribute, disk_full)
            with pytest.raises(CheckpointError, match=rf"rank {failing_rank}: OSError: \[Errno 28\] No space left"):
                checkpoints.save(15, state_at(15, mesh), metadata={})
        torch.distributed.barrier(mesh.group)
        assert names(checkpoints.directory) == [first.name]
        assert checkpoints.latest() == first
    checkpoints.load(first, state := state_at(0, mesh))
    assert_is_state(state, 10, mesh)


def check_damage(checkpoints: CheckpointStore, newest: Path) -> None:
    """Whichever rank verifies a file, all ranks pass over its checkpoint, and rank 0 alone says so."""
    older = newest.with_name("step-00000020")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    store.logger.addHandler(handler)
    for name in names(newest):
        records.clear()
        if checkpoints.mesh.rank == 0:
            flip(newest / name, 40, 3)
        torch.distributed.barrier(checkpoints.mesh.group)
        assert checkpoints.latest() == older, name
        assert [name in record.getMessage() for record in records] == ([True] if checkpoints.mesh.rank == 0 else [])
        torch.distributed.barrier(checkpoints.mesh.group)
        if checkpoints.mesh.rank == 0:
            flip(newest / name, 40, 3)
        torch.distributed.barrier(checkpoints.mesh.group)


def check_background(rank: int, world_size: int, place: str) -> None:
    """A thread of each rank saves while the ranks communicate about other things; all learn alike how it ended."""
    mesh = ShardMesh.from_group()
    checkpoints = CheckpointStore(place, mesh=mesh, keep_last=2)
    for step in (1, 2, 3):
        state = state_at(step, mesh)
        path = checkpoints.save(step, state, metadata={}, score=step / 2, blocking=False)
        for value in state["head"].values():
            value.to_local().zero_()
        state["progress"]["step"] = -1
        assert communicate_until_told(checkpoints) is None
        checkpoints.load(path, loaded := state_at(0, mesh))
        assert_is_state(loaded, step, mesh)
        assert_is_state(state_at(step, mesh), step, mesh)
    torch.distributed.barrier()
    assert names(Path(place)) == ["step-00000002", "step-00000003"]

    for failing_rank, patched, attribute in [
        (1, storage._HashingFile, "write"),
        (0, store.Manifest, "write"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing_rank:
                patch.setattr(patched, attribute, disk_full)
            checkpoints.save(4, state_at(4, mesh), metadata={}, blocking=False)
            error = communicate_until_told(checkpoints)
            assert error is not None
            assert f"rank {failing_rank}: OSError: [Errno 28] No space left" in error
        torch.distributed.barrier()
        assert names(Path(place)) == ["step-00000002", "step-00000003"]
    checkpoints.save(5, state_at(5, mesh), metadata={}, blocking=False)
    checkpoints.wait()
    checkpoints.load(Path(place) / "step-00000005", state := state_at(0, mesh))
    assert_is_state(state, 5, mesh)


def communicate_until_told(checkpoints: CheckpointStore) -> str | None:
    """Steps of a training that ask at each whether the save is over. All ranks hear of it in the same step."""
    heard = None
    told: list[int] = []
    for step in range(2000):
        total = torch.full((7,), step + checkpoints.mesh.rank)
        torch.distributed.all_reduce(total)
        assert int(total[0]) == sum(step + rank for rank in range(checkpoints.mesh.size))
        # One rank is slower than the other.
        time.sleep(0.002 * checkpoints.mesh.rank)
        under_way = checkpoints._background._under_way is not None
        try:
            checkpoints.poll()
        except CheckpointError as error:
            heard = str(error)
        if under_way and checkpoints._background._under_way is None:
            told.append(step)
            break
    everyone: list[Any] = [None] * checkpoints.mesh.size
    torch.distributed.all_gather_object(everyone, (told, heard))
    assert len(told) == 1
    assert all(other == (told, heard) for other in everyone)
    return heard


def check_lock(rank: int, world_size: int, place: str) -> None:
    """The first rank locks for all; a second job is refused on all of its ranks."""
    mesh = ShardMesh.from_group()
    with RunLock(place, mesh=mesh, wait_seconds=0):
        torch.distributed.barrier()
        second = RunLock(place, mesh=mesh, wait_seconds=0)
        with pytest.raises(RunLockedError, match="in use by another run in this process"):
            second.acquire()
    with RunLock(place, mesh=mesh, wait_seconds=0):
        pass


def check_two_ranks(rank: int, world_size: int, place: str) -> None:
    check_background(rank, world_size, place)
    check_lock(rank, world_size, place + "-run")


def test_ranks_save_in_the_background_and_lock_as_one(tmp_path: Path) -> None:
    run_distributed(check_two_ranks, 2, str(tmp_path / "store"))


def test_ranks_act_as_one_and_any_number_of_them_loads(tmp_path: Path) -> None:
    run_distributed(check_on_many_ranks, 3, str(tmp_path))

    alone = single_store(tmp_path)
    path = alone.latest()
    assert path is not None
    metadata = alone.load(path, state := state_at(0, alone.mesh))
    assert_is_state(state, 30, alone.mesh)
    assert (metadata["world_size"], metadata["config_hash"]) == (2, "abc")


def verify_slowly(rank: int, world_size: int, directory: str) -> None:
    impatient = ShardMesh.from_group(dist.new_group(timeout=timedelta(seconds=4)))
    checkpoints = CheckpointStore(Path(directory) / "checkpoints", mesh=impatient)
    path = checkpoints.save(1, state_at(1, impatient), metadata={})
    verifying._ROUND_SECONDS = 0.5
    find_damage, slow = verifying.find_damage, time.monotonic() + (7 if rank == 1 else 0)

    def find_damage_slowly(*arguments: Any, on_bytes: Any) -> str | None:
        while time.monotonic() < slow:
            time.sleep(0.1)
            on_bytes(0)
        return find_damage(*arguments, on_bytes=on_bytes)

    verifying.find_damage = find_damage_slowly
    assert checkpoints.latest() == path


def test_ranks_wait_for_one_that_verifies_for_longer_than_a_collective_may_take(tmp_path):
    run_distributed(verify_slowly, 3, str(tmp_path))
