"""Packs images from any source into a data set: in parallel, and to be gone on with after an interruption."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.data.parallel import run_tasks
from partialfc.data.shard_jobs import PARTS, ShardJob, ShardPlace, relabel, write_shard
from partialfc.data.sources import SkippedFile, Source, open_source
from partialfc.data.split_format import record_type, write_split_files
from partialfc.data.writer import check_target, resumable_directory
from partialfc.keyed import hash64

__all__ = ["PackReport", "SkippedFile", "pack"]

_VERIFICATION_SHARE = 1
_BYTES_VERSION = 1  # Another number where the same job would give other bytes, so that no half of each is joined.

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackReport:
    """What `pack` did, or of a dry run what it would try.

    Attributes:
        train_identities: identities in the training split.
        train_images: images in the training split.
        verification_identities: identities set aside.
        verification_images: images of those.
        image_bytes: bytes of all images; of a dry run as the source tells them.
        skipped: everything that was left out, with the reason.
        empty_identities: names of identities without a usable image; they have no label.
        notes: what else is to be known of the source.
        dry_run: nothing was decoded or written.
    """

    train_identities: int
    train_images: int
    verification_identities: int
    verification_images: int
    image_bytes: int
    skipped: tuple[SkippedFile, ...]
    empty_identities: tuple[str, ...]
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """How many were left out for which reason, the most frequent first."""
        return dict(Counter(file.reason for file in self.skipped).most_common())

    def __str__(self) -> str:
        lines = [f"train: {self.train_identities:,} identities, {self.train_images:,} images"]
        if self.verification_identities:
            lines.append(
                f"verification: {self.verification_identities:,} identities, {self.verification_images:,} images"
            )
        lines.append(f"bytes of images: {self.image_bytes:,}")
        if self.dry_run:
            lines.append("dry run: no image was decoded, nothing was written")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped_by_reason.items())
        lines.append(f"skipped: {len(self.skipped):,}" + (f" ({reasons})" if reasons else ""))
        lines += [f"  {file.path}: {file.message}" for file in self.skipped]
        if self.empty_identities:
            lines.append(f"identities without a usable image, left out: {len(self.empty_identities):,}")
            lines += [f"  {name}" for name in self.empty_identities]
        return "\n".join([*lines, *self.notes])


def pack(
    source: str | Path | Source,
    out: str | Path,
    *,
    verification_share: float,
    seed: int,
    image_size: int | None = None,
    samples_per_shard: int = 10_000,
    num_workers: int = 0,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Packs a source of images into the data set `out/train` and, if wanted, `out/verification`.

    The identities of each split, sorted by name (by number if all are numbers), get the labels 0, 1, 2 ... Images lie
    in the shards in the order of the source; the sampling plan mixes them. Which identities are set aside depends on
    the seed and the names. Files are stored byte for byte, except those of a kind that decoders disagree on (see
    `store_image`) or of another size than asked for.

    Data shards are made one by one. After an error or an interruption those that are finished stay in
    `.<name of out>.partial` beside `out`, and the same call goes on after them. The files are the same whatever the
    number of workers, and with or without an interruption.

    Args:
        source: a source, or the path of one (see `open_source`); it is only read.
        out: folder to make; it must be missing or empty, and is only there once it is complete.
        verification_share: share of the identities to set aside for verification, in [0, 1).
        seed: key of that draw.
        image_size: height and width that images are resized to; left out, they keep their size.
        samples_per_shard: images tried for each data shard; those that cannot be used make it shorter.
        num_workers: worker processes; 0 works in the calling process. A script that uses some needs the usual
            `if __name__ == "__main__":`.
        dry_run: only count what would be packed.
        on_progress: called as on_progress(images done, images in all) after each data shard.

    Raises:
        FileNotFoundError: if `source` is missing.
        FileExistsError: if `out` is there and not an empty folder.
        BlockingIOError: if another process packs to `out`.
        ValueError: if `out` lies in `source`, for a number out of its range, a source that cannot be used or has no
            usable image, or if what is left of an interruption is of another source or other options.
        DataError: if the source cannot be read on, or a worker process dies.
    """
    _check_numbers(verification_share, image_size, samples_per_shard, num_workers)
    check_target(out)
    if not isinstance(source, Source):
        if Path(source).is_dir() and Path(out).resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"{out}: lies in the source {source}; choose a folder outside of it")
        source = open_source(source)
    aside = _reserved(source.identity_names, verification_share, seed)[source.identities]
    splits = {"train": np.flatnonzero(~aside), "verification": np.flatnonzero(aside)}
    packing = _Packing(source, splits, image_size, samples_per_shard, num_workers, on_progress)
    if dry_run:
        return packing.count()
    return packing.write(out, {"verification_share": verification_share, "seed": seed})


class _Packing:
    """One call of `pack`."""

    def __init__(
        self,
        source: Source,
        splits: Mapping[str, np.ndarray],
        image_size: int | None,
        samples_per_shard: int,
        num_workers: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.image_size, self.samples_per_shard = source, image_size, samples_per_shard
        self.num_workers, self.on_progress = num_workers, on_progress
        self.splits = splits
        # Of each split the identities that have an image to be tried, in the order of their labels.
        self.planned = {name: np.unique(source.identities[positions]) for name, positions in splits.items()}

    def count(self) -> PackReport:
        """What would be tried."""
        num_bytes = sum(self.source.count_bytes(positions) for positions in self.splits.values())
        return self._report(
            self.planned, {name: len(positions) for name, positions in self.splits.items()}, num_bytes, [], dry_run=True
        )

    def write(self, out: str | Path, options: Mapping[str, Any]) -> PackReport:
        """Writes the data shards that are not there yet, then joins them."""
        job = {
            "version": _BYTES_VERSION,
            "source": self.source.path,
            "content of the source": self.source.digest(),
            "image_size": self.image_size,
            "samples_per_shard": self.samples_per_shard,
            **options,
        }
        with resumable_directory(out, job) as staging:
            for folder in (PARTS, *self.splits):
                (staging / folder).mkdir(exist_ok=True)
            places = [place for name in self.splits for place in self._places(staging, name)]
            try:
                self._write_shards(places)
            except BaseException:
                if finished := sum(place.outcome() is not None for place in places):
                    _log.warning(
                        "%d of %d data shards are finished and kept in %s; the same command goes on after them",
                        *(finished, len(places), staging),
                    )
                raise
            report = self._join(staging, verification_share=float(options["verification_share"]))
            shutil.rmtree(staging / PARTS)
            return report

    def _places(self, staging: Path, name: str) -> list[ShardPlace]:
        """All data shards of a split."""
        count = -(-len(self.splits[name]) // self.samples_per_shard)
        return [ShardPlace(staging, name, number) for number in range(count)]

    def _write_shards(self, places: list[ShardPlace]) -> None:
        outcomes = [place.outcome() for place in places]
        total = sum(map(len, self.splits.values()))
        done = sum(outcome.tried for outcome in outcomes if outcome is not None)
        todo = [place for place, outcome in zip(places, outcomes, strict=True) if outcome is None]
        # Closed here, so that no worker writes any more when what is finished is counted.
        with closing(run_tasks(write_shard, map(self._job, todo), num_workers=self._workers(len(todo)))) as results:
            for tried in results:
                done += tried
                if self.on_progress is not None:
                    self.on_progress(done, total)

    def _workers(self, num_tasks: int) -> int:
        """One data shard alone is sooner written here than a worker process has started."""
        return min(self.num_workers, num_tasks) if num_tasks > 1 else 0

    def _job(self, place: ShardPlace) -> ShardJob:
        start = place.number * self.samples_per_shard
        positions = self.splits[place.split][start : start + self.samples_per_shard]
        labels = np.searchsorted(self.planned[place.split], self.source.identities[positions])
        return ShardJob(place, self.source.part(positions), labels, self.image_size)

    def _join(self, staging: Path, *, verification_share: float) -> PackReport:
        """Makes splits of the finished data shards: closes the gaps in the labels, and writes the index."""
        skipped: list[SkippedFile] = []
        identities, counts, num_bytes = {}, {}, 0
        shards, records = {}, {}
        for name in self.splits:
            shards[name], records[name] = self._collect(staging, name, skipped)
            used = np.bincount(records[name]["label"], minlength=len(self.planned[name])) > 0
            identities[name], counts[name] = self.planned[name][used], len(records[name])
            num_bytes += int(records[name]["size"].sum(dtype=np.int64))
        problem = self._find_problem(counts, verification_share, skipped)
        if problem is not None:
            # The same command would end here again: there is nothing to go on with.
            for folder in (PARTS, *self.splits):
                shutil.rmtree(staging / folder)
            raise ValueError(problem)
        for name in self.splits:
            if counts[name] == 0:
                shutil.rmtree(staging / name)
                continue
            if len(identities[name]) < len(self.planned[name]):
                new_labels = np.searchsorted(identities[name], self.planned[name])
                self._relabel(self._places(staging, name), new_labels)
                records[name]["label"] = new_labels[records[name]["label"]]
            names = [self.source.identity_names[identity] for identity in identities[name].tolist()]
            write_split_files(staging / name, records[name], label_names=names, shards=shards[name])
        return self._report(identities, counts, num_bytes, skipped)

    def _collect(self, staging: Path, name: str, skipped: list[SkippedFile]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The data shards of a split as a manifest lists them, and their records. Those without samples are removed."""
        outcomes = [(place, place.outcome()) for place in self._places(staging, name)]
        has_weight, has_quality = self.source.weights is not None, self.source.quality is not None
        num_samples = sum(outcome.num_samples for _, outcome in outcomes if outcome is not None)
        records = np.empty(num_samples, dtype=record_type(weight=has_weight, quality=has_quality))
        shards, start = [], 0
        for place, outcome in outcomes:
            assert outcome is not None, place
            skipped += outcome.skipped
            if outcome.num_samples == 0:
                place.tar.unlink()
                continue
            records[start : start + outcome.num_samples] = place.records()
            start += outcome.num_samples
            shards.append({"name": place.tar.name, "bytes": outcome.num_bytes, "num_samples": outcome.num_samples})
        return shards, records

    def _relabel(self, places: list[ShardPlace], new_labels: np.ndarray) -> None:
        work = [(place, new_labels) for place in places if place.tar.is_file()]
        for _ in run_tasks(relabel, work, num_workers=self._workers(len(work))):
            pass

    def _find_problem(
        self, counts: Mapping[str, int], verification_share: float, skipped: list[SkippedFile]
    ) -> str | None:
        """Why there is no data set in the end."""
        skipped = [*self.source.skipped, *skipped]
        num_identities = len(self.source.identity_names)
        if counts["train"] == 0:
            first = f" (first: {skipped[0].path}: {skipped[0].message})" if skipped else ""
            return (
                f"{self.source.path}: no usable image for training of {num_identities} identities, {len(skipped)} "
                f"files skipped{first}"
            )
        if verification_share > 0.0 and counts["verification"] == 0:
            return (
                f"{self.source.path}: verification_share is {verification_share}, but no identity with an image could "
                f"be set aside of {num_identities}; at least two are needed"
            )
        return None

    def _report(
        self,
        identities: Mapping[str, np.ndarray],
        counts: Mapping[str, int],
        num_bytes: int,
        skipped: list[SkippedFile],
        *,
        dry_run: bool = False,
    ) -> PackReport:
        empty = np.ones(len(self.source.identity_names), dtype=bool)
        for used in identities.values():
            empty[used] = False
        names = (self.source.identity_names[identity] for identity in np.flatnonzero(empty).tolist())
        return PackReport(
            train_identities=len(identities["train"]),
            train_images=counts["train"],
            verification_identities=len(identities["verification"]),
            verification_images=counts["verification"],
            image_bytes=num_bytes,
            skipped=(*self.source.skipped, *skipped),
            empty_identities=tuple(names),
            notes=self.source.notes,
            dry_run=dry_run,
        )


def _check_numbers(verification_share: float, image_size: int | None, samples_per_shard: int, num_workers: int) -> None:
    if not 0.0 <= verification_share < 1.0:
        raise ValueError(f"pack: verification_share is {verification_share}, but must be in [0, 1)")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise ValueError(f"pack: image_size is {image_size}, but must be in [1, 4096]")
    if samples_per_shard < 1:
        raise ValueError(f"pack: samples_per_shard is {samples_per_shard}, but must be at least 1")
    if num_workers < 0:
        raise ValueError(f"pack: num_workers is {num_workers}, but must not be negative")


def _reserved(names: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Which identities are set aside: those of the lowest hashes, at least one if a share is wanted and two are there.

    Returns:
        bool [len(names)].
    """
    reserved = np.zeros(len(names), dtype=bool)
    if share == 0.0 or len(names) < 2:
        return reserved
    count = min(max(1, round(share * len(names))), len(names) - 1)

    def draw(number: int) -> int:
        word = int.from_bytes(sha256(os.fsencode(names[number])).digest()[:8], "little")
        return hash64(seed, _VERIFICATION_SHARE, word)

    reserved[sorted(range(len(names)), key=draw)[:count]] = True
    return reserved
