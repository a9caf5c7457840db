"""Reads every byte of a split, and names each damaged sample."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from partialfc.data.decode import decode_image
from partialfc.data.errors import SampleError
from partialfc.data.piece_cache import CacheSettings
from partialfc.data.split_format import INDEX, check_split, read_manifest, shard_location
from partialfc.data.tar_samples import groups_by_key
from partialfc.data.tar_scan import SequentialFile, TarError, TarMember, scan_tar, split_name

__all__ = ["Damage", "VerifyReport", "verify"]


class Damage(NamedTuple):
    """Something that is not as it was when the split was written.

    Attributes:
        shard: path or URL of the data shard.
        sample_id: of the sample; None if it is of none, such as the end of the tar.
        key: of the sample in the tar; "" if that is not known.
        offset: byte of the shard.
        reason: one of `partialfc.data.errors.REASONS`, or "label", "header", "padding", "archive", "size" or "missing".
        message: what was found.
    """

    shard: str
    sample_id: int | None
    key: str
    offset: int
    reason: str
    message: str

    def __str__(self) -> str:
        sample = "" if self.sample_id is None else f", sample {self.sample_id}"
        named = f" (key {self.key})" if self.key else ""
        return f"{self.shard}{sample}{named} at byte {self.offset}: {self.reason}: {self.message}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        num_samples: samples of the split.
        num_shards: its data shards.
        num_bytes: bytes of its data shards.
        damages: all that is wrong, in the order of the shards.
    """

    num_samples: int
    num_shards: int
    num_bytes: int
    damages: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason came up, the most frequent first."""
        return dict(Counter(damage.reason for damage in self.damages).most_common())

    def __str__(self) -> str:
        read = f"{self.num_samples:,} samples in {self.num_shards:,} data shards, {self.num_bytes:,} bytes"
        if self.ok:
            return f"{read}: all as it was written"
        samples = len({damage.sample_id for damage in self.damages} - {None})
        lines = [f"{read}: {len(self.damages):,} damages, {samples:,} samples damaged"]
        lines += [f"  {count:,} x {reason}" for reason, count in self.reasons.items()]
        lines += [f"  {damage}" for damage in self.damages]
        return "\n".join(lines)


def verify(
    directory: str | Path,
    *,
    num_threads: int,
    decode: bool = False,
    cache: CacheSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Reads every byte of the data shards of a split and compares it with the index.

    Images are compared by their checksums, labels with the .cls members, headers by their own checksums; what fills
    blocks up must be zero, and the end-of-archive marker be there. Members that are not part of the index, such as
    captions, have no checksum, nor have times and owners in PAX headers.

    Args:
        directory: the folder of the split.
        num_threads: data shards that are read at a time.
        decode: whether to decode each image, too.
        cache: tries and waits for URLs; nothing is taken from the cache.
        on_progress: called as on_progress(data shards done, data shards in all).

    Raises:
        FileNotFoundError: if the folder is no split.
        ValueError: if the index itself was changed, so that there is nothing to compare with.
        DataError: if a shard is there but cannot be read.
    """
    if num_threads < 1:
        raise ValueError(f"verify: num_threads is {num_threads}, but must be at least 1")
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_split(directory, manifest)
    records = np.load(directory / INDEX, mmap_mode="r")
    settings, shards = cache or CacheSettings(), manifest["shards"]
    first_ids = np.cumsum([0, *(shard["num_samples"] for shard in shards)]).tolist()

    def work(number: int) -> list[Damage]:
        shard = shards[number]
        part = records[first_ids[number] : first_ids[number + 1]]
        return _ShardCheck(
            shard_location(directory, shard["name"]), part, first_ids[number], decode, manifest["labels_in_shards"]
        ).run(shard["bytes"], settings)

    damages: list[Damage] = []
    with ThreadPoolExecutor(num_threads) as threads:
        try:
            for done, found in enumerate(threads.map(work, range(len(shards))), 1):
                damages += found
                if on_progress is not None:
                    on_progress(done, len(shards))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    num_bytes = sum(shard["bytes"] for shard in shards)
    return VerifyReport(len(records), len(shards), num_bytes, tuple(damages))


class _ShardCheck:
    """The check of one data shard."""

    def __init__(self, path: str, records: np.ndarray, first_id: int, decode: bool, labels_in_shards: bool) -> None:
        self._path, self._records, self._first_id = path, records, first_id
        self._decode, self._labels_in_shards = decode, labels_in_shards
        self._rows = {int(offset): row for row, offset in enumerate(records["offset"].tolist())}
        self._unseen = set(range(len(records)))
        self._damages: list[Damage] = []

    def run(self, expected_bytes: int, settings: CacheSettings) -> list[Damage]:
        """Reads the shard from its first byte to its last; what is wrong."""
        try:
            file = SequentialFile(self._path, settings)
        except FileNotFoundError:
            self._add(None, "", 0, "missing", f"the data shard is missing, with {len(self._records)} samples")
            return self._damages
        with file:
            if file.size != expected_bytes:
                message = f"the data shard has {file.size} bytes, but manifest.json says {expected_bytes}"
                self._add(None, "", min(file.size, expected_bytes), "size", message)
            try:
                for key, members in groups_by_key(self._watched(scan_tar(file, wants=lambda name: True))):
                    self._check_sample(key, members)
            except TarError as error:
                self._add(None, "", 0, "archive", str(error).removeprefix(f"{self._path}: "))
            # Behind a damaged header the images can still be found by the index.
            for row in sorted(self._unseen):
                self._check_image(
                    row, "", file.read(int(self._records["offset"][row]), int(self._records["size"][row]))
                )
        return self._damages

    def _watched(self, members: Iterator[TarMember]) -> Iterator[TarMember]:
        for member in members:
            if not member.is_padded_with_zeros:
                self._add(None, "", member.offset, "padding", f"what fills the blocks of {member.name!r} is not zero")
            yield member

    def _check_sample(self, key: str, members: list[TarMember]) -> None:
        rows = []
        for member in members:
            row = self._rows.get(member.offset)
            if row is None:
                continue
            rows.append(row)
            self._unseen.discard(row)
            assert member.content is not None
            if member.size != self._records["size"][row]:
                message = f"the tar says {member.size} bytes, the index {self._records['size'][row]}"
                self._add(row, key, member.offset, "header", message)
            self._check_image(row, key, member.content)
        if rows and self._labels_in_shards:
            self._check_label(rows[0], key, members)

    def _check_label(self, row: int, key: str, members: list[TarMember]) -> None:
        offset, label = int(self._records["offset"][row]), int(self._records["label"][row])
        texts = [member.content or b"" for member in members if (split_name(member.name) or ("", ""))[1] == "cls"]
        if len(texts) != 1:
            self._add(row, key, offset, "label", f"the sample has {len(texts)} .cls members, but needs 1")
            return
        try:
            found = int(texts[0].decode("ascii").strip("\0 \t\r\n"))
        except ValueError:
            self._add(row, key, offset, "label", f"the .cls holds {texts[0][:40]!r}, but the index has {label}")
            return
        if found != label:
            self._add(row, key, offset, "label", f"the .cls holds {found}, but the index has {label}")

    def _check_image(self, row: int, key: str, data: bytes) -> None:
        offset, size = int(self._records["offset"][row]), int(self._records["size"][row])
        if len(data) < size:
            self._add(row, key, offset, "truncated", f"{size} bytes expected, but the file holds {len(data)}")
        elif zlib.crc32(data) != int(self._records["crc32"][row]):
            self._add(row, key, offset, "checksum", "the bytes do not match their crc32 checksum")
        elif self._decode:
            try:
                decode_image(data)
            except SampleError as error:
                self._add(row, key, offset, error.reason, str(error))

    def _add(self, row: int | None, key: str, offset: int, reason: str, message: str) -> None:
        sample_id = None if row is None else self._first_id + row
        self._damages.append(Damage(self._path, sample_id, key, offset, reason, message))
