"""Mistakes that sharded losses are known for, each with numbers worked out by hand, over two ranks.

Four classes, the first two on rank 0: at (1, 0), (0, 1), (-1, 0) and (0, -1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from support import run_distributed
from torch import Tensor

from partialfc import CenterSGD, HeadGroup, PartialFC
from partialfc.keyed import normal
from partialfc.margins import AdaFace, CosFace, CurricularFace, ElasticFace, MagFace, Margin, NormFace, Softmax

CENTERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
STILL = CenterSGD(learning_rate=0.0)


def build(margin: Margin, **options: Any) -> PartialFC:
    head = PartialFC(4, 2, margin=margin, optimizer=STILL, dtype=torch.float64, **options)
    assert head.partition.num_local_classes == 2
    head.set_class_centers(CENTERS)
    return head


def at(degrees: float, norm: float = 1.0) -> list[float]:
    return [norm * math.cos(math.radians(degrees)), norm * math.sin(math.radians(degrees))]


def step(head: PartialFC, rows: list[list[float]], labels: list[int]) -> tuple[float, Tensor]:
    """(loss, gradient of this rank's embeddings)."""
    embeddings = torch.tensor(rows, dtype=torch.float64).view(-1, 2).requires_grad_()
    loss = head(embeddings, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    return float(loss.detach()), embeddings.grad


def close(got: float, expected: float) -> None:
    assert abs(got - expected) < 1e-10, (got, expected)


def cross_entropy(own: float, others: list[float]) -> float:
    return math.log(sum(math.exp(other - own) for other in [own, *others]))


def check_magface_gradient_through_the_norm(rank: int) -> None:
    """Both ranks compute the margin from the norm; their gradients for it must not be added up."""
    margin = MagFace(scale=4.0, norm_low=1.0, norm_high=3.0, margin_low=0.2, margin_high=0.6, lambda_g=5.0)
    degrees, norms = (20.0, 110.0), (1.5, 2.5)
    _, gradient = step(build(margin), [at(degrees[rank], norms[rank])], [2 * rank])
    # The angle to the own center at 0 or 180 degrees, and d loss / d norm at a fixed direction.
    theta = math.radians(degrees[rank] if rank == 0 else 180 - degrees[rank])
    m = 0.2 + 0.2 * (norms[rank] - 1.0)
    others = [math.cos(math.pi - theta), math.sin(theta), -math.sin(theta)]
    own = 4.0 * math.cos(theta + m)
    probability = math.exp(own) / (math.exp(own) + sum(math.exp(4.0 * other) for other in others))
    through_margin = (probability - 1) * 4.0 * -math.sin(theta + m) * 0.2
    through_regularizer = 5.0 * (-1 / norms[rank] ** 2 + 1 / 3.0**2)
    direction = torch.tensor(at(degrees[rank]), dtype=torch.float64)
    close(float(gradient[0] @ direction), (through_margin + through_regularizer) / 2)


def check_curricularface_with_targets_elsewhere(rank: int) -> None:
    """Row at 30 degrees of class 0, row at 50 degrees of class 1: both live on rank 0, rank 1 has negatives alone."""
    margin = CurricularFace(scale=3.0, margin=0.9, momentum=0.5)
    rows, labels = ([at(30)], [0]) if rank == 0 else ([at(50)], [1])
    loss, _ = step(build(margin), rows, labels)
    t = 0.5 * (math.cos(math.radians(30)) + math.cos(math.radians(40))) / 2
    expected = 0.0
    for degrees, label in ((30, 0), (50, 1)):
        cosines = [math.cos(math.radians(degrees - 90 * number)) for number in range(4)]
        threshold = math.cos(math.acos(cosines[label]) + 0.9)
        negatives = [c for number, c in enumerate(cosines) if number != label]
        hardened = [c * (t + c) if c > threshold else c for c in negatives]
        assert hardened != negatives
        expected += cross_entropy(3.0 * threshold, [3.0 * h for h in hardened]) / 2
    close(loss, expected)


def check_adaface_statistics_over_the_global_batch(rank: int) -> None:
    """Three rows on rank 0, of which one is masked, and one row on rank 1, which has no deviation of its own."""
    head = build(AdaFace(batch_weight=0.5))
    if rank == 0:
        step(head, [at(10, 2.0), at(50, 70.0), at(20, 4.0)], [0, -1, 1])
    else:
        step(head, [at(200, 9.0)], [2])
    close(float(head.margin_state["norm_mean"]), 0.5 * 20 + 0.5 * 5.0)
    close(float(head.margin_state["norm_deviation"]), 0.5 * 100 + 0.5 * math.sqrt((9 + 1 + 16) / 2))


def check_elasticface_plus_and_the_hardest_row(rank: int) -> None:
    """Target cosines .1, .9 | .5: the largest of the three margins goes to .1, the smallest to .9."""
    head = build(ElasticFace(scale=2.0, variant="cos", margin=0.35, deviation=0.2, sort=True), seed=11)
    cosines = [0.1, 0.9, 0.5]
    rows = [[cosine, math.sqrt(1 - cosine**2)] for cosine in cosines]
    own = slice(0, 2) if rank == 0 else slice(2, 3)
    loss, _ = step(head, rows[own], [0, 0, 0][own])
    drawn = sorted(0.35 + 0.2 * normal(11, 3, 0, torch.arange(3)).double(), reverse=True)
    expected = 0.0
    for cosine, margin in zip(cosines, (drawn[0], drawn[2], drawn[1]), strict=True):
        sine = math.sqrt(1 - cosine**2)
        expected += cross_entropy(2.0 * (cosine - float(margin)), [2.0 * c for c in (sine, -cosine, -sine)]) / 3
    close(loss, expected)


def check_a_loss_above_69(rank: int) -> None:
    """A probability clamped at 1e-30 would end at 69.08; the own class of the row lives on the other rank."""
    rows, labels = ([[96.0, 0.0]], [2]) if rank == 0 else ([], [])
    loss, gradient = step(build(Softmax()), rows, labels)
    # Logits 96, 0, -96 and 0.
    close(loss, 192.0)
    assert rank == 1 or abs(float(gradient[0, 0]) - 2.0) < 1e-12


def check_learned_scale(rank: int) -> None:
    """Each rank sees the scale at its own classes; the gradient of it is the sum, once."""
    head = PartialFC(
        4, 2, margin=NormFace(scale=2.0, learned=True), optimizer=CenterSGD(1.0, momentum=0.0), dtype=torch.float64
    )
    head.set_class_centers(CENTERS)
    step(head, [at(30)] if rank == 0 else [], [0] if rank == 0 else [])
    cosines = [math.cos(math.radians(30 - 90 * number)) for number in range(4)]
    total = sum(math.exp(2.0 * c) for c in cosines)
    slope = sum(c * math.exp(2.0 * c) / total for c in cosines) - cosines[0]
    assert head.learned is not None
    close(float(head.learned.values()["scale"]), 2.0 - slope)


def check_filtered_negatives_are_counted(rank: int) -> None:
    head = build(CosFace(scale=2.0, margin=0.0), interclass_filtering_threshold=0.45)
    rows, labels = ([at(60), at(10)], [0, -1]) if rank == 0 else ([at(210)], [1])
    loss, _ = step(head, rows, labels)
    # 60 degrees: class 1 has .87 and goes. 210 degrees, of class 1: class 2 has .87 and class 3 has .5, both go.
    first = cross_entropy(2 * 0.5, [2 * -0.5, 2 * -math.sqrt(0.75)])
    second = cross_entropy(2 * -0.5, [2 * -math.sqrt(0.75)])
    close(loss, (first + second) / 2)
    close(head.diagnostics()["filtered_negatives"], 3)


def check_several_heads(rank: int) -> None:
    """Two heads over rows of two sources: weights, gradients, and a source that one rank has no row of."""
    heads = HeadGroup(
        {"faces": build(CosFace(scale=2.0), loss_weight=0.25), "products": build(NormFace(scale=3.0), loss_weight=2.0)}
    )
    faces, products = ([at(30), at(100)], [at(200)]) if rank == 0 else ([], [at(300), at(20)])
    labels = ([0, 1], [2]) if rank == 0 else ([], [3, 1])
    embeddings = torch.tensor([*faces, *products], dtype=torch.float64).requires_grad_()
    by_name = {name: torch.tensor(own, dtype=torch.int64) for name, own in zip(heads.names, labels, strict=True)}
    loss = heads(embeddings, by_name)
    loss.backward()
    first, face_gradient = step(build(CosFace(scale=2.0)), faces, labels[0])
    second, product_gradient = step(build(NormFace(scale=3.0)), products, labels[1])
    close(float(loss.detach()), 0.25 * first + 2.0 * second)
    expected = torch.cat([0.25 * face_gradient, 2.0 * product_gradient])
    torch.testing.assert_close(embeddings.grad, expected, rtol=0, atol=1e-12)


def check_all(rank: int, world_size: int) -> None:
    check_magface_gradient_through_the_norm(rank)
    check_curricularface_with_targets_elsewhere(rank)
    check_adaface_statistics_over_the_global_batch(rank)
    check_elasticface_plus_and_the_hardest_row(rank)
    check_a_loss_above_69(rank)
    check_learned_scale(rank)
    check_filtered_negatives_are_counted(rank)
    check_several_heads(rank)


def test_two_ranks() -> None:
    run_distributed(check_all, 2)
