"""A real file system that is full, or read-only: the message says which, and nothing of before is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from partialfc.checkpoint import CheckpointError, CheckpointStore, RunLock
from partialfc.distributed.mesh import ShardMesh

MIB = 2**20


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"this user may not mount a file system: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def state_at(step: int, num_bytes: int = MIB) -> dict[str, Any]:
    return {"weights": {"a": torch.full((num_bytes // 4,), float(step)), "b": torch.tensor(step)}}


def assert_is(checkpoints: CheckpointStore, path: Path | None, step: int) -> None:
    assert path is not None
    checkpoints.load(path, state := state_at(0))
    assert torch.equal(state["weights"]["a"], state_at(step)["weights"]["a"])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(small_disk: Path, blocking: bool, foreseen: bool) -> None:
    checkpoints = CheckpointStore(small_disk / "run", mesh=ShardMesh.single(), keep_last=1)
    first = checkpoints.save(1, state_at(1), metadata={})
    # Room for one like the first only if it fills up in the middle of one that is larger.
    filler = small_disk / "filler"
    filler.write_bytes(bytes((5 * MIB // 2) if foreseen else MIB))
    too_much = state_at(2) if foreseen else state_at(2, 3 * MIB)

    def save(step: int, state: dict[str, Any]) -> Path:
        path = checkpoints.save(step, state, metadata={}, blocking=blocking)
        checkpoints.wait()
        return path

    with pytest.raises(CheckpointError) as caught:
        save(2, too_much)
    message = str(caught.value)
    assert ": OSError: [Errno 28] No space left on device" in message
    assert f"the tmpfs file system at {small_disk} has " in message
    assert " free of 4.0 MiB; make room there" in message
    assert ("the newest checkpoint has 1.0 MiB, but" in message) == foreseen
    assert ("has 0 B free" in message) != foreseen, "or it filled up in the middle"
    assert names(small_disk / "run") == ["step-00000001"]
    assert checkpoints.latest() == first
    assert_is(checkpoints, first, 1)

    filler.unlink()
    second = save(3, state_at(3))
    assert names(small_disk / "run") == ["step-00000003"]
    assert_is(checkpoints, second, 3)


def test_a_disk_that_has_no_room_for_the_manifest(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small can be what does not fit."""
    checkpoints = CheckpointStore(small_disk, mesh=ShardMesh.single())
    first = checkpoints.save(1, state_at(1), metadata={})
    with pytest.raises(CheckpointError, match=r"committing .*No space left on device.* free of 4\.0 MiB"):
        checkpoints.save(2, state_at(2), metadata={"long": "x" * 3 * MIB})
    assert names(small_disk) == ["step-00000001"]
    assert_is(checkpoints, checkpoints.latest(), 1)
    assert first == checkpoints.latest()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_read_only_disk(small_disk: Path, blocking: bool) -> None:
    checkpoints = CheckpointStore(small_disk / "run", mesh=ShardMesh.single())
    first = checkpoints.save(1, state_at(1), metadata={})
    mount("-o", "remount,ro", str(small_disk))

    def save() -> None:
        checkpoints.save(2, state_at(2), metadata={}, blocking=blocking)
        checkpoints.wait()

    with pytest.raises(CheckpointError) as caught:
        save()
    message = str(caught.value)
    assert message.startswith("saving step 2: OSError: [Errno 30] Read-only file system: ")
    assert f"the tmpfs file system at {small_disk}, mounted read-only, cannot be written to" in message
    assert_is(checkpoints, checkpoints.latest(), 1)
    with (
        pytest.raises(OSError, match="mounted read-only"),
        RunLock(small_disk / "run", mesh=ShardMesh.single()),
    ):
        pass
    mount("-o", "remount,rw", str(small_disk))
    save()
    assert names(small_disk / "run") == ["step-00000001", "step-00000002"]
    assert_is(checkpoints, first, 1)
