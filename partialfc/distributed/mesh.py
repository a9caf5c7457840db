"""The group of ranks over which class centers are sharded, and that over which they are replicated, if any is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from partialfc.distributed.trail import TRAIL

__all__ = ["ProcessGroup", "ShardMesh", "node_groups"]


@dataclass(frozen=True)
class ShardMesh:
    """This rank's place among the ranks that hold the shards.

    Attributes:
        rank: in [0, size).
        size: number of ranks; 1 for a process on its own.
        group: the process group, or None for a process on its own.
        replicate_over: the ranks that hold the same shard as this one, in a grid of replicas by shards; None if no
            other rank does.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    replicate_over: ProcessGroup | None = None

    @classmethod
    def single(cls) -> ShardMesh:
        """A process on its own, whether or not torch.distributed is initialised."""
        return cls()

    @classmethod
    def from_group(
        cls, process_group: ProcessGroup | None = None, *, replicate_over: ProcessGroup | None = None
    ) -> ShardMesh:
        """The mesh over `process_group`; None means the default group, or a process on its own if there is none.

        Raises:
            ValueError: if the two groups are not a row and a column of a grid of ranks.
        """
        if process_group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls.single()
            process_group = dist.group.WORLD
        assert process_group is not None
        if replicate_over is not None and dist.get_world_size(replicate_over) == 1:
            replicate_over = None
        if replicate_over is not None:
            _check_grid(process_group, replicate_over)
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), process_group, replicate_over)

    @property
    def replicas(self) -> ShardMesh:
        """The ranks that hold the same shard, as a mesh; a process on its own if no other rank does."""
        return ShardMesh.single() if self.replicate_over is None else ShardMesh.from_group(self.replicate_over)

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
        mesh, placements = self._layout(local.device.type)
        shape = torch.Size((global_size, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _layout(self, device_type: str) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        assert self.group is not None
        if self.replicate_over is None:
            return DeviceMesh.from_group(self.group, device_type), (Shard(0),)
        mesh = DeviceMesh.from_group(
            [self.replicate_over, self.group],
            device_type,
            mesh=_grid(self.group, self.replicate_over),
            mesh_dim_names=("replicas", "shards"),
        )
        return mesh, (Replicate(), Shard(0))

    def own_part(self, value: Tensor, local: Tensor) -> Tensor:
        """The rows of `value` that belong to this rank, whichever way `value` is laid out.

        Args:
            value: a DTensor over any mesh, or the whole tensor, [global_size, ...].
            local: this rank's present part, for its shape.

        Returns:
            [n_r, ...], on the device and in the dtype of `value`.
        """
        if isinstance(value, DTensor):
            if self.group is not None and (value.device_mesh, value.placements) == self._layout(local.device.type):
                return value.to_local()
            value = value.full_tensor()
        start = self.rank * -(-value.shape[0] // self.size)
        return value[start : start + local.shape[0]]


def node_groups(
    ranks_per_node: int, *, timeout: timedelta | None = None
) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """The groups of class centers that are sharded over the ranks of a node, and replicated over nodes. Collective.

    Ranks are those of the default group, in a row on each node, as launchers number them.

    Args:
        ranks_per_node: of this node (LOCAL_WORLD_SIZE); must be the same on all.
        timeout: of collectives in the groups; None for that of torch.

    Returns:
        The `process_group` and the `replicate_over` of a head: the ranks of this node, and those with the same place
        in each node. On one node the default group and None; (None, None) for a process on its own.

    Raises:
        ValueError: on every rank alike, if nodes differ in their ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None, None
    size, per_node = dist.get_world_size(), [0] * dist.get_world_size()
    TRAIL.note("all_gather ranks per node")
    dist.all_gather_object(per_node, ranks_per_node)
    if len(set(per_node)) > 1 or ranks_per_node < 1 or size % ranks_per_node:
        raise ValueError(
            f"class centers on each node need the same number of ranks on each, but {size} ranks say that their nodes "
            f"have {', '.join(map(str, sorted(set(per_node))))}; start as many on each node, or shard over all ranks"
        )
    if ranks_per_node == size:
        return dist.group.WORLD, None
    grid = torch.arange(size).view(-1, ranks_per_node)
    rank, mine = dist.get_rank(), []
    for rows in (grid, grid.T):
        # Every rank makes every group, in the same order.
        groups = [dist.new_group(row, timeout=timeout) for row in rows.tolist()]
        mine += [group for row, group in zip(rows.tolist(), groups, strict=True) if rank in row]
    shards, replicas = mine
    return shards, replicas


def _grid(shards: ProcessGroup, replicas: ProcessGroup) -> Tensor:
    """[replicas, shards] int: the ranks of the grid in which this rank's row and column are those."""
    rank = dist.get_rank()
    row, column = (torch.tensor(dist.get_process_group_ranks(group)) for group in (shards, replicas))
    return column[:, None] + row - rank


def _check_grid(shards: ProcessGroup, replicas: ProcessGroup) -> None:
    row, column = dist.get_process_group_ranks(shards), dist.get_process_group_ranks(replicas)
    grid = _grid(shards, replicas).flatten().tolist()
    if set(row) & set(column) != {dist.get_rank()} or len(set(grid)) < len(grid) or grid != sorted(grid):
        raise ValueError(
            f"process_group has the ranks {row} and replicate_over {column}, but they must be a row and a column of a "
            "grid of ranks in order; `partialfc.distributed.mesh.node_groups` makes such groups"
        )
