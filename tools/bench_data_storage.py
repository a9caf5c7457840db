"""What `bench_data.py` measures of storage: reading from a disk that is not cached, and opening a large index."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["READERS", "make_cold_set", "make_large_index", "measure_index", "read_cold"]

_PIECE_BYTES = 4 << 20
_BATCH = 512
_LANES, _WINDOW = 8, 2048  # Ten windows in a gigabyte: the first, which nothing is read before, counts little.


def make_cold_set(split: Path, *, megabytes: int) -> Path:
    """A split of random files of 4 to 8 kB; they need not be images to be read."""
    from partialfc.data.writer import SplitWriter

    split.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with SplitWriter(split, samples_per_shard=10_000) as writer:
        writer.label_names = ["only"]
        for number in range(megabytes * 1024 // 6):
            writer.add(f"{number:09d}", generator.bytes(int(generator.integers(4096, 8192))), extension="jpg", label=0)
    os.sync()
    return split


def read_cold(name: str, split: Path) -> float:
    """MB/s of a reader, after all pages of the data shards were dropped from the cache."""
    from partialfc.data import ShardIndex

    index = ShardIndex.open(split)
    for path in index.shard_paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    READERS[name](index)
    return sum(index.shard_bytes) / (time.perf_counter() - start) / 1e6


def _sequential(index: Any) -> None:
    buffer = bytearray(_PIECE_BYTES)
    for path in index.shard_paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _plan_order(index: Any, *, read_ahead: bool) -> None:
    from partialfc.data import RankSteps, SamplePlan
    from partialfc.data.read_ahead import WarmSteps

    plan = SamplePlan(index.shard_sizes, seed=0, lanes=_LANES, window=_WINDOW)
    count = index.num_samples // _BATCH
    steps = RankSteps(plan=plan, global_batch=_BATCH, rank=0, world_size=1, consumed=0, num_batches=count)
    for step in WarmSteps(index, steps) if read_ahead else range(count):
        index.read_many(steps.draws(step).ids.numpy())


READERS: dict[str, Callable[[Any], None]] = {
    "sequential": _sequential,
    "plan, read ahead": lambda index: _plan_order(index, read_ahead=True),
    "plan, sample by sample": lambda index: _plan_order(index, read_ahead=False),
}


def make_large_index(split: Path, *, samples: int, classes: int) -> Path:
    """A split whose data shards are holes of the right size: all but the images is there."""
    from partialfc.data.split_format import record_type, write_split_files

    split.mkdir(parents=True)
    per_shard, slot = 10_000, 7168
    samples = -(-samples // per_shard) * per_shard
    shards = [
        {"name": f"shard-{number:06d}.tar", "bytes": per_shard * slot, "num_samples": per_shard}
        for number in range(samples // per_shard)
    ]
    for shard in shards:
        with open(split / str(shard["name"]), "wb") as file:
            file.truncate(per_shard * slot)
    records = np.zeros(samples, dtype=record_type())
    records["offset"] = np.arange(samples) % per_shard * slot + 512
    records["size"] = 6000
    records["label"] = np.random.default_rng(0).permutation(np.arange(samples) % classes)
    write_split_files(split, records, label_names=[f"identity-{label}" for label in range(classes)], shards=shards)
    return split


def measure_index(split: Path) -> dict[str, float]:
    """Seconds and memory of opening, of a plan, and of the first batch at 5/7 of the first epoch."""
    from partialfc.data import RankSteps, SamplePlan, ShardIndex

    SamplePlan([8], seed=0).sample_ids(torch.arange(8))  # What torch does once is not counted.
    resident, start = _resident_megabytes(), time.perf_counter()
    index = ShardIndex.open(split)
    opened = time.perf_counter()
    plan = SamplePlan(index.shard_sizes, seed=0)
    consumed = index.num_samples * 5 // 7
    steps = RankSteps(plan=plan, global_batch=16_384, rank=3, world_size=64, consumed=consumed, num_batches=1)
    ids = steps.draws(0).ids.numpy()
    for data in index.read_many(ids):
        assert data is not None
    _ = index.labels[ids]
    ready = time.perf_counter()
    evaluations = [_plan_seconds(plan, position * 7_919_317) for position in range(200)]
    return {
        "samples": index.num_samples,
        "open, s": opened - start,
        "open and first batch read, s": ready - start,
        "resident memory added, MB": _resident_megabytes() - resident,
        "plan at a position, ms (median)": float(np.median(evaluations)) * 1e3,
        "plan at a position, ms (most)": max(evaluations) * 1e3,
    }


def _plan_seconds(plan: Any, position: int) -> float:
    start = time.perf_counter()
    plan.sample_ids(torch.tensor([position]))
    return time.perf_counter() - start


def _resident_megabytes() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
