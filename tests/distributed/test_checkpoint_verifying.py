"""What ranks do when one of them is slow, or finds or does what the others do not."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_states import flip, names, state_at
from support import run_distributed

from partialfc.checkpoint import CheckpointError, CheckpointStore, RunLock, lock, rounds, verifying
from partialfc.distributed.mesh import ShardMesh

HOST = socket.gethostname()
LOOKS = 20  # of a slow rank at its clock, at each of which it is time for the next round


@contextmanager
def slow_comparing(looks: Iterable[object]) -> Iterator[None]:
    """The first bytes of this rank's share take these looks at the clock, one after the other."""
    compare = verifying.compare

    def compare_slowly(*arguments: Any, on_bytes: Any) -> None:
        for _ in looks:
            on_bytes(0)
        compare(*arguments, on_bytes=on_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "compare", compare_slowly)
        yield


@contextmanager
def counted_rounds() -> Iterator[list[int]]:
    """How often this rank meets the others, if it is time for that at each look at the clock."""
    met, meet = [0], rounds.Rounds._meet

    def counted(self: rounds.Rounds, working: int) -> int:
        met[0] += 1
        return meet(self, working)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "_ROUND_SECONDS", 0.0)
        patch.setattr(lock, "_POLL_SECONDS", 0.0)
        patch.setattr(rounds.Rounds, "_meet", counted)
        yield met


def said_by_all(error: CheckpointError) -> bool:
    """Whether every rank has the same message."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, str(error))
    return len(set(everyone)) == 1


def check_slow_rank(rank: int, world_size: int, directory: str) -> None:
    mesh = ShardMesh.from_group()
    checkpoints = CheckpointStore(directory, mesh=mesh)
    path = checkpoints.save(1, state_at(1, mesh), metadata={})
    with counted_rounds() as met, slow_comparing(range(LOOKS if rank == 1 else 0)):
        assert checkpoints.latest() == path
    assert met[0] >= LOOKS, "those that have ended meet the one that works"


def test_ranks_meet_one_that_verifies_for_long_all_the_while(tmp_path: Path) -> None:
    run_distributed(check_slow_rank, 3, str(tmp_path))


def check_slow_rank_in_time(rank: int, world_size: int, directory: str) -> None:
    ordinary = ShardMesh.from_group()
    path = CheckpointStore(directory, mesh=ordinary).save(1, state_at(1, ordinary), metadata={})
    impatient = ShardMesh.from_group(dist.new_group(timeout=timedelta(seconds=20)))
    looks = (time.sleep(0.1) for _ in range(250 if rank == 1 else 0))  # 25 s at least
    with slow_comparing(looks):
        assert CheckpointStore(directory, mesh=impatient).latest() == path


@pytest.mark.soak
def test_ranks_wait_for_one_that_verifies_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    run_distributed(check_slow_rank_in_time, 3, str(tmp_path))


def check_damage_beside_a_slow_rank(rank: int, world_size: int, directory: str) -> None:
    mesh = ShardMesh.from_group()
    checkpoints = CheckpointStore(directory, mesh=mesh)
    path = checkpoints.save(1, state_at(1, mesh), metadata={})
    # The first rank's.
    largest, *_ = sorted(path.glob("[_.]*"), key=lambda file: -file.stat().st_size)
    dist.barrier()
    if rank == 0:
        flip(largest, 40, 3)
    dist.barrier()
    with (
        counted_rounds() as met,
        slow_comparing(range(LOOKS if rank == 1 else 0)),
        pytest.raises(CheckpointError, match="1 checkpoints and none is good") as caught,
    ):
        checkpoints.latest()
    assert met[0] >= LOOKS
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
    looks, lockf = 0, fcntl.lockf

    def busy(*arguments: Any) -> None:
        nonlocal looks
        looks += 1
        if looks <= LOOKS:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        lockf(*arguments)

    with pytest.MonkeyPatch.context() as patch, counted_rounds() as met:
        patch.setattr(fcntl, "lockf", busy)
        with RunLock(directory, mesh=ShardMesh.from_group(), wait_seconds=300):
            pass
    assert looks == (LOOKS + 1 if rank == 0 else 0)
    assert met[0] >= LOOKS


def test_ranks_meet_the_first_while_it_waits_for_the_lock(tmp_path: Path) -> None:
    run_distributed(check_wait_for_a_lock, 2, str(tmp_path))
