"""The contestants of `bench_head.py`: what makes a training step of a head, or a part of one for scale.

Shapes: B rows of the batch, C classes, n classes in play, c of a chunk, D embedding dimension.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc import PartialFC
from partialfc.head.optimizers import CenterAdagrad, CenterSGD
from partialfc.margins import ArcFace, target_similarity

__all__ = ["CONTESTANTS", "Case", "Clock", "Contestant", "Entry", "PlugConfig", "build", "entry_of"]

MARGIN = ArcFace(scale=64.0, margin=0.5)
OPTIMIZER = CenterSGD(learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
INITIAL_STD = 0.01
EXACT, ROUNDED = 1e-5, 1e-3  # relative differences between losses, in float32 and with 16-bit numbers
FLOOR_CHUNK = 2**16


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

    def phases(self) -> dict[str, float]:
        """Seconds of the last step by phase; empty if it has none."""
        ...


class Clock:
    """Seconds of the phases of a step. On a GPU between events in its stream, so that no phase waits for another."""

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begins a step."""
        self._marks = []
        self.lap("")

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        mark: Any = time.perf_counter()
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def phases(self) -> dict[str, float]:
        """Seconds by phase; on a GPU this waits for the step."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._on_gpu:
            torch.cuda.synchronize()
            return {phase: before.elapsed_time(after) / 1000 for (_, before), (phase, after) in pairs}
        return {phase: after - before for (_, before), (phase, after) in pairs}


class Own:
    """The head of this project, with `options` of `PartialFC`. In backward it updates."""

    def __init__(self, case: Case, centers: Tensor | None, **options: Any) -> None:
        self.clock = Clock(case.device)
        settings: dict[str, Any] = {
            "margin": MARGIN,
            "sample_rate": case.sample_rate,
            "optimizer": OPTIMIZER,
            "init_std": INITIAL_STD,
        }
        self.head = PartialFC(case.classes, case.dim, device=case.device, **(settings | options))
        if centers is not None:
            self.head.set_class_centers(centers)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step."""
        self.clock.start()
        loss: Tensor = self.head(embeddings, labels)
        self.clock.lap("forward")
        loss.backward()
        self.clock.lap("backward")
        return loss.detach()

    def phases(self) -> dict[str, float]:
        """Forward, and backward with the update."""
        return self.clock.phases()


class PlainSoftmax:
    """Cross entropy over all classes, as one writes it first, with `torch.optim.SGD`."""

    def __init__(self, case: Case, centers: Tensor | None) -> None:
        self.case, self.clock = case, Clock(case.device)
        self.weight = nn.Parameter(_centers(case) if centers is None else centers.clone())
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
        self.clock.start()
        loss = self.loss(embeddings, labels)
        self.clock.lap("forward")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.lap("backward")
        return loss.detach()

    def phases(self) -> dict[str, float]:
        """Forward, and backward with the update."""
        return self.clock.phases()


class DensePartial(PlainSoftmax):
    """The usual partial head: it samples logits, and yet the gradient and the update are those of the whole matrix.

    Sampling is a random number for every class and a top-k. The softmax is in separate sweeps, as a head whose classes
    are spread over ranks needs it.
    """

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """[B, D], [B] -> scalar, over the classes in play."""
        weight: Tensor = self.weight
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
        shifted = logits - logits.amax(1, keepdim=True)
        own = shifted.gather(1, labels[:, None])
        probability = shifted.exp_()
        total = probability.sum(1, keepdim=True)
        probability /= total
        ctx.save_for_backward(probability, labels)
        return (total.log() - own).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probability, labels = ctx.saved_tensors
        rows = torch.arange(len(labels), device=labels.device)
        probability[rows, labels] -= 1
        return probability.mul_(gradients[0] / len(labels)), None


class Floor:
    """Logits, gradient of the embeddings, gradient of the class centers in play, and nothing else.

    Into memory that is already there, a chunk of classes at a time, so that it fits whatever the number of classes is.
    """

    def __init__(self, case: Case, centers: Tensor | None, *, dtype: torch.dtype = torch.float32) -> None:
        drawn = _centers(case, case.classes_in_play) if centers is None else centers[: case.classes_in_play]
        self.centers_nD = drawn.to(dtype)
        self.logits_Bc = self.centers_nD.new_empty(case.batch * min(FLOOR_CHUNK, len(self.centers_nD)))
        self.embeddings_gradient_BD = self.centers_nD.new_empty(case.batch, case.dim)
        self.centers_gradient_nD = torch.empty_like(self.centers_nD)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Three matrix products; the loss is 0."""
        with torch.no_grad():
            operand_BD = embeddings.to(self.centers_nD.dtype)
            chunks = zip(self.centers_nD.split(FLOOR_CHUNK), self.centers_gradient_nD.split(FLOOR_CHUNK), strict=True)
            for number, (centers_cD, gradient_cD) in enumerate(chunks):
                logits_Bc = self.logits_Bc[: len(embeddings) * len(centers_cD)].view(len(embeddings), -1)
                torch.mm(operand_BD, centers_cD.T, out=logits_Bc)
                self.embeddings_gradient_BD.addmm_(logits_Bc, centers_cD, beta=1.0 if number else 0.0)
                torch.mm(logits_Bc.T, operand_BD, out=gradient_cD)
        return torch.zeros(())

    def phases(self) -> dict[str, float]:
        """None."""
        return {}


class Copy:
    """A copy of [n, D] float32, to see what memory can do."""

    def __init__(self, case: Case, centers: Tensor | None) -> None:
        self.source_nD = _centers(case, case.classes_in_play) if centers is None else centers[: case.classes_in_play]
        self.target_nD = torch.empty_like(self.source_nD)

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One copy; the loss is 0."""
        self.target_nD.copy_(self.source_nD)
        return torch.zeros(())

    def phases(self) -> dict[str, float]:
        """None."""
        return {}


@dataclass(frozen=True)
class PlugConfig:
    """What the factory of a head from elsewhere is given; names and meanings are those of its protocol.

    Attributes:
        margin: (m1, m2, m3) of cos(m1 theta + m2) - m3.
        dtype: of the operands of matrix products, "fp32".
    """

    num_classes: int
    embedding_size: int
    batch_per_rank: int
    sample_rate: float
    device: torch.device
    rank: int = 0
    world_size: int = 1
    margin: tuple[float, float, float] = (1.0, MARGIN.margin, 0.0)
    scale: float = MARGIN.scale
    optimizer: str = "sgd"
    lr: float = OPTIMIZER.learning_rate
    momentum: float = OPTIMIZER.momentum
    weight_decay: float = OPTIMIZER.weight_decay
    dtype: str = "fp32"
    seed: int = 2048

    @property
    def num_local(self) -> int:
        """Classes of this rank: all."""
        return self.num_classes

    @property
    def class_start(self) -> int:
        """The first class of this rank."""
        return 0


class External:
    """A head from elsewhere, made by `module:factory`; a process group, if it needs one, is the factory's concern.

    Attributes:
        takes_centers: whether it can be given class centers; else it draws its own.
    """

    def __init__(self, case: Case, centers: Tensor | None, *, factory: str) -> None:
        module, _, name = factory.partition(":")
        config = PlugConfig(case.classes, case.dim, case.batch, case.sample_rate, torch.device(case.device))
        self.plug = getattr(importlib.import_module(module), name)(config)
        self.takes_centers = hasattr(self.plug, "load_full_weight")
        if centers is not None and self.takes_centers:
            self.plug.load_full_weight(centers.clone())

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step."""
        return torch.as_tensor(self.plug.step(embeddings, labels)).detach()

    def phases(self) -> dict[str, float]:
        """Its own, if it has any."""
        return dict(self.plug.phases()) if hasattr(self.plug, "phases") else {}


@dataclass(frozen=True)
class Entry:
    """How a contestant is made, and in what it must agree with `plain`.

    Attributes:
        make: from a case and class centers [C, D], which it does not change; from None, it draws its own.
        is_head: whether it does all that a head does, so that its losses and its peak memory mean something.
        compared_losses: of how many steps at sample rate 1; those after the first depend on the update too.
        tolerance: the largest relative difference.
    """

    make: Callable[[Case, Tensor | None], Contestant]
    is_head: bool = True
    compared_losses: int = 3
    tolerance: float = EXACT


_IN_16_BITS: dict[str, Any] = {"matmul_dtype": torch.bfloat16, "dtype": torch.float16}
_BFLOAT16_MOMENTUM = replace(OPTIMIZER, momentum_dtype="bfloat16")
_ADAGRAD = CenterAdagrad(learning_rate=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)

CONTESTANTS: dict[str, Entry] = {
    "fused": Entry(Own),
    "fused_bf16": Entry(partial(Own, matmul_dtype=torch.bfloat16), tolerance=ROUNDED),
    "fused_16bit": Entry(partial(Own, optimizer=_BFLOAT16_MOMENTUM, **_IN_16_BITS), tolerance=ROUNDED),
    "fused_adagrad": Entry(partial(Own, optimizer=_ADAGRAD, **_IN_16_BITS), compared_losses=1, tolerance=ROUNDED),
    "autograd": Entry(partial(Own, fused=False)),
    "plain": Entry(PlainSoftmax),
    "dense": Entry(DensePartial),
    "floor": Entry(Floor, is_head=False),
    "floor_bf16": Entry(partial(Floor, dtype=torch.bfloat16), is_head=False),
    "copy": Entry(Copy, is_head=False),
}
"""By name."""


def entry_of(name: str) -> Entry:
    """The entry of a name; `module:factory` stands for a head from elsewhere.

    Such a head is compared in its first loss alone: it may train with another gradient of the margin.

    Raises:
        ValueError: if there is no such contestant.
    """
    if ":" in name:
        return Entry(partial(External, factory=name), compared_losses=1, tolerance=ROUNDED)
    if name not in CONTESTANTS:
        raise ValueError(f"contestant {name!r} is unknown; there are {', '.join(CONTESTANTS)}, and --external ones")
    return CONTESTANTS[name]


def build(case: Case, name: str, centers: Tensor | None = None) -> Contestant:
    """A contestant with these class centers [C, D], or with some of its own."""
    return entry_of(name).make(case, centers)


def _centers(case: Case, count: int | None = None) -> Tensor:
    shape = (case.classes if count is None else count, case.dim)
    return torch.empty(shape, device=case.device).normal_(std=INITIAL_STD)


def _logits(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[B, n] scaled cosines, with the margin on the own class."""
    cosine = F.normalize(embeddings) @ F.normalize(weight).T
    own = cosine.gather(1, labels[:, None])
    return MARGIN.scale * cosine.scatter(1, labels[:, None], target_similarity(MARGIN, own, {}))
