"""Packs a folder of identity folders into a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from partialfc.data.conversion import store_image
from partialfc.data.writer import SplitWriter, staged_directory
from partialfc.keyed import hash64

__all__ = ["PackReport", "SkippedFile", "pack"]

_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_PROGRESS_EVERY_IMAGES = 100
_VERIFICATION_SHARE = 1


@dataclass(frozen=True)
class SkippedFile:
    """A file that was left out, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    Attributes:
        train_identities: identities in the training split.
        train_images: images in the training split.
        verification_identities: identities set aside.
        verification_images: images of those.
        skipped: every file that was left out, with the reason.
        empty_identities: names of identity folders without a usable image; they have no label.
    """

    train_identities: int
    train_images: int
    verification_identities: int
    verification_images: int
    skipped: tuple[SkippedFile, ...]
    empty_identities: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"train: {self.train_identities:,} identities, {self.train_images:,} images"]
        if self.verification_identities:
            lines.append(
                f"verification: {self.verification_identities:,} identities, {self.verification_images:,} images"
            )
        lines.append(f"skipped: {len(self.skipped):,} files")
        lines += [f"  {file.path}: {file.reason}" for file in self.skipped]
        if self.empty_identities:
            lines.append(f"identities without a usable image, left out: {len(self.empty_identities):,}")
            lines += [f"  {name}" for name in self.empty_identities]
        return "\n".join(lines)


def pack(
    source: str | Path,
    out: str | Path,
    *,
    verification_share: float,
    seed: int,
    image_size: int | None = None,
    samples_per_shard: int = 10_000,
    on_progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Packs `source/<identity>/**/<image>` into the data set `out/train` and, if wanted, `out/verification`.

    The identities of each split, sorted by name, get the labels 0, 1, 2 ... and lie in the shards in that order;
    the sampling plan mixes them. Which of them are set aside depends on the seed and the names. Files are stored byte
    for byte, except those of a kind that decoders disagree on (16-bit, CMYK, EXIF orientation) or of another size
    than asked for.

    Args:
        source: folder with one folder for each identity; it is only read.
        out: folder to make; it must be missing or empty, and is only there once it is complete.
        verification_share: share of the identities to set aside for verification, in [0, 1).
        seed: key of that draw.
        image_size: height and width that images are resized to; left out, they keep their size.
        samples_per_shard: samples in each data shard.
        on_progress: called as on_progress(files done, files in all) now and then.

    Raises:
        FileNotFoundError: if `source` is missing.
        NotADirectoryError: if `source` is not a folder.
        FileExistsError: if `out` is there and not an empty folder.
        ValueError: if `out` lies in `source`, for a number out of its range, a source without any usable image, or
            two files of the same key.
    """
    source = Path(source)
    if Path(out).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out}: lies in the source {source}; choose a folder outside of it")
    _check_arguments(source, verification_share, image_size, samples_per_shard)
    names, stray = _list_identities(source)
    total = sum(len(list(_walk(source / name))) for name in names)
    reserved = _reserved(names, verification_share, seed)
    with staged_directory(out) as staging:
        packing = _Packing(source, image_size, total, on_progress)
        packing.skipped += stray
        train = packing.write_split(
            staging / "train", [name for name in names if name not in reserved], samples_per_shard
        )
        kept = packing.write_split(staging / "verification", sorted(reserved), samples_per_shard)
        if train[0] == 0:
            raise ValueError(
                f"{source}: no usable image for training in {len(names)} identity folders, {len(packing.skipped)} "
                f"files skipped{_first(packing.skipped)}; expected {source}/<identity>/<image>"
            )
        if verification_share > 0.0 and kept[0] == 0:
            raise ValueError(
                f"{source}: verification_share is {verification_share}, but no identity with an image could be set "
                f"aside of {len(names)}; at least two are needed"
            )
        return PackReport(*train, *kept, tuple(packing.skipped), tuple(packing.empty_identities))


class _Packing:
    """The state of one call of `pack`: what was done so far, and what was left out."""

    def __init__(
        self, source: Path, image_size: int | None, total: int, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self.source = source
        self.image_size = image_size
        self.total = total
        self.on_progress = on_progress
        self.done = 0
        self.skipped: list[SkippedFile] = []
        self.empty_identities: list[str] = []

    def write_split(self, directory: Path, names: list[str], samples_per_shard: int) -> tuple[int, int]:
        """Writes the identities that have an image; returns how many, and the number of images."""
        directory.mkdir()
        num_images = 0
        with SplitWriter(directory, samples_per_shard=samples_per_shard) as writer:
            for name in names:
                before = num_images
                for key, image, extension in self._images(name):
                    writer.add(key, image, extension=extension, label=len(writer.label_names))
                    num_images += 1
                if num_images > before:
                    writer.label_names.append(name)
                else:
                    self.empty_identities.append(name)
        if num_images == 0:
            directory.rmdir()
        return len(writer.label_names), num_images

    def _images(self, name: str) -> Iterator[tuple[str, bytes, str]]:
        """The key, bytes and extension of each usable image of an identity."""
        paths: dict[str, Path] = {}
        for path in _walk(self.source / name):
            self.done += 1
            if self.on_progress is not None and (self.done % _PROGRESS_EVERY_IMAGES == 0 or self.done == self.total):
                self.on_progress(self.done, self.total)
            if path.suffix.lower() not in _EXTENSIONS:
                self.skipped.append(SkippedFile(path, f"not a jpeg, png, bmp or webp file: {path.suffix!r}"))
                continue
            if not path.is_file():
                self.skipped.append(SkippedFile(path, "not a regular file"))
                continue
            key = _key(path.relative_to(self.source))
            if key in paths:
                raise ValueError(f"{path} and {paths[key]} both have the key {key!r}; rename or remove one of them")
            paths[key] = path
            try:
                image, extension = store_image(path.read_bytes(), image_size=self.image_size)
            except (OSError, ValueError) as error:
                self.skipped.append(SkippedFile(path, str(error)))
                continue
            yield key, image, extension


def _check_arguments(source: Path, verification_share: float, image_size: int | None, samples_per_shard: int) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder; expected a folder with one folder for each identity")
    if not source.is_dir():
        raise NotADirectoryError(f"{source}: not a folder; expected a folder with one folder for each identity")
    if not 0.0 <= verification_share < 1.0:
        raise ValueError(f"pack: verification_share is {verification_share}, but must be in [0, 1)")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise ValueError(f"pack: image_size is {image_size}, but must be in [1, 4096]")
    if samples_per_shard < 1:
        raise ValueError(f"pack: samples_per_shard is {samples_per_shard}, but must be at least 1")


def _list_identities(source: Path) -> tuple[list[str], list[SkippedFile]]:
    entries = sorted(source.iterdir())
    names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    kept = set(names)
    stray = [SkippedFile(entry, "not an identity folder") for entry in entries if entry.name not in kept]
    if not names:
        raise ValueError(f"{source}: no identity folder in it; expected {source}/<identity>/<image>")
    return names, stray


def _walk(directory: Path) -> Iterator[Path]:
    """All files under a folder, in an order that does not depend on the file system."""
    for folder, subfolders, files in os.walk(directory, onerror=_raise):
        subfolders.sort()
        for name in sorted(files):
            yield Path(folder, name)


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is not an empty one."""
    raise error


def _key(path: Path) -> str:
    """identity/name without extension; WebDataset ends a key at the first dot of the file name."""
    return path.with_name(path.stem.replace(".", "_")).as_posix()


def _reserved(names: list[str], share: float, seed: int) -> set[str]:
    """The identities set aside: those of the lowest hashes, at least one if a share is wanted and two are there."""
    if share == 0.0 or len(names) < 2:
        return set()
    count = min(max(1, round(share * len(names))), len(names) - 1)

    def draw(name: str) -> int:
        word = int.from_bytes(sha256(os.fsencode(name)).digest()[:8], "little")
        return hash64(seed, _VERIFICATION_SHARE, word)

    return set(sorted(names, key=draw)[:count])


def _first(skipped: list[SkippedFile]) -> str:
    return f" (first: {skipped[0].path}: {skipped[0].reason})" if skipped else ""
