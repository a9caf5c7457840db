"""How cheap loading is: CPU time per image of every loader against others and the bare decoder, measured in one run.

Each contestant runs in a process of its own, again and again in turns, over the same data set in the page cache; what
is counted is the CPU time of that process and all of its children, without start-up. Wall-clock time depends on what
else a machine does; CPU time is what a loader takes away from training.

    python tools/bench_data.py                       a table of CPU time per image
    python tools/bench_data.py --cold                reading from a disk that is not cached, against reading in sequence
    python tools/bench_data.py --index 42000000      opening a large index, and the first batch far inside of it
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench_data_contestants import CONTESTANTS, Case, run_contestant

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a markdown table, or JSON."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        if options.index:
            rows = _index_rows(Path(directory), options.index)
        elif options.cold:
            rows = _cold_rows(Path(directory), options)
        else:
            rows = _loader_rows(Path(directory), options)
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    return 0


def _loader_rows(directory: Path, options: argparse.Namespace) -> list[dict[str, float | str]]:
    from partialfc.data import synthesize

    identities = max(2, options.images // 8)
    synthesize(directory / "set", identities=identities, images_per_identity=8, seed=0, image_size=options.image_size)
    case = Case(directory / "set" / "train", options.image_size, options.batch, options.workers)
    names = [name for name in CONTESTANTS if not options.only or name in options.only]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with _fresh_processes() as pool:
        for repetition in range(options.repetitions):
            for name in names:
                print(f"repetition {repetition + 1} of {options.repetitions}: {name}", file=sys.stderr)
                found[name].append(pool.submit(run_contestant, name, case).result())
    cpu = {name: statistics.median(1e6 * seconds for seconds, _ in runs) for name, runs in found.items()}
    base = cpu[names[0]]
    return [
        {
            "loader": name,
            "CPU us per image": cpu[name],
            "least": min(1e6 * seconds for seconds, _ in found[name]),
            f"against {names[0]}": cpu[name] / base,
            "images/s": statistics.median(rate for _, rate in found[name]),
        }
        for name in names
    ]


def _cold_rows(directory: Path, options: argparse.Namespace) -> list[dict[str, float | str]]:
    from bench_data_storage import READERS, make_cold_set, read_cold

    split = make_cold_set(directory / "set" / "train", megabytes=options.megabytes)
    found: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(options.repetitions):
        for name in READERS:
            found[name].append(read_cold(name, split))
    first = statistics.median(found["sequential"])
    return [
        {
            "reader": name,
            "MB/s": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "against sequential": statistics.median(rates) / first,
        }
        for name, rates in found.items()
    ]


def _index_rows(directory: Path, samples: int) -> list[dict[str, float | str]]:
    from bench_data_storage import make_large_index, measure_index

    split = make_large_index(directory / "train", samples=samples, classes=max(1, samples // 10))
    with _fresh_processes() as pool:
        return [{"what": name, "value": value} for name, value in pool.submit(measure_index, split).result().items()]


def _fresh_processes() -> ProcessPoolExecutor:
    """A new process for each task."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1, help="loader processes, where a loader has them")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS), help="contestants to run")
    parser.add_argument("--cold", action="store_true", help="measure reading from a disk that is not cached")
    parser.add_argument("--megabytes", type=int, default=1024, help="of the cold set")
    parser.add_argument("--index", type=int, default=None, metavar="SAMPLES", help="measure opening a large index")
    parser.add_argument("--directory", type=Path, default=None, help="where to make the data; default: the usual one")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
