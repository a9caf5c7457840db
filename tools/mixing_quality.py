"""How well the plan mixes a set that was stored identity by identity, and how long it takes to evaluate.

    python tools/mixing_quality.py

prints two tables for the documentation, in less than a minute on one core.

The first counts the different identities in the batches of one epoch: in those of a rank (512 images), and in the
global ones of 8 ranks (4,096). The set has 20 images of each identity, one identity after the other, in data shards of
10,000. "by lane" are the slices that ranks get in training: the global batch sorted by lane, then cut (`RankSteps`).
"consecutive" are slices that were not sorted, for comparison. A global batch is the same either way. A full shuffle is
one lane and one window over everything, which leaves no read near another.

The second is the time to evaluate the default plan of a large set in data shards of 10,000: at one position at random
within an epoch, at the first position of an epoch that was not touched before, and for the batch of a rank, by lane.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from partialfc.data.plan import RankSteps, SamplePlan
from partialfc.keyed import randint

IMAGES_PER_IDENTITY = 20
IMAGES_PER_SHARD = 10_000
RANKS, RANK_BATCH = 8, 512
RANK_GOAL, GLOBAL_GOAL = 470, 3800
DEFAULT_LANES, DEFAULT_WINDOW = 64, 65536
LAYOUTS = [(1, 10_000), (1, 65536), (8, 10_000), (8, 65536), (64, 4096), (64, 16384)]
TIMED_CALLS = 200

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """Different identities in batches: the fewest, and the mean."""

    fewest: int
    mean: float

    def __str__(self) -> str:
        return f"{self.fewest:,} / {self.mean:,.1f}"


def count_distinct(identity_nb: Tensor) -> Counts:
    """Counts within each row of [n, b] int64."""
    sorted_nb = identity_nb.sort(1).values
    number_n = 1 + (sorted_nb.diff(dim=1) != 0).sum(1)
    return Counts(int(number_n.min()), float(number_n.double().mean()))


def shards_of(images: int) -> list[int]:
    """Images of each data shard."""
    full, rest = divmod(images, IMAGES_PER_SHARD)
    return [IMAGES_PER_SHARD] * full + ([rest] if rest else [])


def steps_of(plan: SamplePlan, *, world_size: int) -> RankSteps:
    """The whole batches of an epoch, as the first of some ranks holds them."""
    global_batch = RANKS * RANK_BATCH
    return RankSteps(
        plan=plan,
        global_batch=global_batch,
        rank=0,
        world_size=world_size,
        consumed=0,
        num_batches=plan.num_samples // global_batch,
    )


def batches(plan: SamplePlan, *, by_lane: bool) -> Tensor:
    """[steps, global batch] identities of the whole batches of an epoch, the slices of the ranks in their order."""
    steps = steps_of(plan, world_size=1)
    if by_lane:
        ids = torch.stack([steps.draws(step).ids for step in range(len(steps))])
    else:
        ids = plan.draw(torch.arange(len(steps) * steps.global_batch)).ids.view(-1, steps.global_batch)
    return ids // IMAGES_PER_IDENTITY


def mixing_rows(images: int) -> Iterator[str]:
    """The lines of the first table."""
    yield "| lanes | window | slices of ranks | rank batch: fewest / mean | global batch: fewest / mean |"
    yield "|---|---|---|---|---|"
    full_shuffle = (1, images)
    for lanes, window in [full_shuffle, *LAYOUTS, (DEFAULT_LANES, DEFAULT_WINDOW)]:
        plan = SamplePlan(shards_of(images), seed=0, lanes=lanes, window=window)
        for by_lane in [False] if lanes == 1 else [False, True]:
            identities = batches(plan, by_lane=by_lane)
            in_ranks, in_all = count_distinct(identities.view(-1, RANK_BATCH)), count_distinct(identities)
            name = f"{window:,}"
            if (lanes, window) == full_shuffle:
                name = "all (full shuffle)"
            elif (lanes, window) == (DEFAULT_LANES, DEFAULT_WINDOW):
                name += " (default)"
            yield f"| {lanes} | {name} | {'by lane' if by_lane else 'consecutive'} | {in_ranks} | {in_all} |"


def milliseconds(function: Callable[[T], object], inputs: Iterable[T]) -> list[float]:
    """Time of each call."""
    times = []
    for value in inputs:
        start = time.perf_counter()
        function(value)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def timing_rows(images: int) -> Iterator[str]:
    """The lines of the second table."""
    plan = SamplePlan(shards_of(images), seed=0)
    steps = steps_of(plan, world_size=RANKS)
    plan.draw(torch.tensor([0]))  # What the first call ever costs is not the plan's.
    number = torch.arange(TIMED_CALLS)
    yield f"| {images:,} images | median ms | slowest ms |"
    yield "|---|---|---|"
    for name, times in [
        ("one position", milliseconds(plan.draw, randint(images, 1, number).view(-1, 1))),
        ("one position, first of its epoch", milliseconds(plan.draw, ((number + 1) * images).view(-1, 1))),
        (f"a batch of {RANK_BATCH}", milliseconds(steps.draws, randint(len(steps), 2, number).tolist())),
    ]:
        yield f"| {name} | {median(times):.3f} | {max(times):.3f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000_000, help="of the first table (default: %(default)s)")
    parser.add_argument("--timed-images", type=int, default=100_000_000, help="of the second (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("images", "timed_images"):
        if getattr(options, name) < RANKS * RANK_BATCH:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least a global batch, "
                f"{RANKS * RANK_BATCH}"
            )
    torch.set_num_threads(1)
    print(f"{options.images:,} images, {IMAGES_PER_IDENTITY} of each identity, sorted by identity:\n")
    print(*mixing_rows(options.images), sep="\n", flush=True)
    print(f"\nGoals for 2,000,000 images: at least {RANK_GOAL} and {GLOBAL_GOAL:,}.\n")
    print(*timing_rows(options.timed_images), sep="\n")


if __name__ == "__main__":
    main()
