"""The process group for libraries that cannot do without one."""

from __future__ import annotations

import torch.distributed as dist

from partialfc.distributed.mesh import ProcessGroup, ShardMesh

__all__ = ["group_of"]


def group_of(mesh: ShardMesh, device_type: str) -> ProcessGroup:
    """The group of a mesh. A process on its own gets the default group of one rank, for as long as it lives.

    Raises:
        ValueError: if the process is on its own in the mesh, but not in the default group.
    """
    if mesh.group is not None:
        return mesh.group
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise ValueError(
            f"this engine runs over all {dist.get_world_size()} ranks of the default group, but was given a process "
            "on its own; give it the mesh of that group, or use the engine ddp"
        )
    assert dist.group.WORLD is not None
    return dist.group.WORLD
