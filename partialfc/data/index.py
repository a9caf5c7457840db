"""The index of a split, opened for reading: where samples lie, their labels, and whether they are still intact."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.data.errors import SampleError
from partialfc.data.remote import CacheSettings
from partialfc.data.split_format import (
    BY_LABEL,
    INDEX,
    LABEL_NAMES,
    LABEL_STARTS,
    check_split,
    read_manifest,
    shard_location,
)
from partialfc.data.storage import Storage, open_storage

__all__ = ["ShardIndex"]

_HEADERS_READ_BYTES = 1 << 15  # what a name of any usual length, as PAX stores it, takes in front of a file


class ShardIndex:
    """The index of one split, opened for reading. Use `ShardIndex.open`.

    An index can be sent to another process, which opens its files again. It is not meant to be shared by threads.

    Attributes:
        directory: the folder of the split.
        num_samples: number of samples; ids are [0, num_samples), in shard order.
        num_classes: number of identities; every label in [0, num_classes) has at least one sample.
        labels: int64 [num_samples], memory-mapped.
        sizes: uint32 [num_samples], bytes of each image, memory-mapped.
        weights: float32 [num_samples], memory-mapped, or None if the set has no weights.
        quality: float32 [num_samples], memory-mapped, or None if the set has no quality.
        by_label: sample ids grouped by label, ascending, memory-mapped; those of label c are
            by_label[label_starts[c] : label_starts[c + 1]].
        label_starts: int64 [num_classes + 1], memory-mapped.
        shard_paths: paths or URLs of the data shards.
        shard_sizes: samples in each data shard.
        shard_bytes: byte size of each data shard.
        labels_in_shards: whether the .cls members of the tars hold these labels.
        fingerprint: hash of the content, as hexadecimal digits; the same wherever the data shards lie.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], storage: Storage) -> None:
        shards = manifest["shards"]
        self.directory = directory
        self.num_samples = int(manifest["num_samples"])
        self.num_classes = int(manifest["num_classes"])
        self.fingerprint = str(manifest["fingerprint"])
        self.labels_in_shards = bool(manifest["labels_in_shards"])
        self.shard_paths = [shard_location(directory, shard["name"]) for shard in shards]
        self.shard_sizes = [int(shard["num_samples"]) for shard in shards]
        self.shard_bytes = [int(shard["bytes"]) for shard in shards]
        self.label_starts = np.load(directory / LABEL_STARTS, mmap_mode="r")
        self.by_label = np.load(directory / BY_LABEL, mmap_mode="r")
        self._records = np.load(directory / INDEX, mmap_mode="r")
        self.labels = self._records["label"]
        self.sizes = self._records["size"]
        fields = self._records.dtype.names or ()
        self.weights = self._records["weight"] if "weight" in fields else None
        self.quality = self._records["quality"] if "quality" in fields else None
        self._shard_ends = np.cumsum(self.shard_sizes)
        self._manifest, self._storage = manifest, storage

    @classmethod
    def open(
        cls, directory: str | Path, *, cache: CacheSettings | None = None, check_shards: bool = True
    ) -> ShardIndex:
        """Opens the split in a folder and checks it, so that damage shows before a training starts.

        Args:
            directory: the folder of a split, such as `faces/train`.
            cache: where pieces of remote data shards are kept; left out, in the usual folder of this user.
            check_shards: whether to look at the data shards: that they are there, of the size recorded, and can be
                read in any order. What only streams them need not.

        Raises:
            FileNotFoundError: if the folder, its index or a data shard is missing.
            ValueError: if a file has another size than recorded, the index was changed, or labels have gaps.
            DataError: if a remote data shard cannot be reached.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        paths = [shard_location(directory, shard["name"]) for shard in manifest["shards"]]
        storage = open_storage(paths, [shard["bytes"] for shard in manifest["shards"]], cache=cache)
        if check_shards:
            storage.check()
        check_split(directory, manifest)
        return cls(directory, manifest, storage)

    @cached_property
    def label_names(self) -> list[str]:
        """The name of the identity of each label; read on first use, as there may be millions."""
        names: list[str] = json.loads((self.directory / LABEL_NAMES).read_text(encoding="utf-8"))
        return names

    @property
    def storage(self) -> Storage:
        """What reads the data shards."""
        return self._storage

    def read(self, sample_id: int) -> bytes:
        """The image file of a sample, as stored.

        Raises:
            IndexError: if the id is outside [0, num_samples).
            SampleError: if the bytes cannot be read, or are not those that were indexed.
            DataError: if the data shard itself cannot be used.
        """
        (data,) = self.read_many(np.array([sample_id]))
        if isinstance(data, SampleError):
            raise data
        return data

    def read_many(self, sample_ids: np.ndarray | Sequence[int]) -> list[bytes | SampleError]:
        """The image files of some samples, or in their place what is wrong with them.

        Args:
            sample_ids: int64 [b].

        Raises:
            IndexError: if an id is outside [0, num_samples).
            DataError: if a data shard itself cannot be used.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        shards, offsets, sizes = self.locate(ids)
        checksums = self._records["crc32"][ids].tolist()
        pieces = self._storage.read_many(shards.tolist(), offsets.tolist(), sizes.tolist())
        found: list[bytes | SampleError] = []
        for number, (data, checksum) in enumerate(zip(pieces, checksums, strict=True)):
            if isinstance(data, SampleError):
                found.append(SampleError(data.reason, f"{self.describe(int(ids[number]))}: {data}"))
            elif zlib.crc32(data) != checksum:
                where = self.describe(int(ids[number]))
                found.append(SampleError("checksum", f"{where}: the bytes do not match their crc32 checksum"))
            else:
                found.append(data)
        return found

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where samples lie: (number of the data shard, byte offset, bytes), int64 [b] each.

        Raises:
            IndexError: if an id is outside [0, num_samples).
        """
        if len(sample_ids) and not (0 <= sample_ids.min() and sample_ids.max() < self.num_samples):
            wrong = sample_ids[(sample_ids < 0) | (sample_ids >= self.num_samples)][0]
            raise IndexError(f"{self.directory}: sample id {wrong} is outside [0, {self.num_samples})")
        records = self._records[sample_ids]
        shards = np.searchsorted(self._shard_ends, sample_ids, side="right")
        return shards, records["offset"], records["size"].astype(np.int64)

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages."""
        shards, offsets, _ = self.locate(np.array([sample_id]))
        key = self.key(sample_id)
        named = f" (key {key})" if key else ""
        return f"{self.shard_paths[int(shards[0])]}, sample {sample_id}{named} at byte {int(offsets[0])}"

    def key(self, sample_id: int) -> str | None:
        """The key of a sample in its tar: its name without extension. None if the tar cannot be read there."""
        shards, offsets, _ = self.locate(np.array([sample_id]))
        offset = int(offsets[0])
        length = min(offset, _HEADERS_READ_BYTES)
        try:
            before = self._storage.read(int(shards[0]), offset - length, length)
        except (OSError, SampleError):
            return None
        name = _name_in_front(before)
        if name is None:
            return None
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def image_bytes(self) -> int:
        """Bytes of all images together, without the headers of the tars."""
        return int(self.sizes.sum(dtype=np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.directory, self._manifest, self._storage)


def _name_in_front(before: bytes) -> str | None:
    """The name in the tar header that ends these bytes, or in the PAX or GNU header in front of that."""
    block = tarfile.BLOCKSIZE
    try:
        name = tarfile.TarInfo.frombuf(before[-block:], "utf-8", "surrogateescape").name
    except tarfile.HeaderError:
        return None
    for start in range(len(before) - 2 * block, -1, -block):
        kind = before[start + 156 : start + 157]
        if kind not in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            continue
        try:
            header = tarfile.TarInfo.frombuf(before[start : start + block], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        if start + block + -(-header.size // block) * block != len(before) - block:
            continue
        content = before[start + block : start + block + header.size]
        if kind == tarfile.GNUTYPE_LONGNAME:
            return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        _, found, rest = content.partition(b" path=")
        return rest.partition(b"\n")[0].decode("utf-8", "surrogateescape") if found else name
    return name
