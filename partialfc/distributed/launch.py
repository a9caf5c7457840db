"""From what a launcher, or none at all, provides to a device and a process group."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from partialfc.distributed.mesh import ShardMesh, node_groups
from partialfc.distributed.ranks import Launched, launched, reachable
from partialfc.distributed.trail import TRAIL

__all__ = ["RendezvousError", "node_mesh", "process_group"]

logger = logging.getLogger(__name__)

_MOST_NAMED = 20


class RendezvousError(RuntimeError):
    """The launched processes did not all find each other. Starting again may help, if the message does not."""


@contextmanager
def process_group(device: str = "auto", *, timeout_seconds: float = 600.0) -> Iterator[tuple[ShardMesh, torch.device]]:
    """The mesh over all launched processes, and this one's device; the group is taken down at the end.

    Without a launcher there is no group, and the mesh is a process on its own. A default group that is there already is
    taken as it is, and left. Collectives run over NCCL for CUDA
    tensors and over gloo for CPU tensors.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        timeout_seconds: to wait for all processes to come, and later for one of them in a collective.

    Raises:
        ValueError: if the launcher's variables contradict each other, or CUDA is asked for and this process has no GPU
            of its own.
        RendezvousError: if not all processes come in time; it names those that are missing.
    """
    if dist.is_initialized():
        yield ShardMesh.from_group(), choose_device(device, launched(os.environ), _num_gpus())
        return
    place = launched(os.environ)
    chosen = choose_device(device, place, _num_gpus())
    if place.address is None:
        yield ShardMesh.single(), chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout = timedelta(seconds=timeout_seconds)
    store = _meet(place, place.address, timeout)
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


def _meet(place: Launched, address: str, timeout: timedelta) -> Store:
    """A store that all processes have reached."""
    if place.launcher == "srun":
        address = reachable(address)
    own = f"rank {place.rank} of {place.world_size} (host {socket.gethostname()})"
    # Where the torchrun agent has a store for its workers, it listens at this address already.
    hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store: Store
    try:
        store = TCPStore(
            address, place.port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if hosts:
            raise RendezvousError(
                f"{own} cannot wait for the others at {address}:{place.port}: {_first_line(error)}; it must be an "
                "address of this host and a free port: set MASTER_ADDR and MASTER_PORT"
            ) from error
        raise RendezvousError(
            f"{own} did not reach rank 0 at {address}:{place.port} within {timeout.total_seconds():g} s: "
            f"{_first_line(error)}; rank 0 has not started, MASTER_ADDR or MASTER_PORT is wrong, or the network "
            "does not let it through"
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A store of the torchrun agent outlives a restart of its workers, and would show the dead ones.
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _call_the_roll(store, place, own, timeout)
    return store


def _call_the_roll(store: Store, place: Launched, own: str, timeout: timedelta) -> None:
    try:
        store.set(f"here/{place.rank}", "")
        if store.add("arrived", 1) >= place.world_size:
            store.set("all here", "")
        try:
            store.wait(["all here"], timeout)
        except dist.DistStoreError as error:
            missing = [rank for rank in range(place.world_size) if not store.check([f"here/{rank}"])]
            if not missing:
                return
            raise RendezvousError(
                f"{own} waited {timeout.total_seconds():g} s for {_named(missing)}, which never came: not started, "
                "died on the way (see its own messages), or cannot reach this network"
            ) from error
    except dist.DistNetworkError as error:
        raise RendezvousError(f"{own} lost rank 0 at the start, which died or gave up: {_first_line(error)}") from error


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if len(ranks) > _MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
