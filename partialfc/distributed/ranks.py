"""Which rank this process is, as the environment of torchrun, deepspeed, srun or mpirun tells.

Only the standard library is imported: the rank is asked for before the seconds that the import of torch takes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "Launched",
    "launched",
    "meeting_host",
    "rank_from_environment",
    "reachable",
    "slurm_address",
    "slurm_port",
]

_DEFAULT_PORT = 29500
_LAST_PORT = 65535
_SLURM_PORTS = range(20000, 32000)  # below those that systems hand out by themselves
_SLURM_STEPS = 0xFFFFFFF0  # step numbers from here on are batch scripts and shells, which no srun has started

# Rank, world size, rank on the node, ranks on the node, as the kinds of mpirun name them.
_MPI = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class Launched:
    """This process among those that were launched together.

    Attributes:
        launcher: "none" for a process on its own, "torchrun" (also deepspeed, and whoever sets its variables), "srun"
            or "mpirun".
        rank: in [0, world_size).
        world_size: processes over all nodes.
        local_rank: in the order of this node.
        local_world_size: processes on this node; None if the launcher does not tell.
        address: host of rank 0, where all meet; None for a process on its own.
        port: a port of that host.
    """

    launcher: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = 1
    address: str | None = None
    port: int = _DEFAULT_PORT


def launched(environment: Mapping[str, str]) -> Launched:
    """What the launcher's variables say; a process on its own if there are none.

    The shell of salloc, and a batch script itself, are processes on their own: Slurm's variables there are those of the
    whole job.

    Raises:
        ValueError: if variables are missing, no numbers, or contradict each other.
    """
    if "RANK" in environment:
        return _from_torchrun(environment)
    for kind, names in _MPI.items():
        if names[0] in environment and not _is_srun_with_pmi(environment, names):
            return _from_mpirun(environment, kind, names)
    if _in_srun_step(environment):
        return _from_srun(environment)
    if _integer(environment, "WORLD_SIZE", 1, default=1) > 1:
        raise ValueError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but RANK is not set; start with torchrun, srun or mpirun, set "
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together, or unset WORLD_SIZE for one process"
        )
    return Launched()


def rank_from_environment() -> int:
    """This process's rank among those that the launcher started; 0 without a launcher, or if it makes no sense."""
    try:
        return launched(os.environ).rank
    except ValueError:
        return 0


def slurm_address(environment: Mapping[str, str]) -> str:
    """The first host of the job, such as "gpu03" for SLURM_JOB_NODELIST=gpu[03-05,9],cpu1.

    Raises:
        ValueError: if Slurm's list of nodes is missing.
    """
    nodes = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    if not nodes:
        raise ValueError("SLURM_JOB_NODELIST is not set; set MASTER_ADDR to the host of rank 0")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that no other job, step or earlier start of the same job is likely to use.

    Raises:
        ValueError: if SLURM_JOB_ID is missing.
    """
    job = _integer(environment, "SLURM_JOB_ID", 0)
    step = _integer(environment, "SLURM_STEP_ID", 0, default=0) % _SLURM_STEPS
    restart = _integer(environment, "SLURM_RESTART_COUNT", 0, default=0)
    return _SLURM_PORTS[(job * 37 + step * 11 + restart) % len(_SLURM_PORTS)]


def reachable(host: str) -> str:
    """`host`, or the address that Slurm has for it where its name means nothing to the resolver.

    Raises:
        ValueError: if neither knows it.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        scontrol = shutil.which("scontrol")
        asked = subprocess.run([scontrol, "show", "node", host], capture_output=True, text=True) if scontrol else None
        found = re.search(r"NodeAddr=(\S+)", asked.stdout) if asked else None
        if found is None:
            raise ValueError(
                f"the first host of the job is {host}, whose name cannot be resolved, and scontrol does not know its "
                "address; set MASTER_ADDR"
            ) from None
        return found[1]
    return host


def meeting_host(place: Launched) -> str:
    """The host of rank 0 as this process can reach it; of a process on its own, this one.

    Raises:
        ValueError: if it is Slurm's name for a host that nobody knows.
    """
    if place.address is None:
        return socket.gethostname()
    return reachable(place.address) if place.launcher == "srun" else place.address


def _from_torchrun(environment: Mapping[str, str]) -> Launched:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        raise ValueError(
            f"RANK is {environment['RANK']!r}, but {' and '.join(missing)} not set; start with torchrun, set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together, or unset RANK for one process"
        )
    size = _integer(environment, "WORLD_SIZE", 1)
    rank = _below(environment, "RANK", size, "WORLD_SIZE")
    if _in_srun_step(environment) and "TORCHELASTIC_RUN_ID" not in environment:
        _agrees_with_srun(environment, rank, size)
    # One process per node is what those mean who set neither.
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    if local_size is None and "LOCAL_RANK" not in environment:
        local_size = "1"
    local_rank = _integer(environment, "LOCAL_RANK", 0, default=0)
    return Launched(
        "torchrun",
        rank,
        size,
        local_rank,
        None if local_size is None else _number("LOCAL_WORLD_SIZE", local_size, 1),
        environment["MASTER_ADDR"],
        _port(environment) or _DEFAULT_PORT,
    )


def _agrees_with_srun(environment: Mapping[str, str], rank: int, size: int) -> None:
    """RANK exported in a batch script is the same for all tasks of srun, which then wait for each other."""
    task, tasks = _integer(environment, "SLURM_PROCID", 0), _srun_tasks(environment)
    if tasks == size and task != rank:
        raise ValueError(
            f"RANK is {rank}, but this is task {task} of {tasks} of srun (SLURM_PROCID); unset RANK in the batch "
            "script, or set it in each task"
        )


def _from_mpirun(environment: Mapping[str, str], kind: str, names: tuple[str, str, str, str]) -> Launched:
    rank_name, size_name, local_rank_name, local_size_name = names
    size = _integer(environment, size_name, 1)
    rank = _below(environment, rank_name, size, size_name)
    local_size = _integer(environment, local_size_name, 1, default=size)
    address = environment.get("MASTER_ADDR")
    if not address:
        if local_size < size:
            raise ValueError(
                f"mpirun of {kind} started {size} ranks, {local_size} of them on this host, but MASTER_ADDR is not "
                "set; set it to the host of rank 0, and pass it on to all hosts (-x MASTER_ADDR for Open MPI, "
                "-genv for MPICH and Intel MPI)"
            )
        address = "127.0.0.1"
    local_rank = _integer(environment, local_rank_name, 0, default=rank)
    port = _port(environment) or _DEFAULT_PORT
    return Launched("mpirun", rank, size, local_rank, local_size, address, port)


def _from_srun(environment: Mapping[str, str]) -> Launched:
    size = _srun_tasks(environment)
    rank = _below(environment, "SLURM_PROCID", size, "SLURM_NTASKS")
    stated = _integer(environment, "WORLD_SIZE", 1, default=size)
    if stated != size:
        raise ValueError(f"WORLD_SIZE is {stated}, but srun started {size} tasks (SLURM_NTASKS); unset WORLD_SIZE")
    local_rank = _integer(environment, "SLURM_LOCALID", 0, default=0)
    address = environment.get("MASTER_ADDR") or slurm_address(environment)
    port = _port(environment) or slurm_port(environment)
    return Launched("srun", rank, size, local_rank, _tasks_of_node(environment), address, port)


def _in_srun_step(environment: Mapping[str, str]) -> bool:
    return (
        "SLURM_PROCID" in environment
        and "SLURM_STEP_ID" in environment
        and _integer(environment, "SLURM_STEP_ID", 0) < _SLURM_STEPS
    )


def _is_srun_with_pmi(environment: Mapping[str, str], names: tuple[str, str, str, str]) -> bool:
    """Slurm can speak PMI to its tasks; a mpirun that uses srun to reach nodes counts differently from it."""
    if names[0] != "PMI_RANK" or not _in_srun_step(environment):
        return False
    return environment["PMI_RANK"] == environment["SLURM_PROCID"] and environment.get("PMI_SIZE") == str(
        _srun_tasks(environment)
    )


def _srun_tasks(environment: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return _integer(environment, name, 1)


def _tasks_of_node(environment: Mapping[str, str]) -> int | None:
    """From SLURM_STEP_TASKS_PER_NODE, such as "8(x3),4", and SLURM_NODEID."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environment, "SLURM_NODEID", 0, default=0)
    return counts[node] if node < len(counts) else None


def _below(environment: Mapping[str, str], name: str, size: int, size_name: str) -> int:
    value = _integer(environment, name, 0)
    if value >= size:
        raise ValueError(f"{name} is {value}, but must be below {size_name}, which is {size}")
    return value


def _port(environment: Mapping[str, str]) -> int | None:
    port = _integer(environment, "MASTER_PORT", 1, default=0)
    if port > _LAST_PORT:
        raise ValueError(f"MASTER_PORT is {port}, but ports end at {_LAST_PORT}")
    return port or None


def _integer(environment: Mapping[str, str], name: str, least: int, *, default: int | None = None) -> int:
    value = environment.get(name)
    if not value:
        if default is not None:
            return default
        raise ValueError(f"{name} is not set, but other variables of its launcher are")
    return _number(name, value, least)


def _number(name: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"the environment variable {name} is {value!r}, but must be a whole number from {least} on")
    return int(value)
