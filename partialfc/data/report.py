"""What is in a data set, for people."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from partialfc.data.index import MANIFEST, ShardIndex

__all__ = ["DatasetReport", "SplitReport", "inspect"]

_SIZES_SAMPLED = 100
_HISTOGRAM_ROWS = 8
_HISTOGRAM_WIDTH = 40


@dataclass(frozen=True)
class SplitReport:
    """What is in a split.

    Attributes:
        name: name of its folder.
        num_samples: number of images.
        num_classes: number of identities.
        num_shards: number of data shards.
        shard_bytes: bytes of all data shards.
        image_bytes: bytes of all images.
        image_sizes: (width, height) -> images of that size, among up to 100 spread over the split.
        images_per_identity: fewest, median and most images of an identity.
        histogram: (fewest, most, identities that have so many images), in ascending order.
        fingerprint: of the index.
    """

    name: str
    num_samples: int
    num_classes: int
    num_shards: int
    shard_bytes: int
    image_bytes: int
    image_sizes: dict[tuple[int, int], int]
    images_per_identity: tuple[int, float, int]
    histogram: tuple[tuple[int, int, int], ...]
    fingerprint: str

    def __str__(self) -> str:
        sizes = ", ".join(f"{width}x{height} ({count})" for (width, height), count in self.image_sizes.items())
        fewest, median, most = self.images_per_identity
        lines = [
            f"{self.name}",
            f"  images        {self.num_samples:,} of {self.num_classes:,} identities",
            f"  data shards   {self.num_shards:,}, {self.shard_bytes:,} bytes, of them {self.image_bytes:,} of images",
            f"  image sizes   {sizes} of {sum(self.image_sizes.values())} looked at",
            f"  per identity  {fewest} to {most} images, median {median:g}",
        ]
        tallest = max(count for _, _, count in self.histogram)
        for low, high, count in self.histogram:
            span = f"{low}" if low == high else f"{low}-{high}"
            lines.append(f"  {span:>12}  {'#' * -(-count * _HISTOGRAM_WIDTH // tallest)} {count:,}")
        lines.append(f"  fingerprint   {self.fingerprint}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DatasetReport:
    """What is in the splits of a data set."""

    directory: Path
    splits: tuple[SplitReport, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.directory), *map(str, self.splits)])


def inspect(directory: str | Path) -> DatasetReport:
    """Looks into a data set, or into one split of it.

    Raises:
        FileNotFoundError: if there is no split.
        ValueError: if a split is damaged, or one of the images looked at is none.
    """
    directory = Path(directory)
    if (directory / MANIFEST).is_file():
        return DatasetReport(directory, (_inspect_split(directory),))
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
    if not found:
        raise FileNotFoundError(
            f"{directory}: neither a data set nor a split: no {MANIFEST} in it or in a folder of it; "
            "make one with `partialfc data pack` or `partialfc data synthesize`"
        )
    return DatasetReport(directory, tuple(_inspect_split(split) for split in found))


def _inspect_split(directory: Path) -> SplitReport:
    index = ShardIndex.open(directory)
    counts = np.bincount(index.labels, minlength=index.num_classes)
    sampled = np.unique(np.linspace(0, index.num_samples - 1, _SIZES_SAMPLED).round().astype(np.int64))
    sizes = Counter(_image_size(index, sample_id) for sample_id in sampled.tolist())
    return SplitReport(
        name=directory.name,
        num_samples=index.num_samples,
        num_classes=index.num_classes,
        num_shards=len(index.shard_paths),
        shard_bytes=sum(index.shard_bytes),
        image_bytes=index.image_bytes,
        image_sizes=dict(sizes.most_common()),
        images_per_identity=(int(counts.min()), float(np.median(counts)), int(counts.max())),
        histogram=_histogram(counts),
        fingerprint=index.fingerprint,
    )


def _image_size(index: ShardIndex, sample_id: int) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(index.read(sample_id))) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{index.describe(sample_id)}: not an image") from error


def _histogram(counts: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Counts in at most 8 spans of whole numbers, of equal width."""
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // _HISTOGRAM_ROWS)
    rows = np.bincount((counts - low) // width)
    return tuple((low + row * width, low + row * width + width - 1, int(count)) for row, count in enumerate(rows))
