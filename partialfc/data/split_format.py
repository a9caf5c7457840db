"""The files of a split, and the checks that they belong together.

A split is a folder:

    shard-000000.tar ...   ordinary WebDataset tars: key.jpg (or .png, .webp, .bmp) and key.cls
    index.npy              one record a sample (`RECORD`), in shard order
    by_label.npy           the sample ids, grouped by label
    label_starts.npy       where in by_label.npy the group of each label begins, and its end
    label_names.json       name of the identity of each label
    manifest.json          format version, counts, names and byte sizes of the data shards, fingerprint

The data shards may lie elsewhere: their names may be absolute paths, or URLs. The arrays are memory-mapped by their
readers, so that all processes of a machine share one copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "BESIDE_MANIFEST",
    "BY_LABEL",
    "FORMAT",
    "INDEX",
    "LABEL_NAMES",
    "LABEL_STARTS",
    "MANIFEST",
    "RECORD",
    "VERSION",
    "check_labels",
    "check_split",
    "compute_fingerprint",
    "read_manifest",
    "record_type",
    "shard_location",
    "write_split_files",
]

FORMAT = "partialfc-split"
VERSION = 2
MANIFEST, INDEX, LABEL_NAMES = "manifest.json", "index.npy", "label_names.json"
BY_LABEL, LABEL_STARTS = "by_label.npy", "label_starts.npy"
BESIDE_MANIFEST = (INDEX, BY_LABEL, LABEL_STARTS, LABEL_NAMES)

RECORD = np.dtype([("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("crc32", "<u4")])
"""Byte offset of the image in its shard, label, image bytes and their crc32: 24 bytes a sample."""

_HASHED_AT_ONCE_BYTES, _READ_AT_ONCE_BYTES = 1 << 26, 1 << 20  # Pieces are hashed by all cores.
_OPTIONAL_FIELDS = ("weight", "quality")


def record_type(*, weight: bool = False, quality: bool = False) -> np.dtype[Any]:
    """`RECORD`, with a float32 weight for sampling and a float32 quality where a set has them."""
    wanted = [name for name, there in zip(_OPTIONAL_FIELDS, (weight, quality), strict=True) if there]
    return np.dtype(RECORD.descr + [(name, "<f4") for name in wanted])


def shard_location(directory: Path, name: str) -> str:
    """The path or URL of a data shard that a manifest names."""
    return name if "://" in name else str(directory / name)


def write_split_files(
    directory: Path,
    records: np.ndarray,
    *,
    label_names: Sequence[str],
    shards: Sequence[dict[str, Any]],
    labels_in_shards: bool = True,
) -> None:
    """Writes everything of a split but its data shards.

    Args:
        directory: an existing folder.
        records: [N] of a `record_type`, in shard order.
        label_names: name of the identity of each label.
        shards: of each data shard its name (relative to the folder, absolute, or a URL), bytes and num_samples.
        labels_in_shards: whether the .cls members of the tars hold the labels of the records.

    Raises:
        ValueError: if the labels do not cover [0, len(label_names)), or a weight or quality is not finite.
    """
    num_samples, num_classes = len(records), len(label_names)
    assert sum(shard["num_samples"] for shard in shards) == num_samples, directory
    counts = check_labels(records["label"], num_classes, where=str(directory))
    for name in _OPTIONAL_FIELDS:
        if name in (records.dtype.names or ()) and len(bad := np.flatnonzero(~np.isfinite(records[name]))):
            raise ValueError(f"{directory}: {name} of sample {bad[0]} is {records[name][bad[0]]}, but must be finite")
    if "weight" in (records.dtype.names or ()) and len(bad := np.flatnonzero(records["weight"] < 0)):
        raise ValueError(
            f"{directory}: weight of sample {bad[0]} is {records['weight'][bad[0]]}, but must be at least 0"
        )
    np.save(directory / INDEX, records)
    narrow = np.uint32 if num_samples <= 1 << 32 else np.int64
    np.save(directory / BY_LABEL, np.argsort(records["label"], kind="stable").astype(narrow))
    np.save(directory / LABEL_STARTS, np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()]))
    _write_json(directory / LABEL_NAMES, list(label_names))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": num_samples,
        "num_classes": num_classes,
        "labels_in_shards": labels_in_shards,
        "shards": list(shards),
    }
    manifest["fingerprint"] = compute_fingerprint(directory, manifest)
    _write_json(directory / MANIFEST, manifest)


def compute_fingerprint(directory: Path, manifest: dict[str, Any]) -> str:
    """SHA-256 over what a split holds: index, names, and the sizes of its data shards, wherever those lie."""
    described = {key: value for key, value in manifest.items() if key not in ("fingerprint", "shards")}
    described["shards"] = [(shard["bytes"], shard["num_samples"]) for shard in manifest["shards"]]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    pieces = [
        (directory / name, start)
        for name in BESIDE_MANIFEST
        for start in range(0, (directory / name).stat().st_size, _HASHED_AT_ONCE_BYTES)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in threads.map(lambda piece: _digest(*piece), pieces):
            digest.update(part)
    return digest.hexdigest()


def _digest(path: Path, start: int) -> bytes:
    """SHA-256 of one piece of a file."""
    digest, rest = hashlib.sha256(), _HASHED_AT_ONCE_BYTES
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while rest and (data := file.read(min(rest, _READ_AT_ONCE_BYTES))):
            digest.update(data)
            rest -= len(data)
    return digest.digest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a split.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the manifest is none, or of another version.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder; expected a split written by `partialfc data`")
    if not (directory / MANIFEST).is_file():
        inside = [split.name for split in sorted(directory.iterdir()) if (split / MANIFEST).is_file()]
        hint = f"; it holds the splits {inside}, name one of them" if inside else ""
        raise FileNotFoundError(f"{directory}: {MANIFEST} is missing, so this is not a split{hint}")
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        kind = (manifest["format"], manifest["version"])
        _ = manifest["num_samples"], manifest["num_classes"], manifest["fingerprint"]
        _ = [(shard["name"], shard["bytes"], shard["num_samples"]) for shard in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / MANIFEST}: not a manifest of a split: {error!r}") from error
    if kind != (FORMAT, VERSION):
        raise ValueError(
            f"{directory / MANIFEST}: format {kind}, but this version reads {(FORMAT, VERSION)}; index its tars anew "
            f"with `partialfc data index '{directory}/*.tar'`"
        )
    for name in BESIDE_MANIFEST:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: {name} is missing, so this is not a split")
    return manifest


def check_split(directory: Path, manifest: dict[str, Any]) -> None:
    """Checks index, names and fingerprint against the manifest; the data shards are not looked at.

    Raises:
        ValueError: if a file was changed, does not fit the others, or labels have gaps.
    """
    if (fingerprint := compute_fingerprint(directory, manifest)) != manifest["fingerprint"]:
        raise ValueError(
            f"{directory}: the index has fingerprint {fingerprint[:16]}, but {MANIFEST} says "
            f"{str(manifest['fingerprint'])[:16]}; a file was changed or damaged: write the split again"
        )
    records = np.load(directory / INDEX, mmap_mode="r")
    num_samples, num_classes = manifest["num_samples"], manifest["num_classes"]
    in_shards = sum(shard["num_samples"] for shard in manifest["shards"])
    known = {record_type(weight=weight, quality=quality) for weight in (False, True) for quality in (False, True)}
    if records.dtype not in known or records.shape != (num_samples,) or in_shards != num_samples:
        raise ValueError(
            f"{directory / INDEX}: {records.shape} records of {records.dtype} for {num_samples} samples, of which "
            f"the shards claim {in_shards}; write the split again"
        )
    counts = np.diff(np.load(directory / LABEL_STARTS, mmap_mode="r"))
    if len(counts) != num_classes or counts.sum() != num_samples:
        raise ValueError(
            f"{directory / LABEL_STARTS}: {counts.sum()} samples of {len(counts)} labels, but {MANIFEST} says "
            f"{num_samples} of {num_classes}; write the split again"
        )
    _check_no_gaps(counts, where=str(directory))


def check_labels(labels: np.ndarray, num_classes: int, *, where: str) -> np.ndarray:
    """Refuses labels that do not cover [0, num_classes).

    Returns:
        The number of samples of each label, int64 [num_classes].

    Raises:
        ValueError: naming the first label that is outside, or that has no sample.
    """
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{where}: label {low if low < 0 else high} is outside [0, {num_classes})")
    counts = np.bincount(labels, minlength=num_classes)
    _check_no_gaps(counts, where=where)
    return counts


def _check_no_gaps(counts: np.ndarray, *, where: str) -> None:
    if counts.sum() == 0:
        raise ValueError(f"{where}: there is no sample")
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise ValueError(
            f"{where}: {len(missing)} of {len(counts)} labels have no sample, first {missing[0]}; labels must cover "
            f"[0, {len(counts)}) without gaps: number the identities anew"
        )


def _write_json(path: Path, value: dict[str, Any] | Sequence[str]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
