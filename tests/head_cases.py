"""The cases in which the sharded head must equal the reference, and the comparison itself. Shared by several tests.

Everything is in float64. A learning rate of 1 without momentum and decay makes the step of a class center, a class bias
and a learned number equal to its gradient, so those gradients are compared through the public interface.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc import CenterSGD, PartialFC
from partialfc.distributed.partition import ClassPartition
from partialfc.head import VariationalPrototypes
from partialfc.head.reference import reference_loss
from partialfc.keyed import normal
from partialfc.margins import (
    AdaCos,
    AdaFace,
    ArcFace,
    CenterLoss,
    CircleLoss,
    CombinedMargin,
    ContrastiveLoss,
    CosFace,
    CurricularFace,
    ElasticFace,
    FNormSphereFace,
    MagFace,
    Margin,
    Need,
    NormFace,
    Parameters,
    Row,
    ScaledMargin,
    Softmax,
    SphereFace,
    SphereFace2,
    State,
    TripletLoss,
    UniFace,
)

DIM = 6
TOLERANCE = 1e-10


@dataclass(frozen=True)
class ProbeMargin(ScaledMargin):
    """Uses everything a margin may: norms with gradient on both sides, noise, step, state, negatives, regularizer."""

    scale: float = 16.0
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EMBEDDING_NORM, Need.NOISE})

    def initial_state(self, num_classes: int) -> State:
        return {"mean": torch.tensor(0.2, dtype=torch.float64)}

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        count = row.valid.sum().clamp(min=1)
        batch_mean = torch.where(row.valid, row.target_cosine, 0.0).sum() / count
        mean = torch.where(row.valid.any(), 0.5 * state["mean"] + 0.5 * batch_mean, state["mean"])
        parameters = {
            "margin": 0.1 * row.embedding_norm + 0.05 * row.noise + 0.01 * row.step,
            "hardness": mean + 0.1 * row.embedding_norm,
            "scale": self.scale * (1 + 0.1 * row.embedding_norm),
        }
        return parameters, {"mean": mean}

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        return cosine_B - parameters["margin"]

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        hardness_B1 = parameters["hardness"][:, None]
        return torch.where(cosine_Bn > 0.1, cosine_Bn * (hardness_B1 + cosine_Bn), cosine_Bn)

    def logit_scale(self, parameters: Parameters) -> Tensor:
        return parameters["scale"]

    def regularizer(self, row: Row) -> Tensor:
        return 0.3 / row.embedding_norm + row.embedding_norm


# Settings that bring every branch into play at the angles and norms of small random embeddings.
NEAR_NORMS = {"norm_low": 1.5, "norm_high": 3.0}
BOTH_GRADIENTS: list[Margin] = [
    Softmax(),
    Softmax(bias=False),
    NormFace(scale=16.0),
    NormFace(scale=16.0, learned=True),
    SphereFace(),
    SphereFace(margin=3, lambda_start=0.0, lambda_min=0.0),
    FNormSphereFace(scale=16.0, lambda_min=0.1, lambda_start=1.0),
    FNormSphereFace(scale=16.0, margin=1.7, lambda_start=0.0, lambda_min=0.0),
    CosFace(),
    ArcFace(),
    ArcFace(margin=1.5, tail="none"),
    ArcFace(margin=0.8, tail="easy"),
    CombinedMargin(),
    CombinedMargin(m1=1.35, m2=0.0, m3=0.0),
    CircleLoss(),
    MagFace(**NEAR_NORMS),
    MagFace(**NEAR_NORMS, margin_high=1.6, tail="easy"),
    MagFace(),
    AdaFace(),
    AdaFace(concentration=50.0, batch_weight=0.9),
    CurricularFace(),
    CurricularFace(margin=1.0, momentum=0.2),
    ElasticFace(),
    ElasticFace(deviation=0.6, sort=True),
    ElasticFace(variant="cos", deviation=0.2),
    ElasticFace(variant="cos", deviation=0.2, sort=True),
    AdaCos(),
    AdaCos(dynamic=False),
    SphereFace2(),
    UniFace(),
    ProbeMargin(),
]
NO_DELAY = VariationalPrototypes(weight=0.4, max_age=1, start_step=1)
# Options of the head that compose with any margin, each with margins that go through different paths.
OPTIONS: list[tuple[Margin, dict[str, Any]]] = [
    *(
        (margin, {"num_subcenters": 3})
        for margin in (Softmax(), ArcFace(), SphereFace(), MagFace(**NEAR_NORMS), CurricularFace(), AdaCos(), UniFace())
    ),
    *(
        (margin, {"interclass_filtering_threshold": 0.2})
        for margin in (CosFace(), CircleLoss(), CurricularFace(), AdaCos(), SphereFace2(), ProbeMargin())
    ),
    *(
        (margin, {"sampling_correction": True})
        for margin in (Softmax(), ArcFace(), CircleLoss(), MagFace(**NEAR_NORMS), CurricularFace(), ProbeMargin())
    ),
    *((margin, {"variational": NO_DELAY}) for margin in (ArcFace(), AdaFace(), CurricularFace(), UniFace())),
    *((ArcFace(), {"auxiliaries": [term]}) for term in (CenterLoss(weight=0.3), ContrastiveLoss(), TripletLoss())),
    *(
        (Softmax(), {"auxiliaries": [term]})
        for term in (
            CenterLoss(weight=0.3, update="gradient"),
            ContrastiveLoss(margin=3.0, normalize=False),
            TripletLoss(soft=True, normalize=False),
        )
    ),
    (
        AdaFace(),
        {
            "auxiliaries": [CenterLoss(weight=0.1), TripletLoss(weight=0.5)],
            "num_subcenters": 3,
            "interclass_filtering_threshold": 0.6,
            "sampling_correction": True,
            "loss_weight": 0.7,
        },
    ),
]
SEVERAL_LABELS: list[tuple[Margin, dict[str, Any]]] = [
    (margin, {"labels_per_row": 3, **options})
    for margin, options in (
        (Softmax(), {}),
        (ArcFace(), {}),
        (CircleLoss(), {"num_subcenters": 3}),
        (SphereFace(), {}),
        (CurricularFace(), {"sampling_correction": True}),
        (ElasticFace(sort=True), {}),
        (MagFace(**NEAR_NORMS), {}),
        (AdaFace(), {}),
        (AdaCos(), {"interclass_filtering_threshold": 0.5}),
        (ProbeMargin(), {"variational": NO_DELAY}),
    )
]


@dataclass(frozen=True)
class Case:
    name: str
    margin: Margin
    num_classes: int
    sample_rate: float
    labels: list[list[Any]]  # for each rank
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}, {self.margin}, C={self.num_classes}, rate={self.sample_rate}, {self.options}"

    @property
    def all_labels(self) -> Tensor:
        """[B] or [B, P], of the global batch."""
        return torch.tensor([label for own in self.labels for label in own], dtype=torch.int64)


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
        "cosines at +1 and -1": [[num_classes - 1 - rank, rank, 1] for rank in range(world_size)],
        "masked rows": [[-1, *draw(2)] for _ in range(world_size)],
        "all rows masked": [[-1] for _ in range(world_size)],
    }


def _several_labels(world_size: int, num_classes: int) -> dict[str, list[list[list[int]]]]:
    last = num_classes - 1
    rows = [[0, last, -1], [5, 5, 7], [-1, 3, -1], [-1, -1, -1], [last, last // 2, 1], [2, -1, 2], [last, 0, 9]]
    return {
        "several labels": [rows[rank : rank + 3] for rank in range(world_size)],
        "several labels, uneven": [rows[rank * rank : rank * rank + (2, 3, 0, 1)[rank]] for rank in range(world_size)],
    }


def cases(world_size: int) -> Iterator[Case]:
    """Every margin and option in every situation that may go wrong for it, sampled and not.

    130 classes: uneven over ranks, with phantoms. 64: even. 37: uneven. 3: at world size 4, a rank without classes.
    """
    few, some = ("even batches", "uneven batches"), ("uneven batches", "duplicates", "cosines at +1 and -1")
    plan: list[tuple[list[tuple[Margin, dict[str, Any]]], int, tuple[str, ...] | None]] = [
        ([(margin, {}) for margin in BOTH_GRADIENTS], 130, None),
        ([(margin, {}) for margin in BOTH_GRADIENTS], 3, few),
        (
            [(replace(margin, gradient="detached"), {}) for margin in BOTH_GRADIENTS if margin != CircleLoss()],
            130,
            some,
        ),
        ([(ArcFace(), {}), (ProbeMargin(), {})], 64, None),
        ([(ArcFace(), {}), (ProbeMargin(), {})], 37, None),
        (OPTIONS, 130, (*some, "a rank without rows", "masked rows", "all rows masked")),
        (OPTIONS, 3, few),
    ]
    for entries, num_classes, names in plan:
        batches = _labels(world_size, num_classes)
        for (margin, options), sample_rate, name in itertools.product(entries, (1.0, 0.3), names or batches):
            yield Case(name, margin, num_classes, sample_rate, batches[name], options)
    for (margin, options), sample_rate in itertools.product(SEVERAL_LABELS, (1.0, 0.3)):
        for name, labels in _several_labels(world_size, 130).items():
            yield Case(name, margin, 130, sample_rate, labels, options)


def _inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Embeddings of each rank, and class centers [C, K, D]."""
    generator = torch.Generator().manual_seed(len(case.name) + case.num_classes)
    num_subcenters = case.options.get("num_subcenters", 1)
    embeddings = [torch.randn(len(own), DIM, generator=generator, dtype=torch.float64) for own in case.labels]
    centers = torch.randn(case.num_classes, num_subcenters, DIM, generator=generator, dtype=torch.float64)
    if case.name.startswith("cosines"):
        # One row on its own center, one opposite to it, and one on a center that is not its own.
        embeddings[0][0] = 2.5 * centers[case.labels[0][0], 0]
        embeddings[0][1] = -0.5 * centers[case.labels[0][1], 0]
        embeddings[0][2] = centers[2, 0]
    return embeddings, centers


def _assert_close(case: Case, what: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, f"{case}: {what} has shape {got.shape}, expected {expected.shape}"
    assert bool(expected.isfinite().all()), f"{case}: {what} is not finite in the reference"
    limit = TOLERANCE * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    assert difference <= limit, f"{case}: {what} differs by {difference:.3e}, more than {limit:.1e}"


def build(case: Case, *, fused: bool = True) -> PartialFC:
    return PartialFC(
        case.num_classes,
        DIM,
        margin=case.margin,
        sample_rate=case.sample_rate,
        optimizer=CenterSGD(learning_rate=1.0, momentum=0.0, weight_decay=0.0),
        fused=fused,
        dtype=torch.float64,
        seed=7,
        **case.options,
    )


def _num_steps(head: PartialFC) -> int:
    """As many as differ from each other by what the head remembers."""
    if head.prototypes is not None:
        return 3
    return 2 if head.margin_state or head.learned or head.class_bias or len(head.auxiliaries) else 1


def check_case(case: Case, rank: int, *, fused: bool = True) -> None:
    """Runs the head and the oracle for one or more steps, and compares everything that they have."""
    head = build(case, fused=fused)
    embeddings, centers = _inputs(case)
    head.set_class_centers(centers if centers.shape[1] > 1 else centers[:, 0])
    oracle = Oracle(case, head, centers)
    start = sum(len(labels) for labels in case.labels[:rank])
    for step in range(_num_steps(head)):
        own = embeddings[rank].clone().requires_grad_()
        labels = torch.tensor(case.labels[rank], dtype=torch.int64).view(len(own), *head_labels(case))
        before = head.class_centers.read("weight", None).clone()
        loss = head(own, labels)
        (3.0 * loss).backward()
        expected_loss, gradient = oracle.step(torch.cat(embeddings), step)
        _assert_close(case, f"loss of step {step}", loss.detach(), expected_loss)
        _assert_close(case, f"d/d embeddings of step {step}", own.grad, 3.0 * gradient[start : start + len(own)])
        after = head.class_centers.read("weight", None)
        _assert_close(case, f"d/d centers of step {step}", after, oracle.centers[oracle.local])
        idle = ~oracle.in_play(step)[oracle.local]
        assert torch.equal(after[idle], before[idle]), f"{case}: centers that are not in play moved"
        for name, (got, expected) in oracle.state_pairs().items():
            _assert_close(case, f"{name} of step {step}", got, expected)


def head_labels(case: Case) -> tuple[int, ...]:
    count = case.options.get("labels_per_row", 1)
    return () if count == 1 else (count,)


class Oracle:
    """One process that knows all class centers: the reference loss, and the rest of the head in plain torch."""

    def __init__(self, case: Case, head: PartialFC, centers: Tensor) -> None:
        self.case, self.head, self.centers = case, head, centers
        # Each rank compares its own rows, which takes no collective.
        start = head.partition.class_start
        self.local = slice(start, start + head.partition.num_local_classes)
        count = case.num_classes
        self.state = case.margin.initial_state(count)
        self.learned = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in case.margin.initial_learned(count).items()
        }
        self.bias = torch.zeros(count, dtype=torch.float64)
        self.own_centers = torch.zeros(count, DIM, dtype=torch.float64)  # of Center loss
        self.last_seen: dict[int, tuple[int, Tensor]] = {}  # of variational prototypes

    def in_play(self, step: int) -> Tensor:
        """[C] bool, found on a partition of one rank whatever the world size of the test."""
        if self.head.sampler is None:
            return torch.ones(self.case.num_classes, dtype=torch.bool)
        labels = self.case.all_labels.flatten()
        rows = self.head.sampler.in_play(labels, ClassPartition(self.case.num_classes), step).rows
        assert rows is not None
        return torch.zeros(self.case.num_classes, dtype=torch.bool).index_fill(0, rows, True)

    def step(self, embeddings: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the embeddings); moves everything."""
        labels = self.case.all_labels
        valid = (labels.view(len(labels), -1) >= 0).any(1)
        embeddings = embeddings.clone().requires_grad_()
        if not valid.any():
            return torch.tensor(0.0).double(), torch.zeros_like(embeddings)
        leaves = {"centers": self.centers.clone(), "class bias": self.bias.clone(), **self.learned}
        leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
        loss = self._margin_loss(embeddings, labels, valid, step, leaves)
        for term in self.case.options.get("auxiliaries", ()):
            loss = loss + term.weight * self._auxiliary(term, embeddings[valid], labels[valid])
        loss = loss * self.case.options.get("loss_weight", 1.0)
        gradients = torch.autograd.grad(loss, (embeddings, *leaves.values()), allow_unused=True)
        moved = {
            name: leaf.detach() - (0 if gradient is None else gradient)
            for (name, leaf), gradient in zip(leaves.items(), gradients[1:], strict=True)
        }
        self.centers, self.bias = moved.pop("centers"), moved.pop("class bias")
        self.learned = moved
        self._remember(embeddings.detach(), labels.view(len(labels), -1), step)
        return loss.detach(), gradients[0]

    def _margin_loss(
        self, embeddings: Tensor, labels: Tensor, valid: Tensor, step: int, leaves: Mapping[str, Tensor]
    ) -> Tensor:
        case, in_play = self.case, self.in_play(step)
        renumber = torch.cat([in_play.cumsum(0) - 1, torch.tensor([-1])])
        unique = self._without_repetitions(labels[valid].view(int(valid.sum()), -1))
        number = torch.arange(labels.numel()).view(len(labels), -1)[valid].flatten()
        noise = normal(self.head.seed, 3, step, number).double()
        positive = torch.zeros(case.num_classes, dtype=torch.bool)
        positive[unique[unique >= 0]] = True
        corrected = self.head.sampler is not None and self.head.corrects_sampling
        probability = self.head.sampler.inclusion_probability if corrected else 1.0
        weight = torch.full((case.num_classes,), 1.0 / probability, dtype=torch.float64).masked_fill(positive, 1.0)
        loss, self.state = reference_loss(
            embeddings[valid],
            renumber[unique] if unique.shape[1] > 1 else renumber[unique[:, 0]],
            self._mixed(leaves["centers"], step)[in_play],
            case.margin,
            state=self.state,
            learned={name: leaves[name] for name in self.learned},
            step=step,
            noise_B=noise,
            bias_C=leaves["class bias"][in_play] if case.margin.has_class_bias else None,
            weight_C=weight[in_play],
            interclass_filtering_threshold=case.options.get("interclass_filtering_threshold"),
        )
        return loss

    @staticmethod
    def _without_repetitions(labels: Tensor) -> Tensor:
        rows = [
            [label if label not in row[:place] else -1 for place, label in enumerate(row)] for row in labels.tolist()
        ]
        return torch.tensor(rows)

    def _mixed(self, centers: Tensor, step: int) -> Tensor:
        settings = self.case.options.get("variational")
        if settings is None:
            return centers
        rows = list(F.normalize(centers, dim=-1))
        for label, (seen, embedding) in self.last_seen.items():
            if step >= settings.start_step and step - seen <= settings.max_age:
                rows[label] = (1 - settings.weight) * rows[label] + settings.weight * F.normalize(embedding, dim=0)
        return torch.stack(rows)

    def _auxiliary(self, term: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = F.normalize(embeddings) if getattr(term, "normalize", False) else embeddings
        if isinstance(term, CenterLoss):
            difference = self.own_centers[labels] - embeddings.detach()
            value = 0.5 * (embeddings - self.own_centers[labels]).square().sum(1).mean()
            moved = self.own_centers.clone()
            for label in labels.unique().tolist():
                rows = labels == label
                share = 1 + rows.sum() if term.update == "paper" else len(labels)
                moved[label] -= term.alpha * difference[rows].sum(0) / share
            self.own_centers = moved
            return value
        distance = [
            [(a - b).square().sum().sqrt() if i != j else None for j, b in enumerate(x)] for i, a in enumerate(x)
        ]
        near = [
            [d for j, d in enumerate(row) if d is not None and labels[i] == labels[j]] for i, row in enumerate(distance)
        ]
        far = [[d for j, d in enumerate(row) if labels[i] != labels[j]] for i, row in enumerate(distance)]
        if isinstance(term, ContrastiveLoss):
            kinds = (
                [0.5 * d**2 for row in near for d in row],
                [0.5 * F.relu(term.margin - d) ** 2 for row in far for d in row],
            )
            return sum((torch.stack(kind).mean() for kind in kinds if kind), torch.tensor(0.0).double())
        gaps = [max(a) - min(b) for a, b in zip(near, far, strict=True) if a and b]
        costs = [F.softplus(gap) if term.soft else F.relu(term.margin + gap) for gap in gaps]
        return torch.stack(costs).mean() if costs else 0.0 * x.sum()

    def _remember(self, embeddings: Tensor, labels: Tensor, step: int) -> None:
        for row, embedding in zip(labels.tolist(), embeddings, strict=True):
            self.last_seen |= {label: (step, embedding) for label in row if label >= 0}

    def state_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(of the head, of the oracle), by name."""
        head = self.head
        pairs = {f"state {name}": (head.margin_state[name].double(), self.state[name]) for name in self.state}
        if head.learned is not None:
            got = head.learned.values()
            pairs |= {f"learned {name}": (got[name], value) for name, value in self.learned.items()}
        if head.class_bias is not None:
            pairs["class bias"] = (head.class_bias.read("weight", None)[:, 0, 0], self.bias[self.local])
        for term, sharded in zip(self.case.options.get("auxiliaries", ()), head.auxiliaries, strict=True):
            if isinstance(term, CenterLoss):
                pairs["centers of Center loss"] = (sharded.centers.read("weight", None), self.own_centers[self.local])
        return pairs
