"""Tensors with one row for each class, sharded over ranks by class."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partialfc.distributed.collectives import gather_rows
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.workspace import Workspace

__all__ = ["ClassTable", "RowTable", "Rows"]

Rows = slice | Tensor | None
"""Local rows: a run of them, distinct ones by number, int64, or all."""


class RowTable(Protocol):
    """Rows of some named tensors, to be read and written. See `ClassTable`."""

    def read(self, name: str, rows: Rows, workspace: Workspace | None = None) -> Tensor: ...  # noqa: D102

    def write(self, name: str, rows: Rows, values: Tensor) -> None: ...  # noqa: D102


class ClassTable(nn.Module):
    """This rank's rows of some named tensors [num_classes, ...].

    Each is stored as [local_blocks, block_size, ...]. In the state dict every one is a DTensor over blocks, placed as
    `Shard(0)`, so that a checkpoint loads on any number of ranks.

    Args:
        partition: which classes live here.
        mesh: the ranks over which the rows are sharded.
    """

    def __init__(self, partition: ClassPartition, *, mesh: ShardMesh) -> None:
        super().__init__()
        self.partition, self.mesh = partition, mesh
        self._names: list[str] = []

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor [local_blocks, block_size, ...], reached as an attribute of that name."""
        self.register_buffer(name, value, persistent=False)
        self._names.append(name)

    @property
    def storage(self) -> dict[str, str]:
        """The dtype of each tensor, by name."""
        return {name: str(getattr(self, name).dtype).removeprefix("torch.") for name in self._names}

    def _rows(self, name: str) -> Tensor:
        """[num_local_classes, ...]: a view without the phantoms."""
        return getattr(self, name).flatten(0, 1)[: self.partition.num_local_classes]

    def read(self, name: str, rows: Rows, workspace: Workspace | None = None) -> Tensor:
        """[n, ...], the rows at `rows`: a view of them if they are a run, else a copy, in the workspace if given."""
        everything = self._rows(name)
        if rows is None or isinstance(rows, slice):
            return everything if rows is None else everything[rows]
        if workspace is None:
            return everything[rows]
        shape = (len(rows), *everything.shape[1:])
        copy = workspace.get(f"{name} rows", shape, everything.dtype, everything.device)
        return torch.index_select(everything, 0, rows, out=copy)

    def write(self, name: str, rows: Rows, values: Tensor) -> None:
        """Replaces the rows at `rows`, unless `values` are those rows themselves."""
        everything = self._rows(name)
        if isinstance(rows, Tensor):
            everything.index_copy_(0, rows, values)
            return
        own = everything if rows is None else everything[rows]
        if own.data_ptr() != values.data_ptr() or own.dtype != values.dtype:
            own.copy_(values)

    def gather_all(self, name: str) -> Tensor:
        """[num_classes, ...] on every rank, a copy. Collective."""
        return gather_rows(self._rows(name), self.mesh, what=f"class table {name}").clone()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self._names:
            destination[prefix + name] = self.mesh.shard(getattr(self, name), self.partition.num_blocks)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {prefix + name for name in self._names}
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        for name in self._names:
            key, own = prefix + name, getattr(self, name)
            expected = (self.partition.num_blocks, *own.shape[1:])
            if key not in state_dict:
                missing_keys.append(key)
            elif tuple(state_dict[key].shape) != expected:
                error_msgs.append(
                    f"{key} has shape {tuple(state_dict[key].shape)} in the checkpoint, but {expected} here "
                    f"([blocks, classes per block, ...] for {self.partition.num_classes} classes)"
                )
            else:
                with torch.no_grad():
                    own.copy_(self.mesh.own_part(state_dict[key], own))
