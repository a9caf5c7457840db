"""Tensors with one row for each class, sharded over ranks by class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from partialfc.distributed.collectives import gather_rows
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition

__all__ = ["ClassTable"]


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

    def _rows(self, name: str) -> Tensor:
        """[num_local_classes, ...]: a view without the phantoms."""
        return getattr(self, name).flatten(0, 1)[: self.partition.num_local_classes]

    def read(self, name: str, rows: Tensor | None) -> Tensor:
        """[n, ...], the rows at `rows`, or a view of all of this rank's if None."""
        everything = self._rows(name)
        return everything if rows is None else everything[rows]

    def write(self, name: str, rows: Tensor | None, values: Tensor) -> None:
        """Replaces the rows at `rows`, distinct, or all of them if None."""
        if rows is None:
            self._rows(name).copy_(values)
        else:
            self._rows(name).index_copy_(0, rows, values)

    def gather_all(self, name: str) -> Tensor:
        """[num_classes, ...] on every rank, a copy. Collective."""
        return gather_rows(self._rows(name), self.mesh).clone()

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
