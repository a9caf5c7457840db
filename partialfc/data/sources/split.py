"""Splits that are packed already, whole or in part, as a source of further ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from partialfc.data.index import ShardIndex
from partialfc.data.sources.base import Source, number_identities
from partialfc.data.split_format import MANIFEST

__all__ = ["SplitSource", "reopen_split"]

_LOCATOR = np.dtype([("split", "<i4"), ("id", "<i8")])


@dataclass(frozen=True, kw_only=True)
class SplitSource(Source):
    """Samples of one split or of several, by their ids.

    Attributes:
        directories: the folders of the splits.
    """

    locators: np.ndarray
    directories: tuple[str, ...]

    @classmethod
    def open(
        cls,
        directories: Sequence[str | Path],
        *,
        prefixes: Sequence[str] | None = None,
        selected: Sequence[np.ndarray] | None = None,
    ) -> SplitSource:
        """Opens the splits. Identities of the same name are the same one.

        Args:
            directories: folders of splits.
            prefixes: for each split what to put before the names of its identities, which keeps equal names apart.
            selected: for each split the ids to take, int64, ascending; left out, all of them.

        Raises:
            FileNotFoundError: if a split is missing.
            ValueError: if one is damaged.
        """
        codes: dict[str, int] = {}
        identities, locators = [], []
        columns: dict[str, list[np.ndarray | None]] = {"weights": [], "quality": []}
        seen: dict[str, str | Path] = {}
        for number, directory in enumerate(directories):
            index = ShardIndex.open(directory)
            if index.fingerprint in seen:
                raise ValueError(f"{directory} and {seen[index.fingerprint]} hold the same data; name it once")
            seen[index.fingerprint] = directory
            prefix = "" if prefixes is None else prefixes[number]
            label_codes = [codes.setdefault(prefix + name, len(codes)) for name in index.label_names]
            ids = np.arange(index.num_samples) if selected is None else selected[number]
            identities.append(np.asarray(label_codes, dtype=np.int32)[index.labels[ids]])
            place = np.empty(len(ids), dtype=_LOCATOR)
            place["split"], place["id"] = number, ids
            locators.append(place)
            for name, pieces in columns.items():
                column = getattr(index, name)
                pieces.append(None if column is None else column[ids])
        names, places = number_identities(list(codes), where=", ".join(map(str, directories)))
        sizes = [len(part) for part in identities]
        return cls(
            path=", ".join(map(str, directories)),
            identity_names=names,
            identities=places[np.concatenate(identities)],
            locators=np.concatenate(locators),
            weights=_join(columns["weights"], sizes, missing=1.0, what="weights"),
            quality=_join(columns["quality"], sizes, missing=None, what="quality"),
            directories=tuple(map(str, directories)),
        )

    def read(self, position: int) -> bytes:
        """The image of a sample, its checksum compared."""
        split, sample_id = self._place(position)
        return self._indexes[split].read(sample_id)

    def key(self, position: int) -> str:
        """The key in its data shard; of several splits with the number of the split in front."""
        split, sample_id = self._place(position)
        key = self._indexes[split].key(sample_id) or f"{self.identity_name(position)}/{sample_id}"
        return key if len(self.directories) == 1 else f"{split}/{key}"

    def describe(self, position: int) -> str:
        """The data shard, the sample id and the byte offset."""
        split, sample_id = self._place(position)
        return self._indexes[split].describe(sample_id)

    def count_bytes(self, positions: np.ndarray) -> int:
        """The sizes in the index."""
        places = self.locators[positions]
        sizes = (
            index.sizes[places["id"][places["split"] == number]].sum(dtype=np.int64)
            for number, index in enumerate(self._indexes)
        )
        return int(sum(sizes))

    @cached_property
    def _indexes(self) -> list[ShardIndex]:
        return [reopen_split(directory) for directory in self.directories]

    def _place(self, position: int) -> tuple[int, int]:
        split, sample_id = self.locators[position]
        return int(split), int(sample_id)

    def _files(self) -> Sequence[Path]:
        # A manifest holds the fingerprint of all the rest.
        return [Path(directory, MANIFEST) for directory in self.directories]


def reopen_split(directory: str | Path) -> ShardIndex:
    """Opens a split, but only once in a process as long as its manifest stays: its index is read whole to be checked.

    Raises:
        FileNotFoundError: if the split is missing.
        ValueError: if it is damaged.
    """
    return _open(str(directory), Path(directory, MANIFEST).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _open(directory: str, _manifest_time: int) -> ShardIndex:
    return ShardIndex.open(directory)


def _join(
    pieces: Sequence[np.ndarray | None], sizes: Sequence[int], *, missing: float | None, what: str
) -> np.ndarray | None:
    """One column for all splits, if any of them has it."""
    if all(piece is None for piece in pieces):
        return None
    if missing is None and any(piece is None for piece in pieces):
        raise ValueError(f"some of the splits have {what} and some have not; only splits alike in this can be merged")
    filled = [
        np.full(size, missing, dtype=np.float32) if piece is None else piece
        for piece, size in zip(pieces, sizes, strict=True)
    ]
    return np.concatenate(filled)
