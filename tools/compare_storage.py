"""What the storage format of class centers does to training: loss, direction and length of centers, next to float32.

    OMP_NUM_THREADS=1 python tools/compare_storage.py --json runs/storage.jsonl

Each run trains a linear layer and a `PartialFC` with all classes in play on synthetic identities: an input is the unit
direction of its identity plus noise. A seed chooses identities, noise, order, initial weights and the random bits of
rounding; all formats see the same of it, so that a run differs from the float32 run of its seed by its format alone.

The head has no centers rounded to the nearest 16-bit number. The rows called "nearest" show why: a float32 head whose
centers are rounded to the nearest after each step, while everything else of it, momentum included, stays in float32.

Training amplifies small changes. How far, the row "float32, perturbed" shows: float32 from first centers whose elements
are about 0.1 % off, which is between the spacing of float16 and that of bfloat16. A difference like that one says
nothing about a format.

The table has, for each format:

- loss: of the training batches, which are new in each step, in the mean over the last 100 steps; mean +- sample
  standard deviation over seeds;
- minus float32: the difference of the same seed, mean +- sample standard deviation over seeds;
- in seed spreads: the difference of the means, as a multiple of float32's standard deviation over seeds;
- angle: between the center of a class and that of the float32 run of the same seed, at the end, in degrees; the median
  over classes, in the mean over seeds;
- length: of a center, as a multiple of that in the float32 run of the same seed, likewise. Above 1, decay is lost.

Shapes: B batch, C classes, D embedding dimension.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partialfc import CenterSGD, PartialFC, keyed
from partialfc.head.storage import MomentumDtype
from partialfc.margins import CosFace
from partialfc.optim.schedules import Polynomial, learning_rate_at

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
LAST_STEPS = 100

# What a random number is for, as a word of its key.
_DIRECTION, _LABEL, _NOISE, _LAYER, _PERTURBATION = range(5)


@dataclass(frozen=True)
class Format:
    """How class centers and their momentum are stored.

    Attributes:
        dtype: of the centers of the head.
        momentum_dtype: see `CenterSGD`.
        nearest: to whose nearest number the centers are rounded after each step; None for what the head does.
        perturbation: standard deviation of a relative change of each element of the first centers.
    """

    dtype: torch.dtype = torch.float32
    momentum_dtype: MomentumDtype = "float32"
    nearest: torch.dtype | None = None
    perturbation: float = 0.0


REFERENCE = "float32"
FORMATS = {
    REFERENCE: Format(),
    "float32, perturbed": Format(perturbation=1e-3),
    "float16": Format(torch.float16),
    "bfloat16": Format(torch.bfloat16),
    "float16, bfloat16 momentum": Format(torch.float16, "bfloat16"),
    "float16, int8 momentum": Format(torch.float16, "int8"),
    "float16 nearest": Format(nearest=torch.float16),
    "bfloat16 nearest": Format(nearest=torch.bfloat16),
}
"""The rows of the table."""


@dataclass(frozen=True)
class Budget:
    """What all runs have in common; each field is an option of the command.

    Attributes:
        noise: length of the noise that is added to the direction of an identity, of length 1.
    """

    identities: int = 2000
    embedding_dim: int = 64
    batch_size: int = 32
    steps: int = 2000
    learning_rate: float = 0.1
    noise: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be a positive number")


@dataclass(frozen=True)
class Trained:
    """What is left of a run: the loss of each step, and the class centers [C, D] float32."""

    losses: list[float]
    centers_CD: Tensor

    @property
    def final_loss(self) -> float:
        """The mean over the last steps."""
        return mean(self.losses[-LAST_STEPS:])


@dataclass(frozen=True)
class Result:
    """A line of the file. Angle and length are medians over classes, next to the float32 run of the same seed."""

    format: str
    seed: int
    loss: float
    angle_degrees: float
    length_ratio: float
    seconds: float
    budget: Budget


@dataclass(frozen=True)
class Row:
    """A line of the table, over seeds. Spreads are sample standard deviations, nan for a single seed."""

    format: str
    loss: float
    loss_spread: float
    difference: float
    difference_spread: float
    seed_spreads: float
    angle_degrees: float
    length_ratio: float


def batches(budget: Budget, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step inputs [B, D] float32 and labels [B] int64, a function of seed and step."""
    row_B, column_D = torch.arange(budget.batch_size), torch.arange(budget.embedding_dim)
    identity_C = torch.arange(budget.identities)
    direction_CD = F.normalize(keyed.normal(seed, _DIRECTION, identity_C[:, None], column_D))
    deviation = budget.noise / budget.embedding_dim**0.5
    for step in range(budget.steps):
        label_B = keyed.randint(budget.identities, seed, _LABEL, step, row_B)
        noise_BD = keyed.normal(seed, _NOISE, step, row_B[:, None], column_D)
        yield direction_CD[label_B].add(noise_BD, alpha=deviation).float(), label_B


def build_head(storage: Format, budget: Budget, seed: int) -> PartialFC:
    """The head of a run, in one process, with all classes in play."""
    head = PartialFC(
        budget.identities,
        budget.embedding_dim,
        margin=CosFace(scale=64.0, margin=0.4),
        optimizer=CenterSGD(budget.learning_rate, MOMENTUM, WEIGHT_DECAY, storage.momentum_dtype),
        dtype=storage.dtype,
        seed=seed,
    )
    if storage.perturbation:
        centers_CD = head.gather_class_centers()
        class_C, column_D = torch.arange(budget.identities), torch.arange(budget.embedding_dim)
        change_CD = keyed.normal(seed, _PERTURBATION, class_C[:, None], column_D).mul_(storage.perturbation)
        head.set_class_centers(centers_CD.mul_(1 + change_CD.float()))
    return head


def build_layer(budget: Budget, seed: int) -> nn.Linear:
    """The layer from inputs to embeddings, [D, D], with elements of variance 1 / D."""
    index_D = torch.arange(budget.embedding_dim)
    layer = nn.Linear(budget.embedding_dim, budget.embedding_dim, bias=False)
    with torch.no_grad():
        layer.weight.copy_(keyed.normal(seed, _LAYER, index_D[:, None], index_D) / budget.embedding_dim**0.5)
    return layer


def round_to_nearest_(centers: Tensor, dtype: torch.dtype) -> None:
    """Rounds float32 centers, of any shape, to numbers of `dtype`, which they are then stored in as float32."""
    centers.copy_(centers.to(dtype))


def train(storage: Format, budget: Budget, seed: int) -> Trained:
    """One run: SGD on both sides, the learning rate falling as in the recipes, without warm-up."""
    head, layer = build_head(storage, budget, seed), build_layer(budget, seed)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=budget.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    losses = []
    for step, (input_BD, label_B) in enumerate(batches(budget, seed)):
        rate = learning_rate_at(
            step, base=budget.learning_rate, total_steps=budget.steps, warmup_steps=0, schedule=Polynomial()
        )
        head.learning_rate = optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = head(layer(input_BD), label_B)
        loss.backward()
        optimizer.step()
        if storage.nearest is not None:
            round_to_nearest_(head.class_centers.weight, storage.nearest)
        losses.append(loss.item())
    return Trained(losses, head.gather_class_centers())


def median_angle(centers_CD: Tensor, reference_CD: Tensor) -> float:
    """Degrees between the two centers of a class, the median over classes."""
    # By the chord, as a cosine near 1 has no digits left for a small angle.
    chord_C = (F.normalize(centers_CD.double()) - F.normalize(reference_CD.double())).norm(dim=1)
    return float(chord_C.div(2).clamp(max=1).asin().mul(2).rad2deg().median())


def median_length_ratio(centers_CD: Tensor, reference_CD: Tensor) -> float:
    """Length of a center over that of the reference, the median over classes."""
    return float((centers_CD.double().norm(dim=1) / reference_CD.double().norm(dim=1)).median())


def perform(formats: Sequence[str], seeds: Sequence[int], budget: Budget) -> Iterator[Result]:
    """Makes the runs, seed by seed, and gives each result as it comes. `formats` begins with float32.

    Raises ValueError if a loss is not finite.
    """
    assert formats[0] == REFERENCE, formats
    for seed in seeds:
        reference: Trained | None = None
        for name in formats:
            started = time.perf_counter()
            trained = train(FORMATS[name], budget, seed)
            if not math.isfinite(trained.final_loss):
                raise ValueError(f"{name}, seed {seed}: the loss is not finite; give a smaller --learning-rate")
            reference = reference or trained
            pair = (trained.centers_CD, reference.centers_CD)
            figures = (trained.final_loss, median_angle(*pair), median_length_ratio(*pair))
            yield Result(name, seed, *figures, time.perf_counter() - started, budget)


def summarize(results: Sequence[Result]) -> list[Row]:
    """A row for each format, in the order of the table.

    Raises ValueError if a format lacks a seed that float32 has, or has one that float32 lacks.
    """
    losses = {name: {result.seed: result.loss for result in results if result.format == name} for name in FORMATS}
    reference, rows = losses[REFERENCE], []
    for name, own in losses.items():
        if not own:
            continue
        if own.keys() != reference.keys():
            raise ValueError(f"{name} has seeds {sorted(own)}, but {REFERENCE} has {sorted(reference)}")
        differences = [loss - reference[seed] for seed, loss in own.items()]
        both = mean(own.values()), _spread(own.values()), mean(differences), _spread(differences)
        spread = _spread(reference.values())
        ratio = both[2] / spread if spread else math.nan
        found = [result for result in results if result.format == name]
        angle, length = mean(result.angle_degrees for result in found), mean(result.length_ratio for result in found)
        rows.append(Row(name, *both, ratio, angle, length))
    return rows


def _spread(values: Iterable[float]) -> float:
    known = list(values)
    return stdev(known) if len(known) > 1 else math.nan


def format_table(results: Sequence[Result]) -> str:
    """Markdown, and below it what was run. See `summarize` for errors."""
    heads = ["centers", "loss", "minus float32", "in seed spreads", "angle", "length"]
    table = [heads, ["---", *["---:" for _ in heads[1:]]]]
    for row in summarize(results):
        cells = [row.format, _with_spread(f"{row.loss:.3f}", row.loss_spread)]
        if row.format == REFERENCE:
            cells += ["", "", "", ""]
        else:
            multiple = "-" if math.isnan(row.seed_spreads) else f"{row.seed_spreads:+.2f}"
            difference = _with_spread(f"{row.difference:+.3f}", row.difference_spread)
            cells += [difference, multiple, f"{row.angle_degrees:.2f}", f"{row.length_ratio:.3f}"]
        table.append(cells)
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(results[0].budget).items())
    seeds = ", ".join(map(str, dict.fromkeys(result.seed for result in results)))
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*lines, "", f"Seeds {seeds}; {facts}; {sum(result.seconds for result in results):.0f} s."])


def _with_spread(text: str, spread: float) -> str:
    return text if math.isnan(spread) else f"{text} +- {spread:.3f}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in FORMATS if name != REFERENCE]
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=others, default=others, help=f"rows besides {REFERENCE}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl", help="where a line for each run is written, too")
    for field in dataclasses.fields(Budget):
        default: float = getattr(Budget, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    options.formats = [REFERENCE, *dict.fromkeys(options.only)]
    options.seeds = list(dict.fromkeys(options.seeds))
    try:
        options.budget = Budget(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)})
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs and prints the table."""
    options = _parse(arguments)
    path: Path | None = options.json
    count = len(options.formats) * len(options.seeds)
    results: list[Result] = []
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        started = time.monotonic()
        for result in perform(options.formats, options.seeds, options.budget):
            results.append(result)
            if path is not None:
                with path.open("a") as stream:
                    stream.write(json.dumps(dataclasses.asdict(result)) + "\n")
            left = (time.monotonic() - started) / len(results) * (count - len(results)) / 60
            found = f"loss {result.loss:.3f}, {result.seconds:.0f} s; {left:.1f} minutes left"
            print(f"{len(results)}/{count} {result.format}, seed {result.seed}: {found}", file=sys.stderr, flush=True)
        print(format_table(results))
    except (ValueError, OSError) as error:
        sys.exit(f"compare_storage: {error}")


if __name__ == "__main__":
    main()
