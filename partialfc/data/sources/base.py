"""What a source of images is: a list of entries, held in columns, and a way to read each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import numpy as np

from partialfc.data.errors import SampleError

__all__ = ["SkippedFile", "Source", "TextColumn", "identity_order", "image_key", "number_identities", "read_file"]

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif"})
"""What files of images are called; what is in them is found out when they are read."""


@dataclass(frozen=True)
class SkippedFile:
    """Something that was left out, and why.

    Attributes:
        path: the file, or the place in a file.
        reason: why, in a few words that are counted by; for an image one of `partialfc.data.errors.REASONS`.
        message: why, in full.
    """

    path: str
    reason: str
    message: str


class TextColumn:
    """Many texts in two arrays: 8 bytes and their UTF-8 for each, where a list of strings takes 60 bytes more.

    Args:
        data: uint8, all texts one after the other. File names that are not UTF-8 keep their bytes.
        ends: int64, where each text ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """Collects texts; they are not held otherwise."""
        data, ends = bytearray(), array("q")
        for text in texts:
            data += text.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        return cls(np.frombuffer(data, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> str:
        start = int(self.ends[position - 1]) if position else 0
        return bytes(self.data[start : self.ends[position]]).decode("utf-8", "surrogateescape")

    def take(self, positions: np.ndarray) -> TextColumn:
        """The texts at these positions."""
        return TextColumn.of(self[position] for position in positions.tolist())


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Images and whom they show. Entries are numbered from 0, in the order in which they will be packed.

    It may be sent to another process, which opens the files again. It is not meant to be shared by threads.

    Attributes:
        path: where it lies, for messages.
        identity_names: name of each identity, in the order that labels follow; an identity may be without entries.
        identities: int32 [num_entries], the identity of each entry.
        locators: how each entry is found: [num_entries] texts or numbers, whatever the kind of source needs.
        weights: float32 [num_entries] for sampling, or None.
        quality: float32 [num_entries], or None.
        skipped: what was left out of the list.
        notes: what else a user should know.
    """

    path: str
    identity_names: Sequence[str]
    identities: np.ndarray
    locators: TextColumn | np.ndarray
    weights: np.ndarray | None = None
    quality: np.ndarray | None = None
    skipped: tuple[SkippedFile, ...] = ()
    notes: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ("weights", "quality")  # what else there is one of for each entry

    @property
    def num_entries(self) -> int:
        """The number of images to be tried."""
        return len(self.identities)

    @abstractmethod
    def read(self, position: int) -> bytes:
        """The image file of an entry.

        Raises:
            SampleError: if this one cannot be read.
            DataError: if nothing more can be read.
        """

    @abstractmethod
    def key(self, position: int) -> str:
        """The name of an entry in a data shard: unique, and without a dot in its last part."""

    @abstractmethod
    def describe(self, position: int) -> str:
        """Where an entry lies, for messages."""

    @abstractmethod
    def count_bytes(self, positions: np.ndarray) -> int:
        """The bytes of the image files of these entries together, as near as can be told without reading them."""

    def part(self, positions: np.ndarray) -> Self:
        """These entries alone, as something small to be sent to a worker process."""
        identities, codes = np.unique(self.identities[positions], return_inverse=True)
        locators = self.locators
        columns: dict[str, Any] = {name: getattr(self, name) for name in self._columns}
        parts: dict[str, Any] = {name: None if all_ is None else all_[positions] for name, all_ in columns.items()}
        return replace(
            self,
            identity_names=[self.identity_names[identity] for identity in identities.tolist()],
            identities=codes.astype(np.int32),
            locators=locators.take(positions) if isinstance(locators, TextColumn) else locators[positions],
            skipped=(),
            notes=(),
            **parts,
        )

    def identity_name(self, position: int) -> str:
        """The name of whom an entry shows."""
        return self.identity_names[int(self.identities[position])]

    def digest(self) -> str:
        """A hash of the list and of the sizes and times of the files in `_files`, as hexadecimal digits."""
        hashed = sha256(f"{type(self).__name__} {self.path} {self.num_entries}\n".encode("utf-8", "surrogateescape"))
        for file in self._files():
            status = file.stat()
            hashed.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        for name in self.identity_names:
            hashed.update(name.encode("utf-8", "surrogateescape") + b"\n")
        locators = self.locators
        columns = [locators.data, locators.ends] if isinstance(locators, TextColumn) else [locators]
        for column in [self.identities, *columns, *(getattr(self, name) for name in self._columns)]:
            hashed.update(b"none" if column is None else np.ascontiguousarray(column).data)
        return hashed.hexdigest()

    def _files(self) -> Sequence[Path]:
        """Files whose size and time tell that the source changed; none where the list itself names what is read."""
        return ()

    def __getstate__(self) -> dict[str, Any]:
        # Without open files, which are held as cached properties.
        return {field.name: getattr(self, field.name) for field in fields(self)}


def number_identities(names: Sequence[str], *, where: str) -> tuple[list[str], np.ndarray]:
    """Puts the names of identities in the order of their labels.

    Numbers are ordered as numbers if all of the names are such, else names as texts.

    Args:
        names: distinct names.
        where: what to name in an error.

    Returns:
        The ordered names, and int32 [len(names)]: the place of each of `names` among them.

    Raises:
        ValueError: for a name that cannot be the name of a folder.
    """
    for name in names:
        if not name or name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise ValueError(
                f"{where}: {name!r} cannot name an identity: names become folders when a set is exported, so they may "
                "not be empty, absolute or lead out of one"
            )
    order = identity_order(names)
    places = np.empty(len(names), dtype=np.int32)
    places[order] = np.arange(len(names), dtype=np.int32)
    return [names[number] for number in order], places


def identity_order(names: Sequence[str]) -> list[int]:
    """The numbers of the names in the order of their labels."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(range(len(names)), key=lambda number: (int(names[number]), names[number]))
    return sorted(range(len(names)), key=lambda number: names[number])


def image_key(path: str) -> str:
    """A path with slashes, less its extension; WebDataset ends a key at the first dot of the file name."""
    pure = PurePosixPath(path)
    return pure.with_name(pure.stem.replace(".", "_")).as_posix()


def read_file(path: str | Path) -> bytes:
    """The content of an image file.

    Raises:
        SampleError: if it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SampleError("unreadable", f"cannot be read: {error.strerror}") from error
