"""Class centers that each node holds as a whole: what one process does, grids of nodes by ranks do too.

Each run goes several steps in float64 with uneven batches, masked rows, and a rank without rows, in many tiles; losses,
gradients, class centers and what the margin remembers must be those of one process. All replicas must be equal bit for
bit, also where numbers are rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_cases import NEAR_NORMS, ProbeMargin
from support import run_distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from partialfc import CenterAdagrad, CenterAdamW, CenterSGD, HeadGroup, PartialFC
from partialfc.checkpoint.store import CheckpointStore
from partialfc.distributed.collectives import all_gather_equal, gather_rows
from partialfc.distributed.mesh import ShardMesh, node_groups
from partialfc.head import VariationalPrototypes, passes, tiles
from partialfc.margins import (
    AdaCos,
    AdaFace,
    ArcFace,
    CenterLoss,
    CircleLoss,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    NormFace,
    Softmax,
    SphereFace,
    SphereFace2,
    UniFace,
)

NUM_CLASSES, DIM, STEPS = 130, 6, 4
# Rows of each rank; with two ranks, of the first and the last two together.
SHARES = {1: (10,), 2: (3, 7), 4: (3, 0, 5, 2)}
GRIDS = {2: (1, 2), 4: (1, 2, 4)}
SGD = CenterSGD(learning_rate=0.5)
RUNS: dict[str, dict[str, Any]] = {
    "softmax": {"margin": Softmax(), "optimizer": SGD},
    "softmax, sampled, AdamW": {"margin": Softmax(scale=4.0), "sample_rate": 0.3, "optimizer": CenterAdamW(0.01)},
    "cosface, sampled": {"margin": CosFace(scale=16.0), "sample_rate": 0.3, "optimizer": SGD},
    "arcface, AdamW": {"margin": ArcFace(), "optimizer": CenterAdamW(learning_rate=0.01)},
    "arcface, sampled, corrected": {
        "margin": ArcFace(scale=16.0),
        "sample_rate": 0.3,
        "sampling_correction": True,
        "optimizer": CenterAdagrad(),
    },
    "circle, sub-centers": {"margin": CircleLoss(), "num_subcenters": 3, "optimizer": SGD},
    "sphereface": {"margin": SphereFace(), "optimizer": SGD},
    "magface, sampled": {"margin": MagFace(**NEAR_NORMS), "sample_rate": 0.3, "optimizer": SGD},
    "learned scale": {"margin": NormFace(scale=8.0, learned=True), "optimizer": SGD},
    "adaface, dense decay": {
        "margin": AdaFace(),
        "sample_rate": 0.3,
        "optimizer": CenterSGD(learning_rate=0.5, decay="dense"),
    },
    "curricularface, filtered": {
        "margin": CurricularFace(),
        "interclass_filtering_threshold": 0.3,
        "optimizer": SGD,
    },
    "elasticface, sorted": {"margin": ElasticFace(sort=True), "sample_rate": 0.3, "optimizer": SGD},
    "adacos, sampled": {"margin": AdaCos(), "sample_rate": 0.3, "optimizer": SGD},
    "sphereface2, sampled": {"margin": SphereFace2(), "sample_rate": 0.3, "optimizer": SGD},
    "uniface": {"margin": UniFace(), "optimizer": SGD},
    "everything of a margin": {"margin": ProbeMargin(), "sample_rate": 0.3, "optimizer": SGD},
    "several labels": {"margin": ArcFace(), "labels_per_row": 3, "sample_rate": 0.3, "optimizer": SGD},
}
STORED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "float16 and int8": {"dtype": torch.float16, "optimizer": CenterSGD(0.5, momentum_dtype="int8")},
    "bfloat16": {"dtype": torch.bfloat16, "optimizer": CenterSGD(0.5, momentum_dtype="bfloat16")},
}

Groups = dict[str, Any]


def build(options: dict[str, Any], groups: Groups) -> PartialFC:
    settings: dict[str, Any] = {"dtype": torch.float64, "init_std": 1.0, "seed": 5, "optimizer": SGD, **options}
    return PartialFC(NUM_CLASSES, DIM, **settings, **groups)


def global_batch(step: int, labels_per_row: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of whom some are of the same class in two nodes; in step 1 the first node has no valid row."""
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(10, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (10, labels_per_row), generator=generator)
    labels[9] = labels[0]
    labels[4] = -1
    if step == 1:
        labels[:3] = -1
    return embeddings, labels[:, 0] if labels_per_row == 1 else labels


def own_rows(rank: int, world_size: int) -> slice:
    shares = SHARES[world_size]
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


def train(
    head: PartialFC, rank: int = 0, world_size: int = 1, steps: range = range(STEPS), *, defers: bool = False
) -> dict[str, Any]:
    """Several steps, and what they came to: [b, D] gradients of this rank, the rest of all ranks."""
    own, head.defers_updates = own_rows(rank, world_size), defers
    results: dict[str, Any] = {"losses": [], "gradients": [], "diagnostics": []}
    for step in steps:
        everyone, labels = global_batch(step, head.labels_per_row)
        embeddings = everyone[own].to(head.dtype).requires_grad_()
        loss = head(embeddings, labels[own])
        (3.0 * loss).backward()
        if defers:
            head.finish_update(True)
        assert embeddings.grad is not None
        results["losses"].append(loss.detach())
        results["gradients"].append(embeddings.grad)
        results["diagnostics"].append(head.diagnostics())
    head.eval()
    with torch.no_grad():
        everyone, labels = global_batch(9, head.labels_per_row)
        results["losses"].append(head(everyone[own], labels[own]))
    head.train()
    return results | {"centers": head.gather_class_centers()}


def stored(head: PartialFC) -> dict[str, Tensor]:
    """Everything that this rank has for its classes."""
    tables = [table for table in (head.class_centers, head.class_bias) if table is not None]
    tensors = {f"{number} {name}": getattr(table, name) for number, table in enumerate(tables) for name in table._names}
    return tensors | dict(head.learned.named_buffers() if head.learned is not None else {})


def assert_replicas_are_equal(head: PartialFC, what: str) -> None:
    for name, tensor in stored(head).items():
        for other in all_gather_equal(tensor[None].contiguous(), head.mesh.replicas):
            assert torch.equal(other, tensor), f"{what}: {name} differs between replicas"


def assert_close(got: Any, expected: Any, what: str) -> None:
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    limit = 1e-10 * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    assert got.shape == expected.shape, what
    assert difference <= limit, f"{what} differs by {difference:.2e}"


def several_tiles() -> None:
    # A few classes each, and not as many as divide their number.
    tiles.TILE_NUMBERS["cpu"], tiles.ROWS_AT_ONCE = 11 * (DIM + 10), 20


def grids(world_size: int) -> dict[int, Groups]:
    """The groups of a head by ranks per node."""
    found = {}
    for ranks_per_node in GRIDS[world_size]:
        shards, replicas = node_groups(ranks_per_node)
        found[ranks_per_node] = {"process_group": shards, "replicate_over": replicas}
    return found


def check_one(name: str, expected: dict[str, Any], rank: int, world_size: int, per_node: int, groups: Groups) -> None:
    what = f"{name}, {world_size // per_node} x {per_node}"
    head = build(RUNS[name], groups)
    assert (head.mesh.size, head.mesh.replicas.size) == (per_node, world_size // per_node)
    found = train(head, rank, world_size, defers=name == "cosface, sampled")
    assert_close(torch.stack(found["losses"]), torch.stack(expected["losses"]), f"{what}: losses")
    for step, (own, everyone) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
        assert_close(own, everyone[own_rows(rank, world_size)], f"{what}: gradient of step {step}")
        for key, value in expected["diagnostics"][step].items():
            assert_close(found["diagnostics"][step][key], value, f"{what}: {key} of step {step}")
    assert_close(found["centers"], expected["centers"], f"{what}: class centers")
    assert_replicas_are_equal(head, what)


def check_runs(rank: int, world_size: int, everything: dict[str, Any], by_ranks_per_node: dict[int, Groups]) -> None:
    for per_node, groups in by_ranks_per_node.items():
        # All of them in one grid of each number of ranks; in the others what uses most.
        chosen = everything if 2 * per_node == world_size else ["arcface, sampled, corrected", "everything of a margin"]
        for name in chosen:
            check_one(name, everything[name], rank, world_size, per_node, groups)
        for name, options in STORED.items():
            head = build({"margin": CosFace(scale=16.0), "sample_rate": 0.5, **options}, groups)
            train(head, rank, world_size)
            assert_replicas_are_equal(head, name)


@pytest.fixture(scope="module")
def expected_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process without a process group."""
    path = tmp_path_factory.mktemp("one process") / "expected.pt"
    results = {name: train(build(options, {})) for name, options in RUNS.items()}
    for name, found in results.items():
        untouched = build(RUNS[name], {}).gather_class_centers()
        assert float((found["centers"] - untouched).abs().max()) > 1e-3, f"{name} learns nothing"
        assert bool(torch.stack(found["losses"]).isfinite().all())
    torch.save(results, path)
    return path


def check_broken(rank: int, everything: dict[str, Any], groups: Groups) -> None:
    """The comparison sees it if gradients of class centers are not summed over replicas."""
    expected, name = everything["arcface, AdamW"], "arcface, AdamW"
    whole, passes.sum_over_shards_ = passes.sum_over_shards_, lambda gradient, *_, **__: gradient
    with pytest.raises(AssertionError, match="losses differs"):
        check_one(name, expected, rank, 2, 1, groups)
    head = build(RUNS[name], groups)
    train(head, rank, 2)
    with pytest.raises(AssertionError, match="differs between replicas"):
        assert_replicas_are_equal(head, "")
    passes.sum_over_shards_ = whole


def check_group(rank: int, groups: Groups) -> None:
    """A value that is not finite, of one row of one rank, in one of the heads: nothing moves."""
    heads = HeadGroup({name: build({"margin": ArcFace()}, groups) for name in ("a", "b")})
    embeddings = torch.ones(2, DIM, dtype=torch.float64, requires_grad=True)
    before = heads["a"].gather_class_centers()
    spoilt = embeddings * (float("nan") if rank == 1 else 1.0)
    loss = heads(torch.cat([embeddings, spoilt]), {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])})
    loss.backward()
    assert bool(loss.isnan())
    assert torch.equal(heads["a"].gather_class_centers(), before)


def check_errors(rank: int, groups: Groups) -> None:
    head, embeddings = build({"margin": ArcFace()}, groups), torch.ones(2, DIM, dtype=torch.float64)
    # The label of another node.
    with pytest.raises(ValueError, match=r"labels\[0\] on rank 1 is 130, but must be in \[0, 130\)"):
        head(embeddings, torch.tensor([NUM_CLASSES if rank == 1 else 0, 0]))
    for options, name in (
        ({"fused": False}, "fused"),
        ({"offload": True, "sample_rate": 0.5}, "offload"),
        ({"auxiliaries": [CenterLoss()]}, "auxiliaries"),
        ({"variational": VariationalPrototypes()}, "variational"),
    ):
        with pytest.raises(ValueError, match=rf"replicated over nodes .* do not go with {name}; .* over all ranks"):
            build({"margin": ArcFace(), **options}, groups)
    everyone = dist.group.WORLD
    with pytest.raises(ValueError, match=r"has the ranks \[0, 1\] and replicate_over \[0, 1\], but they must be a row"):
        build({"margin": ArcFace()}, {"process_group": everyone, "replicate_over": everyone})
    for own, all_of_them in ((3, "3"), (1 + rank, "1, 2")):
        with pytest.raises(ValueError, match=rf"but 2 ranks say that their nodes have {all_of_them}; start as many"):
            node_groups(own)


def check_two_ranks(rank: int, world_size: int, expected_file: Path) -> None:
    several_tiles()
    everything, groups = torch.load(expected_file), grids(world_size)
    check_runs(rank, world_size, everything, groups)
    check_broken(rank, everything, groups[1])
    check_group(rank, groups[1])
    check_errors(rank, groups[1])


def check_four_ranks(rank: int, world_size: int, expected_file: Path) -> None:
    several_tiles()
    groups = grids(world_size)
    check_runs(rank, world_size, torch.load(expected_file), groups)
    check_checkpoints(rank, world_size, groups, expected_file.parent)


def load(store: CheckpointStore, head: PartialFC) -> None:
    state, path = {"head": head.state_dict()}, store.latest()
    assert path is not None
    store.load(path, state)
    head.load_state_dict(state["head"])


MOVED = {"margin": AdaFace(), "sample_rate": 0.3, "optimizer": CenterSGD(0.5, momentum_dtype="bfloat16")}


def everyones(head: PartialFC) -> dict[str, Tensor]:
    """[C, ...] of each quantity, on every rank."""
    centers = head.class_centers
    return {name: gather_rows(centers.read(name, None).contiguous(), head.mesh).clone() for name in centers._names}


def check_checkpoints(rank: int, world_size: int, by_ranks_per_node: dict[int, Groups], directory: Path) -> None:
    grid, everyone = by_ranks_per_node[2], ShardMesh.from_group()
    head = build(MOVED, grid)
    weight = head.state_dict()["class_centers.weight"]
    assert isinstance(weight, DTensor)
    assert weight.placements == (Replicate(), Shard(0))
    assert weight.shape[0] == head.partition.num_blocks
    assert weight.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    train(head, rank, world_size)
    saved = everyones(head)
    CheckpointStore(directory / "grid", mesh=everyone).save(4, {"head": head.state_dict()}, metadata={})
    if rank == 0:
        torch.save(saved, directory / "saved.pt")
    for groups in ({}, *by_ranks_per_node.values()):
        other = build({**MOVED, "seed": 6}, groups)
        load(CheckpointStore(directory / "grid", mesh=everyone), other)
        assert other.step == head.step
        assert other.margin_state == head.margin_state
        for name, value in everyones(other).items():
            assert torch.equal(value, saved[name]), f"{name} is not what was saved"
    flat = build(MOVED, {})
    load(CheckpointStore(directory / "grid", mesh=everyone), flat)
    train(flat, rank, world_size, range(STEPS, STEPS + 2))
    CheckpointStore(directory / "flat", mesh=everyone).save(6, {"head": flat.state_dict()}, metadata={})
    expected = everyones(flat)
    load(CheckpointStore(directory / "flat", mesh=everyone), head)
    for name, value in everyones(head).items():
        assert torch.equal(value, expected[name])


def test_two_ranks(expected_file: Path) -> None:
    run_distributed(check_two_ranks, 2, expected_file)


def test_four_ranks_and_checkpoints_of_any_layout(expected_file: Path) -> None:
    run_distributed(check_four_ranks, 4, expected_file)
    head, directory = build({**MOVED, "seed": 7}, {}), expected_file.parent
    load(CheckpointStore(directory / "grid", mesh=ShardMesh.single()), head)
    for name, value in torch.load(directory / "saved.pt").items():
        assert torch.equal(everyones(head)[name], value)


def test_a_process_on_its_own_has_no_groups() -> None:
    assert node_groups(8) == (None, None)
