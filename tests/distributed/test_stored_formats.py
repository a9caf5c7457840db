"""Class centers in 16 bits, momentum in 8: the same on any number of ranks, also by way of a checkpoint.

Sums over ranks may differ in the last bit of float32, and then a number that lies on the edge is rounded to the other
side. So what is equal bit for bit is compared where all sums are exact; else that all but very few numbers are equal,
and those differ by one step of the format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_distributed
from torch import Tensor

from partialfc import CenterSGD, PartialFC
from partialfc.checkpoint.store import CheckpointStore
from partialfc.distributed.collectives import gather_rows
from partialfc.distributed.mesh import ShardMesh
from partialfc.margins import CosFace, Softmax

NUM_CLASSES, DIM, BATCH = 130, 16, 9
SHARES = {1: (9,), 2: (4, 5), 3: (3, 5, 1)}
MARGINS = {"exact": Softmax(bias=False), "usual": CosFace(scale=16.0)}
OPTIMIZER = CenterSGD(momentum_dtype="int8", weight_decay=2.0**-6)


def build(margin: str, sample_rate: float, **options: Any) -> PartialFC:
    options = {"optimizer": OPTIMIZER, "dtype": torch.float16, "init_std": 1.0, "seed": 4, **options}
    return PartialFC(NUM_CLASSES, DIM, margin=MARGINS[margin], sample_rate=sample_rate, **options)


def train(head: PartialFC, step: int, everyone: Tensor | None = None) -> None:
    """One step on this rank's share of the global batch."""
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(BATCH, DIM, generator=generator) if everyone is None else everyone
    labels = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
    shares, rank = SHARES[head.mesh.size], head.mesh.rank
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    head(embeddings[own], labels[own]).backward()


def everything(head: PartialFC) -> dict[str, Tensor]:
    """[C, ...] of each quantity as it is stored, on every rank."""
    centers = head.class_centers
    return {name: gather_rows(centers.read(name, None).contiguous(), head.mesh).clone() for name in centers._names}


def first_step(sample_rate: float) -> dict[str, Tensor]:
    """From centers of zero: all logits are 0, sums over classes are whole numbers, and each sum over rows has one term.

    So the gradient, which is no 16-bit number, is the same on any number of ranks, and only the keys of what is rounded
    could make a difference.
    """
    head = build("exact", sample_rate, optimizer=CenterSGD(momentum_dtype="int8", weight_decay=0.0))
    head.set_class_centers(torch.zeros(NUM_CLASSES, DIM))
    train(head, 0, torch.diag(torch.exp2(torch.arange(DIM) % 5.0))[:BATCH])
    return everything(head)


def several_steps(sample_rate: float, seed: int = 4) -> dict[str, Tensor]:
    head = build("usual", sample_rate, seed=seed)
    for step in range(6):
        train(head, step)
    return everything(head)


def different(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of numbers that differ, of the centers or the momentum, whichever is larger."""
    return max(float((got[name] != expected[name]).double().mean()) for name in ("weight", "momentum"))


def check(rank: int, world_size: int, directory: Path) -> None:
    expected = torch.load(directory / "expected.pt")
    for sample_rate in (1.0, 0.3):
        first = first_step(sample_rate)
        for name, value in expected["first", sample_rate].items():
            assert torch.equal(first[name], value), f"{name} differs at rate {sample_rate} on {world_size} ranks"
        last = several_steps(sample_rate)
        known = expected["several", sample_rate]
        assert different(last, known) < 0.01
        steps = (last["weight"].view(torch.int16).int() - known["weight"].view(torch.int16).int()).abs()
        assert int(steps.max()) <= 2
        codes = (last["momentum"].int() - known["momentum"].int()).abs()
        assert int(codes.max()) <= 2
    # What one process saved.
    checkpoints = CheckpointStore(directory / "one", mesh=ShardMesh.from_group())
    head = build("usual", 0.3, init_std=0.5)
    load(checkpoints, head)
    assert head.step == 3
    loaded = everything(head)
    for name, value in expected["saved"].items():
        assert torch.equal(loaded[name], value), f"{name} was not loaded as it was saved"
    train(head, 3)
    known = expected["next"]
    moved = everything(head)
    assert different(moved, known) < 0.01
    checkpoints = CheckpointStore(directory / "several", mesh=ShardMesh.from_group())
    checkpoints.save(4, {"head": head.state_dict()}, metadata={})
    if rank == 0:
        torch.save(moved, directory / "moved.pt")


def load(checkpoints: CheckpointStore, head: PartialFC) -> None:
    state = {"head": head.state_dict()}
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.load(latest, state)
    head.load_state_dict(state["head"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_numbers_of_ranks(world_size: int, tmp_path: Path) -> None:
    expected: dict[Any, Any] = {}
    for sample_rate in (1.0, 0.3):
        expected["first", sample_rate] = first_step(sample_rate)
        assert int(expected["first", sample_rate]["weight"].unique().numel()) > 10
        expected["several", sample_rate] = several_steps(sample_rate)
        # With other random bits most numbers would be others.
        assert different(several_steps(sample_rate, seed=6), expected["several", sample_rate]) > 0.2
    head = build("usual", 0.3)
    for step in range(3):
        train(head, step)
    expected["saved"] = everything(head)
    CheckpointStore(tmp_path / "one", mesh=ShardMesh.single()).save(3, {"head": head.state_dict()}, metadata={})
    train(head, 3)
    expected["next"] = everything(head)
    assert different(expected["next"], expected["saved"]) > 0.2
    torch.save(expected, tmp_path / "expected.pt")
    run_distributed(check, world_size, tmp_path)
    # And what several saved.
    resumed = build("usual", 0.3, init_std=0.5)
    load(CheckpointStore(tmp_path / "several", mesh=ShardMesh.single()), resumed)
    assert resumed.step == 4
    for name, value in torch.load(tmp_path / "moved.pt").items():
        assert torch.equal(resumed.class_centers.read(name, None), value), name
