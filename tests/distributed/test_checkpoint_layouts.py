"""What some ranks saved, any others load bit by bit: every format of class centers, uneven shards, ranks with none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import run_distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from partialfc import CenterAdagrad, CenterAdamW, CenterSGD, PartialFC
from partialfc.checkpoint import CheckpointError, CheckpointStore, parts
from partialfc.distributed.mesh import ShardMesh
from partialfc.keyed import hash64
from partialfc.margins import CosFace

WORLD_SIZE, DIM = 4, 6
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "float16, momentum bfloat16": {"dtype": torch.float16, "optimizer": CenterSGD(momentum_dtype="bfloat16")},
    "bfloat16, momentum int8": {"dtype": torch.bfloat16, "optimizer": CenterSGD(momentum_dtype="int8")},
    "no momentum": {"optimizer": CenterSGD(momentum=0.0)},
    "adagrad": {"optimizer": CenterAdagrad()},
    "adamw, sub-centers": {"optimizer": CenterAdamW(), "num_subcenters": 3},
}
# 65 blocks of two, of which one class is a phantom; and fewer blocks than ranks.
NUM_CLASSES = (129, 3)


def heads(mesh: ShardMesh) -> dict[str, PartialFC]:
    return {
        f"{name}, {num_classes} classes": PartialFC(
            num_classes, DIM, margin=CosFace(), process_group=mesh.group, **options
        )
        for num_classes in NUM_CLASSES
        for name, options in FORMATS.items()
    }


def whole(name: str, table: str, head: PartialFC) -> Tensor:
    """[num_blocks, ...] of any bits; phantoms too."""
    local = getattr(head.class_centers, table)
    shape = (head.partition.num_blocks, *local.shape[1:])
    generator = torch.Generator().manual_seed(hash64(len(name), *map(ord, name + table)))
    return (torch.randn(shape, generator=generator) * 100).to(local.dtype)


def fill(everything: dict[str, PartialFC]) -> None:
    for name, head in everything.items():
        for table in head.class_centers._names:
            own = getattr(head.class_centers, table)
            own.copy_(head.mesh.own_part(whole(name, table, head), own))


def assert_filled(everything: dict[str, PartialFC]) -> None:
    tables = set()
    for name, head in everything.items():
        for table in head.class_centers._names:
            tables.add(table)
            own = getattr(head.class_centers, table)
            assert torch.equal(own, head.mesh.own_part(whole(name, table, head), own)), (name, table)
    assert tables >= {"weight", "momentum", "momentum_scale", "squares"}, tables


def state_of(everything: dict[str, PartialFC]) -> dict[str, Any]:
    return {"head": {name: head.state_dict() for name, head in everything.items()}}


@contextmanager
def pieces_of(num_bytes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PIECE_BYTES", num_bytes)
        yield


def check_all_pairs(rank: int, directory: Path) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in range(1, WORLD_SIZE + 1)}
    meshes = {size: ShardMesh.from_group(group) for size, group in groups.items() if rank < size}
    for size, mesh in meshes.items():
        everything = heads(mesh)
        fill(everything)
        # From some numbers of ranks in many small pieces, and never in step with the shards.
        with pieces_of(200 if size % 2 else 2**20):
            store = CheckpointStore(directory / str(size), mesh=mesh)
            store.save(1, state_of(everything), metadata={}, blocking=size < WORLD_SIZE)
            store.wait()
    dist.barrier()
    for saved in groups:
        for mesh in meshes.values():
            everything = heads(mesh)
            store = CheckpointStore(directory / str(saved), mesh=mesh)
            path = store.latest()
            assert path is not None
            store.load(path, state := state_of(everything))
            for name, head in everything.items():
                head.load_state_dict(state["head"][name])
            assert_filled(everything)
    dist.barrier()


def replicated(rank: int, value: Tensor) -> tuple[ShardMesh, DTensor, Tensor]:
    """`value` sharded over two ranks and that twice."""
    mesh = DeviceMesh("cpu", torch.arange(WORLD_SIZE).view(2, 2), mesh_dim_names=("replica", "shard"))
    share = -(-len(value) // 2)
    local = value[rank % 2 * share : (rank % 2 + 1) * share].clone()
    sharded = DTensor.from_local(local, mesh, [Replicate(), Shard(0)], shape=value.shape, stride=value.stride())
    return ShardMesh.from_group(), sharded, local


def check_replicas(rank: int, directory: Path) -> None:
    """Replicas of a shard write it once, both of them a half; and each loads it."""
    value = torch.randn(1001, 64, generator=torch.Generator().manual_seed(1))
    world, sharded, local = replicated(rank, value)
    store = CheckpointStore(directory / "replicas", mesh=world)
    for step, blocking in ((1, True), (2, False)):
        with pieces_of(2**15):
            path = store.save(step, {"table": {"weight": sharded}}, metadata={}, blocking=blocking)
            store.wait()
        dist.barrier()
        sizes = sorted(file.stat().st_size for file in path.glob("*.distcp"))
        assert value.nbytes < sum(sizes) < 1.2 * value.nbytes, sizes
        assert sizes[0] > 0.2 * value.nbytes, "the work is not divided"
        _, empty, own = replicated(rank, torch.zeros_like(value))
        store.load(path, {"table": {"weight": empty}})
        assert torch.equal(own, local)
        # Over all four ranks, and whole.
        part = world.own_part(torch.zeros_like(value), torch.zeros(251 if rank < 3 else 248, 64)).clone()
        store.load(path, {"table": {"weight": world.shard(part, 1001)}})
        assert torch.equal(part, value[rank * 251 : (rank + 1) * 251])
        store.load(path, {"table": {"weight": (everything := torch.zeros_like(value))}})
        assert torch.equal(everything, value)


def check_refusals(rank: int, directory: Path) -> None:
    """If a checkpoint does not fit what one rank has, no rank's state changes."""
    world = ShardMesh.from_group()
    store = CheckpointStore(directory / "refused", mesh=world)

    def state(value: float, dtype: torch.dtype = torch.float32, rows: int = 3) -> dict[str, Any]:
        sharded = world.shard(torch.full((2, 5), value), 8)
        return {"all": {"a": sharded, "b": torch.full((rows, 2), value, dtype=dtype), "step": value}}

    path = store.save(1, state(1.0), metadata={})
    for options, message in [
        ({"dtype": torch.bfloat16}, "all.b has dtype torch.float32 in the checkpoint but torch.bfloat16"),
        ({"rows": 4}, "Size mismatch .* for all.b"),
        (None, "lacks, the first is all.b"),
    ]:
        own = state(0.0)
        if rank == 2 and options is None:
            del own["all"]["b"]
        elif rank == 2:
            own = state(0.0, **options)
        with pytest.raises(CheckpointError, match=rf"rank 2 \(\S+\): .*{message}"):
            store.load(path, own)
        assert own["all"]["step"] == 0.0
        for name in own["all"].keys() - {"step"}:
            value = own["all"][name]
            local = value.to_local() if isinstance(value, DTensor) else value
            assert not local.any(), name


def check(rank: int, world_size: int, directory: Path) -> None:
    check_all_pairs(rank, directory)
    check_replicas(rank, directory)
    check_refusals(rank, directory)


def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    run_distributed(check, WORLD_SIZE, tmp_path)
    for saved in range(1, WORLD_SIZE + 1):
        everything = heads(ShardMesh.single())
        store = CheckpointStore(tmp_path / str(saved), mesh=ShardMesh.single())
        path = store.latest()
        assert path is not None
        store.load(path, state := state_of(everything))
        for name, head in everything.items():
            head.load_state_dict(state["head"][name])
        assert_filled(everything)
