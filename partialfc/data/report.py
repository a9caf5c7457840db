"""What is in a data set, for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from partialfc.data.batch import bad_sample
from partialfc.data.decode import open_image
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.split_format import INDEX, MANIFEST

__all__ = ["DatasetReport", "SplitReport", "stats"]

_IMAGES_SAMPLED = 100
_FEW_IMAGES = (1, 4, 9)
_RECORDS_AT_ONCE = 1 << 17  # A few MiB: pages of a memory map would count as memory of this process.
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
        samples_per_shard: fewest and most samples of a data shard.
        shard_bytes: bytes of all data shards.
        image_bytes: bytes of all images.
        bytes_per_image: fewest, mean and most bytes of an image.
        image_sizes: (width, height) -> images of that size, among up to 100 spread over the split.
        bad_images: of those up to 100 images, the ones that cannot be read: where they lie, and what is wrong.
        images_per_identity: fewest, median and most images of an identity.
        few_images: (count, identities with at most that many images) for 1, 4 and 9 images.
        histogram: (fewest, most, identities that have so many images), in ascending order.
        weights: lowest and highest weight; None if the set has none.
        quality: lowest and highest quality; None if the set has none.
        fingerprint: of the index.
    """

    name: str
    num_samples: int
    num_classes: int
    num_shards: int
    samples_per_shard: tuple[int, int]
    shard_bytes: int
    image_bytes: int
    bytes_per_image: tuple[int, float, int]
    image_sizes: dict[tuple[int, int], int]
    bad_images: tuple[str, ...]
    images_per_identity: tuple[int, float, int]
    few_images: tuple[tuple[int, int], ...]
    histogram: tuple[tuple[int, int, int], ...]
    weights: tuple[float, float] | None
    quality: tuple[float, float] | None
    fingerprint: str

    def __str__(self) -> str:
        sizes = ", ".join(f"{width}x{height} ({count})" for (width, height), count in self.image_sizes.items())
        looked_at = sum(self.image_sizes.values()) + len(self.bad_images)
        fewest, median, most = self.images_per_identity
        smallest, mean, largest = self.bytes_per_image
        low, high = self.samples_per_shard
        samples = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lines = [
            f"{self.name}",
            f"  images        {self.num_samples:,} of {self.num_classes:,} identities",
            f"  bytes each    {smallest:,} to {largest:,}, mean {mean:,.0f}",
            f"  image sizes   {sizes or 'none'} of {looked_at} looked at",
            f"  data shards   {self.num_shards:,} of {samples} samples, {self.shard_bytes:,} bytes, "
            f"of them {self.image_bytes:,} of images",
            f"  per identity  {fewest} to {most} images, median {median:g}",
        ]
        tallest = max(count for _, _, count in self.histogram)
        for low, high, count in self.histogram:
            span = f"{low}" if low == high else f"{low}-{high}"
            lines.append(f"  {span:>12}  {'#' * -(-count * _HISTOGRAM_WIDTH // tallest)} {count:,}")
        few = ", ".join(f"at most {images}: {count:,}" for images, count in self.few_images)
        lines.append(f"  few images    identities with {few}")
        for name, limits in (("weights", self.weights), ("quality", self.quality)):
            if limits is not None:
                lines.append(f"  {name}       {limits[0]:g} to {limits[1]:g}")
        if self.bad_images:
            lines.append(
                f"  bad images    {len(self.bad_images)} of {looked_at} looked at, the first: {self.bad_images[0]}; "
                "`partialfc data verify` finds all"
            )
        lines.append(f"  fingerprint   {self.fingerprint}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DatasetReport:
    """What is in the splits of a data set."""

    directory: Path
    splits: tuple[SplitReport, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.directory), *map(str, self.splits)])


def stats(directory: str | Path) -> DatasetReport:
    """Looks into a data set, or into one split of it.

    Raises:
        FileNotFoundError: if there is no split, or a file of one is missing.
        ValueError: if the index of a split is damaged or does not fit its data shards.
        DataError: if a data shard cannot be read.
    """
    directory = Path(directory)
    if (directory / MANIFEST).is_file():
        return DatasetReport(directory, (_split_stats(directory),))
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
    if not found:
        raise FileNotFoundError(
            f"{directory}: neither a data set nor a split: no {MANIFEST} in it or in a folder of it; "
            "make one with `partialfc data pack` or `partialfc data synthesize`"
        )
    return DatasetReport(directory, tuple(_split_stats(split) for split in found))


def _split_stats(directory: Path) -> SplitReport:
    index = ShardIndex.open(directory)
    counts = np.diff(index.label_starts)
    columns = _columns(directory / INDEX)
    sizes = columns["size"]
    image_sizes, bad_images = _look_at_images(index)
    return SplitReport(
        name=directory.name,
        num_samples=index.num_samples,
        num_classes=index.num_classes,
        num_shards=len(index.shard_paths),
        samples_per_shard=(min(index.shard_sizes), max(index.shard_sizes)),
        shard_bytes=sum(index.shard_bytes),
        image_bytes=int(sizes.sum),
        bytes_per_image=(int(sizes.lowest), sizes.sum / index.num_samples, int(sizes.highest)),
        image_sizes=image_sizes,
        bad_images=bad_images,
        images_per_identity=(int(counts.min()), float(np.median(counts)), int(counts.max())),
        few_images=tuple((images, int((counts <= images).sum())) for images in _FEW_IMAGES),
        histogram=_histogram(counts),
        weights=_limits(columns.get("weight")),
        quality=_limits(columns.get("quality")),
        fingerprint=index.fingerprint,
    )


class _Column(NamedTuple):
    lowest: float
    highest: float
    sum: float


def _columns(path: Path) -> dict[str, _Column]:
    """Range and sum of each column of an index, read piece by piece."""
    records = np.load(path, mmap_mode="r")
    names = [name for name in ("size", "weight", "quality") if name in records.dtype.names]
    pieces: dict[str, list[_Column]] = {name: [] for name in names}
    with open(path, "rb") as file:
        file.seek(records.offset)
        while len(piece := np.fromfile(file, dtype=records.dtype, count=_RECORDS_AT_ONCE)):
            for name in names:
                column = piece[name]
                total = column.sum(dtype=np.float64)
                pieces[name].append(_Column(float(column.min()), float(column.max()), float(total)))
    joined = {}
    for name, parts in pieces.items():
        lowest, highest, sums = zip(*parts, strict=True)
        joined[name] = _Column(min(lowest), max(highest), sum(sums))
    return joined


def _limits(column: _Column | None) -> tuple[float, float] | None:
    return None if column is None else (column.lowest, column.highest)


def _look_at_images(index: ShardIndex) -> tuple[dict[tuple[int, int], int], tuple[str, ...]]:
    """(width, height) -> count of some images spread over the split, and what is wrong with the others."""
    sampled = np.unique(np.linspace(0, index.num_samples - 1, _IMAGES_SAMPLED).round().astype(np.int64))
    sizes: Counter[tuple[int, int]] = Counter()
    bad = []
    for sample_id, data in zip(sampled.tolist(), index.read_many(sampled), strict=True):
        try:
            if isinstance(data, SampleError):
                raise data
            with open_image(data) as image:
                sizes[image.size] += 1
        except SampleError as error:
            bad.append(bad_sample(index, sample_id, error).message)
    return dict(sizes.most_common()), tuple(bad)


def _histogram(counts: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Counts in at most 8 spans of whole numbers, of equal width."""
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // _HISTOGRAM_ROWS)
    rows = np.bincount((counts - low) // width)
    return tuple((low + row * width, low + row * width + width - 1, int(count)) for row, count in enumerate(rows))
