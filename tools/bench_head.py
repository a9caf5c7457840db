"""Step time and peak memory of the head beside what it replaces, as ratios from one run.

    python tools/bench_head.py
    python tools/bench_head.py --device cuda --classes 1000000 --batch 1024 --apart --json head.jsonl

The first takes some minutes on two CPU cores. A machine needs about 6 KB of memory for each class and contestant of 512
dimensions, in all of them at once, unless `--apart` is given.

Every head does a whole step: loss, gradient of the embeddings, update of the class centers (SGD with momentum).

    fused          `PartialFC` of this project, in float32
    fused_bf16     with bfloat16 operands of the matrix products
    fused_16bit    with class centers in float16 and momentum in bfloat16 besides
    fused_adagrad  with class centers in float16, and row-wise Adagrad instead of momentum
    autograd       `PartialFC` with fused=False: gradients from autograd
    plain          a full softmax over all classes, whatever the sample rate: one [C, D] parameter, `torch.optim.SGD`
    dense          the usual partial head: sampled logits, but a gradient and an update of all [C, D]
    floor          no head: the three matrix products over the classes in play that an exact softmax needs, in float32
    floor_bf16     the same in bfloat16
    copy           no head: a copy of the float32 class centers in play, for scale
    module:factory a head from elsewhere, named by `--external`; see `External` in `bench_contestants.py`

The contestants take turns in one process, so a ratio is taken between steps that ran back to back, and the median of
those is reported with the lowest and highest. Peak memory is that of a fresh process for each head, over what the
process held before: resident memory on a CPU, allocated memory on a GPU. Before anything is measured, the heads must
agree in their losses at sample rate 1: those in float32 with the same optimizer in three steps to 1e-5, those with
numbers of 16 bits to 1e-3, those with another optimizer or from elsewhere in the first step alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_contestants import CONTESTANTS, Case, entry_of
from bench_measuring import WARM_HEAP, Timing, check_parity, in_fresh_process, measure_peak_bytes, measure_seconds

FLOORS = ("floor", "floor_bf16")


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
    """What was measured of a case.

    Attributes:
        baseline: the contestant that the others are compared with.
        rounds: the contestants that took turns in one process, with their times.
        peak_bytes: of each head; None if it did not fit.
        load_average: that of the minute before.
    """

    case: Case
    baseline: str
    rounds: list[dict[str, Timing]]
    peak_bytes: dict[str, int | None]
    load_average: float

    @property
    def names(self) -> list[str]:
        """Of all contestants, each once."""
        return list(dict.fromkeys(name for timings in self.rounds for name in timings))

    def timing(self, name: str) -> Timing:
        """Of a contestant, in the first round that has it."""
        return next(timings[name] for timings in self.rounds if name in timings)

    def ratio(self, above: str, below: str) -> Ratio | None:
        """Time of one over time of another, from the first round that has both; None if one did not fit."""
        for timings in self.rounds:
            if above in timings and below in timings and timings[above].seconds and timings[below].seconds:
                return paired_ratio(timings[above].seconds, timings[below].seconds)
        return None

    def throughput(self, name: str) -> str:
        """What a contestant does that is no head, per second; empty for a head."""
        numbers = self.case.classes_in_play * self.case.dim
        seconds = self.timing(name).seconds
        if name in FLOORS and seconds:
            return f"{6 * numbers * self.case.batch / median(seconds) / 1e12:.3g} TFLOP/s"
        if name == "copy" and seconds:
            return f"{2 * 4 * numbers / median(seconds) / 1e9:.3g} GB/s"
        return ""

    def record(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        contestants = {}
        for name in self.names:
            ratio = self.ratio(name, self.baseline)
            shares = {floor: self.ratio(floor, name) for floor in FLOORS if floor in self.names}
            contestants[name] = {
                **asdict(self.timing(name)),
                "peak_bytes": self.peak_bytes.get(name),
                "time_over_baseline": ratio and asdict(ratio),
                "share": {floor: share and share.middle for floor, share in shares.items()},
            }
        about = {"case": asdict(self.case), "baseline": self.baseline, "load_average": self.load_average}
        return {**about, "contestants": contestants}

    def __str__(self) -> str:
        case = self.case
        title = (
            f"C={case.classes:,} D={case.dim} B={case.batch} sample rate {case.sample_rate:g} "
            f"(n={case.classes_in_play:,}), load average before {self.load_average:.1f}"
        )
        floors = [floor for floor in FLOORS if floor in self.names]
        head = [
            "",
            "ms/step",
            "forward",
            "backward",
            f"time / {self.baseline}",
            *(f"{floor} / time" for floor in floors),
        ]
        rows = [[*head, "peak MiB", "bytes/class", ""], *(self._row(name, floors) for name in self.names)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([title, *(line.rstrip() for line in lines)])

    def _row(self, name: str, floors: Sequence[str]) -> list[str]:
        timing = self.timing(name)
        phases = [timing.phases.get(phase) for phase in ("forward", "backward")]
        ratio, shares = self.ratio(name, self.baseline), [self.ratio(floor, name) for floor in floors]
        peak = ["", ""]
        if name in self.peak_bytes:
            found = self.peak_bytes[name]
            peak = ["no room", ""] if found is None else [f"{found / 2**20:.0f}", f"{found / self.case.classes:.0f}"]
        return [
            name,
            f"{1000 * median(timing.seconds):.1f}" if timing.seconds else "no room",
            *(f"{1000 * median(seconds):.1f}" if seconds else "-" for seconds in phases),
            "-" if ratio is None else str(ratio),
            *("-" if share is None else f"{share.middle:.2f}" for share in shares),
            *peak,
            self.throughput(name),
        ]


def measure(case: Case, names: Sequence[str], *, baseline: str, repeats: int, warmup: int, apart: bool) -> Outcome:
    """Times and peak memory of a case; with `apart`, each contestant takes turns with baseline and floors alone."""
    load_average = os.getloadavg()[0]
    fixed = [name for name in names if name == baseline or not entry_of(name).is_head]
    groups = [[*fixed, name] for name in names if name not in fixed] if apart else []
    rounds = [
        in_fresh_process(measure_seconds, case, group, repeats, warmup, environment=WARM_HEAP)
        for group in groups or [list(names)]
    ]
    heads = [name for name in names if entry_of(name).is_head]
    peaks = {name: in_fresh_process(measure_peak_bytes, case, name, environment={}) for name in heads}
    return Outcome(case, baseline, rounds, peaks, load_average)


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
    parser.add_argument("--contestants", nargs="*", default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--external", nargs="+", default=[], metavar="MODULE:FACTORY", help="heads from elsewhere")
    parser.add_argument(
        "--baseline", default="floor", metavar="NAME", help="what times are divided by; always measured"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps of each contestant before those that count")
    parser.add_argument("--apart", action="store_true", help="time each head in a process with the baseline alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append every measured figure, one line for each case")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, but must be at least 1")
    if options.warmup < 0:
        parser.error(f"--warmup is {options.warmup}, but must not be negative")
    for spec in options.external:
        if not all(spec.partition(":")):
            parser.error(f"--external is {spec}, but must be module:factory")
    options.names = list(dict.fromkeys([*options.contestants, *options.external, options.baseline]))
    try:
        for name in options.names:
            entry_of(name)
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
    sys.path.append(os.getcwd())  # where an external head may be
    about = {"machine": machine(options.device), "date": datetime.date.today().isoformat()}
    print(f"{about['machine']}, {about['date']}")
    parity = in_fresh_process(check_parity, options.cases[0], options.names, environment={})
    agreeing = ", ".join(f"{name} {difference:.1e}" for name, difference in parity.items())
    print(f"largest difference from the losses of plain at sample rate 1: {agreeing or 'no head'}", flush=True)
    for case in options.cases:
        outcome = measure(
            case,
            options.names,
            baseline=options.baseline,
            repeats=options.repeats,
            warmup=options.warmup,
            apart=options.apart,
        )
        print(f"\n{outcome}", flush=True)
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**about, "parity": parity, **outcome.record()}) + "\n")


if __name__ == "__main__":
    main()
