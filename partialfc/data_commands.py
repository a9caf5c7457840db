"""The commands `partialfc data ...`: data sets made, looked at, checked and rearranged."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_data_commands"]


class _progress:  # noqa: N801
    """A progress bar behind the callback (done, total) that the data functions call."""

    def __init__(self, description: str, *, unit: str = "images") -> None:
        self._description, self._unit = description, unit

    def __enter__(self) -> Callable[[int, int], None]:
        from partialfc.telemetry import ProgressBar

        self._bar: ProgressBar | None = None

        def report(done: int, total: int) -> None:
            if self._bar is None:
                self._bar = ProgressBar(total, description=self._description, unit=self._unit)
            self._bar.update(done - self._bar.count)

        return report

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _synthesize(options: argparse.Namespace) -> None:
    from partialfc.data import stats, synthesize

    with _progress("synthesize") as report:
        synthesize(
            options.out,
            identities=options.identities,
            images_per_identity=options.images_per_identity,
            seed=options.seed,
            image_size=options.image_size,
            difficulty=options.difficulty,
            verification_identities=options.verification_identities,
            on_progress=report,
        )
    print(stats(options.out))


def _pack(options: argparse.Namespace) -> None:
    from partialfc.data import open_source, pack

    source = open_source(
        options.source, root=options.root, image_column=options.image_column, label_column=options.label_column
    )
    with _progress("pack") as report:
        result = pack(
            source,
            options.out,
            verification_share=options.verification_share,
            seed=options.seed,
            image_size=options.image_size,
            on_progress=report,
            **_packing(options),
        )
    print(result)


def _index(options: argparse.Namespace) -> None:
    from partialfc.data import index_tars

    with _progress("index", unit="data shards") as report:
        result = index_tars(
            options.tars,
            options.out,
            num_workers=options.num_workers,
            decode=options.decode,
            remap=options.remap,
            dry_run=options.dry_run,
            on_progress=report,
        )
    print(result)


def _merge(options: argparse.Namespace) -> None:
    from partialfc.data import merge

    with _progress("merge") as report:
        result = merge(options.splits, options.out, disjoint=options.disjoint, on_progress=report, **_packing(options))
    print(result)


def _split(options: argparse.Namespace) -> None:
    from partialfc.data import split

    with _progress("split") as report:
        result = split(
            options.split, options.out, share=options.share, seed=options.seed, on_progress=report, **_packing(options)
        )
    print(result)


def _dedup(options: argparse.Namespace) -> None:
    from partialfc.data import dedup

    with _progress("dedup") as report:
        result = dedup(
            options.split,
            options.out,
            method=options.method,
            max_distance=options.max_distance,
            on_progress=report,
            **_packing(options),
        )
    print(result)


def _export(options: argparse.Namespace) -> None:
    from partialfc.data import export_folder, export_records

    export = {"folder": export_folder, "rec": export_records}[options.format]
    with _progress("export") as report:
        result = export(options.split, options.out, on_progress=report)
    print(result)


def _stats(options: argparse.Namespace) -> None:
    from partialfc.data import stats

    print(stats(options.directory))


def _verify(options: argparse.Namespace) -> None:
    from partialfc.data import DataError, verify

    with _progress("verify") as report:
        result = verify(options.split, num_threads=options.threads, decode=options.decode, on_progress=report)
    print(result)
    if not result.ok:
        raise DataError(f"{options.split}: the data set is damaged, as listed above")


def _sample_grid(options: argparse.Namespace) -> None:
    from partialfc.data import sample_grid

    bad = sample_grid(
        options.split,
        options.out,
        identities=options.identities,
        images_per_identity=options.images_per_identity,
        seed=options.seed,
        image_size=options.image_size,
    )
    for sample in bad:
        print(sample.message)
    print(options.out)


def _packing(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "samples_per_shard": options.samples_per_shard,
        "num_workers": options.num_workers,
        "dry_run": options.dry_run,
    }


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """Adds the commands to the parser of `partialfc data`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_making(commands)
    _add_looking(commands)
    _add_rearranging(commands)


def _add_making(commands: Any) -> None:
    synthesize = commands.add_parser("synthesize", help="generate identities that nobody has")
    synthesize.add_argument("--identities", type=int, required=True, help="identities to train on")
    synthesize.add_argument("--images-per-identity", type=int, required=True)
    synthesize.add_argument("--verification-identities", type=int, default=0, help="identities set aside")
    synthesize.add_argument("--seed", type=int, default=0)
    synthesize.add_argument("--image-size", type=int, default=112, help="in pixels")
    synthesize.add_argument("--difficulty", type=float, default=0.5, help="how much views differ, in [0, 1]")
    _add_out(synthesize)
    synthesize.set_defaults(command=_synthesize)

    pack = commands.add_parser("pack", help="pack images of any source into tar shards")
    pack.add_argument(
        "source", type=Path, help="a folder of identity folders, train.rec, a list, a Parquet file, an LMDB, a split"
    )
    pack.add_argument("--root", type=Path, default=None, help="of the relative paths of a list; default: its folder")
    pack.add_argument("--image-column", default=None, help="of a Parquet file; default: the usual names")
    pack.add_argument("--label-column", default=None, help="of a Parquet file; default: the usual names")
    pack.add_argument("--verification-share", type=float, default=0.0, help="share of identities set aside")
    pack.add_argument("--image-size", type=int, default=None, help="resize to this many pixels; default: keep")
    pack.add_argument("--seed", type=int, default=0, help="chooses the identities set aside")
    _add_packing(pack)
    pack.set_defaults(command=_pack)

    index = commands.add_parser("index", help="make a split of tars that lie somewhere already, without copying them")
    index.add_argument("tars", nargs="+", help="paths, patterns such as 'set/{0000..0099}.tar' or '*.tar', or URLs")
    index.add_argument("--no-decode", dest="decode", action="store_false", help="do not try to decode each image")
    index.add_argument("--remap", action="store_true", help="number labels that have gaps anew")
    index.add_argument("--num-workers", type=int, default=0, help="processes that read")
    index.add_argument("--dry-run", action="store_true", help="only say what would be done")
    _add_out(index)
    index.set_defaults(command=_index)


def _add_looking(commands: Any) -> None:
    stats = commands.add_parser("stats", help="print counts, sizes and labels of a data set")
    stats.add_argument("directory", type=Path)
    stats.set_defaults(command=_stats)

    verify = commands.add_parser("verify", help="read every byte of a split and name each damaged sample")
    verify.add_argument("split", type=Path)
    verify.add_argument("--threads", type=int, default=4)
    verify.add_argument("--decode", action="store_true", help="also decode each image")
    verify.set_defaults(command=_verify)

    grid = commands.add_parser("sample-grid", help="draw a picture of some identities, one in each row")
    grid.add_argument("split", type=Path)
    grid.add_argument("out", type=Path, help="a .png file")
    grid.add_argument("--identities", type=int, default=8)
    grid.add_argument("--images-per-identity", type=int, default=8)
    grid.add_argument("--image-size", type=int, default=112, help="of a tile, in pixels")
    grid.add_argument("--seed", type=int, default=0, help="chooses identities and images")
    grid.set_defaults(command=_sample_grid)


def _add_rearranging(commands: Any) -> None:
    merge = commands.add_parser("merge", help="make one split of several")
    merge.add_argument("splits", type=Path, nargs="+")
    merge.add_argument("--disjoint", action="store_true", help="equal names in different splits are different people")
    _add_packing(merge)
    merge.set_defaults(command=_merge)

    split = commands.add_parser("split", help="set identities of a split aside for verification")
    split.add_argument("split", type=Path)
    split.add_argument("--share", type=float, required=True, help="of the identities, in (0, 1)")
    split.add_argument("--seed", type=int, default=0, help="chooses the identities set aside")
    _add_packing(split)
    split.set_defaults(command=_split)

    dedup = commands.add_parser("dedup", help="leave duplicates out, and list those that have two labels")
    dedup.add_argument("split", type=Path)
    dedup.add_argument("--method", choices=["bytes", "perceptual"], default="bytes")
    dedup.add_argument("--max-distance", type=int, default=3, help="bits in which two pictures may differ; perceptual")
    _add_packing(dedup)
    dedup.set_defaults(command=_dedup)

    export = commands.add_parser("export", help="write a split as a folder of identity folders, or as train.rec")
    export.add_argument("split", type=Path)
    export.add_argument("--format", choices=["folder", "rec"], required=True)
    _add_out(export)
    export.set_defaults(command=_export)


def _add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read, decode and write")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    _add_out(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
