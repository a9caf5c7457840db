"""Records of insightface and mxnet: train.rec with train.idx and a file named property."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from partialfc.data.errors import SampleError
from partialfc.data.sources.base import Source
from partialfc.data.sources.record_io import peek_record, read_record, scan_records

__all__ = ["IMAGE_HEADER", "MAX_EXACT_LABEL", "RecordSource"]

IMAGE_HEADER = struct.Struct("<IfQQ")
"""In front of an image: flag, label, id, second id. Instead of one label, flag > 0 float32 labels follow."""

MAX_EXACT_LABEL = 1 << 24
"""Labels are float32 there: from this number on they do not tell neighbours apart."""

_LOCATOR = np.dtype([("offset", "<i8"), ("key", "<i8")])
_LABEL = struct.Struct("<f")


@dataclass(frozen=True, kw_only=True)
class RecordSource(Source):
    """The images of a .rec file, in the order in which they lie in it. Identities are named by their labels."""

    locators: np.ndarray

    @classmethod
    def open(cls, path: Path) -> RecordSource:
        """Reads the header of every record.

        Args:
            path: the .rec file, or a folder with train.rec. The .idx file of the same name and the file `property`
                beside it are used if they are there; without .idx the records are found by going through the file.

        Raises:
            FileNotFoundError: if there is no train.rec in the folder.
            ValueError: if the files are damaged or do not fit each other, or labels are not whole numbers below 2^24.
        """
        path = path / "train.rec" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected train.rec and train.idx as insightface has them")
        locators = _find_records(path)
        with open(path, "rb") as file:
            labels, has_image, images = _read_headers(file.fileno(), locators, path)
        keep = _is_image(locators["key"], has_image, images)
        locators, labels = locators[keep], labels[keep]
        if len(labels) == 0:
            raise ValueError(f"{path}: holds no image")
        _check_labels(labels, locators, path)
        numbers, identities = np.unique(labels.astype(np.int32), return_inverse=True)
        return cls(
            path=str(path),
            identity_names=[str(number) for number in numbers.tolist()],
            identities=identities.astype(np.int32),
            locators=locators,
            notes=tuple(_notes(path, numbers)),
        )

    def read(self, position: int) -> bytes:
        """The image of a record."""
        offset = int(self.locators["offset"][position])
        payload = read_record(self._descriptor, offset, path=self.path)
        return payload[_image_start(payload, len(payload)) :]

    def key(self, position: int) -> str:
        """label/key of the record."""
        return f"{self.identity_name(position)}/{int(self.locators['key'][position])}"

    def describe(self, position: int) -> str:
        """The file, the key of the record and its byte offset."""
        locator = self.locators[position]
        return f"{self.path}, record {int(locator['key'])} at byte {int(locator['offset'])}"

    def count_bytes(self, positions: np.ndarray) -> int:
        """The distances from each record to the next, which hold the headers too."""
        offsets = self.locators["offset"]
        ends = np.append(offsets[1:], os.path.getsize(self.path))
        return int((ends - offsets)[positions].sum())

    @cached_property
    def _file(self) -> _OpenFile:
        return _OpenFile(self.path)

    @property
    def _descriptor(self) -> int:
        return self._file.descriptor

    def _files(self) -> Sequence[Path]:
        return (Path(self.path),)


class _OpenFile:
    """Closes with its last reference."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.descriptor)


def _find_records(path: Path) -> np.ndarray:
    """Offset and key of each record, in the order of the file."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        with open(path, "rb") as file:
            offsets = np.fromiter(scan_records(file.fileno(), path=path), dtype=np.int64)
        keys = np.arange(len(offsets))
    else:
        keys, offsets = _read_index(index)
        order = np.argsort(offsets)
        keys, offsets = keys[order], offsets[order]
        size = path.stat().st_size
        if len(offsets) and not (0 <= offsets[0] and offsets[-1] < size):
            raise ValueError(
                f"{index}: lists the byte offsets {offsets[0]} to {offsets[-1]}, but {path.name} has {size} bytes; "
                f"one of the two was cut off or belongs to another set"
            )
    locators = np.empty(len(offsets), dtype=_LOCATOR)
    locators["offset"], locators["key"] = offsets, keys
    return locators


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The keys and byte offsets of a .idx file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy's word for text that is not a number
            numbers = np.fromfile(path, dtype=np.int64, sep=" ")
    except (ValueError, DeprecationWarning) as error:
        raise ValueError(f"{path}: not lines of key<TAB>byte offset: {error}") from error
    if len(numbers) == 0 or len(numbers) % 2:
        raise ValueError(f"{path}: {len(numbers)} numbers, but two a line are expected: key<TAB>byte offset")
    keys, offsets = numbers[::2], numbers[1::2]
    for what, column in (("key", keys), ("byte offset", offsets)):
        ordered = np.sort(column)
        if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
            raise ValueError(f"{path}: the {what} {twice[0]} is listed twice; remove the file, it is not needed")
    return keys, offsets


def _read_headers(descriptor: int, locators: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    """The first label of each record, whether an image follows, and what the header record of insightface says.

    That one has key 0 and no image; its first label is one more than the key of the last image.
    """
    labels = np.empty(len(locators), dtype=np.float32)
    has_image = np.empty(len(locators), dtype=bool)
    images_end = None
    file_bytes = os.fstat(descriptor).st_size
    if len(locators) == 0:
        raise ValueError(f"{path}: there is no record in it")
    ends = np.append(locators["offset"][1:], file_bytes).tolist()
    places = zip(locators["offset"].tolist(), locators["key"].tolist(), ends, strict=True)
    for number, (offset, key, next_offset) in enumerate(places):
        try:
            payload, size, end = peek_record(descriptor, offset, path=path)
            image_start = _image_start(payload, size)
        except SampleError as error:
            raise ValueError(
                f"{path}, record {key} at byte {offset}: {error}; copy the files again, or remove an .idx file of "
                "another set"
            ) from error
        if end > file_bytes:
            raise ValueError(
                f"{path}: the record at byte {offset} needs {end - offset} bytes, but the file ends after "
                f"{file_bytes - offset}; copy the file again"
            )
        if end != next_offset:
            raise ValueError(
                f"{path}: the record at byte {offset} ends at byte {end}, but the .idx file lists the next at byte "
                f"{next_offset}; remove that file to have the records found"
            )
        flag, label = struct.unpack_from("<If", payload)
        labels[number] = _LABEL.unpack_from(payload, IMAGE_HEADER.size)[0] if flag else label
        has_image[number] = size > image_start
        if key == 0 and flag and not has_image[number]:
            images_end = int(labels[number])
    return labels, has_image, images_end


def _image_start(payload: bytes, size: int) -> int:
    """Where the image begins in a payload of so many bytes, of which the first are given."""
    if size < IMAGE_HEADER.size:
        raise SampleError("unreadable", f"a record of {size} bytes has no image header")
    (flag,) = struct.unpack_from("<I", payload)
    start: int = IMAGE_HEADER.size + 4 * flag
    if size < start:
        raise SampleError("unreadable", f"a record of {size} bytes cannot hold the {flag} labels it claims")
    return start


def _is_image(keys: np.ndarray, has_image: np.ndarray, images_end: int | None) -> np.ndarray:
    """Which records are images, and not the header record or the range of an identity."""
    if images_end is None:
        return np.ones(len(keys), dtype=bool)
    # The header is float32 too: of a large set it is not exact.
    return (keys >= 1) & (keys < images_end) if images_end < MAX_EXACT_LABEL else has_image


def _check_labels(labels: np.ndarray, locators: np.ndarray, path: Path) -> None:
    whole = np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))
    if len(wrong := np.flatnonzero(~whole)):
        key = int(locators["key"][wrong[0]])
        raise ValueError(
            f"{path}: record {key} has the label {labels[wrong[0]]}, but labels are whole numbers from 0 on"
        )
    if (highest := float(labels.max())) >= MAX_EXACT_LABEL:
        raise ValueError(
            f"{path}: the label {highest:.0f} is not below 2^24 = {MAX_EXACT_LABEL}. Labels of this format are "
            "float32, which does not tell such numbers from their neighbours, so different identities may have become "
            "one; import the set from where it was made, as folders, a list file or Parquet"
        )


def _notes(path: Path, numbers: np.ndarray) -> list[str]:
    """What the file `property` says against the labels, and what of the labels becomes another number."""
    property_file = path.with_name("property")
    highest = int(numbers[-1])
    expected = highest + 1
    if property_file.is_file():
        text = property_file.read_text(errors="replace").strip()
        first = text.split(",")[0].strip()
        if not first.isdecimal():
            raise ValueError(f"{property_file}: {text!r} does not begin with the number of identities")
        expected = int(first)
        if highest >= expected:
            raise ValueError(f"{property_file}: {expected} identities, but {path.name} has the label {highest}")
    if len(numbers) == expected:
        return []
    return [
        f"{path}: {expected - len(numbers):,} of {expected:,} labels have no image, so the identities get new numbers; "
        "their names in label_names.json are the old ones"
    ]
