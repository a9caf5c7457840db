"""Splits from splits: several merged to one, one cut in two, duplicates left out. All of them are packed anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from partialfc.data.decode import decode_image
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.packing import PackReport, pack
from partialfc.data.parallel import run_tasks
from partialfc.data.sources import SplitSource
from partialfc.data.sources.split import reopen_split
from partialfc.data.split_format import INDEX

__all__ = ["DedupReport", "DuplicateGroup", "dedup", "merge", "split"]

MAX_DISTANCE = 7
"""Of perceptual hashes: further apart, pictures are seldom the same, and the search for them becomes slow."""

_GROUPS_SHOWN = 20
_IDS_PER_TASK = 2_000
_HASH_BITS = 64
_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class DuplicateGroup:
    """A sample that is kept, and those that show the same picture.

    Attributes:
        kept: id of the sample that is kept, the first in index order.
        duplicates: ids of those that are left out.
        identities: names of all identities that these samples are labelled with.
    """

    kept: int
    duplicates: tuple[int, ...]
    identities: tuple[str, ...]


@dataclass(frozen=True)
class DedupReport:
    """What `dedup` found and did.

    Attributes:
        within: groups of one identity each: only superfluous.
        across: groups of several identities: at least one label of each is wrong.
        pack: what was written without the duplicates.
    """

    within: tuple[DuplicateGroup, ...]
    across: tuple[DuplicateGroup, ...]
    pack: PackReport

    def __str__(self) -> str:
        lines = []
        for title, groups in (("within one identity", self.within), ("across identities", self.across)):
            left_out = sum(len(group.duplicates) for group in groups)
            lines.append(f"duplicates {title}: {left_out:,} left out, in {len(groups):,} groups")
            lines += [
                f"  sample {group.kept} is kept, left out: {', '.join(map(str, group.duplicates))} "
                f"({', '.join(group.identities)})"
                for group in groups[:_GROUPS_SHOWN]
            ]
            if len(groups) > _GROUPS_SHOWN:
                lines.append(f"  ... and {len(groups) - _GROUPS_SHOWN:,} groups more")
        return "\n".join([*lines, str(self.pack)])


def merge(splits: Sequence[str | Path], out: str | Path, *, disjoint: bool = False, **options: Any) -> PackReport:
    """Merges splits to the training split `out/train`.

    Args:
        splits: folders of splits.
        out: folder to make, as for `pack`.
        disjoint: equal names in different splits are different identities; the names get the number of the split and
            a slash in front. Left out, an equal name is the same identity.
        **options: of `pack`: samples_per_shard, num_workers, dry_run, on_progress.

    Raises:
        ValueError: for less than two splits, or a damaged one; and whatever `pack` raises.
        FileNotFoundError: if a split is missing.
    """
    if len(splits) < 2:
        raise ValueError(f"merge: {len(splits)} split given, but at least two are needed")
    prefixes = [f"{number}/" for number in range(len(splits))] if disjoint else None
    return pack(SplitSource.open(splits, prefixes=prefixes), out, verification_share=0.0, seed=0, **options)


def split(source: str | Path, out: str | Path, *, share: float, seed: int, **options: Any) -> PackReport:
    """Sets identities of a split aside: the rest becomes `out/train`, and they become `out/verification`.

    Args:
        source: the folder of a split.
        out: folder to make, as for `pack`.
        share: share of the identities to set aside, in (0, 1).
        seed: key of that draw.
        **options: of `pack`: samples_per_shard, num_workers, dry_run, on_progress.

    Raises:
        ValueError: for a share out of its range, or a damaged split; and whatever `pack` raises.
        FileNotFoundError: if the split is missing.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"split: share is {share}, but must be in (0, 1)")
    return pack(SplitSource.open([source]), out, verification_share=share, seed=seed, **options)


def dedup(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "bytes",
    max_distance: int = 3,
    num_workers: int = 0,
    **options: Any,
) -> DedupReport:
    """Writes a split without its duplicates to `out/train`. Of those, the first in index order is kept.

    Args:
        source: the folder of a split.
        out: folder to make, as for `pack`.
        method: `bytes` finds files that are equal, `perceptual` pictures that look alike: their difference hashes (64
            bits: which of neighbouring pixels of the picture at 9 x 8 gray pixels is brighter) differ in few bits
            from that of a picture that is kept. Pictures without structure are all alike to it.
        max_distance: of `perceptual`: the number of bits that may differ, in [0, 7].
        num_workers: worker processes; 0 works in the calling process.
        **options: of `pack`: samples_per_shard, dry_run, on_progress.

    Raises:
        ValueError: for another method, a distance out of its range, or a damaged split; and whatever `pack` raises.
        FileNotFoundError: if the split is missing.
    """
    if method not in ("bytes", "perceptual"):
        raise ValueError(f"dedup: method is {method!r}, but must be 'bytes' or 'perceptual'")
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"dedup: max_distance is {max_distance}, but must be in [0, {MAX_DISTANCE}]")
    index = ShardIndex.open(source)
    if method == "bytes":
        kept_as = _equal_files(index)
    else:
        kept_as = _alike(*_hash_all(index, num_workers), index.num_samples, max_distance)
    within, across = _groups(index, kept_as)
    kept = np.flatnonzero(kept_as == np.arange(index.num_samples))
    chosen = SplitSource.open([source], selected=[kept])
    report = pack(chosen, out, verification_share=0.0, seed=0, num_workers=num_workers, **options)
    return DedupReport(within, across, report)


def _groups(index: ShardIndex, kept_as: np.ndarray) -> tuple[tuple[DuplicateGroup, ...], tuple[DuplicateGroup, ...]]:
    """The groups within one identity, and those across several."""
    members: dict[int, list[int]] = defaultdict(list)
    left_out = np.flatnonzero(kept_as != np.arange(len(kept_as)))
    for sample_id, kept in zip(left_out.tolist(), kept_as[left_out].tolist(), strict=True):
        members[kept].append(sample_id)
    within: list[DuplicateGroup] = []
    across: list[DuplicateGroup] = []
    for kept, duplicates in sorted(members.items()):
        labels = np.unique(index.labels[[kept, *duplicates]]).tolist()
        group = DuplicateGroup(kept, tuple(duplicates), tuple(index.label_names[label] for label in labels))
        (within if len(labels) == 1 else across).append(group)
    return tuple(within), tuple(across)


def _equal_files(index: ShardIndex) -> np.ndarray:
    """For each sample the first one of the same bytes, int64 [num_samples]."""
    records = np.load(index.directory / INDEX, mmap_mode="r")
    marks = records["size"].astype(np.uint64) << np.uint64(32) | records["crc32"]
    order = np.argsort(marks, kind="stable")
    same_as_before = marks[order][1:] == marks[order][:-1]
    kept_as = np.arange(index.num_samples)
    first_of: dict[bytes, int] = {}
    for place in np.flatnonzero(same_as_before).tolist():
        if place == 0 or not same_as_before[place - 1]:
            first_of = {}
            _note_first(index, int(order[place]), first_of)
        sample_id = int(order[place + 1])
        kept_as[sample_id] = _note_first(index, sample_id, first_of)
    return kept_as


def _note_first(index: ShardIndex, sample_id: int, first_of: dict[bytes, int]) -> int:
    """The first sample of the bytes of this one. One that cannot be read is like no other; `pack` reports it."""
    try:
        return first_of.setdefault(index.read(sample_id), sample_id)
    except SampleError:
        return sample_id


def _hash_all(index: ShardIndex, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all samples that can be decoded, int64, and the uint64 hashes of their pictures."""
    tasks = [(index.directory, start) for start in range(0, index.num_samples, _IDS_PER_TASK)]
    parts = list(run_tasks(_hash_some, tasks, num_workers=num_workers if len(tasks) > 1 else 0))
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([hashes for _, hashes in parts])


def _hash_some(task: tuple[Path, int]) -> tuple[np.ndarray, np.ndarray]:
    index, start = reopen_split(task[0]), task[1]
    ids, hashes = [], []
    for sample_id in range(start, min(start + _IDS_PER_TASK, index.num_samples)):
        try:
            hashes.append(_difference_hash(decode_image(index.read(sample_id))))
        except SampleError:  # It is like no other; `pack` reports it.
            continue
        ids.append(sample_id)
    return np.array(ids, dtype=np.int64), np.array(hashes, dtype=np.uint64)


def _difference_hash(pixels: np.ndarray) -> int:
    """64 bits: whether each pixel of the picture at 9 x 8 gray pixels is brighter than its right neighbour."""
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(small[:, :-1] > small[:, 1:]).tobytes(), "big")


def _alike(ids: np.ndarray, hashes: np.ndarray, num_samples: int, max_distance: int) -> np.ndarray:
    """For each sample the first kept one that it is alike to, or itself, int64 [num_samples]."""
    kept_as = np.arange(num_samples)
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    neighbours: dict[int, list[int]] = defaultdict(list)
    for left, right in _close_pairs(distinct, max_distance):
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            neighbours[one].append(other)
            neighbours[other].append(one)
    # Hashes in the order in which they are first met: one is kept unless it is close to one kept before.
    stands_for = np.arange(len(distinct))
    kept: set[int] = set()
    for number in np.argsort(first, kind="stable").tolist():
        earlier = [other for other in neighbours.get(number, ()) if other in kept]
        if earlier:
            stands_for[number] = min(earlier, key=lambda other: first[other])
        else:
            kept.add(number)
    kept_as[ids] = ids[first[stands_for[inverse]]]
    return kept_as


def _close_pairs(hashes: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of distinct hashes that differ in at most `max_distance` bits; a pair may come more than once.

    Cut into one band of bits more than may differ, two such hashes are equal in at least one of the bands.
    """
    edges = np.linspace(0, _HASH_BITS, max_distance + 2).round().astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = hashes >> np.uint64(low) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        places = np.arange(len(order))
        for step in range(1, len(order)):
            # Within a band, each hash against that `step` places further.
            places = places[places + step < len(order)]
            places = places[band[order[places]] == band[order[places + step]]]
            if len(places) == 0:
                break
            left, right = order[places], order[places + step]
            close = _distance(hashes[left], hashes[right]) <= max_distance
            yield left[close], right[close]


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The number of bits that differ."""
    differing = (left ^ right).view(np.uint8).reshape(len(left), 8)
    count: np.ndarray = _BITS_SET[differing].sum(axis=1)
    return count
