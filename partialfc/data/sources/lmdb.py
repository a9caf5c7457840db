"""LMDB databases whose values are image files. Values that are pickles of Python objects are not read."""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.data.errors import SampleError
from partialfc.data.sources.base import SkippedFile, Source, TextColumn, image_key, number_identities
from partialfc.data.sources.listing import LIST_EXTENSIONS, ListSource

__all__ = ["LmdbSource"]

# A process may not open a database twice: parts of a source share it as long as one of them is there.
_opened: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class LmdbSource(Source):
    """Entries `identity/name` -> image file; or any keys, with a list `labels.txt` (.lst, .csv, .tsv) of key and label.

    Locators are the keys, UTF-8.

    Attributes:
        lines: int64 [num_entries], the line of each entry in the list, or None without a list.
    """

    locators: TextColumn
    lines: np.ndarray | None = None

    _columns = (*Source._columns, "lines")

    @classmethod
    def open(cls, path: Path) -> LmdbSource:
        """Reads all keys, or the list of them.

        Args:
            path: a folder with data.mdb, or a file that ends with .mdb.

        Raises:
            ImportError: if lmdb is missing.
            ValueError: if it is no such database, or no key names an identity and there is no list.
        """
        if (labels := _find_list(path)) is not None:
            listed = ListSource.open(labels)
            return cls(
                path=str(path),
                identity_names=listed.identity_names,
                identities=listed.identities,
                locators=listed.locators,
                weights=listed.weights,
                quality=listed.quality,
                lines=listed.lines,
            )
        codes: dict[str, int] = {}
        identities = array("i")
        skipped: list[SkippedFile] = []
        with _open(path).begin() as transaction:
            keys = _identity_keys(transaction, path, codes, identities, skipped)
            locators = TextColumn.of(keys)
        if not codes:
            raise ValueError(
                f"{path}: no key of the form identity/name among {len(skipped)}; with other keys, put a list of "
                f"key<TAB>label beside it: {_list_folder(path) / 'labels.tsv'}"
            )
        names, places = number_identities(list(codes), where=str(path))
        return cls(
            path=str(path),
            identity_names=names,
            identities=places[np.frombuffer(identities, dtype=np.int32)],
            locators=locators,
            skipped=tuple(skipped),
        )

    def read(self, position: int) -> bytes:
        """The value of a key."""
        data = self._transaction.get(self.locators[position].encode("utf-8", "surrogateescape"))
        if data is None:
            raise SampleError("unreadable", "the database has no such key")
        return bytes(data)

    def key(self, position: int) -> str:
        """The key without extension; with a list, identity/line."""
        if self.lines is None:
            return image_key(self.locators[position])
        return f"{self.identity_name(position)}/{int(self.lines[position])}"

    def describe(self, position: int) -> str:
        """The database and the key."""
        return f"{self.path}, key {self.locators[position]!r}"

    def count_bytes(self, positions: np.ndarray) -> int:
        """The sizes of the values."""
        keys = (self.locators[position].encode("utf-8", "surrogateescape") for position in positions.tolist())
        return sum(len(data) for key in keys if (data := self._transaction.get(key)) is not None)

    @cached_property
    def _transaction(self) -> Any:
        return _open(Path(self.path)).begin(buffers=False)

    def _files(self) -> Sequence[Path]:
        path = Path(self.path)
        return [path / "data.mdb" if path.is_dir() else path]


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("reading LMDB needs lmdb: pip install partialfc[lmdb]") from error
    place = os.path.realpath(path)
    if (environment := _opened.get(place)) is not None:
        return environment
    try:
        _opened[place] = environment = lmdb.open(
            place, subdir=path.is_dir(), readonly=True, lock=False, readahead=False
        )
        return environment
    except lmdb.Error as error:
        raise ValueError(f"{path}: not an LMDB database that can be read: {error}") from error


def _list_folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _find_list(path: Path) -> Path | None:
    lists = [_list_folder(path) / f"labels{extension}" for extension in LIST_EXTENSIONS]
    return next((path for path in lists if path.is_file()), None)


def _identity_keys(
    transaction: Any, path: Path, codes: dict[str, int], identities: array[int], skipped: list[SkippedFile]
) -> Iterator[str]:
    """The keys that name an identity, in the order of the database; `codes` and `identities` grow with them."""
    seen: dict[str, str] = {}
    before = ""
    for raw in transaction.cursor().iternext(keys=True, values=False):
        key = bytes(raw).decode("utf-8", "surrogateescape")
        identity, slash, name = key.partition("/")
        if not (identity and slash and name) or key.endswith("/"):
            skipped.append(SkippedFile(f"{path}, key {key!r}", "other key", "not of the form identity/name"))
            continue
        if identity != before:  # Keys are sorted, so those of an identity follow each other.
            seen, before = {}, identity
        stem = image_key(key)
        if stem in seen:
            raise ValueError(f"{path}: the keys {seen[stem]!r} and {key!r} both become {stem!r}; rename one of them")
        seen[stem] = key
        identities.append(codes.setdefault(identity, len(codes)))
        yield key
