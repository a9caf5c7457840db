"""What several test files use: running a function in many processes, and small helpers."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SOON_SECONDS = 300.0  # for whatever should happen soon: several processes import torch on a busy machine
_LONGEST_SECONDS = 900.0  # without the end of a rank
_PORTS = random.SystemRandom()  # others seed what `random` draws from


def _entry(
    rank: int, function: Callable[..., None], world_size: int, port: int, args: tuple[Any, ...], errors: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=600))
        function(rank, world_size, *args)
        dist.barrier()
    except BaseException:
        errors.put(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()
    # The interpreter is not taken down: a thread of gloo that gives a tensor back meanwhile would abort the process.
    os._exit(0)


def free_port() -> int:
    """A port that nobody listens at.

    It is none of those that the system gives to whoever asks for any, as gloo does many times: until it is used, which
    is seconds later, one of a test beside this one could have it.
    """
    for _ in range(100):
        port = _PORTS.randrange(10_000, 24_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no port is free")


class Ranks:
    """Processes that are the ranks of one run, and where their standard error goes."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], directory: Path) -> None:
        self.processes, self.directory = processes, directory

    def wait_until_ready(self) -> None:
        """Until each has written "ready"."""
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n", self.errors(rank)

    def ended(self, timeout: float = SOON_SECONDS) -> list[int]:
        """The exit codes of all."""
        return [process.wait(timeout) for process in self.processes]

    def errors(self, rank: int) -> str:
        return (self.directory / f"stderr-{rank}").read_text()

    def seconds_until(self, rank: int, pattern: str) -> float:
        """Until a rank has said what matches."""
        started = time.monotonic()
        while not re.search(pattern, self.errors(rank)):
            assert time.monotonic() - started < SOON_SECONDS, self.errors(rank)
            time.sleep(0.1)
        return time.monotonic() - started


@contextmanager
def running_ranks(directory: Path, commands: list[list[str]], **environment: str) -> Iterator[Ranks]:
    """Starts a command for each rank, as srun would; kills what is left at the end."""
    port, processes = str(free_port()), []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands))}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with (directory / f"stderr-{rank}").open("wb") as errors:
            processes.append(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **place, **environment}
                )
            )
    try:
        yield Ranks(processes, directory)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Runs `function(rank, world_size, *args)` in `world_size` gloo processes; the first failure is raised here."""
    context = mp.get_context("spawn")
    errors = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_entry, args=(rank, function, world_size, port, args, errors))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    reports, running = [], {process.sentinel for process in processes}
    while running:
        ready = wait([errors._reader, *running], _LONGEST_SECONDS)
        if not ready:
            reports.append(f"{len(running)} ranks have not ended")
            break
        # Before it ends: what a rank has to say may be more than a pipe holds.
        if errors._reader in ready:
            reports.append(errors.get())
        else:
            running.difference_update(ready)
    for process in processes:
        if reports:
            process.kill()
        process.join()
    while not errors.empty():
        reports.append(errors.get())
    assert not reports, "\n".join(reports)
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]


def checkpoint_tensors(run: Path, name: str) -> dict[str, Any]:
    """Every entry of a checkpoint of a run, by its path, loaded without the trainer."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = run / f"{name}.pt"
    dcp_to_torch_save(run / "checkpoints" / name, whole)
    return _flat(torch.load(whole, weights_only=False))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{path}/{name}").items()}
    return {path: value}
