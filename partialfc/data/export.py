"""Splits back to what other software reads: folders of images, and records of insightface."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from partialfc.data.conversion import image_extension
from partialfc.data.decode import decode_image
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.sources.base import SkippedFile, number_identities
from partialfc.data.sources.record_io import write_record
from partialfc.data.sources.records import IMAGE_HEADER, MAX_EXACT_LABEL
from partialfc.data.writer import staged_directory

__all__ = ["ExportReport", "export_folder", "export_records"]

_SAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        num_images: images written.
        num_identities: identities they show.
        skipped: images that are damaged, and are not part of the export.
    """

    num_images: int
    num_identities: int
    skipped: tuple[SkippedFile, ...]

    def __str__(self) -> str:
        lines = [f"exported: {self.num_images:,} images of {self.num_identities:,} identities"]
        lines.append(f"skipped: {len(self.skipped):,}")
        return "\n".join([*lines, *(f"  {file.path}: {file.message}" for file in self.skipped)])


def export_folder(
    split: str | Path, out: str | Path, *, on_progress: Callable[[int, int], None] | None = None
) -> ExportReport:
    """Writes each image of a split, byte for byte, as `out/<identity>/<key>.<extension>`.

    Args:
        split: the folder of a split.
        out: folder to make; it must be missing or empty, and is only there once it is complete.
        on_progress: called as on_progress(images done, images in all) now and then.

    Raises:
        FileNotFoundError: if there is no split.
        FileExistsError: if `out` is there and not an empty folder.
        ValueError: if the split is damaged, or an identity or a key leads out of its folder.
    """
    index = ShardIndex.open(split)
    number_identities(index.label_names, where=str(split))
    reading = _Reading(index, np.arange(index.num_samples), on_progress)
    with staged_directory(out) as staging:
        for sample_id, label, image in reading:
            try:
                extension = image_extension(image)
            except SampleError as error:
                reading.skip(sample_id, error)
                continue
            name = index.label_names[label]
            key = (index.key(sample_id) or f"sample-{sample_id}").removeprefix(f"{name}/")
            if ".." in key.split("/"):
                raise ValueError(f"{index.describe(sample_id)}: the key {key!r} leads out of its folder; rename it")
            path = staging / name / f"{key.lstrip('/')}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.write(image)
            reading.written[label] += 1
    return reading.report()


def export_records(
    split: str | Path, out: str | Path, *, on_progress: Callable[[int, int], None] | None = None
) -> ExportReport:
    """Writes a split as `out/train.rec`, `train.idx` and `property`, as insightface's training reads them.

    Images follow each other identity by identity, under the keys 1, 2 ...; the header record 0 says how many there
    are, and a record for each identity says which. Those numbers are float32 like all labels there: a set with more
    images than they can count gets no such records, and insightface then takes all records, from key 0, for images.

    Args:
        split: the folder of a split.
        out: folder to make; it must be missing or empty, and is only there once it is complete.
        on_progress: called as on_progress(images done, images in all) now and then.

    Raises:
        FileNotFoundError: if there is no split.
        FileExistsError: if `out` is there and not an empty folder.
        ValueError: if the split is damaged, or has more than 2^24 identities.
    """
    index = ShardIndex.open(split)
    if index.num_classes > MAX_EXACT_LABEL:
        raise ValueError(
            f"{split}: {index.num_classes} identities, but labels of this format are float32, which tells no more than "
            f"2^24 = {MAX_EXACT_LABEL} apart; export to folders"
        )
    reading = _Reading(index, index.by_label, on_progress)
    with (
        staged_directory(out) as staging,
        open(staging / "train.rec", "wb") as records,
        open(staging / "train.idx", "w", encoding="ascii") as offsets,
    ):
        height, width = _write_records(reading, _RecordWriter(records, offsets), index)
        (staging / "property").write_text(f"{index.num_classes},{height},{width}\n", encoding="ascii")
    return reading.report()


class _Reading:
    """The intact samples of a split: (sample id, label, image file) each, in a given order."""

    def __init__(
        self, index: ShardIndex, sample_ids: np.ndarray, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self.index, self.sample_ids, self.on_progress = index, sample_ids, on_progress
        self.skipped: list[SkippedFile] = []
        self.written = np.zeros(index.num_classes, dtype=np.int64)

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        total = len(self.sample_ids)
        for start in range(0, total, _SAMPLES_AT_ONCE):
            ids = np.asarray(self.sample_ids[start : start + _SAMPLES_AT_ONCE], dtype=np.int64)
            labels = self.index.labels[ids].tolist()
            for sample_id, label, image in zip(ids.tolist(), labels, self.index.read_many(ids), strict=True):
                if isinstance(image, SampleError):
                    self.skip(sample_id, image)
                    continue
                yield sample_id, label, image
            if self.on_progress is not None:
                self.on_progress(start + len(ids), total)

    def skip(self, sample_id: int, error: SampleError) -> None:
        """Leaves a sample out."""
        self.skipped.append(SkippedFile(self.index.describe(sample_id), error.reason, str(error)))

    def report(self) -> ExportReport:
        """What came of it."""
        return ExportReport(int(self.written.sum()), int(np.count_nonzero(self.written)), tuple(self.skipped))


class _RecordWriter:
    """Writes records and where they begin."""

    def __init__(self, records: BinaryIO, offsets: TextIO) -> None:
        self._records, self._offsets = records, offsets

    def image(self, key: int, label: int, image: bytes) -> None:
        """Appends an image."""
        self._write(key, IMAGE_HEADER.pack(0, float(label), key, 0) + image)

    def numbers(self, key: int, first: int, second: int) -> None:
        """Appends a record of two numbers and no image."""
        self._write(key, _numbers(key, first, second))

    def header(self, first: int, second: int) -> None:
        """Writes the first record again, of the same size."""
        self._records.seek(0)
        write_record(self._records, _numbers(0, first, second))

    def _write(self, key: int, payload: bytes) -> None:
        self._offsets.write(f"{key}\t{self._records.tell()}\n")
        write_record(self._records, payload)


def _numbers(key: int, first: int, second: int) -> bytes:
    return IMAGE_HEADER.pack(2, 0.0, key, 0) + struct.pack("<2f", first, second)


def _write_records(reading: _Reading, writer: _RecordWriter, index: ShardIndex) -> tuple[int, int]:
    """Writes all records; returns the height and width of the first image."""
    counted = index.num_samples + 1 + index.num_classes <= MAX_EXACT_LABEL
    first = 1 if counted else 0
    if counted:
        writer.numbers(0, 0, 0)  # What it says is known at the end.
    key, size = first, None
    for sample_id, label, image in reading:
        if size is None:
            try:
                size = decode_image(image).shape[:2]
            except SampleError as error:
                reading.skip(sample_id, error)
                continue
        writer.image(key, label, image)
        reading.written[label] += 1
        key += 1
    if size is None:
        raise ValueError(f"{index.directory}: no intact image to export")
    if counted:
        ends = first + reading.written.cumsum()
        for label, end in enumerate(ends.tolist()):
            writer.numbers(key + label, end - int(reading.written[label]), end)
        writer.header(key, key + index.num_classes)
    return size[0], size[1]
