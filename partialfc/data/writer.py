"""Writes splits: WebDataset tars and, in the same pass, their index."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from partialfc.data.split_format import record_type, write_split_files

__all__ = ["ShardWriter", "SplitWriter", "check_target", "relabel_shard", "resumable_directory", "staged_directory"]

JOB = "job.json"
"""In an unfinished folder: what it is to become."""


def check_target(target: str | Path) -> Path:
    """Refuses a target that something lies at.

    Raises:
        FileExistsError: if `target` exists and is not an empty folder.
    """
    target = Path(target)
    if target.is_symlink():
        raise FileExistsError(f"{target}: is a symbolic link; name the folder itself")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: already there and not an empty folder; remove it or choose another name")
    return target


@contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and is removed otherwise.

    Raises:
        FileExistsError: if `target` exists and is not an empty folder.
    """
    target = check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def resumable_directory(target: str | Path, job: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well, and otherwise stays to be gone on with.

    If nothing was left in it but empty folders, it is removed.

    Args:
        target: the folder to make.
        job: what makes the folder what it is to become. JSON; what it must be equal in to be gone on with.

    Raises:
        FileExistsError: if `target` exists and is not an empty folder.
        BlockingIOError: if another process works at the same target.
        ValueError: if what was left behind is of another job.
    """
    target = check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.partial"
    staging.mkdir(exist_ok=True)
    with open(staging / JOB, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"{staging}: another process is at work on {target}") from error
        file.seek(0)
        if not _is_same_job(staging, file.read(), job):
            _empty(staging)
            file.truncate(0)
            json.dump(job, file)
            file.flush()
        try:
            yield staging
            (staging / JOB).unlink()
            staging.rename(target)
        except BaseException:
            if not any(path.is_file() and path.name != JOB for path in staging.rglob("*")):
                shutil.rmtree(staging, ignore_errors=True)
            raise


def _is_same_job(staging: Path, text: str, job: dict[str, Any]) -> bool:
    """Whether what lies there is of this job. A file that is not whole was just begun, or removed at the very end."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    if found != job:
        differing = [name for name in job if found.get(name) != job[name]]
        changes = ", ".join(f"{name} was {found.get(name)!r} and now is {job[name]!r}" for name in differing)
        raise ValueError(
            f"{staging}: holds what was finished of another job: {changes}; give the command as it was, or remove "
            "that folder to begin anew"
        )
    return True


def _empty(staging: Path) -> None:
    """Removes all but the description of the job."""
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOB:
            path.unlink()


class ShardWriter:
    """Writes one data shard. It is only whole once `close` has returned.

    Args:
        path: the tar to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        # PAX holds names of any length and script; short ASCII names look the same in all formats.
        self._tar = TarWriter(self._file, mtime=0, format="PAX_FORMAT")
        self._records: list[tuple[float, ...]] = []
        self._optional: tuple[bool, bool] | None = None

    def __len__(self) -> int:
        return len(self._records)

    def add(
        self,
        key: str,
        image: bytes,
        *,
        extension: str,
        label: int,
        weight: float | None = None,
        quality: float | None = None,
    ) -> None:
        """Appends a sample; see `SplitWriter.add`."""
        assert "." not in key.rpartition("/")[2], key
        optional = (weight is not None, quality is not None)
        assert self._optional in (None, optional), f"{key}: all samples have a weight and a quality, or none"
        self._optional = optional
        self._tar.write({"__key__": key, extension: image})
        # The stream stands behind the image, which was padded to a multiple of the block size.
        offset = self._tar.tarstream.offset - _padded(len(image))
        self._tar.write({"__key__": key, "cls": str(label).encode()})
        numbers = [number for number in (weight, quality) if number is not None]
        self._records.append((offset, label, len(image), zlib.crc32(image), *numbers))

    def close(self) -> tuple[np.ndarray, int]:
        """Ends the tar and hands it to the disk; returns its records, [n] of a `record_type`, and its bytes."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        weight, quality = self._optional or (False, False)
        records = np.array(self._records, dtype=record_type(weight=weight, quality=quality))
        return records, self._path.stat().st_size

    def abort(self) -> None:
        """Closes the file, which is not whole, also when the disk is full."""
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()


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
        self._shard: ShardWriter | None = None

    def add(
        self,
        key: str,
        image: bytes,
        *,
        extension: str,
        label: int,
        weight: float | None = None,
        quality: float | None = None,
    ) -> None:
        """Appends a sample.

        Args:
            key: name of the sample in the tar; unique, and without a dot in its last part.
            image: the image file.
            extension: of the image file, without a dot.
            label: its label.
            weight: its weight for sampling; all samples have one, or none.
            quality: its quality; likewise.
        """
        if self._shard is None:
            name = f"shard-{len(self._shards):06d}.tar"
            self._shards.append({"name": name})
            self._shard = ShardWriter(self._directory / name)
        self._shard.add(key, image, extension=extension, label=label, weight=weight, quality=quality)
        if len(self._shard) == self._samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        records, num_bytes = self._shard.close()
        self._shard = None
        self._shards[-1].update(bytes=num_bytes, num_samples=len(records))
        self._records.append(records)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_shard()
            if self._shards:
                records = np.concatenate(self._records)
                write_split_files(self._directory, records, label_names=self.label_names, shards=self._shards)
        elif self._shard is not None:
            self._shard.abort()


def relabel_shard(path: Path, records: np.ndarray, labels: np.ndarray) -> None:
    """Writes other labels into a data shard of ours, in place: the bytes become those of a shard written with them.

    May be repeated after an interruption.

    Args:
        path: the tar.
        records: [n], of which offset and size are used.
        labels: int64 [n].
    """
    with open(path, "r+b") as file:
        ends = records["offset"] + _padded(records["size"].astype(np.int64))
        for start, label in zip(ends.tolist(), labels.tolist(), strict=True):
            file.seek(start)
            header = file.read(tarfile.BLOCKSIZE)
            if header[156:157] == tarfile.XHDTYPE:  # In front of the header proper: a name in PAX records.
                file.seek(_padded(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size), os.SEEK_CUR)
                header = file.read(tarfile.BLOCKSIZE)
            text = str(label).encode()
            file.seek(-tarfile.BLOCKSIZE, os.SEEK_CUR)
            file.write(_with_size(header, len(text)) + text.ljust(tarfile.BLOCKSIZE, b"\0"))
        file.flush()
        os.fsync(file.fileno())


def _with_size(header: bytes, size: int) -> bytes:
    """A tar header with another size, and the checksum that goes with it."""
    changed = bytearray(header)
    changed[124:136] = b"%011o\0" % size
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def _padded(size: Any) -> Any:
    """Bytes that a member takes in a tar, of an int or an array."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
