"""Other forms of a checkpoint, made by one process in bounded memory."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from partialfc.checkpoint.directory import CheckpointDirectory, remove, step_of
from partialfc.checkpoint.manifest import MANIFEST_NAME, Manifest, fsync_directory
from partialfc.checkpoint.parts import PIECE_BYTES, FlatState, Part
from partialfc.checkpoint.reading import StoredState
from partialfc.checkpoint.storage import write_parts

__all__ = ["check_export", "check_reshard", "export_rows", "reshard", "reshard_bytes"]

_LEAST_SPLIT_BYTES = 2**20
_MOST_RANKS = 2**16

OnBytes = Callable[[int], None]


def reshard(path: Path, out: Path, *, num_ranks: int, on_bytes: OnBytes = lambda count: None) -> Path:
    """Writes a checkpoint as some number of ranks would, and compares the copy with it before it is committed.

    Tensors of 1 MiB and more are cut by rows, as class centers are over ranks; the others go to one file each.

    Args:
        path: of a committed checkpoint that is known to be good.
        out: a directory of checkpoints, in which the copy has the same name.
        num_ranks: how many files with tensors there are in the copy.
        on_bytes: called with the size of what was done, of `reshard_bytes` in all.

    Returns:
        The committed copy.

    Raises:
        ValueError: if `num_ranks` is below 1, or `out` has a checkpoint of that step.
        OSError: if it cannot be written.
    """
    copy = check_reshard(path, out, num_ranks=num_ranks)
    step, source = step_of(copy), StoredState(path)
    assert step is not None, path
    directory = CheckpointDirectory(out, keep_last=1, keep_best=False)
    metadata = {**Manifest.read(path).metadata, "world_size": num_ranks}
    temporary = directory.begin(step)
    try:
        states = [_state_of(source, rank, num_ranks, on_bytes) for rank in range(num_ranks)]
        files = write_parts(temporary, states)
        _compare(source, StoredState(temporary), on_bytes)
        directory.commit(temporary, step, Manifest(files, metadata))
    except BaseException:
        remove(temporary)
        raise
    return copy


def check_reshard(path: Path, out: Path, *, num_ranks: int) -> Path:
    """Refuses what `reshard` would refuse, without reading the checkpoint.

    Args:
        path: of a committed checkpoint.
        out: as of `reshard`.
        num_ranks: as of `reshard`.

    Returns:
        Where the copy will be.

    Raises:
        ValueError: if `num_ranks` is out of its range, or `out` has a checkpoint of that step.
    """
    if not 1 <= num_ranks <= _MOST_RANKS:
        raise ValueError(f"--ranks is {num_ranks}, but must be from 1 to {_MOST_RANKS}")
    copy = out / path.absolute().name
    if os.path.lexists(copy):  # a link to nothing would be replaced
        raise ValueError(f"{copy} exists; give another --out")
    return copy


def reshard_bytes(path: Path) -> int:
    """How much `reshard` has to do for a checkpoint: all tensors are written and compared."""
    entries = StoredState(path).tensors.values()
    return 2 * sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)


def _state_of(source: StoredState, rank: int, num_ranks: int, on_bytes: OnBytes) -> FlatState:
    """What one of the ranks has; what several have is written by one."""
    values: dict[str, Part | bytes] = {name: source.read_value(name) for name in source.values}
    for name, entry in source.tensors.items():
        shape, dtype = entry.size, entry.properties.dtype
        start, stop = 0, shape[0] if shape else 1
        if shape.numel() * dtype.itemsize >= _LEAST_SPLIT_BYTES and shape:
            share = -(-shape[0] // num_ranks)
            start, stop = min(rank * share, shape[0]), min((rank + 1) * share, shape[0])
            if start == stop:
                continue

        def read(first: int, last: int, name: str = name, start: int = start) -> torch.Tensor:
            box = source.read_rows(name, start + first, start + last)
            on_bytes(box.nbytes)
            return box

        offsets = torch.Size([start, *[0] * (len(shape) - 1)] if shape else [])
        sizes = torch.Size([stop - start, *shape[1:]] if shape else [])
        values[name] = Part(shape, offsets, sizes, dtype, read)
    return FlatState(values, source.paths)


def _compare(source: StoredState, copy: StoredState, on_bytes: OnBytes) -> None:
    """That what was written can be read, and is what it should be.

    Raises:
        OSError: if it is not.
    """
    if source.paths != copy.paths or source.tensors.keys() != copy.tensors.keys():
        raise OSError("the copy has other entries than the checkpoint")
    for name in source.values:
        if source.read_value(name) != copy.read_value(name):
            raise OSError(f"{name} was not copied as it is")
    for name, entry in source.tensors.items():
        rows = entry.size[0] if entry.size else 1
        whole = Part(entry.size, entry.size, entry.size, entry.properties.dtype, lambda start, stop: torch.empty(0))
        for start in range(0, rows, whole.rows_at_once):
            stop = min(start + whole.rows_at_once, rows)
            expected, got = source.read_rows(name, start, stop), copy.read_rows(name, start, stop)
            # As bytes: numbers that are not finite count too.
            if not torch.equal(expected.reshape(-1).view(torch.uint8), got.reshape(-1).view(torch.uint8)):
                raise OSError(f"{name} was not copied as it is")
            on_bytes(got.nbytes)


def export_rows(
    path: Path,
    name: str,
    out: Path,
    *,
    num_rows: int,
    facts: dict[str, Any],
    on_rows: OnBytes = lambda count: None,
) -> None:
    """Writes a table of rows as a float32 .npy file, and facts of it as a .json file beside that.

    Args:
        path: of a committed checkpoint that is known to be good.
        name: of a tensor [blocks, rows of a block, K, D].
        out: ends in .npy; the file is [num_rows, K, D], or [num_rows, D] with K = 1.
        num_rows: the blocks may have more, which are left out.
        facts: what JSON can hold.
        on_rows: called with numbers of rows, as they are written.

    Raises:
        ValueError: as of `check_export`, or if there is no such tensor.
        OSError: if it cannot be written; then neither file is there.
    """
    check_export(out)
    stored = StoredState(path)
    if name not in stored.tensors:
        raise ValueError(f"{path} has no {name}")
    blocks, block_size, num_subcenters, dim = stored.tensors[name].size
    assert (blocks - 1) * block_size < num_rows <= blocks * block_size, (blocks, block_size, num_rows)
    shape = (num_rows, dim) if num_subcenters == 1 else (num_rows, num_subcenters, dim)
    temporary = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            left = num_rows
            for start, stop in _portions(stored, name):
                rows = stored.read_rows(name, start, stop).flatten(0, 1)[:left].to(torch.float32)
                stream.write(rows.numpy().data)
                left -= len(rows)
                on_rows(len(rows))
            assert left == 0
            stream.flush()
            os.fsync(stream.fileno())
        _write_json(_beside(out), {**facts, "shape": list(shape), "dtype": "float32"})
        temporary.rename(out)
        fsync_directory(out.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_export(out: Path) -> None:
    """Refuses what `export_rows` would refuse, without reading the checkpoint.

    Args:
        out: as of `export_rows`.

    Raises:
        ValueError: if it does not end in .npy, is inside of a checkpoint, its directory is missing, or it or the .json
            file beside it is there already.
    """
    if out.suffix != ".npy":
        raise ValueError(f"--out is {out}, but must end in .npy")
    if (out.parent / MANIFEST_NAME).exists():
        raise ValueError(f"--out is {out}, which is inside of a checkpoint; give another folder")
    if not out.parent.is_dir():
        raise ValueError(f"--out is {out}, but there is no directory {out.parent}; make it first")
    for file in (out, _beside(out)):
        if file.exists():
            raise ValueError(f"{file} exists; give another --out")


def _beside(out: Path) -> Path:
    """The file of facts."""
    return out.with_suffix(".json")


def _portions(stored: StoredState, name: str) -> list[tuple[int, int]]:
    """Runs of blocks that end where pieces do, none of them much larger than a piece should be."""
    bounds, shape = stored.row_bounds(name), stored.tensors[name].size
    at_once = max(1, PIECE_BYTES // max(shape[1:].numel() * 4, 1))
    return [
        (first, min(first + at_once, stop)) for start, stop in pairwise(bounds) for first in range(start, stop, at_once)
    ]


def _write_json(file: Path, values: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            json.dump(values, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
