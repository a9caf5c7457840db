"""A checkpoint read piece by piece, by one process, which need not know what it is a state of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from partialfc.checkpoint.parts import StatePath

__all__ = ["StoredState"]

_START = torch.Size([0])


class StoredState:
    """The entries of a checkpoint by their dotted names. Nothing is verified here.

    Args:
        path: a committed directory.

    Attributes:
        tensors: shape, dtype and pieces of each tensor.
        values: names of what is no tensor.
        paths: where each entry stands in the state.
    """

    def __init__(self, path: Path) -> None:
        self._reader = dcp.FileSystemReader(path)
        metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        entries = metadata.state_dict_metadata
        self.tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.values = [name for name in entries if name not in self.tensors]
        self.paths: dict[str, StatePath] = metadata.planner_data

    def read(self, name: str, offsets: torch.Size, sizes: torch.Size) -> Tensor:
        """A box of a tensor. Besides, one of the pieces that it was written in is in memory at a time."""
        entry = self.tensors[name]
        box = torch.empty(sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(name, entry, [ChunkStorageMetadata(offsets, sizes)])
        self._reader.read_data(LoadPlan(items), _BoxPlanner(box)).wait()
        return box

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of a tensor; of a scalar, itself."""
        shape = self.tensors[name].size
        if not shape:
            return self.read(name, shape, shape)
        inner = shape[1:]
        return self.read(name, torch.Size([start, *[0] * len(inner)]), torch.Size([stop - start, *inner]))

    def read_value(self, name: str) -> bytes:
        """What is no tensor, pickled as it was written."""
        index = MetadataIndex(name)
        planner = _BytesPlanner()
        item = ReadItem(LoadItemType.BYTE_IO, index, _START, index, _START, _START)
        self._reader.read_data(LoadPlan([item]), planner).wait()
        return planner.value

    def row_bounds(self, name: str) -> list[int]:
        """Between which rows pieces of a tensor end: from one to the next, each is read once."""
        entry = self.tensors[name]
        return sorted({0, entry.size[0], *(piece.offsets[0] for piece in entry.chunks)})


class _BoxPlanner(dcp.DefaultLoadPlanner):
    """Has all reads go to places in one tensor."""

    def __init__(self, box: Tensor) -> None:
        super().__init__()
        self._box = box

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._box


class _BytesPlanner(dcp.DefaultLoadPlanner):
    """Takes one value as it is."""

    value = b""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> Any:
        self.value = value.getvalue()
