"""The manifest of a checkpoint: every file with its size and checksum, and a checksum of itself.

The storage layer beneath keeps no checksum of contents, and most flipped bits would load silently. A directory is a
checkpoint only if it holds a manifest, and a good one only if every file agrees with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST_NAME",
    "DamageError",
    "FileRecord",
    "Manifest",
    "ManifestError",
    "compare",
    "fsync_directory",
    "json_copy",
]

MANIFEST_NAME = "MANIFEST.json"
_FORMAT = "partialfc-checkpoint-1"
_READ_BYTES = 2**20


class ManifestError(ValueError):
    """A manifest that is missing, damaged or of another format; the message says which.

    Its cause is an OSError where the system could not read it; so it is with `DamageError`.
    """


class DamageError(ValueError):
    """A file that is not what its record says, or cannot be read; the message names it."""


@dataclass(frozen=True)
class FileRecord:
    """What one file must be.

    Attributes:
        size_bytes: its length.
        sha256: hexadecimal digest of its contents.
    """

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint but the manifest, and what the run wants to know before it loads them.

    Attributes:
        files: records by file name.
        metadata: values that JSON can hold.
    """

    files: dict[str, FileRecord]
    metadata: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The one text of this manifest.

        Raises:
            ValueError: if the metadata is not finite numbers, strings, booleans, None, lists and dictionaries.
        """
        body = {
            "format": _FORMAT,
            "metadata": self.metadata,
            "files": {
                name: {"size_bytes": record.size_bytes, "sha256": record.sha256} for name, record in self.files.items()
            },
        }
        body = json_copy(body)
        return _render({**body, "self_sha256": _digest(body)})

    @property
    def total_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(record.size_bytes for record in self.files.values())

    def write(self, directory: Path) -> None:
        """Writes the manifest into `directory` and makes it durable."""
        with (directory / MANIFEST_NAME).open("xb") as stream:
            stream.write(self.to_bytes())
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads the manifest of `directory` and checks it against its own checksum.

        Raises:
            ManifestError: if it is missing, unreadable, altered in any byte, or of an unknown format.
        """
        try:
            raw = (directory / MANIFEST_NAME).read_bytes()
        except OSError as error:
            raise ManifestError(f"{MANIFEST_NAME} cannot be read: {error.strerror}") from error
        try:
            body = json.loads(raw)
            own_digest = body.pop("self_sha256")
            # The text is compared as a whole, since a flipped bit may hide in white space or in the digest's case.
            intact = own_digest == _digest(body) and raw == _render({**body, "self_sha256": own_digest})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ManifestError(f"{MANIFEST_NAME} is damaged: it is not the JSON that was written") from error
        if not intact:
            raise ManifestError(f"{MANIFEST_NAME} is damaged: it does not match its own checksum")
        if body["format"] != _FORMAT:
            raise ManifestError(f"{MANIFEST_NAME} has format {body['format']!r}; this version reads {_FORMAT!r}")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return cls(files, body["metadata"])


def compare(
    directory: Path,
    files: dict[str, FileRecord],
    *,
    contents: bool = True,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Compares files with their records.

    Args:
        directory: where they are.
        files: records by name.
        contents: False looks at the sizes alone.
        on_bytes: called with the number of bytes read, as they are.

    Raises:
        DamageError: at the first difference, naming the file.
    """
    for name, record in sorted(files.items()):
        try:
            with (directory / name).open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != record.size_bytes:
                    raise DamageError(f"{name} has {size} bytes instead of {record.size_bytes}")
                digest = _digest_of(stream, on_bytes) if contents else record.sha256
        except OSError as error:
            raise DamageError(f"{name} cannot be read: {error.strerror}") from error
        if digest != record.sha256:
            raise DamageError(f"{name} has sha256 {digest[:12]}... instead of {record.sha256[:12]}...")


def _digest_of(stream: io.RawIOBase, on_bytes: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
    while count := stream.readinto(buffer):
        digest.update(memoryview(buffer)[:count])
        on_bytes(count)
    return digest.hexdigest()


def json_copy(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back: integer keys and tuples do not stay what they are.

    Raises:
        ValueError: if they are not finite numbers, strings, booleans, None, lists and dictionaries.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint metadata cannot be written as JSON: {error}") from error
    return copy


def fsync_directory(directory: Path) -> None:
    """Makes the names in `directory` durable; fsync of a file does not cover its own name."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_render(body)).hexdigest()


def _render(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
