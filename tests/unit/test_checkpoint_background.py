"""Saves that a thread writes, by one process; several are in tests/distributed/test_checkpoint_ranks.py."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from partialfc.checkpoint import CheckpointError, CheckpointStore, storage, store
from partialfc.checkpoint.parts import Part, flatten
from partialfc.checkpoint.staging import Staging
from partialfc.distributed.mesh import ShardMesh


def state_at(step: int) -> dict[str, Any]:
    return {
        "head": {"weight": torch.full((6, 4), float(step)), "half": torch.full((3,), step, dtype=torch.bfloat16)},
        "list": [torch.tensor(step), {"deep": torch.arange(3) * step}],
        "progress": {"step": step, "losses": [step, step + 0.5], "nothing": None},
    }


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(got, expected)
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    return bool(got == expected)


def loaded(checkpoints: CheckpointStore, path: Path) -> dict[str, Any]:
    state = state_at(0)
    checkpoints.load(path, state)
    return state


def open_store(directory: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(directory, mesh=ShardMesh.single(), **options)


def input_output_error(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Gate:
    """Holds the thread back before it writes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.calls = threading.Event(), threading.Event(), 0
        write = store.write_state

        def held_back(*arguments: Any) -> Any:
            self.calls += 1
            self.reached.set()
            assert self.opened.wait(60)
            return write(*arguments)

        patch.setattr(store, "write_state", held_back)


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, checkpoints = Gate(monkeypatch), open_store(tmp_path)
    state, metadata = state_at(7), {"facts": [1, 2]}
    path = checkpoints.save(7, state, metadata=metadata, blocking=False)
    assert gate.reached.wait(60)
    for tensor in (*state["head"].values(), state["list"][0], state["list"][1]["deep"]):
        tensor.zero_()
    state["progress"]["losses"].append(9.0)
    state["progress"]["step"] = 8
    state["head"].clear()
    metadata["facts"].append(3)
    checkpoints.poll()
    assert not path.exists(), "under way, and poll does not wait"
    gate.opened.set()
    checkpoints.wait()
    assert same(loaded(checkpoints, path), state_at(7))
    assert checkpoints.metadata(path)["facts"] == [1, 2]


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, checkpoints = Gate(monkeypatch), open_store(tmp_path, keep_last=1)
    checkpoints.save(1, state_at(1), metadata={}, blocking=False)
    assert gate.reached.wait(60)
    opener = threading.Timer(0.3, gate.opened.set)
    opener.start()
    second = checkpoints.save(2, state_at(2), metadata={}, blocking=False)
    assert gate.opened.is_set()
    assert checkpoints.latest() == second, "what looks for checkpoints waits for the one under way"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    # A blocking one waits too.
    gate.opened.clear()
    checkpoints.save(3, state_at(3), metadata={}, blocking=False)
    opener = threading.Timer(0.3, gate.opened.set)
    opener.start()
    path = checkpoints.save(4, state_at(4), metadata={})
    assert same(loaded(checkpoints, path), state_at(4))
    assert gate.calls == 4


def test_host_memory_is_used_again() -> None:
    staging = Staging()

    def copied(state: dict[str, Any]) -> dict[str, torch.Tensor]:
        flat = staging.copy(flatten(state))
        return {name: value.read(0, value.num_rows) for name, value in flat.values.items() if isinstance(value, Part)}

    first = copied(state_at(1))
    pointers = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = copied(state_at(2))
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == pointers
    assert torch.equal(second["head.weight"], torch.full((6, 4), 2.0))
    # What has another shape gets other memory, and what is gone keeps none.
    state = state_at(3)
    state["head"] = {"weight": torch.full((7, 4), 3.0)}
    third = copied(state)
    assert torch.equal(third["head.weight"], torch.full((7, 4), 3.0))
    assert set(staging._buffers) == {"head.weight", "list.0", "list.1.deep"}


@pytest.mark.parametrize("told_by", ["poll", "wait", "save", "blocking save"])
def test_a_failure_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str) -> None:
    checkpoints = open_store(tmp_path)
    first = checkpoints.save(1, state_at(1), metadata={})
    with monkeypatch.context() as patch:
        patch.setattr(storage._HashingFile, "write", input_output_error)
        checkpoints.save(2, state_at(2), metadata={}, blocking=False)
        assert checkpoints.latest() == first, "which waits, and does not tell"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    tell = {
        "poll": checkpoints.poll,
        "wait": checkpoints.wait,
        "save": lambda: checkpoints.save(3, state_at(3), metadata={}, blocking=False),
        "blocking save": lambda: checkpoints.save(3, state_at(3), metadata={}),
    }
    with pytest.raises(CheckpointError, match=r"writing .*tmp-00000002-\w+: OSError: .*Input/output error"):
        tell[told_by]()
    checkpoints.wait()
    checkpoints.poll()
    assert checkpoints.latest() == first
    third = checkpoints.save(3, state_at(3), metadata={}, blocking=False)
    checkpoints.wait()
    assert same(loaded(checkpoints, third), state_at(3))
    assert same(loaded(checkpoints, first), state_at(1))


def test_a_state_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    checkpoints = open_store(tmp_path)
    with pytest.raises(CheckpointError, match="has the key 0"):
        checkpoints.save(1, {"a": {0: 1}}, metadata={}, blocking=False)
    with pytest.raises(CheckpointError, match="metadata cannot be written as JSON"):
        checkpoints.save(1, {"a": 1}, metadata={"x": float("inf")}, blocking=False)
    checkpoints.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_finishes_the_save(tmp_path: Path) -> None:
    script = f"""
import time, torch
from partialfc.checkpoint import CheckpointStore, store
from partialfc.distributed.mesh import ShardMesh
write = store.write_state
def slow(*arguments):
    time.sleep(0.5)
    return write(*arguments)
store.write_state = slow
checkpoints = CheckpointStore({str(tmp_path)!r}, mesh=ShardMesh.single())
checkpoints.save(5, {{"a": torch.ones(3)}}, metadata={{}}, blocking=False)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    checkpoints = open_store(tmp_path)
    path = checkpoints.latest()
    assert path is not None
    checkpoints.load(path, state := {"a": torch.zeros(3)})
    assert torch.equal(state["a"], torch.ones(3))


# Scores


def test_the_best_is_kept_besides_the_last(tmp_path: Path) -> None:
    checkpoints = open_store(tmp_path, keep_last=2, keep_best=True)
    assert checkpoints.best() is None
    kept = {}
    for step, score in enumerate([0.1, 0.9, float("nan"), None, 0.9, 0.3, float("inf"), 0.2], start=1):
        checkpoints.save(step, state_at(step), metadata={}, score=score, blocking=bool(step % 2))
        checkpoints.wait()
        kept[step] = sorted(int(path.name[5:]) for path in tmp_path.iterdir())
    assert kept == {
        1: [1],
        2: [1, 2],
        3: [2, 3],
        4: [2, 3, 4],
        5: [4, 5],  # as good as the second, and newer
        6: [5, 6],
        7: [5, 6, 7],
        8: [5, 7, 8],
    }
    assert checkpoints.best() == tmp_path / "step-00000005"
    assert checkpoints.metadata(tmp_path / "step-00000005")["score"] == 0.9
    assert checkpoints.metadata(tmp_path / "step-00000007")["score"] is None
    # Without keep_best it goes as any other does.
    open_store(tmp_path, keep_last=2).save(9, state_at(9), metadata={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000009"]


def test_a_damaged_best_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = open_store(tmp_path, keep_last=4, keep_best=True)
    for step, score in ((1, 0.5), (2, 0.7), (3, 0.6)):
        checkpoints.save(step, state_at(step), metadata={}, score=score)
    (tmp_path / "step-00000002" / ".metadata").write_bytes(b"")
    assert checkpoints.best() == tmp_path / "step-00000003"
    assert ".metadata has 0 bytes" in caplog.text
    (tmp_path / "step-00000003" / "MANIFEST.json").unlink()
    assert checkpoints.best() == tmp_path / "step-00000001"
