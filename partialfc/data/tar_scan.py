"""Walks through the members of a tar that anyone wrote, and notices when it is damaged.

Understood are ustar, GNU and PAX archives, with long names and sizes beyond 8 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from partialfc.data.errors import DataError
from partialfc.data.piece_cache import PIECE_BYTES, CacheSettings
from partialfc.data.remote import RemoteStore, is_url

__all__ = ["SequentialFile", "TarError", "TarMember", "scan_tar", "split_name"]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = b"0\x007"
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE, _PAX, _PAX_GLOBAL = b"L", b"K", b"S", b"x", b"g"
_WITHOUT_CONTENT = b"123456"  # Links, devices, folders: whatever size their header gives.
_LONGEST_HEADER_BYTES = 1 << 20


class TarError(ValueError):
    """A tar is damaged or of a kind that cannot be read. The message names the tar and the byte."""


class TarMember(NamedTuple):
    """A member of a tar.

    Attributes:
        name: its name.
        offset: byte of the tar where its content begins.
        size: bytes of the content.
        content: the content; None if it was not wanted.
        is_file: whether it is a regular file.
        is_padded_with_zeros: whether what fills the last block is zero, as far as it was read.
    """

    name: str
    offset: int
    size: int
    content: bytes | None
    is_file: bool
    is_padded_with_zeros: bool


class SequentialFile:
    """Reads a file or URL in large pieces, for a reader that goes mostly forward. A context manager.

    Args:
        path: a local path or a URL.
        settings: tries and waits for a URL.

    Attributes:
        size: of the file, in bytes.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str, settings: CacheSettings) -> None:
        self.path = path
        self._store = RemoteStore(settings) if is_url(path) else None
        self._descriptor = -1
        if self._store is not None:
            self.size = self._store.stat(path).size
        else:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        self._start, self._buffer = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer only where the file ends.

        Raises:
            DataError: if the file cannot be read.
        """
        start = offset - self._start
        if start < 0 or start + size > len(self._buffer):
            stop = min(self.size, offset + max(size, PIECE_BYTES))
            self._start, self._buffer, start = offset, self._load(offset, stop), 0
        return self._buffer[start : start + size]

    def _load(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        if self._store is not None:
            return self._store.fetch(self.path, start, stop)
        parts = []
        while start < stop:
            try:
                part = os.pread(self._descriptor, stop - start, start)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {start}: {error.strerror}") from error
            if not part:
                break
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def __enter__(self) -> SequentialFile:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def scan_tar(file: SequentialFile, *, wants: Callable[[str], bool]) -> Iterator[TarMember]:
    """The members of a tar in their order, up to its end-of-archive marker.

    Args:
        file: the tar.
        wants: whether the content of a member of this name is wanted.

    Raises:
        TarError: at the place where the tar is damaged or cut, or holds a sparse file.
        DataError: if the file cannot be read.
    """
    if file.size == 0:
        raise TarError(f"{file.path}: the tar has no bytes")
    position = 0
    long_name, extended, clean = None, dict[str, str](), True
    while True:
        header = file.read(position, _BLOCK)
        if header == _ZEROS:
            return _check_end(file, position)
        if len(header) < _BLOCK:
            raise TarError(_cut_between_members(file, position, len(header)))
        _check_header(file, position, header)
        kind = header[156:157]
        size = _number(file, position, header[124:136])
        content_start = position + _BLOCK
        if kind in (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL):
            content = _extended_header(file, content_start, size)
            clean = clean and not file.read(content_start + size, _padded(size) - size).strip(b"\0")
            if kind == _GNU_LONG_NAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == _PAX:
                extended = _pax_records(file, content_start, content)
            position = content_start + _padded(size)
            continue
        if kind == _GNU_SPARSE or any(keyword.startswith("GNU.sparse") for keyword in extended):
            raise TarError(f"{file.path}: sparse file at byte {position}; pack it again without --sparse")
        name = extended.get("path") or long_name or _name(header)
        size = int(extended.get("size", size)) if kind not in _WITHOUT_CONTENT else 0
        position = content_start + _padded(size)
        if content_start + size > file.size:
            raise TarError(
                f"{file.path}: cut inside of {name!r}: it needs {content_start + size} bytes, the file has {file.size}"
            )
        is_file = kind in _REGULAR and name[-1:] != "/"
        if not wants(name):
            yield TarMember(name, content_start, size, None, is_file, clean)
        else:
            data = file.read(content_start, _padded(size))
            if len(data) < size:
                raise TarError(f"{file.path}: became shorter while it was read, in {name!r} at byte {content_start}")
            yield TarMember(name, content_start, size, data[:size], is_file, clean and not data[size:].strip(b"\0"))
        long_name, extended, clean = None, {}, True


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the extension of a member, as WebDataset has them: cut at the first dot of the file name.

    Returns:
        For `a/b.c/d.e.JPG`: `a/b.c/d` and `e.jpg`. None for a name without one of the two.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def _check_end(file: SequentialFile, position: int) -> None:
    """Behind the end-of-archive marker there is nothing but zeros."""
    while data := file.read(position, min(PIECE_BYTES, file.size - position)):
        if rest := data.lstrip(b"\0"):
            place = position + len(data) - len(rest)
            raise TarError(
                f"{file.path}: there are bytes at {place}, behind the end-of-archive marker; tars cannot be joined "
                "by `cat`, name them one by one"
            )
        position += len(data)


def _cut_between_members(file: SequentialFile, position: int, rest: int) -> str:
    where = f"ends at byte {file.size}" if rest == 0 else f"ends inside of a header at byte {position}"
    return f"{file.path}: {where}, without an end-of-archive marker; it was cut off: copy or write it again"


def _check_header(file: SequentialFile, position: int, header: bytes) -> None:
    try:
        expected = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        raise TarError(f"{file.path}: no tar header at byte {position}") from None
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if expected == unsigned:
        return
    # Some old programs added the bytes up as signed ones.
    if expected != unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise TarError(f"{file.path}: the header at byte {position} does not match its checksum")


def _number(file: SequentialFile, position: int, data: bytes) -> int:
    if data[0] == 0x80:  # Beyond eleven octal digits.
        return int.from_bytes(data[1:], "big")
    try:
        return int(data.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarError(f"{file.path}: the header at byte {position} has the size {data!r}") from None


def _extended_header(file: SequentialFile, start: int, size: int) -> bytes:
    if size > _LONGEST_HEADER_BYTES:
        raise TarError(f"{file.path}: the extended header at byte {start} would have {size} bytes")
    content = file.read(start, size)
    if len(content) < size:
        raise TarError(
            f"{file.path}: cut inside of the header at byte {start}: it needs {start + size} bytes, the file has "
            f"{file.size}"
        )
    return content


def _pax_records(file: SequentialFile, start: int, content: bytes) -> dict[str, str]:
    """Reads records of the form "length keyword=value", each with a line end that counts."""
    records = {}
    rest = content
    while rest := rest.lstrip(b"\0"):
        digits, space, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = rest[len(digits) + 1 : length - 1].partition(b"=")
        if not (space and equals) or length > len(rest) or rest[length - 1 : length] != b"\n":
            raise TarError(f"{file.path}: the PAX header at byte {start} is damaged")
        records[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        rest = rest[length:]
    if not records.get("size", "0").isdigit():
        raise TarError(f"{file.path}: the PAX header at byte {start} has the size {records['size']!r}")
    return records


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # GNU archives keep other things where POSIX ones have the first part of the name.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
