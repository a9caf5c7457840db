"""Step time and peak memory of the head beside what it replaces, as ratios from one run.

    python tools/bench_head.py
    python tools/bench_head.py --device cuda --classes 1000000 --batch 1024 --json head.json

The first takes a few minutes on two CPU cores. The machine needs about 40 KB of memory for each class.

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

# Memory fresh from the kernel costs page faults at every step, which a GPU's caching allocator spares. So for times,
# glibc shall keep what it has; for peak memory it must not.
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
    """Cross entropy over all classes, as one writes it first. `centers` [C, D] become its parameter."""

    def __init__(self, case: Case, centers: Tensor) -> None:
        self.case = case
        self.weight = nn.Parameter(centers)
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


def build_all(case: Case) -> dict[str, Contestant]:
    """The contestants, all with the same class centers."""
    own = Own(case)
    centers = own.head.class_centers.select(None)[:, 0]
    return {
        "ours": own,
        "plain": PlainSoftmax(case, centers.clone()),
        "dense": DensePartial(case, centers.clone()),
        "floor": Floor(case, centers),
    }


def build_one(case: Case, name: str) -> Contestant:
    """A contestant that has to itself what it needs, for measuring its memory."""
    if name == "ours":
        return Own(case)
    makers: dict[str, type[PlainSoftmax]] = {"plain": PlainSoftmax, "dense": DensePartial}
    return makers[name](case, torch.empty(case.classes, case.dim, device=case.device).normal_(std=0.01))


def draw_batch(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D] that require a gradient, and labels [B]."""
    generator = torch.Generator().manual_seed(number)
    embeddings = torch.randn(case.batch, case.dim, generator=generator).to(case.device)
    return embeddings.requires_grad_(), torch.randint(case.classes, (case.batch,), generator=generator).to(case.device)


def check_parity(case: Case) -> float:
    """The largest relative difference between the losses of three steps at sample rate 1.

    The later losses depend on the updates before them, so they compare gradients and optimizers too.

    Raises:
        RuntimeError: if it is more than `PARITY_TOLERANCE`.
    """
    case = Case(min(case.classes, 2000), case.dim, case.batch, 1.0, case.device)
    contestants = build_all(case)
    del contestants["floor"]
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
    contestants = build_all(case)
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP_STEPS + repeats):
        first = number % len(names)  # The order goes round, so that nobody always starts.
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
    """Peak memory of a contestant with its class centers and their momentum, over what the process held before.

    To be called in a fresh process: the peak of resident memory cannot be taken back.
    """
    small = Case(min(case.classes, 300), case.dim, case.batch, case.sample_rate, case.device)
    build_one(small, name).step(*draw_batch(small, 0))  # Libraries allocate their workspaces at first use.
    base = _peak_bytes(case)
    contestant = build_one(case, name)
    for number in range(2):
        contestant.step(*draw_batch(case, number))
    return _peak_bytes(case) - base


def _synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(case: Case) -> int:
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_fresh_process(function: Callable[..., Result], *arguments: Any, environment: Mapping[str, str]) -> Result:
    """What `function` returns in a new interpreter whose environment has these variables besides."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Ratio:
    """Of paired figures: the median of their ratios, the lowest and the highest."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}-{self.high:.2f})"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratios repeat by repeat; what slows the machine down for a while slows both figures of a pair."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Outcome:
    """What was measured of a case, by contestant; `load_average` is that of the minute before."""

    case: Case
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    load_average: float

    def __str__(self) -> str:
        case = self.case
        lines = [
            f"C={case.classes:,} D={case.dim} B={case.batch} sample rate {case.sample_rate:g} "
            f"(n={case.classes_in_play:,}), load average before {self.load_average:.1f}",
            f"{'':6}{'ms/step':>9}  {'time / ours':<19}{'time / floor':<19}{'peak MiB':>9}  peak / ours",
        ]
        for name, seconds in self.seconds.items():
            line = (
                f"{name:6}{1000 * median(seconds):9.1f}  {paired_ratio(seconds, self.seconds['ours'])!s:<19}"
                f"{paired_ratio(seconds, self.seconds['floor'])!s:<19}"
            )
            if name in self.peak_bytes:
                peak = self.peak_bytes[name]
                ours = self.peak_bytes["ours"]
                # A small case may fit into memory that the process held already.
                line += f"{peak / 2**20:9.0f}  {f'{peak / ours:.2f}' if ours else '-'}"
            lines.append(line.rstrip())
        return "\n".join(lines)


def measure(case: Case, repeats: int) -> Outcome:
    """Times and peak memory of a case."""
    load_average = os.getloadavg()[0]
    seconds = in_fresh_process(measure_seconds, case, repeats, environment=WARM_HEAP)
    peaks = {
        name: in_fresh_process(measure_peak_bytes, case, name, environment={}) for name in seconds if name != "floor"
    }
    return Outcome(case, seconds, peaks, load_average)


def machine(device: str) -> str:
    """Hardware, threads, torch and commit, in a line."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 250_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sample-rate", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every measured figure to this file")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, but must be at least 1")
    try:
        options.cases = [
            Case(classes, options.dim, options.batch, sample_rate, options.device)
            for classes in options.classes
            for sample_rate in options.sample_rate
        ]
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, measures and prints."""
    options = _parse(arguments)
    about = machine(options.device)
    print(about)
    parity = in_fresh_process(check_parity, options.cases[0], environment={})
    print(f"ours, plain and dense agree in three losses at sample rate 1 to {parity:.1e}", flush=True)
    outcomes = []
    for case in options.cases:
        outcomes.append(measure(case, options.repeats))
        print(f"\n{outcomes[-1]}", flush=True)
    if options.json is not None:
        record = {"machine": about, "parity": parity, "cases": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
