"""Several data sets as one: sample ids and labels laid one after the other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.storage import Storage

__all__ = ["Column", "JoinedColumn", "JoinedIndex"]


class Column(Protocol):
    """One number a row, read where it is asked for: an array, a memory map, or several of them joined."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """The values at an int, a slice or an int64 array of rows."""


class JoinedColumn:
    """Columns laid one after the other, without a copy of them.

    Args:
        parts: arrays or memory maps; None for a part that has no such column.
        dtype: of the values.
        lengths: rows to take from the front of each part.
        added: what to add to the values of each part.
        missing: value of the rows of parts that are None.
    """

    def __init__(
        self,
        parts: Sequence[Column | None],
        dtype: Any,
        *,
        lengths: Sequence[int],
        added: Sequence[int] | None = None,
        missing: float = 0,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self._parts = list(parts)
        self._added = [0] * len(self._parts) if added is None else list(added)
        self._missing = missing
        self._starts = _starts(lengths)
        self.shape = (int(self._starts[-1]),)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        """The values at some rows, in the shape of `rows`: an int, a slice or an array of int64.

        Raises:
            IndexError: if a row is outside [0, len).
        """
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= (low := rows.min()) <= (high := rows.max()) < len(self):
            raise IndexError(f"row {low if low < 0 else high} is outside [0, {len(self)})")
        values = np.full(rows.shape, self._missing, dtype=self.dtype)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            part = self._parts[number]
            if part is not None:
                here = numbers == number
                values[here] = part[rows[here] - self._starts[number]].astype(self.dtype) + self._added[number]
        return values[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)


class JoinedIndex:
    """Several indexes as one, with what a `ShardIndex` has. Labels of different parts are different identities.

    Args:
        indexes: the parts, two or more.

    Attributes:
        parts: the indexes.
        first_ids: the id of the first sample of each part.
        directory: the folder that all parts lie in.
        num_samples: number of samples; ids are [0, num_samples), part by part.
        num_classes: number of identities.
        fingerprint: hash of the fingerprints of the parts, in their order.
        labels, sizes, by_label, label_starts: as those of `ShardIndex`, gathered from the parts when asked for.
        weights, quality: float32, likewise, or None if no part has them; where one lacks them, 1.0 and NaN.
        shard_paths, shard_sizes, shard_bytes: of all data shards.
        labels_in_shards: False, as the .cls members of the tars hold the labels of their own part.

    Raises:
        ValueError: if there are fewer than two parts, or two hold the same data.
    """

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        if len(indexes) < 2:
            raise ValueError(
                f"JoinedIndex: {len(indexes)} data sets given, but it joins two or more; use one by itself"
            )
        by_fingerprint: dict[str, Path] = {}
        for part in indexes:
            if part.fingerprint in by_fingerprint:
                raise ValueError(
                    f"{part.directory} and {by_fingerprint[part.fingerprint]} are the same data set, and its "
                    "identities would get two labels each; name it once, with a larger share"
                )
            by_fingerprint[part.fingerprint] = part.directory
        self.parts = list(indexes)
        samples, classes = [part.num_samples for part in self.parts], [part.num_classes for part in self.parts]
        self._id_starts, label_starts = _starts(samples), _starts(classes)
        self._shard_starts = _starts([len(part.shard_paths) for part in self.parts])
        self.first_ids: list[int] = self._id_starts[:-1].tolist()
        self.directory = Path(os.path.commonpath([part.directory.absolute() for part in self.parts]))
        self.num_samples, self.num_classes = int(self._id_starts[-1]), int(label_starts[-1])
        self.labels_in_shards = False
        self.fingerprint = hashlib.sha256("\n".join(part.fingerprint for part in self.parts).encode()).hexdigest()
        self.shard_paths = [path for part in self.parts for path in part.shard_paths]
        self.shard_sizes = [size for part in self.parts for size in part.shard_sizes]
        self.shard_bytes = [size for part in self.parts for size in part.shard_bytes]
        first_labels = label_starts[:-1].tolist()
        self.labels = self._join("labels", np.int64, samples, added=first_labels)
        self.sizes = self._join("sizes", np.uint32, samples)
        self.by_label = self._join("by_label", np.int64, samples, added=self.first_ids)
        # The last entry of each part is the first of the next; that of the last part ends them all.
        classes[-1] += 1
        self.label_starts = self._join("label_starts", np.int64, classes, added=self.first_ids)
        self.weights = self._join_optional("weights", samples, missing=1.0)
        self.quality = self._join_optional("quality", samples, missing=float("nan"))

    @cached_property
    def label_names(self) -> list[str]:
        """The name of the identity of each label. If parts share one, all begin with the number of their part: "0/"."""
        names = [part.label_names for part in self.parts]
        if len(set().union(*names)) < self.num_classes:
            names = [[f"{number}/{name}" for name in part] for number, part in enumerate(names)]
        return [name for part in names for name in part]

    @property
    def storage(self) -> Storage:
        """What reads the data shards."""
        return _JoinedStorage([part.storage for part in self.parts], self._shard_starts)

    @property
    def image_bytes(self) -> int:
        """Bytes of all images together."""
        return sum(part.image_bytes for part in self.parts)

    def read(self, sample_id: int) -> bytes:
        """The image file of a sample; see `ShardIndex.read`, also for what is raised."""
        part, own_id = self._part_of(sample_id)
        return part.read(own_id)

    def read_many(self, sample_ids: np.ndarray) -> list[bytes | SampleError]:
        """The image files of int64 sample ids [b], in their order; see `ShardIndex.read_many`."""
        found: list[bytes | SampleError] = [b""] * len(sample_ids)
        for number, places, own_ids in self._by_part(sample_ids):
            for place, data in zip(places.tolist(), self.parts[number].read_many(own_ids), strict=True):
                found[place] = data
        return found

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the image files of int64 sample ids [b] lie: data shard, byte offset and bytes, int64 [b] each."""
        located = np.zeros((3, len(sample_ids)), dtype=np.int64)
        for number, places, own_ids in self._by_part(sample_ids):
            located[:, places] = self.parts[number].locate(own_ids)
            located[0, places] += self._shard_starts[number]
        shards, offsets, sizes = located
        return shards, offsets, sizes

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages; it is numbered as in its own data set."""
        part, own_id = self._part_of(sample_id)
        return part.describe(own_id)

    def key(self, sample_id: int) -> str | None:
        """The key of a sample in its tar; see `ShardIndex.key`."""
        part, own_id = self._part_of(sample_id)
        return part.key(own_id)

    def _join(self, name: str, dtype: Any, lengths: list[int], *, added: list[int] | None = None) -> JoinedColumn:
        return JoinedColumn([getattr(part, name) for part in self.parts], dtype, lengths=lengths, added=added)

    def _join_optional(self, name: str, lengths: list[int], *, missing: float) -> JoinedColumn | None:
        columns = [getattr(part, name) for part in self.parts]
        if all(column is None for column in columns):
            return None
        return JoinedColumn(columns, np.float32, lengths=lengths, missing=missing)

    def _part_of(self, sample_id: int) -> tuple[ShardIndex, int]:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"{self.directory}: sample id {sample_id} is outside [0, {self.num_samples})")
        number = int(np.searchsorted(self._id_starts, sample_id, side="right")) - 1
        return self.parts[number], sample_id - self.first_ids[number]

    def _by_part(self, sample_ids: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(part, places in `sample_ids`, ids in that part) for each part that is asked for."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        for sample_id in ids[(ids < 0) | (ids >= self.num_samples)]:
            self._part_of(int(sample_id))  # Raises.
        numbers = np.searchsorted(self._id_starts, ids, side="right") - 1
        groups = [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
        return [(number, places, ids[places] - self.first_ids[number]) for number, places in groups]

    def __reduce__(self) -> tuple[Callable[..., JoinedIndex], tuple[list[ShardIndex]]]:
        return JoinedIndex, (self.parts,)


class _JoinedStorage:
    """The storages of several indexes as one, their shards numbered one after the other. See `Storage`."""

    def __init__(self, parts: Sequence[Storage], shard_starts: np.ndarray) -> None:
        self._parts, self._shard_starts = list(parts), shard_starts

    def check(self) -> None:
        for part in self._parts:
            part.check()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        part, own_shard = self._part_of(shard)
        return part.read(own_shard, offset, size)

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
    ) -> list[bytes | SampleError]:
        found: list[bytes | SampleError] = [b""] * len(shards)
        numbers = np.searchsorted(self._shard_starts, shards, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number).tolist()
            first = int(self._shard_starts[number])
            pieces = self._parts[number].read_many(
                [shards[place] - first for place in places],
                [offsets[place] for place in places],
                [sizes[place] for place in places],
            )
            for place, data in zip(places, pieces, strict=True):
                found[place] = data
        return found

    def warm(self, shard: int, start: int, stop: int) -> None:
        part, own_shard = self._part_of(shard)
        part.warm(own_shard, start, stop)

    def _part_of(self, shard: int) -> tuple[Storage, int]:
        number = int(np.searchsorted(self._shard_starts, shard, side="right")) - 1
        return self._parts[number], shard - int(self._shard_starts[number])


def _starts(lengths: Sequence[int]) -> np.ndarray:
    """int64 [len + 1]: where each part begins, and the end."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
