"""How `bench_head.py` measures: steps taken in turns, peak memory in fresh processes, losses compared beforehand."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from bench_contestants import INITIAL_STD, Case, Contestant, External, build, entry_of
from torch import Tensor

__all__ = ["Timing", "check_parity", "draw_batch", "measure_peak_bytes", "measure_seconds"]

Result = TypeVar("Result")

REFERENCE = "plain"
PARITY_CLASSES = 2000

# Memory fresh from the kernel costs page faults at every step, which a GPU's caching allocator spares. So for times,
# glibc shall keep what it has; for peak memory it must not.
WARM_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**12),
    "MALLOC_TOP_PAD_": str(2**29),
}


@dataclass
class Timing:
    """Seconds of each measured step, whole and by phase; nothing if the contestant ran out of a GPU's memory."""

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, phases: Mapping[str, float]) -> None:
        """Notes a step."""
        self.seconds.append(seconds)
        for name, part in phases.items():
            self.phases.setdefault(name, []).append(part)


def draw_batch(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D] that require a gradient, and labels [B]."""
    generator = torch.Generator().manual_seed(number)
    embeddings = torch.randn(case.batch, case.dim, generator=generator).to(case.device)
    return embeddings.requires_grad_(), torch.randint(case.classes, (case.batch,), generator=generator).to(case.device)


def check_parity(case: Case, names: Sequence[str]) -> dict[str, float]:
    """By contestant, the largest relative difference from the losses of `plain`, in steps at sample rate 1.

    The later losses depend on the updates before them, so they compare gradients and optimizers too. Contestants that
    are no heads, or cannot be given class centers, are left out.

    Raises:
        RuntimeError: if one is more than that contestant's tolerance.
    """
    case = replace(case, classes=min(case.classes, PARITY_CLASSES), sample_rate=1.0)
    generator = torch.Generator().manual_seed(0)
    centers = INITIAL_STD * torch.randn(case.classes, case.dim, generator=generator).to(case.device)
    expected = _losses(case, build(case, REFERENCE, centers), 3)
    differences: dict[str, float] = {}
    for name in names:
        entry = entry_of(name)
        if name == REFERENCE or not entry.is_head:
            continue
        contestant = build(case, name, centers)
        if isinstance(contestant, External) and not contestant.takes_centers:
            continue
        differences[name] = 0.0
        for number, loss in enumerate(_losses(case, contestant, entry.compared_losses)):
            difference = abs(loss - expected[number]) / abs(expected[number])
            if not difference <= entry.tolerance:
                raise RuntimeError(
                    f"{name} differs from {REFERENCE} by {difference:.1e} in the loss of step {number + 1}, "
                    f"{loss} and {expected[number]}; {entry.tolerance:.0e} is allowed"
                )
            differences[name] = max(differences[name], difference)
    return differences


def _losses(case: Case, contestant: Contestant, count: int) -> list[float]:
    return [float(contestant.step(*draw_batch(case, number))) for number in range(count)]


def measure_seconds(case: Case, names: Sequence[str], repeats: int, warmup: int) -> dict[str, Timing]:
    """`repeats` steps of each contestant, taken in turns after `warmup` others."""
    timings = {name: Timing() for name in names}
    contestants: dict[str, Contestant] = {}
    for name in names:
        contestant = _unless_out_of_memory(build, case, name)
        if contestant is not None:
            contestants[name] = contestant
    contestant = None
    for number in range(warmup + repeats):
        order = list(contestants)
        first = number % max(1, len(order))  # The order goes round, so that nobody always starts.
        for name in order[first:] + order[:first]:
            step = _unless_out_of_memory(_timed_step, case, contestants[name], number)
            if step is None:
                del contestants[name]
                timings[name] = Timing()
                _release_memory()
            elif number >= warmup:
                timings[name].add(*step)
    return timings


def _timed_step(case: Case, contestant: Contestant, number: int) -> tuple[float, dict[str, float]]:
    embeddings, labels = draw_batch(case, number)
    _synchronize(case)
    started = time.perf_counter()
    contestant.step(embeddings, labels)
    _synchronize(case)
    return time.perf_counter() - started, contestant.phases()


def measure_peak_bytes(case: Case, name: str) -> int | None:
    """Peak memory of a contestant with its class centers and its optimizer, over what the process held before.

    To be called in a fresh process: the peak of resident memory cannot be taken back. None if a GPU has too little.
    """
    return _unless_out_of_memory(_peak_over_base, case, name)


def _peak_over_base(case: Case, name: str) -> int:
    small = replace(case, classes=min(case.classes, 300))
    build(small, name).step(*draw_batch(small, 0))  # Libraries allocate their workspaces at first use.
    base = _peak_bytes(case)
    contestant = build(case, name)
    for number in range(2):
        contestant.step(*draw_batch(case, number))
    return _peak_bytes(case) - base


def _unless_out_of_memory(function: Callable[..., Result], *arguments: Any) -> Result | None:
    """What `function` returns; None, with its memory free again, if a GPU had too little of it."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        pass  # The exception holds on to what its frames had until here.
    _release_memory()
    return None


def _release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


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
