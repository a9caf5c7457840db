"""Step time and peak memory of the head beside what it replaces, as ratios from one run.

    python tools/bench_head.py                                        # about two minutes on two CPU cores
    python tools/bench_head.py --device cuda --classes 1000000 --batch 1024 --json head.json

Every contestant does a whole step: loss, gradient of the embeddings, update of the class centers (SGD with momentum).

    ours    `PartialFC` of this project
    plain   a full softmax over all classes, whatever the sample rate: one [C, D] parameter, `torch.optim.SGD`
    dense   the usual partial head: sampled logits, but a gradient and an update of all [C, D]
    floor   no head: the three matrix products over the classes in play that an exact softmax needs

The contestants take turns in one process, so a ratio is taken between steps that ran back to back, and the median of
those is reported with the lowest and highest. Peak memory is that of a fresh process for each of them, over what the
process held before: resident memory on a CPU, allocated memory on a GPU. Before anything is measured, `ours`, `plain`
and `dense` must agree in three losses at sample rate 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc import CenterSGD, PartialFC
from partialfc.margins import ArcFace, target_similarity

Result = TypeVar("Result")

MARGIN = ArcFace(scale=64.0, margin=0.5)
OPTIMIZER = CenterSGD(learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
PARITY_TOLERANCE = 1e-5
WARMUP_STEPS = 2

# Large blocks fresh from the kernel cost page faults at every step, which a GPU's caching allocator does not have: for
# times, glibc shall keep what it has. For peak memory it must not.
WARM_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**12),
    "MALLOC_TOP_PAD_": str(2**29),
}


@dataclass(frozen=True)
class Case:
    """What is measured: C classes, embeddings [batch, dim] and the share of the classes in play."""

    classes: int
    dim: int
    batch: int
    sample_rate: float
    device: str

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"--sample-rate is {self.sample_rate}, but must be in (0, 1]")

    @property
    def classes_in_play(self) -> int:
        """n, the classes of a step."""
        return max(round(self.sample_rate * self.classes), min(self.batch, self.classes))


class Contestant(Protocol):
    """Something that makes training steps."""

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch [B, D], [B]; leaves its gradient in `embeddings.grad` and updates the centers."""
        ...


class Own:
    """The head of this project."""

    def __init__(self, case: Case) -> None:
        self.head = PartialFC(
            case.classes,
            case.dim,
            margin=MARGIN,
            sample_rate=case.sample_rate,
            optimizer=OPTIMIZER,
            device=case.device,
        )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step."""
        loss: Tensor = self.head(embeddings, labels)
        loss.backward()
        return loss.detach()


class PlainSoftmax:
    """Cross entropy over all classes, as one writes it first."""

    def __init__(self, case: Case, centers: Tensor) -> None:
        self.case = case
        self.weight = nn.Parameter(centers.clone())
        self.optimizer = torch.optim.SGD(
            [self.weight],
            lr=OPTIMIZER.learning_rate,
            momentum=OPTIMIZER.momentum,
            weight_decay=OPTIMIZER.weight_decay,
        )

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """[B, D], [B] -> scalar."""
        return F.cross_entropy(_logits(embeddings, self.weight, labels), labels)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step."""
        loss = self.loss(embeddings, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class DensePartial(PlainSoftmax):
    """The usual partial head: it samples logits, and yet the gradient and the update are those of the whole matrix.

    Sampling is a random number for every class and a top-k. The softmax is in separate sweeps, as a head whose classes
    are spread over ranks needs it.
    """

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """[B, D], [B] -> scalar, over the classes in play."""
        weight = self.weight
        if self.case.sample_rate < 1:
            score = torch.rand(self.case.classes, device=labels.device)
            score[labels] = 2.0
            rows = score.topk(self.case.classes_in_play).indices.sort().values
            weight, labels = weight[rows], torch.searchsorted(rows, labels)
        loss: Tensor = _SweptCrossEntropy.apply(_logits(embeddings, weight, labels), labels)
        return loss


class _SweptCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        probability = (logits - logits.amax(1, keepdim=True)).exp_()
        probability /= probability.sum(1, keepdim=True)
        ctx.save_for_backward(probability, labels)
        return -probability.gather(1, labels[:, None]).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probability, labels = ctx.saved_tensors
        rows = torch.arange(len(labels), device=labels.device)
        probability[rows, labels] -= 1
        return probability.mul_(gradients[0] / len(labels)), None


class Floor:
    """Logits, gradient of the embeddings, gradient of the class centers in play; into memory that is already there."""

    def __init__(self, case: Case, centers: Tensor) -> None:
        self.centers = centers[: case.classes_in_play]
        self.logits = centers.new_empty(case.batch, len(self.centers))
        self.embeddings_gradient = centers.new_empty(case.batch, case.dim)
        self.centers_gradient = torch.empty_like(self.centers)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Three matrix products."""
        with torch.no_grad():
            torch.mm(embeddings, self.centers.T, out=self.logits)
            torch.mm(self.logits, self.centers, out=self.embeddings_gradient)
            torch.mm(self.logits.T, embeddings, out=self.centers_gradient)
        return torch.zeros(())


def _logits(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[B, n] scaled cosines, with the margin on the own class."""
    cosine = F.normalize(embeddings) @ F.normalize(weight).T
    own = cosine.gather(1, labels[:, None])
    return MARGIN.scale * cosine.scatter(1, labels[:, None], target_similarity(MARGIN, own, {}))


def build(case: Case, names: Sequence[str]) -> dict[str, Contestant]:
    """The contestants, all with the same class centers."""
    own = Own(case)
    centers = own.head.class_centers.select(None)
    makers: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: own,
        "plain": lambda: PlainSoftmax(case, centers),
        "dense": lambda: DensePartial(case, centers),
        "floor": lambda: Floor(case, centers),
    }
    return {name: makers[name]() for name in names}


def draw_batch(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D] that require a gradient, and labels [B]."""
    generator = torch.Generator().manual_seed(number)
    embeddings = torch.randn(case.batch, case.dim, generator=generator).to(case.device)
    return embeddings.requires_grad_(), torch.randint(case.classes, (case.batch,), generator=generator).to(case.device)


def check_parity(case: Case) -> float:
    """The largest relative difference between the losses of three steps at sample rate 1.

    Later losses depend on the updates before them, so they compare gradients and optimizers too.

    Raises:
        RuntimeError: if it is more than `PARITY_TOLERANCE`.
    """
    case = Case(min(case.classes, 2000), case.dim, case.batch, 1.0, case.device)
    contestants = build(case, ("ours", "plain", "dense"))
    worst = 0.0
    for number in range(3):
        losses = {name: float(entry.step(*draw_batch(case, number))) for name, entry in contestants.items()}
        difference = (max(losses.values()) - min(losses.values())) / losses["plain"]
        if not difference <= PARITY_TOLERANCE:
            raise RuntimeError(f"the contestants differ by {difference:.1e} in the loss of step {number + 1}: {losses}")
        worst = max(worst, difference)
    return worst


def measure_seconds(case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step for each contestant, `repeats` of them, taken in turns."""
    contestants = build(case, ("ours", "plain", "dense", "floor"))
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP_STEPS + repeats):
        first = number % len(names)  # Nobody shall always follow the same one.
        for name in names[first:] + names[:first]:
            embeddings, labels = draw_batch(case, number)
            _synchronize(case)
            started = time.perf_counter()
            contestants[name].step(embeddings, labels)
            _synchronize(case)
            if number >= WARMUP_STEPS:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def measure_peak_bytes(case: Case, name: str) -> int:
    """Peak memory of `name`, its class centers and optimizer state included, over what the process holds before.

    To be called in a fresh process: resident memory has no reset.
    """
    small = Case(min(case.classes, 300), case.dim, case.batch, case.sample_rate, case.device)
    build(small, [name])[name].step(*draw_batch(small, 0))  # Libraries allocate their workspaces at first use.
    base = _peak_bytes(case.device, reset=True)
    contestant: Contestant = Own(case) if name == "ours" else _alone(case, name)
    for number in range(2):
        contestant.step(*draw_batch(case, number))
    return _peak_bytes(case.device) - base


def _alone(case: Case, name: str) -> Contestant:
    """A baseline without a copy of the class centers beside its own."""
    makers = {"plain": PlainSoftmax, "dense": DensePartial}
    contestant = makers[name](Case(1, case.dim, case.batch, 1.0, case.device), torch.empty(0, device=case.device))
    contestant.case = case
    contestant.weight = nn.Parameter(torch.randn(case.classes, case.dim, device=case.device).mul_(0.01))
    contestant.optimizer.param_groups[0]["params"] = [contestant.weight]
    return contestant


def _synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
