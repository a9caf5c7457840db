"""A folder with one folder of images for each identity."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from partialfc.data.sources.base import IMAGE_EXTENSIONS, SkippedFile, Source, TextColumn, image_key, read_file

__all__ = ["FolderSource"]


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """`folder/<identity>/**/<image>`. Locators are paths below the folder; identities are sorted by name."""

    locators: TextColumn

    @classmethod
    def open(cls, folder: Path) -> FolderSource:
        """Lists a folder. Names that begin with a dot, and files that are no images, are left out and reported.

        Raises:
            ValueError: if there is no identity folder, or two files have the same key.
        """
        entries = sorted(folder.iterdir())
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        kept = set(names)
        skipped = [
            SkippedFile(str(entry), "not an identity folder", "not an identity folder")
            for entry in entries
            if entry.name not in kept
        ]
        if not names:
            raise ValueError(f"{folder}: no identity folder in it; expected {folder}/<identity>/<image>")
        identities = array("i")

        def paths() -> Iterator[str]:
            for identity, name in enumerate(names):
                for path in _images(folder, name, skipped):
                    identities.append(identity)
                    yield path

        locators = TextColumn.of(paths())
        return cls(
            path=str(folder),
            identity_names=names,
            identities=np.frombuffer(identities, dtype=np.int32),
            locators=locators,
            skipped=tuple(skipped),
        )

    def read(self, position: int) -> bytes:
        """The content of a file."""
        return read_file(self.describe(position))

    def key(self, position: int) -> str:
        """identity/name without extension."""
        return image_key(self.locators[position])

    def describe(self, position: int) -> str:
        """The path of a file."""
        return os.path.join(self.path, self.locators[position])

    def count_bytes(self, positions: np.ndarray) -> int:
        """The sizes of the files."""
        return sum(os.path.getsize(self.describe(position)) for position in positions.tolist())


def _images(folder: Path, name: str, skipped: list[SkippedFile]) -> Iterator[str]:
    """The paths below `folder` of the images of an identity; what else lies there goes to `skipped`."""
    paths: dict[str, Path] = {}
    for path in _walk(folder / name):
        if path.suffix.lower() not in IMAGE_EXTENSIONS:
            skipped.append(SkippedFile(str(path), "other file", f"not an image file: {path.suffix!r}"))
            continue
        if not path.is_file():
            skipped.append(SkippedFile(str(path), "not a regular file", "not a regular file"))
            continue
        below = path.relative_to(folder).as_posix()
        key = image_key(below)
        if key in paths:
            raise ValueError(f"{path} and {paths[key]} both have the key {key!r}; rename or remove one of them")
        paths[key] = path
        yield below


def _walk(directory: Path) -> Iterator[Path]:
    """All files under a folder, in an order that does not depend on the file system."""
    for folder, subfolders, files in os.walk(directory, onerror=_raise):
        subfolders.sort()
        for name in sorted(files):
            yield Path(folder, name)


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is not an empty one."""
    raise error
