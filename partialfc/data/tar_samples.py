"""The samples of one tar that anyone wrote, by WebDataset's rule: neighbouring members with one key are one sample."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from partialfc.data.decode import decode_image
from partialfc.data.errors import SampleError
from partialfc.data.piece_cache import CacheSettings
from partialfc.data.split_format import record_type
from partialfc.data.tar_scan import SequentialFile, TarError, TarMember, scan_tar, split_name

__all__ = ["IMAGE_EXTENSIONS", "IndexProblem", "TarContent", "TarTask", "groups_by_key", "read_tar"]

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "avif"})
_LABEL_KEYS = ("label", "cls", "identity")
_MOST_IMAGE_BYTES = 2**32 - 1


class IndexProblem(NamedTuple):
    """A sample that was left out of an index.

    Attributes:
        shard: path or URL of its tar.
        key: its key in there.
        offset: byte of the tar where its first member begins.
        reason: short; one of `partialfc.data.errors.REASONS`, or what its members lack.
        message: what was found.
    """

    shard: str
    key: str
    offset: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.shard}, key {self.key} at byte {self.offset}: {self.reason}: {self.message}"


@dataclass(frozen=True)
class TarTask:
    """A tar to read.

    Attributes:
        path: local path or URL.
        decode: whether to decode each image, to find those that cannot be.
        settings: tries and waits for a URL.
    """

    path: str
    decode: bool
    settings: CacheSettings


@dataclass
class TarContent:
    """What a tar holds.

    Attributes:
        path: of the tar.
        num_bytes: its size.
        records: [n] of `record_type(weight=True, quality=True)`, nan where a sample has no weight or quality; the
            label is the place of the sample's label in `labels`.
        labels: the labels as text, each once.
        labels_from_json: whether labels stand in .json members rather than in .cls.
        problems: samples that were left out.
        error: why the tar cannot be used; "" if it can.
    """

    path: str
    num_bytes: int = 0
    records: np.ndarray = field(default_factory=lambda: np.zeros(0, record_type(weight=True, quality=True)))
    labels: list[str] = field(default_factory=list)
    labels_from_json: bool = False
    problems: list[IndexProblem] = field(default_factory=list)
    error: str = ""


class _UnusableSampleError(Exception):
    """A sample that has to be left out."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_tar(task: TarTask) -> TarContent:
    """Reads a tar from its first byte to its last.

    A tar that cannot be read is reported in `TarContent.error`, so that the caller can list all of them.
    """
    content = TarContent(task.path)
    numbers: dict[str, int] = {}
    seen: set[str] = set()
    records = []
    try:
        with SequentialFile(task.path, task.settings) as file:
            content.num_bytes = file.size
            for key, members in groups_by_key(scan_tar(file, wants=_is_wanted)):
                try:
                    if key in seen:
                        raise _UnusableSampleError("duplicate key", "an earlier sample of the tar has the same key")
                    seen.add(key)
                    label, extras, from_json = _label(members)
                    image = _image(members, task.decode)
                except _UnusableSampleError as error:
                    content.problems.append(IndexProblem(task.path, key, members[0].offset, error.reason, str(error)))
                    continue
                assert image.content is not None
                number = numbers.setdefault(label, len(numbers))
                records.append((image.offset, number, image.size, zlib.crc32(image.content), *extras))
                content.labels_from_json |= from_json
    except (TarError, OSError) as error:
        content.error = str(error) if task.path in str(error) else f"{task.path}: {error}"
        return content
    content.labels = list(numbers)
    content.records = np.array(records, dtype=content.records.dtype)
    return content


def groups_by_key(members: Iterator[TarMember]) -> Iterator[tuple[str, list[TarMember]]]:
    """Neighbouring members with one key, which make a sample. Members without a key or an extension are of none."""
    key, group = "", list[TarMember]()
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        if group and parts[0] != key:
            yield key, group
            group = []
        key = parts[0]
        group.append(member)
    if group:
        yield key, group


def _is_wanted(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS or _extension(name) in ("cls", "json")


def _extension(name: str) -> str:
    parts = split_name(name)
    return parts[1] if parts else ""


def _image(members: list[TarMember], decode: bool) -> TarMember:
    images = [member for member in members if _extension(member.name) in IMAGE_EXTENSIONS]
    if len(images) != 1:
        names = [member.name for member in images or members]
        raise _UnusableSampleError("no image" if not images else "several images", f"the sample has {names}")
    (image,) = images
    if not image.is_file:
        raise _UnusableSampleError("not a file", f"{image.name} is a link or a folder; pack it with --dereference")
    if image.size > _MOST_IMAGE_BYTES:
        raise _UnusableSampleError("too large", f"{image.name} has {image.size} bytes")
    if not image.content:
        raise _UnusableSampleError("not an image", f"{image.name} has no bytes")
    if decode:
        try:
            decode_image(image.content)
        except SampleError as error:
            raise _UnusableSampleError(error.reason, str(error)) from error
    return image


def _label(members: list[TarMember]) -> tuple[str, tuple[float, float], bool]:
    """The label as text, (weight, quality) with nan for what is not there, and whether the label is from .json."""
    parts = {_extension(member.name): member.content for member in members if member.is_file}
    described = parts.get("json")
    values = {} if described is None else _json_values(described)
    extras = _number(values, "weight"), _number(values, "quality")
    if extras[0] < 0.0:
        raise _UnusableSampleError("bad number", f"weight is {extras[0]}, but must not be negative")
    text = parts.get("cls")
    if text is not None:
        try:
            label = text.decode("utf-8").strip("\0 \t\r\n")
        except UnicodeDecodeError:
            raise _UnusableSampleError("bad label", f"the .cls holds {text[:40]!r}, which is not text") from None
        if not label:
            raise _UnusableSampleError("bad label", "the .cls is empty")
        return label, extras, False
    found = next((values[key] for key in _LABEL_KEYS if key in values), None)
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        names = [member.name for member in members]
        given = f"the .json has {found!r}" if found is not None else f"the sample has {names}"
        reason = "no label" if found is None else "bad label"
        raise _UnusableSampleError(reason, f"{given}; expected a .cls, or a .json with {', '.join(_LABEL_KEYS)}")
    return str(found), extras, True


def _json_values(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise _UnusableSampleError("bad label", f"the .json cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _number(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _UnusableSampleError("bad number", f"{name} is {value!r}, but must be a finite number")
    return float(value)
