"""The cases in which the sharded head must equal the reference, and the comparison itself. Shared by several tests.

Everything is in float64. A learning rate of 1 without momentum and decay makes the step of a class center equal to its
gradient, so d loss / d centers is compared through the public interface.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partialfc import CenterSGD, PartialFC
from partialfc.distributed.partition import ClassPartition
from partialfc.head.reference import reference_loss
from partialfc.keyed import normal
from partialfc.margins import ArcFace, CombinedMargin, CosFace, Margin, Need, NormFace, Row, Softmax

DIM = 6
TOLERANCE = 1e-10


@dataclass(frozen=True)
class ProbeMargin(Margin):
    """Uses everything a margin may: norms with gradient on both sides, noise, step, state, negatives, regularizer."""

    scale: float = 16.0
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EMBEDDING_NORM, Need.NOISE})

    def initial_state(self) -> Mapping[str, Tensor]:
        return {"mean": torch.tensor(0.2, dtype=torch.float64)}

    def prepare(self, row: Row, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        count = row.valid.sum().clamp(min=1)
        batch_mean = torch.where(row.valid, row.target_cosine, 0.0).sum() / count
        mean = 0.5 * state["mean"] + 0.5 * batch_mean
        margin = 0.1 * row.embedding_norm + 0.05 * row.noise + 0.01 * row.step
        return {"margin": margin, "hardness": mean + 0.1 * row.embedding_norm}, {"mean": mean}

    def target(self, cosine_B: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return cosine_B - parameters["margin"]

    def negative(self, cosine_Bn: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        hardness_B1 = parameters["hardness"][:, None]
        return torch.where(cosine_Bn > 0.1, cosine_Bn * (hardness_B1 + cosine_Bn), cosine_Bn)

    def logit_scale(self, row: Row) -> Tensor:
        return self.scale * (1 + 0.1 * row.embedding_norm)

    def regularizer(self, row: Row) -> Tensor:
        return 0.3 / row.embedding_norm + row.embedding_norm


MARGINS: list[Margin] = [
    margin
    for gradient in ("exact", "detached")
    for margin in (
        Softmax(gradient=gradient),
        NormFace(scale=16.0, gradient=gradient),
        CosFace(gradient=gradient),
        ArcFace(gradient=gradient),
        ArcFace(margin=1.5, tail="none", gradient=gradient),
        ArcFace(margin=0.8, tail="easy", gradient=gradient),
        CombinedMargin(gradient=gradient),
        CombinedMargin(m1=1.35, m2=0.0, m3=0.0, gradient=gradient),
        ProbeMargin(gradient=gradient),
    )
]


@dataclass(frozen=True)
class Case:
    name: str
    margin: Margin
    num_classes: int
    sample_rate: float
    labels: list[list[int]]  # for each rank

    def __str__(self) -> str:
        return f"{self.name}, {self.margin}, C={self.num_classes}, rate={self.sample_rate}"


def _labels(world_size: int, num_classes: int) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(num_classes)

    def draw(count: int, high: int = num_classes) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    first_only = max(1, ClassPartition(num_classes, 0, world_size).num_local_classes)
    return {
        "even batches": [draw(4) for _ in range(world_size)],
        "uneven batches": [draw((5, 1, 3, 2)[rank]) for rank in range(world_size)],
        "batches of one": [draw(1) for _ in range(world_size)],
        "a rank without rows": [draw((3, 0, 2, 1)[rank]) for rank in range(world_size)],
        "positives on rank 0 only": [draw(3, first_only) for _ in range(world_size)],
        "duplicates": [[num_classes - 1, 0, num_classes - 1] for _ in range(world_size)],
        "masked rows": [[-1, *draw(2)] for _ in range(world_size)],
        "all rows masked": [[-1] for _ in range(world_size)],
    }


def cases(world_size: int) -> Iterator[Case]:
    # 64 classes: even. 130: uneven, with phantoms. 37: uneven. 3: at world size 4, a rank without classes.
    for margin, num_classes, sample_rate in itertools.product(MARGINS, (64, 130, 37, 3), (1.0, 0.3)):
        batches = _labels(world_size, num_classes)
        if num_classes < 64:
            batches = {name: batches[name] for name in ("even batches", "uneven batches")}
        for name, labels in batches.items():
            yield Case(name, margin, num_classes, sample_rate, labels)


def _inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(len(case.name) + case.num_classes)
    embeddings = [torch.randn(len(own), DIM, generator=generator, dtype=torch.float64) for own in case.labels]
    return embeddings, torch.randn(case.num_classes, DIM, generator=generator, dtype=torch.float64)


def _assert_close(case: Case, what: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, f"{case}: {what} has shape {got.shape}, expected {expected.shape}"
    limit = TOLERANCE * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    assert difference <= limit, f"{case}: {what} differs by {difference:.3e}, more than {limit:.1e}"


def check_case(case: Case, rank: int) -> None:
    """Runs the head and the reference, and compares loss, gradients, centers and margin state."""
    head = PartialFC(
        case.num_classes,
        DIM,
        margin=case.margin,
        sample_rate=case.sample_rate,
        optimizer=CenterSGD(learning_rate=1.0, momentum=0.0, weight_decay=0.0),
        dtype=torch.float64,
        seed=7,
    )
    embeddings, centers = _inputs(case)
    head.set_class_centers(centers)
    state = case.margin.initial_state()
    for step in range(2 if state else 1):
        own = embeddings[rank].clone().requires_grad_()
        loss = head(own, torch.tensor(case.labels[rank], dtype=torch.int64))
        (3.0 * loss).backward()
        idle = ~_in_play(case, head, step)
        expected_loss, embeddings_gradient, centers_gradient, state = _expected(
            case, head, embeddings, centers, state, step
        )
        start = sum(len(labels) for labels in case.labels[:rank])
        _assert_close(case, f"loss of step {step}", loss.detach(), expected_loss)
        own_gradient = 3.0 * embeddings_gradient[start : start + len(own)]
        _assert_close(case, f"d/d embeddings of step {step}", own.grad, own_gradient)
        after = head.gather_class_centers()
        _assert_close(case, f"d/d centers of step {step}", centers - after, centers_gradient)
        assert torch.equal(after[idle], centers[idle]), f"{case}: centers that are not in play moved"
        for name, value in state.items():
            _assert_close(case, f"state {name} of step {step}", head.get_extra_state()["margin"][name], value)
        centers = after


def _in_play(case: Case, head: PartialFC, step: int) -> Tensor:
    """[C] bool, found on a partition of one rank whatever the world size of the test."""
    labels = torch.tensor([label for own in case.labels for label in own])
    if head.sampler is None:
        return torch.ones(case.num_classes, dtype=torch.bool)
    rows = head.sampler.in_play(labels, ClassPartition(case.num_classes), step).rows
    assert rows is not None
    return torch.zeros(case.num_classes, dtype=torch.bool).index_fill(0, rows, True)


def _expected(
    case: Case, head: PartialFC, embeddings: list[Tensor], centers: Tensor, state: Mapping[str, Tensor], step: int
) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
    labels = torch.tensor([label for own in case.labels for label in own])
    valid = labels >= 0
    everything = torch.cat(embeddings).requires_grad_()
    centers = centers.clone().requires_grad_()
    if not valid.any():
        margin_state = head.get_extra_state()["margin"]
        return torch.tensor(0.0).double(), torch.zeros_like(everything), torch.zeros_like(centers), margin_state
    in_play = _in_play(case, head, step)
    renumbered = (in_play.cumsum(0) - 1)[labels[valid]]
    noise = normal(head.seed, 3, step, torch.arange(len(labels))).double()
    loss, state = reference_loss(
        everything[valid],
        renumbered,
        centers[in_play],
        case.margin,
        state=state,
        step=step,
        noise_B=noise[valid],
    )
    gradients = torch.autograd.grad(loss, (everything, centers))
    return loss.detach(), *gradients, state
