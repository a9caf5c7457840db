"""Embeddings and their gradients in 16 bits between ranks: what is rounded, and how much that changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import run_distributed
from torch import Tensor

from partialfc import PartialFC
from partialfc.head import reference_loss
from partialfc.margins import AdaFace, ArcFace, MagFace, Margin

NUM_CLASSES, DIM, STEPS = 130, 32, 3
SHARES = {1: (9,), 2: (4, 5), 3: (3, 5, 1)}
# Of the gradient of a row, in its length: each number of a part is wrong by up to 2^-9 of itself, and so are sums.
TOLERANCE = 2.0**-7
MARGINS: dict[str, Margin] = {"arcface": ArcFace(), "magface": MagFace(), "adaface": AdaFace()}


def build(name: str, **options: Any) -> PartialFC:
    options = {"sample_rate": 0.5, "seed": 4, "init_std": 1.0, **options}
    return PartialFC(NUM_CLASSES, DIM, margin=MARGINS[name], **options)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(9, DIM, generator=generator), torch.randint(NUM_CLASSES, (9,), generator=generator)


def run(head: PartialFC, rank: int, world_size: int, *, rounded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(losses, gradients of this rank) of several steps; `rounded`: of embeddings that are rounded to begin with."""
    own = slice(sum(SHARES[world_size][:rank]), sum(SHARES[world_size][: rank + 1]))
    losses, gradients = [], []
    for step in range(STEPS):
        everyone, labels = global_batch(step)
        embeddings = (everyone.bfloat16().float() if rounded else everyone)[own].clone().requires_grad_()
        loss = head(embeddings, labels[own])
        loss.backward()
        assert embeddings.grad is not None
        losses.append(loss.detach())
        gradients.append(embeddings.grad)
    return losses, gradients


def check(rank: int, world_size: int) -> None:
    for name in MARGINS:
        half, whole = build(name, gather_dtype=torch.bfloat16), build(name)
        losses, gradients = run(half, rank, world_size, rounded=False)
        expected_losses, expected_gradients = run(whole, rank, world_size, rounded=True)
        # All that follows from rounded embeddings, this rank's own among them, is as if they had come so.
        for got, expected in zip(losses, expected_losses, strict=True):
            assert torch.equal(got, expected), name
        assert torch.equal(half.gather_class_centers(), whole.gather_class_centers()), name
        assert half.margin_state == whole.margin_state
        for got, expected in zip(gradients, expected_gradients, strict=True):
            assert not torch.equal(got, expected), f"{name}: nothing was rounded"
            wrong = (got - expected).norm(dim=1) / expected.norm(dim=1)
            assert float(wrong.max()) < TOLERANCE, f"{name}: gradient of a row is wrong by {float(wrong.max()):.4f}"


def test_one_process_rounds_as_several_do() -> None:
    check(0, 1)
    # And that is the definition.
    embeddings, labels = global_batch(0)
    head = build("arcface", sample_rate=1.0, gather_dtype=torch.bfloat16)
    loss = head(embeddings, labels)
    expected, _ = reference_loss(embeddings.bfloat16().float(), labels, head.gather_class_centers(), ArcFace())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    head.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(embeddings, labels), expected, rtol=1e-6, atol=0)


def check_several(rank: int, world_size: int, one_process: list[Tensor]) -> None:
    check(rank, world_size)
    losses, _ = run(build("arcface", gather_dtype=torch.bfloat16), rank, world_size, rounded=False)
    for got, expected in zip(losses, one_process, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_three_ranks() -> None:
    losses, _ = run(build("arcface", gather_dtype=torch.bfloat16), 0, 1, rounded=False)
    run_distributed(check_several, 3, losses)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gather_dtype is torch.float16, but must be torch.bfloat16, or None"):
        build("arcface", gather_dtype=torch.float16)
