"""Data shards in a remote store: http, https, s3, gs and what else fsspec reads.

They are read in aligned pieces of 4 MiB, each of which is fetched once for all processes of a machine.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from partialfc.data.errors import DataError, SampleError
from partialfc.data.piece_cache import LONGEST_WAIT_SECONDS, PIECE_BYTES, CacheSettings, PieceCache

__all__ = ["RemoteFile", "RemoteStorage", "RemoteStore", "is_url"]

_MAX_OPEN_PIECES = 256  # Below the usual limit of 1,024 open files.
_THREADS = 16
_WORTH_RETRYING = {408, 425, 429}  # Client errors of HTTP that pass: timeout, too early, too many requests.

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_url(path: str) -> bool:
    """Whether a data shard is named by a URL rather than by a path of this machine."""
    return "://" in path


class RemoteFile(NamedTuple):
    """What a store says about a file.

    Attributes:
        size: in bytes.
        etag: changes with the content; "" if the store has none.
    """

    size: int
    etag: str


class RemoteStore:
    """Requests to remote stores, tried again when they fail in a way that may pass. Threads may share it.

    Args:
        settings: number of tries, waits and time limit.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._file_systems: dict[tuple[int, str], Any] = {}

    def stat(self, url: str) -> RemoteFile:
        """Size and version of a file.

        Raises:
            DataError: if the store cannot be reached, or has no such file, or does not tell its size.
            ImportError: if a library for the URL is missing.
        """
        info = self._retried(url, "its size", lambda: self._call(url, "info"))
        if info.get("size") is None:
            raise DataError(f"{url}: the store does not tell the size of the file; use data.exact=false")
        etag = next((str(info[key]) for key in ("ETag", "etag", "Last-Modified") if info.get(key)), "")
        return RemoteFile(int(info["size"]), etag)

    def fetch(self, url: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file.

        Raises:
            DataError: if they cannot be had, or the store sends others than it was asked for.
            ImportError: if a library for the URL is missing.
        """

        def attempt() -> bytes:
            data: bytes = self._call(url, "cat_file", start=start, end=stop)
            if len(data) > stop - start:
                raise _no_ranges(url)
            if len(data) < stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._retried(url, f"bytes {start} to {stop}", attempt)

    def check_ranges(self, url: str) -> None:
        """Makes sure that a web server can send parts of a file; other stores always can.

        Raises:
            DataError: if it cannot, or cannot be reached.
        """
        if not url.startswith(("http://", "https://")):
            return

        def attempt() -> None:
            # Unlike `cat_file`, an open file does not load the whole body from a server that ignores the range.
            with self._file_system(url).open(url, "rb", cache_type="none") as file:
                try:
                    file.seek(1)
                    file.read(1)
                except ValueError as error:
                    raise _no_ranges(url) from error

        self._retried(url, "byte 1", attempt)

    def _call(self, url: str, method: str, **arguments: Any) -> Any:
        file_system = self._file_system(url)
        if file_system.async_impl:
            arguments["timeout"] = self._settings.timeout_seconds
        return getattr(file_system, method)(file_system._strip_protocol(url), **arguments)

    def _file_system(self, url: str) -> Any:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(f"{url}: remote data needs fsspec: pip install partialfc[remote]") from error

        protocol = url.partition("://")[0]
        # The event loop of a file system does not survive a fork, so each process has its own.
        key = (os.getpid(), protocol)
        if key not in self._file_systems:
            options: dict[str, Any] = {}
            try:
                if protocol in ("http", "https"):
                    import aiohttp

                    # Compressed on the way, byte ranges would not be those of the file.
                    options["headers"] = {"Accept-Encoding": "identity"}
                    timeout = aiohttp.ClientTimeout(total=self._settings.timeout_seconds)
                    options["client_kwargs"] = {"timeout": timeout}
                self._file_systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
            except ImportError as error:
                raise ImportError(f"{url}: {error}; for http: pip install partialfc[remote]") from error
            except ValueError as error:
                raise ValueError(f"{url}: {error}; known: http, https, s3, gs and what else fsspec reads") from error
        return self._file_systems[key]

    def _retried(self, url: str, what: str, attempt: Callable[[], Result]) -> Result:
        self._file_system(url)  # What is wrong with the URL itself need not be tried again.
        wait = self._settings.first_wait_seconds
        tries = 0
        while True:
            tries += 1
            try:
                return attempt()
            except DataError:
                raise
            except Exception as error:  # Each store has errors of its own, related to nothing.
                if _is_final(error) or tries == self._settings.attempts:
                    raise DataError(
                        f"{url}: {what} could not be read, tried {tries} times; last error: {_describe(error)}"
                    ) from error
            time.sleep(wait)
            wait = min(2.0 * wait, LONGEST_WAIT_SECONDS)


class RemoteStorage:
    """Data shards in a remote store. See `partialfc.data.storage.Storage`.

    Args:
        urls: the data shards.
        shard_bytes: byte size of each.
        settings: how they are read and kept.
        etags: version of each, as far as known; `check` asks for them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        shard_bytes: Sequence[int],
        *,
        settings: CacheSettings,
        etags: Sequence[str] | None = None,
    ) -> None:
        self._urls, self._bytes, self._settings = list(urls), list(shard_bytes), settings
        self._etags = [""] * len(urls) if etags is None else list(etags)
        self._store = RemoteStore(settings)
        self._cache = PieceCache(settings)
        self._pieces: OrderedDict[tuple[int, int], int] = OrderedDict()

    def check(self) -> None:
        """Asks the store for the sizes of all shards, and whether it can send parts of them.

        Raises:
            ValueError: if shards have another size than expected; the message lists all of them.
            DataError: if the store cannot be reached, lacks a shard, or cannot send parts of files.
            ImportError: if a library for the URLs is missing.
        """
        files = _in_threads(self._store.stat, self._urls)
        wrong = [
            f"{url}: the data shard has {file.size} bytes, but manifest.json says {size}"
            for url, file, size in zip(self._urls, files, self._bytes, strict=True)
            if file.size != size
        ]
        if wrong:
            raise ValueError("; ".join([*wrong, "cut off or changed: copy or write again"]))
        hosts = {url.split("/", 3)[2]: url for url, size in zip(self._urls, self._bytes, strict=True) if size > 1}
        _in_threads(self._store.check_ranges, list(hosts.values()))
        self._etags = [file.etag for file in files]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See `partialfc.data.storage.Storage`."""
        if offset + size > self._bytes[shard]:
            held = max(0, self._bytes[shard] - offset)
            raise SampleError("truncated", f"{size} bytes expected, but the file holds {held}")
        parts = []
        for piece in _pieces(offset, offset + size):
            start = max(offset - piece * PIECE_BYTES, 0)
            stop = min(offset + size - piece * PIECE_BYTES, PIECE_BYTES)
            parts.append(self._read_piece(shard, piece, start, stop))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
    ) -> list[bytes | SampleError]:
        """See `partialfc.data.storage.Storage`."""
        needed = {
            (shard, piece)
            for shard, offset, size in zip(shards, offsets, sizes, strict=True)
            for piece in _pieces(offset, min(offset + size, self._bytes[shard]))
        }
        missing = sorted(needed - self._pieces.keys())
        if len(missing) > 1:
            _in_threads(lambda place: os.close(self._open_piece(*place)), missing)
        found: list[bytes | SampleError] = []
        for shard, offset, size in zip(shards, offsets, sizes, strict=True):
            try:
                found.append(self.read(shard, offset, size))
            except SampleError as error:
                found.append(error)
        return found

    def warm(self, shard: int, start: int, stop: int) -> None:
        """See `partialfc.data.storage.Storage`."""
        for piece in _pieces(start, min(stop, self._bytes[shard])):
            os.close(self._open_piece(shard, piece))

    def _read_piece(self, shard: int, piece: int, start: int, stop: int) -> bytes:
        place = (shard, piece)
        if place in self._pieces:
            self._pieces.move_to_end(place)
        else:
            self._pieces[place] = self._open_piece(shard, piece)
            if len(self._pieces) > _MAX_OPEN_PIECES:
                os.close(self._pieces.popitem(last=False)[1])
        data = os.pread(self._pieces[place], stop - start, start)
        assert len(data) == stop - start, place  # The size was checked when the piece was opened.
        return data

    def _open_piece(self, shard: int, piece: int) -> int:
        url, size, start = self._urls[shard], self._bytes[shard], piece * PIECE_BYTES
        stop = min(start + PIECE_BYTES, size)
        key = hashlib.sha256(f"{url}\n{size}\n{self._etags[shard]}".encode()).hexdigest()[:32]
        return self._cache.open(key, piece, size=stop - start, fetch=lambda: self._store.fetch(url, start, stop))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RemoteStorage, settings=self._settings, etags=self._etags), (self._urls, self._bytes)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_pieces", {}).values():
            os.close(descriptor)


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of a function of each item; the first error ends it, without the items not begun yet."""
    with ThreadPoolExecutor(_THREADS) as threads:
        try:
            return list(threads.map(function, items))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _pieces(start: int, stop: int) -> range:
    """The numbers of the pieces that hold the bytes [start, stop)."""
    return range(start // PIECE_BYTES, -(-stop // PIECE_BYTES))


def _no_ranges(url: str) -> DataError:
    return DataError(f"{url}: this store has no range reads; use data.exact=false")


def _is_final(error: BaseException) -> bool:
    """Whether trying again is in vain: the file is not there, or not for us."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec says so of any failure.
        error = error.__cause__
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _WORTH_RETRYING
    return isinstance(error, FileNotFoundError | PermissionError)


def _describe(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
