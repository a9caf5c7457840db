"""The samples of data shards that are read from their beginning to their end."""

from __future__ import annotations

import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from partialfc.data.batch import MASKED_LABEL
from partialfc.data.errors import DataError, SampleError
from partialfc.data.piece_cache import LONGEST_WAIT_SECONDS, CacheSettings
from partialfc.data.remote import is_url
from partialfc.data.split_format import MANIFEST, read_manifest, shard_location
from partialfc.data.storage import open_storage
from partialfc.data.tar_samples import IMAGE_EXTENSIONS

__all__ = ["StreamedSample", "StreamedShards"]

_LABEL_EXTENSION = "cls"
_DAMAGED = (tarfile.TarError, EOFError, zlib.error)  # What a damaged tar, plain or compressed, is reported as.


class StreamedSample(NamedTuple):
    """A sample of a stream: `visit` numbers the draw of its data shard, `where` says where it lies."""

    sample_id: int
    visit: int
    label: int
    data: bytes | SampleError
    where: str


class StreamedShards:
    """The data shards of a split that hold samples.

    Args:
        paths: paths or URLs.
        sizes: samples in each.
        num_classes: labels are in [0, num_classes).
        settings: tries, waits and time limit.
    """

    def __init__(self, paths: list[str], sizes: list[int], num_classes: int, settings: CacheSettings) -> None:
        kept = [number for number, size in enumerate(sizes) if size > 0]
        first_ids = np.cumsum([0, *sizes]).tolist()
        self.paths = [paths[number] for number in kept]
        self.sizes = [sizes[number] for number in kept]
        self.first_ids = [first_ids[number] for number in kept]
        self.num_classes, self.settings = num_classes, settings

    @classmethod
    def of_split(cls, directory: Path, settings: CacheSettings) -> StreamedShards:
        """The data shards that the manifest of a split names; local ones are looked at.

        Raises:
            FileNotFoundError: if the split or a local data shard is missing.
            ValueError: if a local data shard has another size than recorded, or the tars hold other labels.
            ImportError: if a library for a URL is missing.
        """
        manifest = read_manifest(directory)
        if not manifest["labels_in_shards"]:
            raise ValueError(
                f"{directory / MANIFEST}: the labels of the index are not those in the tars, which were numbered anew "
                "when they were indexed; streaming reads the labels of the tars: pack the data set, or use "
                "data.exact=true"
            )
        shards = manifest["shards"]
        paths = [shard_location(directory, shard["name"]) for shard in shards]
        local = [number for number, path in enumerate(paths) if not is_url(path)]
        open_storage([paths[number] for number in local], [shards[number]["bytes"] for number in local]).check()
        for scheme in {path.partition("://")[0] for path in paths if is_url(path)}:
            _check_scheme(scheme, next(path for path in paths if path.startswith(f"{scheme}://")))
        return cls(paths, [shard["num_samples"] for shard in shards], manifest["num_classes"], settings)

    def read(self, shard: int, visit: int) -> Iterator[StreamedSample]:
        """The samples of a data shard, tried again from where it was if reading fails.

        Args:
            shard: its number.
            visit: given to each sample.

        Raises:
            DataError: if it cannot be read, or holds a label that the split does not have.
        """
        given, tries = 0, 0
        while True:
            before = given
            try:
                for number, item in enumerate(self._expand(shard, visit)):
                    if number == given:
                        given += 1
                        yield item
                return
            except (DataError, ImportError):
                raise
            except Exception as error:  # Each store has errors of its own, related to nothing.
                if isinstance(error, _DAMAGED) and given > 0:
                    yield self._ends_early(shard, visit, given, _first_words(error))
                    return
                tries = 1 if given > before else tries + 1
                if tries >= self.settings.attempts:
                    raise DataError(
                        f"{self.paths[shard]}: the data shard cannot be read beyond its first {given} samples, tried "
                        f"{tries} times; last error: {type(error).__name__}: {_first_words(error)}"
                    ) from error
            time.sleep(min(self.settings.first_wait_seconds * 2 ** (tries - 1), LONGEST_WAIT_SECONDS))

    def _expand(self, shard: int, visit: int) -> Iterator[StreamedSample]:
        """The samples of a data shard, read once from its beginning."""
        number = 0
        with closing(_open(self.paths[shard], self.settings.timeout_seconds)) as stream:
            members = _Members(self.paths[shard], stream)
            for sample in group_by_keys(members, handler=members.note):
                fault = SampleError("unreadable", "; ".join(members.faults)) if members.faults else None
                members.faults.clear()
                yield self._item(shard, visit, number, sample, fault)
                number += 1
            if members.broken is not None:
                raise members.broken
        if number < self.sizes[shard]:
            yield self._ends_early(shard, visit, number, "end of the tar")

    def _item(
        self, shard: int, visit: int, number: int, sample: dict[str, Any], fault: SampleError | None
    ) -> StreamedSample:
        key = sample["__key__"]
        where = f"{self.paths[shard]}, sample {self.first_ids[shard] + number} (key {key})"
        sample_id = self.first_ids[shard] + number
        try:
            if fault is not None:
                raise fault
            image, label = _image_of(sample), _label_of(sample)
        except SampleError as error:
            return StreamedSample(sample_id, visit, MASKED_LABEL, error, where)
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{where}: the label is {label}, but the split has labels in [0, {self.num_classes}); the tar is not "
                "the one that was indexed: index it anew"
            )
        return StreamedSample(sample_id, visit, label, image, where)

    def _ends_early(self, shard: int, visit: int, given: int, why: str) -> StreamedSample:
        where = f"{self.paths[shard]}, sample {self.first_ids[shard] + given}"
        error = SampleError("truncated", f"{given} of {self.sizes[shard]} samples read, then: {why}")
        return StreamedSample(self.first_ids[shard] + given, visit, MASKED_LABEL, error, where)


class _Members:
    """The files of a tar, one after the other. At damage they end, so that the samples before it are not lost.

    Args:
        path: of the tar.
        stream: its bytes.

    Attributes:
        broken: the damage, if any.
        faults: of members that do not fit into their sample.
    """

    def __init__(self, path: str, stream: Any) -> None:
        self._source = {"url": path, "stream": stream}
        self.broken: Exception | None = None
        self.faults: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from tar_file_expander([self._source])
        except _DAMAGED as error:
            self.broken = error

    def note(self, error: Exception) -> bool:
        """A handler of webdataset that goes on; its own ones sleep for half a second at each bad sample."""
        self.faults.append(_first_words(error))
        return True


def _label_of(sample: dict[str, Any]) -> int:
    text = sample.get(_LABEL_EXTENSION)
    if text is None:
        raise SampleError("unreadable", f"there is no .{_LABEL_EXTENSION} beside it")
    try:
        return int(text)
    except ValueError as error:
        raise SampleError("unreadable", f"its label {text[:20]!r} is no whole number") from error


def _image_of(sample: dict[str, Any]) -> bytes:
    for name in sorted(sample.keys() & IMAGE_EXTENSIONS):
        data: bytes = sample[name]
        return data
    members = sorted(name for name in sample if not name.startswith("__"))
    raise SampleError("not an image", f"there is no image among its members {members}")


def _check_scheme(scheme: str, url: str) -> None:
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ImportError(f"{url}: {error}; remote data needs: pip install partialfc[remote]") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; known: http, https, s3, gs and what else fsspec reads") from error


def _open(path: str, timeout_seconds: float) -> Any:
    """A data shard as a stream of bytes."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    options: dict[str, Any] = {}
    how: dict[str, Any] = {}
    if path.startswith(("http://", "https://")):
        import aiohttp

        # A limit for each wait, as a whole tar may well take longer than any limit.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
        options = {"client_kwargs": {"timeout": limits}, "headers": {"Accept-Encoding": "identity"}}
        # As a stream; and without a question for the size first, which costs a request and is of no use here.
        how = {"block_size": 0, "size": 1}
    # The event loop of a file system does not survive a fork, so each process has its own.
    file_system, target = fsspec.url_to_fs(path, skip_instance_cache=True, **options)
    return file_system.open(target, "rb", **how)


def _first_words(error: Exception) -> str:
    """What an error says, without the stream and its address, which webdataset adds."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0] if error.args else ""
    return str(words).partition(" @ ")[0] or type(error).__name__
