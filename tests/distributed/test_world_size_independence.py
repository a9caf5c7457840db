"""A run is a function of its configuration, not of the number of ranks: what one process does, 2, 3 and 4 do too."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_cases import ProbeMargin
from support import run_distributed
from torch import Tensor

from partialfc import CenterAdamW, CenterSGD, PartialFC
from partialfc.backbones import VisionTransformer
from partialfc.distributed.collectives import gather_rows
from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import DDPEngine, EngineSettings
from partialfc.head import VariationalPrototypes
from partialfc.keyed import normal, randint
from partialfc.margins import AdaFace, ArcFace, CenterLoss, Softmax, TripletLoss, UniFace

NUM_CLASSES, DIM, IMAGE_SIZE, STEPS = 130, 16, 16, 20
# The global batch of 8, cut into the batches of the ranks.
SHARES = {1: (8,), 2: (3, 5), 3: (3, 3, 2), 4: (2, 2, 2, 2)}
# A rank of a group need not be its rank among all.
GROUPS = ((2,), (1, 3), (0, 2, 3), (0, 1, 2, 3))
# A margin that uses everything a margin may, with sampling, and the usual one without.
RUNS: dict[str, dict[str, Any]] = {
    "sampled": {"margin": ProbeMargin(scale=8.0), "sample_rate": 0.3, "optimizer": CenterSGD(learning_rate=0.05)},
    "everything": {
        "margin": UniFace(scale=8.0),
        "sample_rate": 0.3,
        "auxiliaries": [CenterLoss(weight=0.1), TripletLoss(weight=0.3)],
        "variational": VariationalPrototypes(start_step=2),
        "interclass_filtering_threshold": 0.5,
        "optimizer": CenterSGD(learning_rate=0.01),
    },
    "sub-centers": {"margin": AdaFace(scale=16.0), "num_subcenters": 3, "optimizer": CenterSGD(learning_rate=0.05)},
    "biases": {"margin": Softmax(scale=4.0), "sample_rate": 0.3, "optimizer": CenterAdamW(learning_rate=0.01)},
    "full": {"margin": ArcFace(scale=16.0), "sample_rate": 1.0, "optimizer": CenterAdamW(learning_rate=0.01)},
}


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(8)
    pixels = torch.arange(3 * IMAGE_SIZE**2)
    images = normal(1, step, rows[:, None], pixels[None]).view(8, 3, IMAGE_SIZE, IMAGE_SIZE)
    return images, randint(NUM_CLASSES, 2, step, rows)


def build_head(name: str, mesh: ShardMesh) -> PartialFC:
    return PartialFC(
        NUM_CLASSES, DIM, dtype=torch.float64, init_std=1.0, seed=5, process_group=mesh.group, **RUNS[name]
    )


def train(name: str, mesh: ShardMesh) -> dict[str, Tensor]:
    """Trains on this rank's share of each batch; what comes back should be the same for any number of ranks."""
    torch.manual_seed(0)
    # No layer of it looks across the batch.
    backbone = VisionTransformer(64, 1, embedding_dim=DIM, image_size=IMAGE_SIZE, final_norm="none").double()
    engine = DDPEngine(
        backbone,
        make_optimizer=lambda network: torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4),
        mesh=mesh,
        settings=EngineSettings(max_gradient_norm=1.0),
    )
    head = build_head(name, mesh)

    shares = SHARES[mesh.size]
    own = slice(sum(shares[: mesh.rank]), sum(shares[: mesh.rank + 1]))
    losses, norms, first_gradients = [], [], torch.empty(0)
    for step in range(STEPS):
        images, labels = global_batch(step)
        loss = head(engine.forward(images[own]), labels[own])
        engine.backward(loss)
        if step == 0:
            first_gradients = torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()])
        norm, updated, _ = engine.step(learning_rate=0.01)
        assert updated
        losses.append(loss.detach())
        norms.append(torch.tensor(norm))
    return {
        "losses": torch.stack(losses),
        "gradient norms": torch.stack(norms),
        "gradients of the first step": first_gradients,
        "backbone": torch.cat([parameter.detach().flatten() for parameter in backbone.parameters()]),
        "class centers": head.gather_class_centers(),
    }


def initial_centers_and_samples(mesh: ShardMesh) -> dict[str, Tensor]:
    """What must be equal bit for bit."""
    results = {}
    for num_classes, sample_rate in itertools.product((3, 130, 1000), (0.05, 0.3)):
        head = PartialFC(num_classes, 5, margin=ArcFace(), sample_rate=sample_rate, seed=9, process_group=mesh.group)
        results[f"centers of {num_classes}"] = head.gather_class_centers()
        assert head.sampler is not None
        for step in (0, 1, 1000):
            rows = head.sampler.in_play(torch.tensor([0, 2, -1]), head.partition, step).rows
            assert rows is not None
            everywhere = gather_rows(rows + head.partition.class_start, head.mesh)
            results[f"sample of {num_classes} at {sample_rate} in step {step}"] = everywhere.sort().values
    return results


def check_against(mesh: ShardMesh, expected: dict[str, dict[str, Tensor]]) -> None:
    for what, value in initial_centers_and_samples(mesh).items():
        assert torch.equal(value, expected["start"][what]), f"{what} differs at world size {mesh.size}"
    for name in RUNS:
        for what, value in train(name, mesh).items():
            difference = float((value - expected[name][what]).abs().max())
            limit = 1e-9 * max(1.0, float(expected[name][what].abs().max()))
            assert difference <= limit, f"{name}: {what} differ by {difference:.2e} at world size {mesh.size}"


def check_all_groups(rank: int, world_size: int, expected_file: Path) -> None:
    expected = torch.load(expected_file)
    # All groups before the first check: where one fails, ranks that wait for a new group would wait for long.
    groups = [dist.new_group(list(ranks), timeout=timedelta(seconds=600)) for ranks in GROUPS]
    for ranks, group in zip(GROUPS, groups, strict=True):
        if rank in ranks:
            check_against(ShardMesh.from_group(group), expected)


@pytest.fixture(scope="module")
def expected_file(tmp_path_factory):
    """The results of one process without a process group."""
    mesh = ShardMesh.single()
    results = {"start": initial_centers_and_samples(mesh), **{name: train(name, mesh) for name in RUNS}}
    path = tmp_path_factory.mktemp("one_process") / "expected.pt"
    torch.save(results, path)
    return path


@pytest.mark.parametrize("name", RUNS)
def test_the_run_to_compare_with_learns(expected_file, name):
    results = torch.load(expected_file)[name]
    assert bool(results["losses"].isfinite().all())
    assert float(results["losses"].max() - results["losses"].min()) > 1
    assert float(results["gradient norms"].max()) > 1, "clipping never acts"
    head = build_head(name, ShardMesh.single())
    moved = (results["class centers"] != head.gather_class_centers()).any(1)
    assert int(moved.sum()) > 100


def test_other_numbers_of_ranks(expected_file):
    run_distributed(check_all_groups, 4, expected_file)
