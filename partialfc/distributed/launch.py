"""From what a launcher, or none at all, provides to a device and a process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from partialfc.distributed.meeting import getting_ready, meet
from partialfc.distributed.mesh import ShardMesh, node_groups
from partialfc.distributed.ranks import Launched, launched
from partialfc.distributed.trail import TRAIL

__all__ = ["node_mesh", "process_group"]


@contextmanager
def process_group(
    device: str = "auto", *, timeout_seconds: float = 600.0, on_refusal: Callable[[], None] = lambda: None
) -> Iterator[tuple[ShardMesh, torch.device]]:
    """The mesh over all launched processes, and this one's device; the group is taken down at the end.

    Without a launcher there is no group, and the mesh is a process on its own. A default group that is there already is
    taken as it is, and left. Collectives run over NCCL for CUDA
    tensors and over gloo for CPU tensors.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        timeout_seconds: to wait for all processes to come, and later for one of them in a collective.
        on_refusal: called when this process knows that some cannot start, before any of them ends.

    Raises:
        ValueError: if the launcher's variables contradict each other, or CUDA is asked for and this process, on its
            own, has no GPU.
        RendezvousError: if not all processes come in time, or some cannot start; it names them.
    """
    if dist.is_initialized():
        yield ShardMesh.from_group(), choose_device(device, launched(os.environ), _num_gpus())
        return
    place = launched(os.environ)
    with getting_ready(on_refusal=on_refusal):
        chosen = choose_device(device, place, _num_gpus())
        if chosen.type == "cuda" and place.address is not None:
            torch.cuda.set_device(chosen)
    if place.address is None:
        yield ShardMesh.single(), chosen
        return
    timeout = timedelta(seconds=timeout_seconds)
    store = meet(place, timeout, on_refusal=on_refusal)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield ShardMesh.from_group(), chosen
        # Leaving while another rank still communicates would abort that rank.
        TRAIL.note("barrier at the end")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def node_mesh(*, timeout_seconds: float) -> ShardMesh:
    """The mesh of class centers that each node holds whole, sharded over its ranks. Collective.

    Args:
        timeout_seconds: to wait for another rank in a collective.

    Raises:
        ValueError: if nodes differ in their number of ranks, or the launcher does not tell it.
    """
    ranks_per_node = launched(os.environ).local_world_size
    if ranks_per_node is None:
        raise ValueError("class centers on each node need to know its number of ranks: set LOCAL_WORLD_SIZE")
    shards, replicas = node_groups(ranks_per_node, timeout=timedelta(seconds=timeout_seconds))
    return ShardMesh.from_group(shards, replicate_over=replicas)


def choose_device(device: str, place: Launched, available: int) -> torch.device:
    """The device of a process.

    Args:
        device: as for `process_group`.
        place: of the process.
        available: GPUs that it can see.

    Raises:
        ValueError: if CUDA is asked for and it has no GPU of its own.
    """
    if device == "cpu" or (device == "auto" and available == 0):
        return torch.device("cpu")
    index = place.local_rank
    if available == 1 and place.launcher in ("srun", "mpirun"):
        # With a GPU bound to each task, every task sees its own as number 0.
        index = 0
    if index >= available:
        raise ValueError(
            f"device is {device!r}, and local rank {place.local_rank} needs a GPU of its own, but this node shows "
            f"{available}; start fewer processes per node, or set run.device=cpu"
        )
    return torch.device("cuda", index)


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
