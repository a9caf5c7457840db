"""The index beside the data shards: where each sample lies, what its label is, and whether it is still intact.

A split is a folder:

    shard-000000.tar ...   ordinary WebDataset tars: key.jpg (or .png, .webp, .bmp) and key.cls
    index.npy              one record a sample (`RECORD`), in shard order; memory-mapped
    label_names.json       name of the identity of each label
    manifest.json          format version, counts, shard names and byte sizes, fingerprint
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ShardIndex"]

FORMAT = "partialfc-split"
VERSION = 1
MANIFEST, INDEX, LABEL_NAMES = "manifest.json", "index.npy", "label_names.json"
RECORD = np.dtype([("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("crc32", "<u4")])
"""Byte offset of the image in its shard, label, image bytes and their crc32: 24 bytes a sample."""

_MAX_OPEN_SHARDS = 64  # Far below the usual limit of 1,024 open files, far above the lanes read at a time.


class ShardIndex:
    """The index of one split, opened for reading. Use `ShardIndex.open`.

    An index can be sent to another process, which opens it again. It is not meant to be shared by threads.

    Attributes:
        directory: the folder of the split.
        num_samples: number of samples; ids are [0, num_samples), in shard order.
        num_classes: number of identities; every label in [0, num_classes) has at least one sample.
        labels: int64 array [num_samples], memory-mapped.
        shard_paths: paths of the data shards.
        shard_sizes: samples in each data shard.
        shard_bytes: byte size of each data shard.
        fingerprint: hash of the index, the names and the manifest, as hexadecimal digits.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], records: np.ndarray) -> None:
        shards = manifest["shards"]
        self.directory = directory
        self.num_samples = int(manifest["num_samples"])
        self.num_classes = int(manifest["num_classes"])
        self.fingerprint = str(manifest["fingerprint"])
        self.shard_paths = [directory / shard["name"] for shard in shards]
        self.shard_sizes = [int(shard["num_samples"]) for shard in shards]
        self.shard_bytes = [int(shard["bytes"]) for shard in shards]
        self.labels = records["label"]
        self._records = records
        self._shard_ends = np.cumsum(self.shard_sizes)
        self._open_files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, directory: str | Path) -> ShardIndex:
        """Opens the split in a folder and checks it, so that damage shows before a training starts.

        Args:
            directory: the folder of a split, such as `faces/train`.

        Raises:
            FileNotFoundError: if the folder, its index or a data shard is missing.
            ValueError: if a file has another size than recorded, the index was changed, or labels have gaps.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        _check_shards(directory, manifest)
        if (fingerprint := compute_fingerprint(directory, manifest)) != manifest["fingerprint"]:
            raise ValueError(
                f"{directory}: the index has fingerprint {fingerprint[:16]}, but {MANIFEST} says "
                f"{str(manifest['fingerprint'])[:16]}; a file was changed or damaged: write the split again"
            )
        records = np.load(directory / INDEX, mmap_mode="r")
        _check_records(directory, manifest, records)
        return cls(directory, manifest, records)

    @cached_property
    def label_names(self) -> list[str]:
        """The name of the identity of each label; read on first use, as there may be millions."""
        names: list[str] = json.loads((self.directory / LABEL_NAMES).read_text(encoding="utf-8"))
        return names

    def read(self, sample_id: int) -> bytes:
        """The image file of a sample, as stored.

        Raises:
            IndexError: if the id is outside [0, num_samples).
            OSError: if the data shard cannot be read.
            ValueError: if the data shard ends too early or the bytes fail their checksum.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"{self.directory}: sample id {sample_id} is outside [0, {self.num_samples})")
        record = self._records[sample_id]
        size = int(record["size"])
        try:
            data = os.pread(self._file(self._shard_of(sample_id)), size, int(record["offset"]))
        except OSError as error:
            raise OSError(error.errno, f"{self.describe(sample_id)}: {error.strerror}") from error
        if len(data) != size:
            raise ValueError(f"{self.describe(sample_id)}: {size} bytes expected, but the file holds {len(data)}")
        if zlib.crc32(data) != int(record["crc32"]):
            raise ValueError(f"{self.describe(sample_id)}: the bytes do not match their crc32 checksum")
        return data

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages."""
        shard, offset = self.shard_paths[self._shard_of(sample_id)], int(self._records[sample_id]["offset"])
        return f"{shard}, sample {sample_id} at byte {offset}"

    @property
    def image_bytes(self) -> int:
        """Bytes of all images together, without the headers of the tars."""
        return int(self._records["size"].sum(dtype=np.int64))

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._shard_ends, sample_id, side="right"))

    def _file(self, shard: int) -> int:
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
        else:
            self._open_files[shard] = os.open(self.shard_paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open_files) > _MAX_OPEN_SHARDS:
                os.close(self._open_files.popitem(last=False)[1])
        return self._open_files[shard]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex.open, (self.directory,)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open_files", {}).values():
            os.close(descriptor)


def compute_fingerprint(directory: Path, manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest (without its fingerprint), the index and the label names of a split."""
    described = {key: value for key, value in manifest.items() if key != "fingerprint"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in (INDEX, LABEL_NAMES):
        with open(directory / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder; expected a split written by `partialfc data`")
    for name in (MANIFEST, INDEX, LABEL_NAMES):
        if not (directory / name).is_file():
            inside = [split.name for split in sorted(directory.iterdir()) if (split / MANIFEST).is_file()]
            hint = f"; it holds the splits {inside}, name one of them" if inside else ""
            raise FileNotFoundError(f"{directory}: {name} is missing, so this is not a split{hint}")
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        kind = (manifest["format"], manifest["version"])
        _ = manifest["num_samples"], manifest["num_classes"], manifest["fingerprint"]
        _ = [(shard["name"], shard["bytes"], shard["num_samples"]) for shard in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / MANIFEST}: not a manifest of a split: {error!r}") from error
    if kind != (FORMAT, VERSION):
        raise ValueError(f"{directory / MANIFEST}: format {kind}, but this version reads {(FORMAT, VERSION)}")
    return manifest


def _check_shards(directory: Path, manifest: dict[str, Any]) -> None:
    for shard in manifest["shards"]:
        path = directory / shard["name"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the data shard is missing, though {MANIFEST} lists it")
        if (found := path.stat().st_size) != shard["bytes"]:
            raise ValueError(
                f"{path}: the data shard has {found} bytes, but {MANIFEST} says {shard['bytes']}; "
                "it was cut off or changed: copy or write it again"
            )


def _check_records(directory: Path, manifest: dict[str, Any], records: np.ndarray) -> None:
    num_samples, num_classes = manifest["num_samples"], manifest["num_classes"]
    in_shards = sum(shard["num_samples"] for shard in manifest["shards"])
    if records.dtype != RECORD or records.shape != (num_samples,) or in_shards != num_samples:
        raise ValueError(
            f"{directory / INDEX}: {records.shape} records of {records.dtype} for {num_samples} samples, of which "
            f"the shards claim {in_shards}; write the split again"
        )
    check_labels(records["label"], num_classes, where=str(directory))


def check_labels(labels: np.ndarray, num_classes: int, *, where: str) -> None:
    """Refuses labels that do not cover [0, num_classes).

    Raises:
        ValueError: naming the first label that is outside, or that has no sample.
    """
    if len(labels) == 0:
        raise ValueError(f"{where}: there is no sample")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{where}: label {low if low < 0 else high} is outside [0, {num_classes})")
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(missing):
        raise ValueError(
            f"{where}: {len(missing)} of {num_classes} labels have no sample, first {missing[0]}; labels must cover "
            f"[0, {num_classes}) without gaps: number the identities anew"
        )
