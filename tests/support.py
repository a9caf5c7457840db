"""What several test files use: running a function in many processes, and small helpers."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(
    rank: int, function: Callable[..., None], world_size: int, port: int, args: tuple[Any, ...], errors: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        function(rank, world_size, *args)
        dist.barrier()
    except BaseException:
        errors.put(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Runs `function(rank, world_size, *args)` in `world_size` gloo processes; the first failure is raised here."""
    context = mp.get_context("spawn")
    errors = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_entry, args=(rank, function, world_size, port, args, errors))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    reports = []
    while not errors.empty():
        reports.append(errors.get())
    assert not reports, "\n".join(reports)
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
