"""One data shard of a packing: an independent piece of work, that is finished or not."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from partialfc.data.conversion import store_image
from partialfc.data.errors import SampleError
from partialfc.data.sources import SkippedFile, Source
from partialfc.data.writer import ShardWriter, relabel_shard

__all__ = ["PARTS", "ShardJob", "ShardOutcome", "ShardPlace", "relabel", "write_shard"]

PARTS = "parts"
"""Folder of what is known of each finished data shard."""


@dataclass(frozen=True)
class ShardOutcome:
    """What came of the work.

    Attributes:
        num_bytes: byte size of the tar.
        num_samples: samples in it.
        tried: entries of the source that were tried.
        skipped: those that could not be used.
    """

    num_bytes: int
    num_samples: int
    tried: int
    skipped: tuple[SkippedFile, ...]


@dataclass(frozen=True)
class ShardPlace:
    """Where a data shard is written, and what is known of it."""

    staging: Path
    split: str
    number: int

    @property
    def tar(self) -> Path:
        """The data shard."""
        return self.staging / self.split / f"shard-{self.number:06d}.tar"

    def part(self, extension: str) -> Path:
        """A file beside it."""
        return self.staging / PARTS / f"{self.split}-{self.number:06d}.{extension}"

    def outcome(self) -> ShardOutcome | None:
        """What came of it, or None if it is not finished."""
        # The last of the files to be written stands for all.
        if not self.part("json").is_file() or not self.tar.is_file():
            return None
        values = json.loads(self.part("json").read_text(encoding="utf-8"))
        outcome = ShardOutcome(**values | {"skipped": tuple(SkippedFile(**file) for file in values["skipped"])})
        return outcome if self.tar.stat().st_size == outcome.num_bytes else None

    def records(self) -> np.ndarray:
        """The records of a finished data shard."""
        records: np.ndarray = np.load(self.part("npy"))
        return records


@dataclass(frozen=True)
class ShardJob:
    """What to write into a data shard: all entries of a source that can be used, and their labels, int64."""

    place: ShardPlace
    source: Source
    labels: np.ndarray
    image_size: int | None


def write_shard(job: ShardJob) -> int:
    """Writes a data shard under another name, then gives all of its files their names; returns the entries tried."""
    place, source = job.place, job.source
    skipped = []
    unfinished = place.part("tar")
    writer = ShardWriter(unfinished)
    try:
        for position, label in enumerate(job.labels.tolist()):
            try:
                image, extension = store_image(source.read(position), image_size=job.image_size)
            except SampleError as error:
                skipped.append(SkippedFile(source.describe(position), error.reason, str(error)))
                continue
            weight = None if source.weights is None else float(source.weights[position])
            quality = None if source.quality is None else float(source.quality[position])
            key = source.key(position)
            writer.add(key, image, extension=extension, label=label, weight=weight, quality=quality)
        records, num_bytes = writer.close()
    except BaseException:
        writer.abort()
        unfinished.unlink()
        raise
    buffer = io.BytesIO()
    np.save(buffer, records)
    _write_durably(place.part("npy"), buffer.getvalue())
    unfinished.replace(place.tar)
    outcome = ShardOutcome(num_bytes, len(records), source.num_entries, tuple(skipped))
    _write_durably(place.part("json"), json.dumps(asdict(outcome)).encode())
    return source.num_entries


def relabel(work: tuple[ShardPlace, np.ndarray]) -> None:
    """Writes the labels that the records of a data shard have become: int64, one for each label before."""
    place, new_labels = work
    records = place.records()
    relabel_shard(place.tar, records, new_labels[records["label"]])


def _write_durably(path: Path, content: bytes) -> None:
    """Writes a file so that under its name it is always whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
