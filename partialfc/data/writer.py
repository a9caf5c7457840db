"""Writes splits: WebDataset tars and, in the same pass, their index."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from partialfc.data.index import (
    FORMAT,
    INDEX,
    LABEL_NAMES,
    MANIFEST,
    RECORD,
    VERSION,
    check_labels,
    compute_fingerprint,
)

__all__ = ["SplitWriter", "staged_directory"]


@contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and is removed otherwise.

    Raises:
        FileExistsError: if `target` exists and is not an empty folder.
    """
    target = Path(target)
    if target.is_symlink():
        raise FileExistsError(f"{target}: is a symbolic link; name the folder itself")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: already there and not an empty folder; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


class SplitWriter:
    """Writes one split into an existing folder. A context manager; the index is written when the block ends well.

    A split without samples leaves the folder empty.

    The files are a function of what is added: no times, user names or host names are stored.

    Args:
        directory: an existing, empty folder.
        samples_per_shard: samples in each data shard; the last may have fewer.

    Raises:
        ValueError: if samples_per_shard < 1, and at the end if `label_names` and the labels do not match.
    """

    def __init__(self, directory: Path, *, samples_per_shard: int) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}, but must be at least 1")
        self.label_names: list[str] = []
        self._directory = directory
        self._samples_per_shard = samples_per_shard
        self._shards: list[dict[str, Any]] = []
        self._records: list[np.ndarray] = []
        self._shard_records: list[tuple[int, int, int, int]] = []
        self._tar: TarWriter | None = None

    def add(self, key: str, image: bytes, *, extension: str, label: int) -> None:
        """Appends a sample.

        Args:
            key: name of the sample in the tar; unique, and without a dot in its last part.
            image: the image file.
            extension: of the image file, without a dot.
            label: its label.
        """
        assert "." not in key.rpartition("/")[2], key
        if self._tar is None:
            name = f"shard-{len(self._shards):06d}.tar"
            self._shards.append({"name": name})
            # PAX holds names of any length and script; short ASCII names look the same in all formats.
            self._tar = TarWriter(str(self._directory / name), mtime=0.0, format="PAX_FORMAT")
        self._tar.write({"__key__": key, extension: image})
        # The stream stands behind the image, which was padded to a multiple of the block size.
        offset = self._tar.tarstream.offset - -(-len(image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._tar.write({"__key__": key, "cls": str(label).encode()})
        self._shard_records.append((offset, label, len(image), zlib.crc32(image)))
        if len(self._shard_records) == self._samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        shard = self._shards[-1]
        shard["bytes"] = (self._directory / shard["name"]).stat().st_size
        shard["num_samples"] = len(self._shard_records)
        self._records.append(np.array(self._shard_records, dtype=RECORD))
        self._shard_records = []

    def _finish(self) -> None:
        self._finish_shard()
        if not self._shards:
            return
        records = np.concatenate([np.zeros(0, RECORD), *self._records])
        check_labels(records["label"], len(self.label_names), where=str(self._directory))
        np.save(self._directory / INDEX, records)
        _write_json(self._directory / LABEL_NAMES, self.label_names)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": len(records),
            "num_classes": len(self.label_names),
            "shards": self._shards,
        }
        manifest["fingerprint"] = compute_fingerprint(self._directory, manifest)
        _write_json(self._directory / MANIFEST, manifest)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()


def _write_json(path: Path, value: dict[str, Any] | Sequence[str]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
