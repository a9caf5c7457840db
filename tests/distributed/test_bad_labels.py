"""What one rank gets wrong, all ranks learn; and batches of any size on any rank, from the first step on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import ProbeMargin
from support import run_distributed
from torch import Tensor

from partialfc import CenterSGD, PartialFC
from partialfc.distributed.collectives import all_gather_equal
from partialfc.distributed.mesh import ShardMesh
from partialfc.head import reference_loss
from partialfc.margins import ArcFace

NUM_CLASSES, DIM = 70, 6
OPTIMIZER = CenterSGD(learning_rate=1.0, momentum=0.0, weight_decay=0.0)


def build_head(**options: Any) -> PartialFC:
    options = {"margin": ArcFace(scale=16.0), "optimizer": OPTIMIZER, "init_std": 1.0, **options}
    return PartialFC(NUM_CLASSES, DIM, dtype=torch.float64, **options)


def batches(sizes: tuple[int, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Of all ranks, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, DIM, generator=generator, dtype=torch.float64),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def check_step(head: PartialFC, rank: int, sizes: tuple[int, ...], seed: int) -> None:
    """One step, against the reference on the joined batch."""
    everyone = batches(sizes, seed)
    centers = head.gather_class_centers().requires_grad_()
    own = everyone[rank][0].clone().requires_grad_()
    loss = head(own, everyone[rank][1])
    loss.backward()
    whole = torch.cat([embeddings for embeddings, _ in everyone]).requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    gradients = (torch.zeros_like(whole), torch.zeros_like(centers))
    if len(whole):
        expected = reference_loss(whole, torch.cat([labels for _, labels in everyone]), centers, head.margin)[0]
        gradients = torch.autograd.grad(expected, (whole, centers))
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=0)
    start = sum(sizes[:rank])
    torch.testing.assert_close(own.grad, gradients[0][start : start + sizes[rank]], rtol=0, atol=1e-12)
    torch.testing.assert_close(centers.detach() - head.gather_class_centers(), gradients[1], rtol=0, atol=1e-12)


def check_sizes(rank: int) -> None:
    # Rank 0 has nothing at the first step; then ranks grow past each other, shrink, and all have nothing.
    head = build_head()
    for step, sizes in enumerate([(0, 2, 1), (1, 0, 0), (4, 1, 7), (2, 2, 2), (0, 0, 0), (9, 0, 1), (1, 1, 1)]):
        check_step(head, rank, sizes, step)
    # Nobody has anything at the first step.
    check_step(head := build_head(), rank, (0, 0, 0), 0)
    check_step(head, rank, (1, 2, 0), 1)


def expect_error(head: PartialFC, embeddings: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        head(embeddings, labels)
    assert str(error.value) == message


def check_labels(rank: int) -> None:
    for first_step_is_bad in (True, False):
        head = build_head()
        if not first_step_is_bad:
            check_step(head, rank, (2, 2, 2), 0)
        before = head.gather_class_centers()
        # The bad batch outgrows those before it, too.
        for bad, value in ((1, NUM_CLASSES), (2, -2), (0, 2**40)):
            embeddings, labels = batches((3, 4, 5), 1)[rank]
            if rank == bad:
                labels[2] = value
            message = (
                f"labels[2] on rank {bad} is {value}, but must be in [0, 70), or -1 to mask the row; 1 of 12 labels of "
                "this batch are out of range. Check num_classes against the data."
            )
            expect_error(head, embeddings, labels, message)
        assert torch.equal(head.gather_class_centers(), before)
        assert head.step == (0 if first_step_is_bad else 1)
        check_step(head, rank, (3, 0, 1), 2)


def check_not_finite(rank: int, mesh: ShardMesh) -> None:
    head = build_head(margin=ProbeMargin(), sample_rate=0.5)
    for step in range(2):
        embeddings, labels = batches((2, 2, 2), step)[rank]
        if step and rank == 2:
            embeddings[0, 0] = float("nan")
        before, state = head.gather_class_centers(), head.get_extra_state()["margin"]
        loss = head(embeddings.requires_grad_(), labels)
        loss.backward()
        finite = step == 0
        assert bool(loss.isfinite()) == finite
        moved = all_gather_equal(torch.tensor([not torch.equal(head.gather_class_centers(), before)]), mesh)
        assert bool((moved == finite).all())
        changed = not torch.equal(head.get_extra_state()["margin"]["mean"], state["mean"])
        assert changed == finite
        assert head.step == step + 1


def check_all(rank: int, world_size: int) -> None:
    check_sizes(rank)
    check_labels(rank)
    check_not_finite(rank, ShardMesh.from_group())


def test_three_ranks() -> None:
    run_distributed(check_all, 3)
