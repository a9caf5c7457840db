"""Every loss on the embedded data, with the same budget: accuracy on unseen identities, with and without sampling.

    python tools/compare_losses.py --out runs/losses.jsonl --workers 2
    python tools/compare_losses.py --table runs/losses.jsonl > losses.md

Each run is a whole `partialfc train` in one thread, on the same synthetic identities; a seed chooses initial weights,
order of images, sampled classes and verification pairs. A line of JSON is written as a run ends. Started again, the
command makes the runs that the file lacks, and refuses if their settings are no longer those of the file.

Backbone, data, learning rates and schedule are the same for all, and no loss is tuned. Settings are those of the papers
except for the ones that `ENTRIES` spells out, which the table repeats:

- a scale of 64 is meant for 100,000 identities and more; here, with 1,000, 64 is 24 as in configs/quickstart.yaml;
- variational prototypes start early, for a run has hundreds of steps.

The embedding has 512 elements, as in the papers: its batch norm gives it a norm near sqrt(512) = 23, which is what the
norms in the settings of MagFace and AdaFace are made for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

from partialfc.config import Config
from partialfc.data.synthesis import synthesize
from partialfc.telemetry import METRICS_FILE, read_metrics
from partialfc.train import DivergedError, train

FAR = 1e-3
UNTRAINED = "(untrained)"
DATA_FIELDS = ("identities", "images_per_identity", "image_size", "verification_identities")

_COSFACE: dict[str, Any] = {"name": "CosFace", "scale": 24.0}
_ARCFACE: dict[str, Any] = {"name": "ArcFace", "scale": 24.0}
_FNORM = {"margin": 1.7, "lambda_start": 0.0, "lambda_min": 0.0, "gradient": "detached"}

ENTRIES: dict[str, dict[str, Any]] = {
    UNTRAINED: {"margin": _COSFACE},
    "Softmax": {"margin": {"name": "Softmax"}},
    "NormFace": {"margin": {"name": "NormFace", "scale": 24.0}},
    "NormFace, learned scale": {"margin": {"name": "NormFace", "scale": 24.0, "learned": True}},
    "SphereFace": {"margin": {"name": "SphereFace"}},
    "FNormSphereFace": {"margin": {"name": "FNormSphereFace", "scale": 24.0, **_FNORM}},
    "CosFace": {"margin": _COSFACE},
    "CosFace + CenterLoss": {"margin": _COSFACE, "auxiliaries": [{"name": "CenterLoss", "weight": 0.003}]},
    "ArcFace": {"margin": _ARCFACE},
    "Sub-center ArcFace": {"margin": _ARCFACE, "num_subcenters": 3},
    "ArcFace, variational": {"margin": _ARCFACE, "variational": {"start_step": 100}},
    "CombinedMargin": {"margin": {"name": "CombinedMargin", "scale": 24.0}},
    "CircleLoss": {"margin": {"name": "CircleLoss"}},
    "MagFace": {"margin": {"name": "MagFace", "scale": 24.0}},
    "AdaFace": {"margin": {"name": "AdaFace", "scale": 24.0}},
    "CurricularFace": {"margin": {"name": "CurricularFace", "scale": 24.0}},
    "ElasticFace": {"margin": {"name": "ElasticFace", "scale": 24.0}},
    "ElasticFace+": {"margin": {"name": "ElasticFace", "scale": 24.0, "sort": True}},
    "AdaCos": {"margin": {"name": "AdaCos"}},
    "SphereFace2": {"margin": {"name": "SphereFace2"}},
    "UniFace": {"margin": {"name": "UniFace", "scale": 24.0}},
}
"""The `head` section of each row of the table."""


@dataclass(frozen=True)
class Budget:
    """What all runs have in common; each field is an option of the command."""

    identities: int = 1000
    images_per_identity: int = 20
    verification_identities: int = 200
    images: int = 32_000
    image_size: int = 32
    width: int = 8
    embedding_dim: int = 512
    batch_size: int = 64
    learning_rate: float = 0.1
    num_pairs: int = 20_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be positive")


@dataclass(frozen=True)
class Run:
    """One row of the table, trained once."""

    entry: str
    seed: int
    sample_rate: float

    def __str__(self) -> str:
        return f"{self.entry}, seed {self.seed}, sample rate {self.sample_rate:g}"


@dataclass(frozen=True)
class Result(Run):
    """A line of the file. Figures are None if the run has diverged; the loss is also None if nothing was trained."""

    accuracy: float | None
    tar: float | None
    loss: float | None
    seconds: float
    settings: str
    settings_hash: str
    budget: Budget

    @property
    def run(self) -> Run:
        """Which run it is the result of."""
        return Run(self.entry, self.seed, self.sample_rate)


def build_config(run: Run, budget: Budget, *, data: Path, directory: Path) -> Config:
    """The configuration of a run. Raises ValueError if a setting is not allowed."""
    untrained = run.entry == UNTRAINED  # one step must be made, but the figures are those before it
    num_images = budget.identities * budget.images_per_identity
    optimizer = {"name": "sgd", "learning_rate": budget.learning_rate}
    values = {
        "run": {"directory": directory, "seed": run.seed, "device": "cpu", "log_every_steps": 50},
        "data": {
            "directory": data,
            "image_size": budget.image_size,
            "augmentation": {"horizontal_flip": 0.0},
            "num_workers": 0,
        },
        "backbone": {"name": "iresnet10", "embedding_dim": budget.embedding_dim, "options": {"width": budget.width}},
        "head": {**ENTRIES[run.entry], "sample_rate": run.sample_rate, "init_std": 0.02, "optimizer": optimizer},
        "optimizer": optimizer,
        "training": {
            "epochs": (budget.batch_size if untrained else budget.images) / num_images,
            "warmup_epochs": 0.05 * budget.images / num_images,
            "global_batch_size": budget.batch_size,
            "schedule": {"name": "polynomial", "power": 1.0},
        },
        "evaluation": {"at_start": untrained, "num_pairs": budget.num_pairs, "far": FAR},
    }
    return Config.model_validate(values)


def describe(entry: str) -> str:
    """What of the `head` section is not the default, as it stands in a configuration file."""
    return yaml.safe_dump(ENTRIES[entry], default_flow_style=True, sort_keys=False, width=1000).strip()[1:-1]


def settings_hash(run: Run, budget: Budget) -> str:
    """The same for runs that are the same but for the seed."""
    config = build_config(run, budget, data=Path("data"), directory=Path("run"))
    # Keys that a later version adds change nothing; settings of the loss count even if not given.
    values = config.model_dump(mode="json", exclude={"run"}, exclude_unset=True)
    return hashlib.sha256(json.dumps([values, vars(budget)], sort_keys=True).encode()).hexdigest()[:12]


def perform(run: Run, budget: Budget, data: Path, log: Path) -> Result:
    """Trains and evaluates. What the trainer has to say goes to the end of the file `log`."""
    started = time.perf_counter()
    accuracy = tar = loss = None
    with tempfile.TemporaryDirectory() as folder, log.open("a") as stream, contextlib.redirect_stderr(stream):
        print(f"{run}:", file=stream, flush=True)
        try:
            trained = train(build_config(run, budget, data=data, directory=Path(folder)))
        except DivergedError as error:
            print(f"diverged: {error}", file=stream)
        else:
            found = trained.verifications["untrained" if run.entry == UNTRAINED else "trained"].result
            accuracy, tar = found.accuracy, found.tar_at_far[FAR]
            if run.entry != UNTRAINED:
                loss = [line["loss"] for line in read_metrics(Path(folder) / METRICS_FILE) if "loss" in line][-1]
    figures = (accuracy, tar, loss, time.perf_counter() - started)
    settings = (describe(run.entry), settings_hash(run, budget), budget)
    return Result(run.entry, run.seed, run.sample_rate, *figures, *settings)


def read_results(path: Path, *, repair: bool = False) -> list[Result]:
    """The lines of a file but one that is not finished; `repair` cuts that off, so that others may follow.

    Raises ValueError if another line is none of this command's, or a run comes twice.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        print(f"{path}: the last line is not finished and is left out", file=sys.stderr)
        if repair:
            os.truncate(path, len(whole))
    results: dict[Run, Result] = {}
    for number, line in enumerate(whole.decode().splitlines(), start=1):
        try:
            values = json.loads(line)
            result = Result(**{**values, "budget": Budget(**values["budget"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}, is no result of this command: {error}; remove it") from error
        if result.run in results:
            raise ValueError(f"{path}, line {number}: {result.run} is there already; remove one of the lines")
        results[result.run] = result
    return list(results.values())


def missing_runs(wanted: Sequence[Run], done: Iterable[Result], budget: Budget, path: Path) -> list[Run]:
    """The runs that are not done yet.

    Raises ValueError if a result in the file is of another budget, or is wanted with other settings.
    """
    found = {result.run: result for result in done}
    for run, result in found.items():
        before, now = vars(result.budget), vars(budget)
        changes = [f"{name} {before[name]}, now {now[name]}" for name in before if before[name] != now[name]]
        if not changes and run in wanted and result.settings_hash != settings_hash(run, budget):
            changes = [f"{result.settings}, now {describe(run.entry)}, or other defaults of partialfc"]
        if changes:
            raise ValueError(
                f"{path} has {run}, made with other settings ({'; '.join(changes)}; hash {result.settings_hash}); "
                "give another --out, or the settings of the file"
            )
    return [run for run in wanted if run not in found]


def format_table(results: Sequence[Result]) -> str:
    """Markdown: accuracy and TAR of each entry and sample rate, mean and sample standard deviation over seeds.

    Raises ValueError if there are no results, or they are of different budgets.
    """
    budgets = {result.budget for result in results}
    if len(budgets) != 1:
        raise ValueError(f"a table needs results of one budget, but there are {len(budgets)}")
    names = list(dict.fromkeys([*ENTRIES, *(result.entry for result in results)]))
    rates = sorted({result.sample_rate for result in results}, reverse=True)
    heads = [f"{figure}, rate {rate:g}" for rate in rates for figure in ("accuracy", f"TAR@FAR={FAR:g}")]
    rows = [["loss", *heads, "settings"], ["---", *["---:" for _ in heads], "---"]]
    for name in names:
        own = [result for result in results if result.entry == name]
        if own:
            cells = [[result for result in own if result.sample_rate == rate] for rate in rates]
            figures = [text for cell in cells for text in (_spread(cell, "accuracy"), _spread(cell, "tar"))]
            rows.append([name, *figures, f"`{own[0].settings}`"])
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in dataclasses.asdict(*budgets).items())
    seeds = ", ".join(map(str, sorted({result.seed for result in results})))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"Mean +- standard deviation over seeds {seeds}. Budget: {facts}."])


def _spread(results: Sequence[Result], name: str) -> str:
    values = [value for result in results if (value := getattr(result, name)) is not None]
    text = f"{mean(values):.3f}" if values else "-"
    if len(values) > 1:
        text += f" +- {stdev(values):.3f}"
    diverged = len(results) - len(values)
    return f"{text} ({diverged} of {len(results)} diverged)" if diverged else text


def perform_all(runs: Sequence[Run], budget: Budget, *, data: Path, out: Path, pool: Executor) -> None:
    """Makes the runs, adds each result to the file `out` as it comes, and prints a line for it."""
    started = time.monotonic()
    log = out.with_suffix(".log")
    pending = [pool.submit(perform, run, budget, data, log) for run in runs]
    try:
        for count, future in enumerate(as_completed(pending), start=1):
            result = future.result()
            with out.open("a") as stream:
                stream.write(json.dumps(dataclasses.asdict(result)) + "\n")
            found = "diverged" if result.accuracy is None else f"accuracy {result.accuracy:.4f}, TAR {result.tar:.4f}"
            left = (time.monotonic() - started) / count * (len(runs) - count) / 60
            found += f", {result.seconds:.0f} s; {left:.1f} minutes left"
            print(f"{count}/{len(runs)} {result}: {found}", file=sys.stderr, flush=True)
    finally:  # After an error or an interruption, what has not begun shall not.
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker whose command was killed would go on for hours and tell nobody.
    threading.Thread(target=lambda: os._exit(len(wait([parent.sentinel]))), daemon=True).start()


def prepare_data(budget: Budget, folder: Path) -> Path:
    """The data set of the budget under `folder`, made if it is not there."""
    sizes = {name: getattr(budget, name) for name in DATA_FIELDS}
    data = folder / "-".join(map(str, sizes.values()))
    if not data.is_dir():
        print(f"making {data}", file=sys.stderr, flush=True)
        synthesize(data, seed=0, **sizes)
    return data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where results go, and are looked for")
    task.add_argument("--table", type=Path, metavar="FILE.jsonl", help="only print the table of these results")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ENTRIES), default=list(ENTRIES), help="rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each with one thread")
    parser.add_argument("--data", type=Path, default=Path("data/compare_losses"), help="where the data set is made")
    for field in dataclasses.fields(Budget):
        default: float = getattr(Budget, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}, but must be at least 1")
    # A seed after the other, so that there soon is a table of one.
    seeds, rates = dict.fromkeys(options.seeds), dict.fromkeys(options.rates)
    options.runs = [Run(entry, seed, rate) for seed in seeds for entry in dict.fromkeys(options.only) for rate in rates]
    try:
        options.budget = Budget(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)})
        for run in options.runs:
            settings_hash(run, options.budget)  # builds the configuration
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing and prints the table."""
    options = _parse(arguments)
    path: Path = options.table or options.out
    try:
        if options.out is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            done = read_results(path, repair=True) if path.is_file() else []
            runs = missing_runs(options.runs, done, options.budget, path)
            print(f"{len(options.runs) - len(runs)} of {len(options.runs)} runs are done", file=sys.stderr)
            if runs:
                data = prepare_data(options.budget, options.data)
                with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
                    perform_all(runs, options.budget, data=data, out=path, pool=pool)
        print(format_table(read_results(path)))
    except (ValueError, OSError) as error:
        sys.exit(f"compare_losses: {error}")


if __name__ == "__main__":
    main()
