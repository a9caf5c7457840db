"""What launchers' variables mean: recorded environments of each, and those that contradict themselves."""

from __future__ import annotations

import pytest
import torch

from partialfc.distributed.launch import choose_device
from partialfc.distributed.ranks import Launched, launched, rank_from_environment, slurm_address, slurm_port

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "41219",
    "TORCHELASTIC_RUN_ID": "run",
}
# As an allocation of two nodes with four tasks shows itself to a shell of salloc, and a step of srun in it.
ALLOCATION = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SRUN = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# Slurm gives a batch script the variables of its first task.
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "99"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launched()),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launched()),
        (TORCHRUN, Launched("torchrun", 5, 8, 1, 4, "node0", 41219)),
        (DEEPSPEED, Launched("torchrun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        # A pod of Kubernetes: one process each, and no local rank.
        ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "pod0"}, Launched("torchrun", 2, 3, 0, 1, "pod0", 29500)),
        (
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a"},
            Launched("torchrun", 2, 4, 0, None, "a", 29500),
        ),
        (ALLOCATION, Launched()),
        (BATCH, Launched()),
        ({**BATCH, "SLURM_STEP_ID": "4294967291"}, Launched()),
        ({**SRUN, "SLURM_STEP_ID": "4294967290"}, Launched()),
        (SRUN, Launched("srun", 3, 4, 1, 2, "gpu03", 20000 + 1234 * 37 % 12000)),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}, Launched("srun", 3, 4, 1, 2, "10.0.0.1", 7)),
        ({**SRUN, "WORLD_SIZE": "4", "MASTER_PORT": "7"}, Launched("srun", 3, 4, 1, 2, "gpu03", 7)),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4", "MASTER_PORT": "7"}, Launched("srun", 3, 4, 1, 2, "gpu03", 7)),
        # Torchrun, one on each node, below srun: its own count is the one.
        ({**SRUN, **TORCHRUN, "SLURM_PROCID": "0"}, Launched("torchrun", 5, 8, 1, 4, "node0", 41219)),
        (OPEN_MPI, Launched("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        ({**MPICH, "MASTER_ADDR": "a", "MASTER_PORT": "9"}, Launched("mpirun", 2, 4, 0, 2, "a", 9)),
        # A mpirun reaches its nodes through a step of srun with one task for each.
        ({**SRUN, **OPEN_MPI, "SLURM_PROCID": "0"}, Launched("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
    ],
)
def test_ranks_of_each_launcher(environment: dict[str, str], expected: Launched) -> None:
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is '0', but WORLD_SIZE and MASTER_ADDR not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "variable WORLD_SIZE is 'two', but must be a whole number from 1 on"),
        ({**TORCHRUN, "RANK": "-1"}, "variable RANK is '-1'"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8, but must be below WORLD_SIZE, which is 8"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is 99999, but ports end at 65535"),
        ({**SRUN, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
        # Exported in the batch script, and so 0 in every task.
        (
            {**SRUN, "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu03"},
            r"RANK is 0, but this is task 3 of 4 of srun \(SLURM_PROCID\)",
        ),
        ({**SRUN, "WORLD_SIZE": "2"}, r"WORLD_SIZE is 2, but srun started 4 tasks"),
        ({**SRUN, "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set"),
        ({**SRUN, "SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        (MPICH, "mpirun of MPICH or Intel MPI started 4 ranks, 2 of them on this host, but MASTER_ADDR is not set"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is not set"),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launched(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7,9-11]", "gpu7"),
        ("rack[1-2]node[4,6]-ib,login", "rack1node4-ib"),
        ("a-b[001]", "a-b001"),
    ],
)
def test_the_first_host_of_a_job(nodes: str, first: str) -> None:
    assert slurm_address({"SLURM_JOB_NODELIST": nodes}) == first


def test_ports_of_slurm_differ_by_job_step_and_start() -> None:
    def port(job: int, step: int = 0, restart: int = 0) -> int:
        return slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)})

    near = {port(job, step, restart) for job in range(50, 60) for step in range(3) for restart in range(10)}
    assert len(near) == 10 * 3 * 10
    assert all(20000 <= port(job) < 32000 for job in range(0, 10**7, 999))
    assert slurm_port({"SLURM_JOB_ID": "50", "SLURM_STEP_ID": "4294967291"}) == port(50, 4294967291 % 0xFFFFFFF0)


@pytest.mark.parametrize(
    ("device", "launcher", "local_rank", "available", "expected"),
    [
        ("auto", "torchrun", 3, 0, "cpu"),
        ("cpu", "torchrun", 3, 8, "cpu"),
        ("auto", "torchrun", 3, 8, "cuda:3"),
        ("cuda", "srun", 3, 8, "cuda:3"),
        ("cuda", "srun", 3, 1, "cuda:0"),
        ("auto", "mpirun", 3, 1, "cuda:0"),
        ("cuda", "none", 0, 1, "cuda:0"),
    ],
)
def test_each_process_gets_its_gpu(device: str, launcher: str, local_rank: int, available: int, expected: str) -> None:
    assert choose_device(device, Launched(launcher, local_rank=local_rank), available) == torch.device(expected)


@pytest.mark.parametrize(("launcher", "local_rank", "available"), [("torchrun", 1, 1), ("srun", 4, 4), ("none", 0, 0)])
def test_a_process_without_a_gpu_is_told(launcher: str, local_rank: int, available: int) -> None:
    with pytest.raises(ValueError, match=f"local rank {local_rank} needs a GPU .* this node shows {available}"):
        choose_device("cuda", Launched(launcher, local_rank=local_rank), available)


def test_the_rank_in_messages_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    assert rank_from_environment() == 0
