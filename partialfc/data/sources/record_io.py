"""The RecordIO framing of dmlc and mxnet: records in a file, each found by its byte offset.

A record is one part or several: uint32 magic; uint32 with the kind of the part in its upper 3 bits (0 whole, 1 first,
2 middle, 3 last) and the bytes of its payload in the lower 29; the payload; zeros up to a multiple of 4 bytes. A
payload that holds the magic at a multiple of 4 bytes is cut there; the magic itself is left out, and put back between
the parts when they are joined.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from partialfc.data.errors import SampleError

__all__ = ["MAX_PAYLOAD_BYTES", "peek_record", "read_record", "record_end", "scan_records", "write_record"]

MAX_PAYLOAD_BYTES = (1 << 29) - 1
_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_PART = struct.Struct("<II")
_PEEKED_BYTES = 64
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


def read_record(descriptor: int, offset: int, *, path: str | Path) -> bytes:
    """The payload of the record at a byte offset of an open file, its parts joined.

    Raises:
        SampleError: if there is no whole record.
    """
    parts = []
    for start, size in _find_parts(descriptor, offset, path):
        parts.append(os.pread(descriptor, size, start))
        if len(parts[-1]) != size:
            raise SampleError("truncated", f"{path}: the record at byte {offset} needs more bytes than the file has")
    return parts[0] if len(parts) == 1 else _MAGIC_BYTES.join(parts)


def peek_record(descriptor: int, offset: int, *, path: str | Path) -> tuple[bytes, int, int]:
    """What a list of records needs of the one at a byte offset, without reading all of it where it is one part.

    Returns:
        The first bytes of its payload (64 or more, if it has so many), the bytes of the payload, and where it ends.

    Raises:
        SampleError: if there is no whole record.
    """
    start = os.pread(descriptor, _PART.size + _PEEKED_BYTES, offset)
    if len(start) >= _PART.size:
        magic, word = _PART.unpack_from(start)
        if magic == _MAGIC and word >> 29 == _WHOLE:
            return start[_PART.size :][:word], word, offset + _PART.size + _padded(word)
    payload = read_record(descriptor, offset, path=path)
    return payload, len(payload), record_end(descriptor, offset, path=path)


def record_end(descriptor: int, offset: int, *, path: str | Path) -> int:
    """Where the record at a byte offset ends, and the next begins.

    Raises:
        SampleError: if there is no whole record.
    """
    end = offset
    for start, size in _find_parts(descriptor, offset, path):
        end = start + _padded(size)
    if start + size > os.fstat(descriptor).st_size:
        raise SampleError("truncated", f"{path}: the record at byte {offset} needs more bytes than the file has")
    return end


def scan_records(descriptor: int, *, path: str | Path) -> Iterator[int]:
    """The byte offset of each record of a file, in order.

    Raises:
        ValueError: where the file holds something else, or ends within a record.
    """
    file_bytes = os.fstat(descriptor).st_size
    offset = 0
    while offset < file_bytes:
        yield offset
        try:
            offset = record_end(descriptor, offset, path=path)
        except SampleError as error:
            raise ValueError(f"{error}; copy the file again") from error


def write_record(file: BinaryIO, payload: bytes) -> None:
    """Appends a record to a file.

    Raises:
        ValueError: if the payload is larger than a record can be.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a record of {len(payload)} bytes, but at most {MAX_PAYLOAD_BYTES} are possible")
    parts = _split(payload)
    for number, part in enumerate(parts):
        if len(parts) == 1:
            kind = _WHOLE
        else:
            kind = _FIRST if number == 0 else _LAST if number == len(parts) - 1 else _MIDDLE
        file.write(_PART.pack(_MAGIC, kind << 29 | len(part)) + part + bytes(-len(part) % 4))


def _split(payload: bytes) -> list[bytes]:
    """Cuts a payload wherever it holds the magic at a multiple of 4 bytes."""
    parts, start, found = [], 0, payload.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            parts.append(payload[start:found])
            start = found + 4
            found = payload.find(_MAGIC_BYTES, start)
        else:
            found = payload.find(_MAGIC_BYTES, found + 1)
    return [*parts, payload[start:]]


def _find_parts(descriptor: int, offset: int, path: str | Path) -> Iterator[tuple[int, int]]:
    """Where the payload of each part of a record begins, and its bytes."""
    start, kind = offset, None
    while kind not in (_WHOLE, _LAST):
        header = os.pread(descriptor, _PART.size, start)
        if len(header) != _PART.size:
            raise SampleError("truncated", f"{path}: the file ends at byte {start + len(header)}, within a record")
        magic, word = _PART.unpack(header)
        if magic != _MAGIC:
            raise SampleError(
                "unreadable", f"{path}: no record part at byte {start}: {magic:#010x} stands there, not {_MAGIC:#010x}"
            )
        allowed = (_WHOLE, _FIRST) if kind is None else (_MIDDLE, _LAST)
        kind, size = word >> 29, word & MAX_PAYLOAD_BYTES
        if kind not in allowed:
            raise SampleError("unreadable", f"{path}: the part at byte {start} is of kind {kind}, not of {allowed}")
        yield start + _PART.size, size
        start += _PART.size + _padded(size)


def _padded(size: int) -> int:
    return size + -size % 4
