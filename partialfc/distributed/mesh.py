"""The group of ranks over which class centers are sharded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

__all__ = ["ProcessGroup", "ShardMesh"]


@dataclass(frozen=True)
class ShardMesh:
    """This rank's place among the ranks that hold the shards.

    Attributes:
        rank: in [0, size).
        size: number of ranks; 1 for a process on its own.
        group: the process group, or None for a process on its own.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @classmethod
    def single(cls) -> ShardMesh:
        """A process on its own, whether or not torch.distributed is initialised."""
        return cls()

    @classmethod
    def from_group(cls, process_group: ProcessGroup | None = None) -> ShardMesh:
        """The mesh over `process_group`; None means the default group, or a process on its own if there is none."""
        if process_group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls.single()
            process_group = dist.group.WORLD
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), process_group)

    def shard(self, local: Tensor, global_size: int) -> Tensor:
        """`local` as this rank's part of a tensor of `global_size` rows, for checkpoints that any world size can load.

        Args:
            local: [n_r, ...], the rows that `torch.chunk` gives this rank.
            global_size: rows over all ranks.

        Returns:
            A DTensor [global_size, ...] that shares the memory of `local`; `local` itself in a process on its own.
        """
        if self.group is None:
            return local
        mesh = DeviceMesh.from_group(self.group, local.device.type)
        shape = torch.Size((global_size, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def own_part(self, value: Tensor, local: Tensor) -> Tensor:
        """The rows of `value` that belong to this rank, whichever way `value` is laid out.

        Args:
            value: a DTensor over any mesh, or the whole tensor, [global_size, ...].
            local: this rank's present part, for its shape.

        Returns:
            [n_r, ...], on the device and in the dtype of `value`.
        """
        if isinstance(value, DTensor):
            value = value.full_tensor()
        start = self.rank * -(-value.shape[0] // self.size)
        return value[start : start + local.shape[0]]
