"""Where the bytes of the data shards come from: files of this machine, or a remote store (`partialfc.data.remote`)."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from partialfc.data.errors import DataError, SampleError
from partialfc.data.piece_cache import CacheSettings
from partialfc.data.remote import RemoteStorage, is_url

__all__ = ["CacheSettings", "LocalStorage", "Storage", "open_storage"]

_MAX_OPEN_SHARDS = 64  # Far below the usual limit of 1,024 open files, far above the lanes read at a time.
_BAD_PLACES = {errno.EIO, errno.EBADMSG}  # One place of a disk cannot be read; the rest of the file may be well.


class Storage(Protocol):
    """Reads byte ranges of data shards. It can be sent to another process, but only `warm` is for other threads."""

    def check(self) -> None:
        """Makes sure that all data shards are there, and have the byte sizes recorded.

        Raises:
            FileNotFoundError: if a local shard is missing.
            ValueError: if a shard has another size.
            DataError: if a remote shard cannot be reached, or its store cannot read parts of it.
            ImportError: if a library for the URLs is missing.
        """

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The `size` bytes of a shard that begin at byte `offset`.

        Raises:
            SampleError: if these bytes are missing or unreadable. The message says what is wrong, not where: the
                caller knows which sample it is.
            DataError: if the shard cannot be read at all.
        """

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
    ) -> list[bytes | SampleError]:
        """What `read` gives for each element of three lists of one length, the errors of single samples in their place.

        Raises:
            DataError: if a shard cannot be read at all.
        """

    def warm(self, shard: int, start: int, stop: int) -> None:
        """Brings the bytes [start, stop) of a shard near, so that reading them is quick. Any thread may call it.

        Raises:
            OSError: if that fails.
        """


def open_storage(paths: Sequence[str], shard_bytes: Sequence[int], *, cache: CacheSettings | None = None) -> Storage:
    """What reads some data shards. Nothing is opened yet.

    Args:
        paths: the data shards, all of them local paths or all of them URLs.
        shard_bytes: byte size of each.
        cache: how remote shards are read and kept; for local ones it does not matter.

    Raises:
        ValueError: if paths and URLs are mixed.
    """
    assert len(paths) == len(shard_bytes), (len(paths), len(shard_bytes))
    urls = [path for path in paths if is_url(path)]
    if not urls:
        return LocalStorage(paths, shard_bytes)
    if len(urls) < len(paths):
        local = next(path for path in paths if not is_url(path))
        raise ValueError(
            f"{local} is a file and {urls[0]} a URL, but the data shards of one split must all be the one or the "
            "other; make two splits and train on both"
        )
    return RemoteStorage(paths, shard_bytes, settings=cache or CacheSettings())


class LocalStorage:
    """Data shards that are files. See `Storage`.

    Args:
        paths: the data shards.
        shard_bytes: byte size of each.
    """

    def __init__(self, paths: Sequence[str], shard_bytes: Sequence[int]) -> None:
        self._paths, self._bytes = list(paths), list(shard_bytes)
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def check(self) -> None:
        """See `Storage`."""
        for path, expected in zip(self._paths, self._bytes, strict=True):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: the data shard is missing, though manifest.json lists it")
            if (found := Path(path).stat().st_size) != expected:
                raise ValueError(
                    f"{path}: the data shard has {found} bytes, but manifest.json says {expected}; "
                    "it was cut off or changed: copy or write it again"
                )

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See `Storage`."""
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise self._error(shard, error) from error
        return data if len(data) == size else self._read_on(shard, offset, size, data)

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
    ) -> list[bytes | SampleError]:
        """See `Storage`."""
        found: list[bytes | SampleError] = []
        for shard, offset, size in zip(shards, offsets, sizes, strict=True):
            try:
                found.append(self.read(shard, offset, size))
            except SampleError as error:
                found.append(error)
        return found

    def warm(self, shard: int, start: int, stop: int) -> None:
        """See `Storage`."""
        # A descriptor of its own, as the thread that reads samples may close those it keeps.
        descriptor = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Read, not POSIX_FADV_WILLNEED: that returns before anything is near, and some file systems ignore it.
            os.pread(descriptor, stop - start, start)
        finally:
            os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        try:
            descriptor = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self._paths[shard]}: the data shard cannot be opened: {error.strerror}") from error
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > _MAX_OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def _read_on(self, shard: int, offset: int, size: int, data: bytes) -> bytes:
        """The rest of a read that came back short, which network file systems may do before the end of a file."""
        while len(data) < size:
            try:
                more = os.pread(self._descriptor(shard), size - len(data), offset + len(data))
            except OSError as error:
                raise self._error(shard, error) from error
            if not more:
                raise SampleError("truncated", f"{size} bytes expected, but the file holds {len(data)}")
            data += more
        return data

    def _error(self, shard: int, error: OSError) -> OSError | SampleError:
        if isinstance(error, DataError):
            return error
        if error.errno in _BAD_PLACES:
            return SampleError("unreadable", f"the disk reports: {error.strerror}")
        return DataError(f"{self._paths[shard]}: the data shard cannot be read: {error.strerror}")

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[list[str], list[int]]]:
        return LocalStorage, (self._paths, self._bytes)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)
