"""From the environment that torchrun, srun or nothing at all provides to a device and a process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from partialfc.distributed.mesh import ShardMesh

__all__ = ["process_group", "rank_from_environment"]

_TIMEOUT = timedelta(minutes=10)


def rank_from_environment() -> int:
    """This process's rank among those that the launcher started; 0 without a launcher."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


@contextmanager
def process_group(device: str = "auto") -> Iterator[tuple[ShardMesh, torch.device]]:
    """The mesh over all launched processes, and this one's device; the group is taken down at the end.

    Without a launcher (no RANK and WORLD_SIZE in the environment) there is no group, and the mesh is a process on its
    own. Collectives run over NCCL for CUDA tensors and over gloo for CPU tensors.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.

    Raises:
        ValueError: if CUDA is asked for and this process has no GPU of its own.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local_rank)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ShardMesh.single(), chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT, device_id=chosen if chosen.type == "cuda" else None)
    try:
        yield ShardMesh.from_group(), chosen
        # Leaving while another rank still communicates would abort that rank.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and available == 0):
        return torch.device("cpu")
    if local_rank >= available:
        raise ValueError(
            f"device is {device!r}, and local rank {local_rank} needs a GPU of its own, but this node shows "
            f"{available}; start fewer processes per node, or set the device to cpu"
        )
    return torch.device("cuda", local_rank)
