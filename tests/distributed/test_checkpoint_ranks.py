"""Ranks that save and load together."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import assert_is_state, disk_full, flip, names, single_store, state_at
from support import SOON_SECONDS, run_distributed

from partialfc.checkpoint import CheckpointError, CheckpointStore, RunLock, RunLockedError, storage, store
from partialfc.checkpoint.manifest import MANIFEST_NAME
from partialfc.distributed.mesh import ShardMesh

HOST = socket.gethostname()


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
    with pytest.raises(CheckpointError, match=r"^saving step 15: rank 1 \(\S+\): state\['backbone'\] has the key 3"):
        checkpoints.save(15, bad_state, metadata={})

    for failing_rank, patched, attribute in [
        (1, storage._HashingFile, "write"),
        (0, storage._HashingFileSystem, "rename"),
        (0, store.Manifest, "write"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            if mesh.rank == failing_rank:
                patch.setattr(patched, attribute, disk_full)
            message = rf"rank {failing_rank} \({HOST}\): OSError: \[Errno 28\] No space left"
            with pytest.raises(CheckpointError, match=message):
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
            assert f"rank {failing_rank} ({HOST}): OSError: [Errno 28] No space left" in error
        torch.distributed.barrier()
        assert names(Path(place)) == ["step-00000002", "step-00000003"]
    checkpoints.save(5, state_at(5, mesh), metadata={}, blocking=False)
    checkpoints.wait()
    checkpoints.load(Path(place) / "step-00000005", state := state_at(0, mesh))
    assert_is_state(state, 5, mesh)

    # What the threads have not agreed on: that of the first rank ends by itself, after the others have.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(checkpoints._directory, "collect_garbage", disk_full)
        checkpoints.save(6, state_at(6, mesh), metadata={}, blocking=False)
        assert communicate_until_told(checkpoints) == (
            f"saving step 6: rank 0 ({HOST}): OSError: [Errno 28] No space left on device"
        )


def communicate_until_told(checkpoints: CheckpointStore) -> str | None:
    """Steps of a training that ask at each whether the save is over. All ranks hear of it in the same step."""
    heard = None
    told: list[int] = []
    deadline = time.monotonic() + SOON_SECONDS
    for step in itertools.count():
        total = torch.tensor([step + checkpoints.mesh.rank, int(time.monotonic() > deadline)])
        torch.distributed.all_reduce(total)
        assert int(total[0]) == sum(step + rank for rank in range(checkpoints.mesh.size))
        assert int(total[1]) == 0, "the save does not end"
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
