"""States that tests of checkpoints save and load, and what they do to the files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from partialfc.checkpoint import CheckpointStore
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


def flip(file: Path, place: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)
