"""Writes synthetic identities as a data set: real JPEGs in real data shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import simplejpeg
import torch

from partialfc.data.synthetic import SyntheticFaces
from partialfc.data.writer import SplitWriter, staged_directory
from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["synthesize"]

VERIFICATION_START = 1 << 40
"""First identity of a verification split: beyond any training split, and the same however many those hold."""

_JPEG_QUALITY = 95
_IMAGES_PER_CHUNK = 256
_SAMPLES_PER_SHARD = 10_000
_SAMPLE_ORDER = 1


def synthesize(
    out: str | Path,
    *,
    identities: int,
    images_per_identity: int,
    seed: int,
    image_size: int,
    difficulty: float = 0.5,
    verification_identities: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a data set of synthetic identities: `out/train` and, if wanted, `out/verification`.

    The samples of a split are written in a keyed random order, so identities are mixed over all of its shards. The
    verification identities are never among those of training, and are the same for any number of those.

    Args:
        out: folder to make; it must be missing or empty, and is only there once it is complete.
        identities: number of training identities; at least 1.
        images_per_identity: views of each identity, in both splits; at least 1.
        seed: key of everything that is drawn.
        image_size: height and width in pixels; at least 16.
        difficulty: how much the views of an identity differ, in [0, 1].
        verification_identities: number of identities set aside; 0 for no such split.
        on_progress: called as on_progress(images written, images in all) now and then.

    Raises:
        ValueError: for a number out of its range.
        FileExistsError: if `out` is there and not an empty folder.
    """
    if identities < 1 or images_per_identity < 1 or verification_identities < 0:
        raise ValueError(
            f"synthesize: identities={identities} and images_per_identity={images_per_identity} must be at least 1, "
            f"verification_identities={verification_identities} not negative"
        )
    faces = SyntheticFaces(seed=seed, image_size=image_size, difficulty=difficulty)
    total = (identities + verification_identities) * images_per_identity
    splits = [("train", 0, identities), ("verification", VERIFICATION_START, verification_identities)]
    done = 0
    with staged_directory(out) as staging, _one_thread():
        for name, first, count in splits:
            if count == 0:
                continue
            directory = staging / name
            directory.mkdir()
            for written in _write_split(directory, faces, first, count, images_per_identity):
                done += written
                if on_progress is not None:
                    on_progress(done, total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The many small operations of a chunk gain nothing from more threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_split(directory: Path, faces: SyntheticFaces, first: int, count: int, views: int) -> Iterator[int]:
    """Writes `views` pictures of the identities [first, first + count); yields the size of each chunk written."""
    order = KeyedPermutation(count * views)
    order_key = hash64(faces.seed, _SAMPLE_ORDER, first)
    with SplitWriter(directory, samples_per_shard=_SAMPLES_PER_SHARD) as writer:
        writer.label_names = [f"identity-{first + label}" for label in range(count)]
        for start in range(0, count * views, _IMAGES_PER_CHUNK):
            picture = order(torch.arange(start, min(start + _IMAGES_PER_CHUNK, count * views)), order_key)
            label, view = picture // views, picture % views
            pixels = faces.render(first + label, view).permute(0, 2, 3, 1).contiguous().numpy()
            for image, label_here, view_here in zip(pixels, label.tolist(), view.tolist(), strict=True):
                jpeg = simplejpeg.encode_jpeg(image, quality=_JPEG_QUALITY, colorspace="RGB")
                key = f"{first + label_here}-{view_here:04d}"
                writer.add(key, jpeg, extension="jpg", label=label_here)
            yield len(picture)
