"""A state as a flat list of what is to be written: this rank's part of each tensor, and bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

__all__ = ["PIECE_BYTES", "FlatState", "Part", "PartPlanner", "StatePath", "flatten"]

PIECE_BYTES = 2**27
"""A part is written in pieces of about this size: who reads, on another number of ranks, holds one piece besides."""

StatePath = tuple[str | int, ...]
"""Where an entry stands in the nested state."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor.

    Attributes:
        shape: of the whole tensor.
        offsets: of the box in it.
        sizes: of the box.
        dtype: of the numbers.
        read: the rows [start, stop) of the box; of a scalar, which has none, itself.
    """

    shape: torch.Size
    offsets: torch.Size
    sizes: torch.Size
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> Part | None:
        """This rank's part of a DTensor, or all of a tensor; None on a rank that is not in the DTensor's mesh."""
        local, offsets = value.detach(), torch.Size([0] * value.ndim)
        if isinstance(value, DTensor):
            if value.device_mesh.get_coordinate() is None:
                return None
            (chunk,) = value.__create_chunk_list__()
            with torch.no_grad():
                local, offsets = value.to_local(), chunk.offsets
            assert local.shape == chunk.sizes, (local.shape, chunk.sizes)
        return cls(value.shape, offsets, local.shape, local.dtype, rows_of(local))

    @property
    def num_rows(self) -> int:
        """Rows of the box; of a scalar 1."""
        return self.sizes[0] if self.sizes else 1

    @property
    def num_bytes(self) -> int:
        """Of the box."""
        return self.sizes.numel() * self.dtype.itemsize

    @cached_property
    def rows_at_once(self) -> int:
        """Rows of a piece."""
        return max(1, PIECE_BYTES // max(self.num_bytes // max(self.num_rows, 1), 1))

    def pieces(self) -> Iterator[ChunkStorageMetadata]:
        """The boxes in which it is written, at least one."""
        if not self.sizes:
            yield ChunkStorageMetadata(self.offsets, self.sizes)
            return
        for start in range(0, max(self.num_rows, 1), self.rows_at_once):
            rows = min(self.rows_at_once, self.num_rows - start)
            yield ChunkStorageMetadata(
                torch.Size([self.offsets[0] + start, *self.offsets[1:]]), torch.Size([rows, *self.sizes[1:]])
            )

    def piece(self, offsets: torch.Size | None) -> Tensor:
        """The piece that begins at `offsets`."""
        assert offsets is not None
        start = offsets[0] - self.offsets[0] if offsets else 0
        return self.read(start, min(start + self.rows_at_once, self.num_rows))


def rows_of(local: Tensor) -> Callable[[int, int], Tensor]:
    """What reads the rows of a tensor at hand."""
    return lambda start, stop: local[start:stop] if local.ndim else local


@dataclass(frozen=True)
class FlatState:
    """A state without its nesting.

    Attributes:
        values: by dotted name; Python values are pickled already, and so cannot change any more.
        paths: where each stands.
    """

    values: dict[str, Part | bytes]
    paths: dict[str, StatePath]


def flatten(state: dict[str, Any]) -> FlatState:
    """What of `state` this rank has to write. Tensors are not copied."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state)
    values: dict[str, Part | bytes] = {}
    for name, value in planner.state_dict.items():
        if isinstance(value, Tensor):
            part = Part.of(value)
            if part is not None:
                values[name] = part
        else:
            stream = io.BytesIO()
            torch.save(value, stream)
            values[name] = stream.getvalue()
    return FlatState(values, planner.mappings)


class PartPlanner(dcp.DefaultSavePlanner):
    """DCP's planner for a `FlatState`, whose values it is given as the state."""

    def __init__(self, paths: dict[str, StatePath]) -> None:
        super().__init__()
        self._paths = paths

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Takes the values as they are."""
        self.state_dict, self.mappings, self.is_coordinator = state_dict, self._paths, is_coordinator

    def create_local_plan(self) -> SavePlan:
        """A write for each piece."""
        items = []
        for name, value in self.state_dict.items():
            if isinstance(value, bytes):
                items.append(WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO))
                continue
            properties = TensorProperties(dtype=value.dtype)
            items += [
                WriteItem(
                    index=MetadataIndex(name, piece.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk=piece, properties=properties, size=value.shape),
                )
                for piece in value.pieces()
            ]
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """What is to be written."""
        value = self.state_dict[write_item.index.fqn]
        return io.BytesIO(value) if isinstance(value, bytes) else value.piece(write_item.index.offset)
