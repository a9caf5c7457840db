"""Indexes data shards where they lie: tars that others wrote, or a split of ours that was copied elsewhere."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from partialfc.data.parallel import run_tasks
from partialfc.data.piece_cache import PIECE_BYTES, CacheSettings
from partialfc.data.remote import is_url
from partialfc.data.split_format import (
    BESIDE_MANIFEST,
    INDEX,
    MANIFEST,
    check_split,
    read_manifest,
    record_type,
    write_split_files,
)
from partialfc.data.storage import open_storage
from partialfc.data.tar_samples import IndexProblem, TarContent, TarTask, read_tar
from partialfc.data.tar_scan import SequentialFile
from partialfc.data.writer import check_target, staged_directory

__all__ = ["IndexReport", "index_tars"]

_MOST_LISTED = 20


@dataclass(frozen=True)
class IndexReport:
    """What `index_tars` found.

    Attributes:
        num_samples: samples in the index.
        num_classes: identities.
        num_shards: data shards.
        image_bytes: bytes of the images.
        labels_in_shards: whether the .cls members of the tars hold the labels of the index.
        empty_shards: tars without a usable sample.
        problems: samples that were left out.
    """

    num_samples: int
    num_classes: int
    num_shards: int
    image_bytes: int
    labels_in_shards: bool
    empty_shards: tuple[str, ...]
    problems: tuple[IndexProblem, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.num_samples:,} images of {self.num_classes:,} identities in {self.num_shards:,} data shards, "
            f"{self.image_bytes:,} bytes"
        ]
        if not self.labels_in_shards:
            lines.append("the .cls members of the tars do not hold these labels, so data.exact=false is refused")
        if self.empty_shards:
            lines.append(f"data shards without a usable sample: {len(self.empty_shards):,}")
            lines += [f"  {path}" for path in self.empty_shards]
        lines.append(f"left out: {len(self.problems):,} samples")
        lines += [f"  {count:,} x {reason}" for reason, count in Counter(p.reason for p in self.problems).most_common()]
        lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines)


def index_tars(
    tars: str | Sequence[str],
    out: str | Path,
    *,
    num_workers: int = 0,
    decode: bool = True,
    remap: bool = False,
    dry_run: bool = False,
    cache: CacheSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> IndexReport:
    """Writes an index for tars, which stay where they are, into the folder `out`: a split to train on.

    Samples are what WebDataset makes of the tars. Each needs one image, and a label: a .cls with a number or a name,
    or a .json with "label", "cls" or "identity". A .json may also give "weight" and "quality". Samples that lack
    something, have a key that the tar had before, or cannot be decoded, are left out and listed.

    A folder or URL that holds a split of ours is attached as it is, without reading its images; its fingerprint stays.

    Args:
        tars: paths, URLs, patterns (`*`, `?`) or braces (`{000000..000127}`) of tars, folders of tars, or one split.
        out: folder to make; it must be missing or empty, and is only there once it is complete.
        num_workers: processes that read tars; 0 reads them in this one.
        decode: whether to decode each image; otherwise images that cannot be decoded are only noticed in training.
        remap: whether to number the labels anew where they have gaps or are names.
        dry_run: whether to write nothing.
        cache: tries and waits for URLs.
        on_progress: called as on_progress(tars done, tars in all).

    Raises:
        FileNotFoundError: if there is no such tar.
        FileExistsError: if `out` is there and not an empty folder.
        ValueError: for damaged tars (the message lists all of them), labels with gaps or names without `remap`, or
            no usable sample.
        DataError: if a store cannot be reached, or a worker process dies.
    """
    out = check_target(out)
    settings = cache or CacheSettings()
    given = [tars] if isinstance(tars, str) else [str(tar) for tar in tars]
    if len(given) == 1 and _is_split(given[0]):
        return _attach(given[0], out, dry_run=dry_run, settings=settings)
    paths = _expand(given)
    tasks = [TarTask(path, decode, settings) for path in paths]
    contents = []
    for content in run_tasks(read_tar, tasks, num_workers=num_workers):
        contents.append(content)
        if on_progress is not None:
            on_progress(len(contents), len(paths))
    records, names, renumbered = _join(contents, remap)
    labels_in_shards = not (renumbered or any(content.labels_from_json for content in contents))
    if not dry_run:
        with staged_directory(out) as staging:
            shards = [
                {"name": content.path, "bytes": content.num_bytes, "num_samples": len(content.records)}
                for content in contents
            ]
            write_split_files(staging, records, label_names=names, shards=shards, labels_in_shards=labels_in_shards)
    return _report(contents, records, num_classes=len(names), labels_in_shards=labels_in_shards)


def _report(
    contents: Sequence[TarContent], records: np.ndarray, *, num_classes: int, labels_in_shards: bool
) -> IndexReport:
    return IndexReport(
        num_samples=len(records),
        num_classes=num_classes,
        num_shards=len(contents),
        image_bytes=int(records["size"].sum(dtype=np.int64)),
        labels_in_shards=labels_in_shards,
        empty_shards=tuple(content.path for content in contents if len(content.records) == 0),
        problems=tuple(problem for content in contents for problem in content.problems),
    )


def _expand(given: Sequence[str]) -> list[str]:
    """The tars that are meant, local ones as absolute paths."""
    paths: list[str] = []
    for pattern in (expanded for text in given for expanded in braceexpand(os.path.expanduser(text))):
        if is_url(pattern):
            paths.append(pattern)
            continue
        if os.path.isdir(pattern):
            found = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
        else:
            found = sorted(glob.glob(pattern)) or [pattern]
        missing = [path for path in found if not os.path.isfile(path)]
        if missing or not found:
            raise FileNotFoundError(
                f"{pattern}: no such tar; expected tars, a folder of *.tar, a pattern such as 'faces-*.tar', or URLs"
            )
        paths += [os.path.abspath(path) for path in found]
    # By way of a symbolic link a tar has two names.
    tars = [path if is_url(path) else os.path.realpath(path) for path in paths]
    twice = [path for path, count in Counter(tars).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: named {tars.count(twice[0])} times; name each tar once")
    if not paths:
        raise ValueError("index_tars: no tar is named")
    open_storage(paths, [0] * len(paths))  # Refuses a mixture of files and URLs.
    return paths


def _join(contents: Sequence[TarContent], remap: bool) -> tuple[np.ndarray, list[str], bool]:
    """The records of all tars, the names of the labels, and whether labels were renumbered."""
    damaged = [content.error for content in contents if content.error]
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(contents)} tars cannot be indexed, nothing was written:\n  " + "\n  ".join(damaged)
        )
    problems = [problem for content in contents for problem in content.problems]
    texts = sorted({text for content in contents for text in content.labels})
    if not texts:
        listed = "".join(f"\n  {problem}" for problem in problems[:_MOST_LISTED])
        raise ValueError(
            f"{contents[0].path}: no usable sample in {len(contents)} tars, {len(problems)} left out{listed}"
        )
    numbers, names, renumbered = _number_labels(texts, remap, len(problems))
    joined = np.concatenate([content.records for content in contents])
    start = 0
    for content in contents:
        own = np.array([numbers[text] for text in content.labels], dtype=np.int64)
        stop = start + len(content.records)
        joined["label"][start:stop] = own[joined["label"][start:stop]]
        start = stop
    return _drop_missing(joined), names, renumbered


def _number_labels(texts: Sequence[str], remap: bool, num_problems: int) -> tuple[dict[str, int], list[str], bool]:
    """The label of each text, the name of each label, and whether labels are other numbers than in the tars."""
    if all(text.isascii() and text.removeprefix("-").isdigit() for text in texts):
        values = {text: int(text) for text in texts}
        found = sorted(set(values.values()))
        if found[0] == 0 and found[-1] == len(found) - 1:
            return values, [str(value) for value in found], False
        gaps = next((place for place, value in enumerate(found) if place != value), len(found))
        hint = (
            f"the {len(found)} labels in the tars go from {found[0]} to {found[-1]}: of 0 to {found[-1]}, "
            f"{found[-1] + 1 - sum(value >= 0 for value in found)} have no sample, first {gaps}"
        )
        if not remap:
            raise ValueError(
                f"{hint} ({num_problems} samples were left out); pass --remap to number them 0 to {len(found) - 1}"
            )
        places = {value: place for place, value in enumerate(found)}
        return {text: places[value] for text, value in values.items()}, [str(value) for value in found], True
    if not remap:
        name = next(text for text in texts if not text.removeprefix("-").isdigit())
        raise ValueError(
            f"labels in the tars are names, such as {name!r}; pass --remap to number the {len(texts)} of them in the "
            "order of the names"
        )
    return {text: place for place, text in enumerate(texts)}, list(texts), True


def _drop_missing(records: np.ndarray) -> np.ndarray:
    """Without the weights or the quality that no sample has; a weight that is missing is 1."""
    has = {name: ~np.isnan(records[name]) for name in ("weight", "quality")}
    if has["quality"].any() and not has["quality"].all():
        raise ValueError(
            f"{int((~has['quality']).sum())} of {len(records)} samples have no quality, but others do; give it to all "
            "of them, or to none"
        )
    records["weight"][~has["weight"]] = 1.0
    kind = record_type(weight=bool(has["weight"].any()), quality=bool(has["quality"].any()))
    kept = np.empty(len(records), kind)
    for name in kind.names or ():
        kept[name] = records[name]
    return kept


def _is_split(location: str) -> bool:
    # A store has no folders; what is not named like a tar must be a split.
    return ".tar" not in location if is_url(location) else os.path.isfile(os.path.join(location, MANIFEST))


def _attach(location: str, out: Path, *, dry_run: bool, settings: CacheSettings) -> IndexReport:
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return _copy_index(location, Path(folder), settings)
    with staged_directory(out) as staging:
        return _copy_index(location, staging, settings)


def _copy_index(location: str, directory: Path, settings: CacheSettings) -> IndexReport:
    """Copies the index of a split, with its data shards named where they lie, and checks both."""
    base = location.rstrip("/") if is_url(location) else os.path.abspath(location)
    for name in (MANIFEST, *BESIDE_MANIFEST):
        with SequentialFile(f"{base}/{name}", settings) as source, open(directory / name, "wb") as target:
            for start in range(0, source.size, PIECE_BYTES):
                target.write(source.read(start, min(PIECE_BYTES, source.size - start)))
    manifest = read_manifest(directory)
    for shard in manifest["shards"]:
        if not is_url(shard["name"]) and not os.path.isabs(shard["name"]):
            shard["name"] = f"{base}/{shard['name']}"
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    check_split(directory, manifest)
    shards = manifest["shards"]
    open_storage([shard["name"] for shard in shards], [shard["bytes"] for shard in shards], cache=settings).check()
    return IndexReport(
        num_samples=manifest["num_samples"],
        num_classes=manifest["num_classes"],
        num_shards=len(shards),
        image_bytes=int(np.load(directory / INDEX, mmap_mode="r")["size"].sum(dtype=np.int64)),
        labels_in_shards=bool(manifest["labels_in_shards"]),
        empty_shards=tuple(shard["name"] for shard in shards if shard["num_samples"] == 0),
        problems=(),
    )
