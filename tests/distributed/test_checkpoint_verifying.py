"""What ranks do when one of them is slow, or finds or does what the others do not."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_states import flip, names, state_at
from support import run_distributed

from partialfc.checkpoint import CheckpointError, CheckpointStore, RunLock, verifying
from partialfc.distributed.mesh import ShardMesh

HOST = socket.gethostname()
TIMEOUT_SECONDS = 4


def impatient_mesh() -> ShardMesh:
    """All ranks, over a group whose collectives end soon."""
    return ShardMesh.from_group(dist.new_group(timeout=timedelta(seconds=TIMEOUT_SECONDS)))


def read_slowly(patch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """As if the first bytes of a share took so long."""
    compare, until = verifying.compare, time.monotonic() + seconds

    def compare_slowly(*arguments: Any, on_bytes: Any) -> None:
        while time.monotonic() < until:
            time.sleep(0.1)
            on_bytes(0)
        compare(*arguments, on_bytes=on_bytes)

    patch.setattr(verifying, "compare", compare_slowly)


def said_by_all(error: CheckpointError) -> bool:
    """Whether every rank has the same message."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, str(error))
    return len(set(everyone)) == 1


def check_slow_rank(rank: int, world_size: int, directory: str) -> None:
    ordinary = ShardMesh.from_group()
    path = CheckpointStore(directory, mesh=ordinary).save(1, state_at(1, ordinary), metadata={})
    checkpoints = CheckpointStore(directory, mesh=impatient_mesh())
    with pytest.MonkeyPatch.context() as patch:
        read_slowly(patch, seconds=TIMEOUT_SECONDS + 3 if rank == 1 else 0)
        assert checkpoints.latest() == path


def test_ranks_wait_for_one_that_verifies_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    run_distributed(check_slow_rank, 3, str(tmp_path))


def check_damage_beside_a_slow_rank(rank: int, world_size: int, directory: str) -> None:
    ordinary = ShardMesh.from_group()
    path = CheckpointStore(directory, mesh=ordinary).save(1, state_at(1, ordinary), metadata={})
    # The first rank's.
    largest, *_ = sorted(path.glob("[_.]*"), key=lambda file: -file.stat().st_size)
    dist.barrier()
    if rank == 0:
        flip(largest, 40, 3)
    dist.barrier()
    checkpoints = CheckpointStore(directory, mesh=impatient_mesh())
    with pytest.MonkeyPatch.context() as patch:
        read_slowly(patch, seconds=TIMEOUT_SECONDS + 3 if rank == 1 else 0)
        with pytest.raises(CheckpointError, match="1 checkpoints and none is good") as caught:
            checkpoints.latest()
    assert f"\n  verifying {path}: rank 0 ({HOST}): {largest.name} has sha256" in str(caught.value)
    assert said_by_all(caught.value)
    assert not caught.value.passing


def test_damage_is_told_when_all_have_read_their_files(tmp_path: Path) -> None:
    run_distributed(check_damage_beside_a_slow_rank, 3, str(tmp_path))


def check_put_back(rank: int, world_size: int, directory: str) -> None:
    mesh = ShardMesh.from_group()
    checkpoints = CheckpointStore(directory, mesh=mesh)
    path = checkpoints.save(2, state_at(2, mesh), metadata={})
    replaced = path.with_name(f"tmp-replaced-{path.name}")
    dist.barrier()
    if rank == 0:
        path.rename(replaced)
    dist.barrier()

    def stale(*_: Any) -> Path:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", stale)  # which the first rank alone calls
        with pytest.raises(CheckpointError) as caught:
            checkpoints.put_back()
    assert str(caught.value) == (
        f"restoring {directory}: rank 0 ({HOST}): OSError: [Errno 116] {os.strerror(errno.ESTALE)}"
    )
    assert caught.value.passing
    assert names(Path(directory)) == [replaced.name]
    assert checkpoints.latest() is None
    checkpoints.put_back()
    assert names(Path(directory)) == [path.name]
    assert checkpoints.latest() == path


def test_what_a_killed_save_was_replacing_is_put_back_by_the_first_rank_for_all(tmp_path: Path) -> None:
    run_distributed(check_put_back, 2, str(tmp_path))


def check_wait_for_a_lock(rank: int, world_size: int, directory: str) -> None:
    refused, looks, lockf = round((TIMEOUT_SECONDS + 2) / 0.2), 0, fcntl.lockf

    def busy(*arguments: Any) -> None:
        nonlocal looks
        looks += 1
        if looks <= refused:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        lockf(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "lockf", busy)
        with RunLock(directory, mesh=impatient_mesh(), wait_seconds=300):
            pass
    assert looks == (refused + 1 if rank == 0 else 0)


def test_ranks_wait_while_the_first_waits_for_the_lock_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    run_distributed(check_wait_for_a_lock, 2, str(tmp_path))
