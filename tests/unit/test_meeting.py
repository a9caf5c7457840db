"""How launched processes meet, and how they learn of those that will not come."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import free_port

from partialfc.distributed.errors import Report, join_reports

MEETING = """
import os, sys
from partialfc.distributed import meeting
from partialfc.distributed.launch import process_group

timeout, trouble = float(sys.argv[1]), sys.argv[2]
meeting._TELL_SECONDS = timeout
try:
    with meeting.getting_ready():
        exec(trouble)
    with process_group("cpu", timeout_seconds=timeout) as (mesh, _):
        sys.stdout.write(f"met {mesh.rank} {mesh.size}\\n")
except meeting.RendezvousError as error:
    sys.stdout.write(f"{error.lasting} {error.agreed} {error}\\n")
except ValueError as error:
    sys.stdout.write(f"{error}\\n")
"""


def _start(rank: int, size: int, port: int, timeout: float, trouble: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEETING, str(timeout), trouble]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_ranks_that_never_come_are_named() -> None:
    port = free_port()
    told = _outputs([_start(rank, 4, port, 4) for rank in (0, 2)])
    assert "rank 0 of 4 (host" in told[0]
    assert "waited 4 s for 2 ranks (1, 3), which never came" in told[0]
    # The store goes with rank 0, which may give up first.
    assert "2 ranks (1, 3)" in told[1] or "lost rank 0 at the start" in told[1]


def test_without_rank_0_its_address_is_named() -> None:
    port = free_port()
    (told,) = _outputs([_start(1, 2, port, 2)])
    assert f"rank 1 of 2 (host {socket.gethostname()}) did not reach rank 0 at 127.0.0.1:{port} within 2 s" in told


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (told,) = _outputs([_start(0, 2, port, 2)])
    assert f"cannot wait for the others at 127.0.0.1:{port}" in told
    assert "set MASTER_ADDR and MASTER_PORT" in told


def test_processes_of_one_launch_meet() -> None:
    port = free_port()
    assert _outputs([_start(rank, 2, port, 60) for rank in (0, 1)]) == ["met 0 2\n", "met 1 2\n"]


def test_ranks_meet_again_after_a_restart_of_plain_torchrun(tmp_path: Path) -> None:
    """Its agent keeps one store for all restarts, with the addresses of the dead in it."""
    script = tmp_path / "dies_once.py"
    dies_once = "        if start == '0': os._exit(1)\n        sys.stdout"
    meeting = MEETING.replace("        sys.stdout", dies_once)
    script.write_text(f"import os\nstart = os.environ['TORCHELASTIC_RESTART_COUNT']\n{meeting}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    finished = subprocess.run(
        [*command, str(script), "30", ""], env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.split("\n")) == ["", "met 0 2", "met 1 2"]


HOST = socket.gethostname()
MISTAKE = "raise ValueError('head.margin: unknown')"


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_cannot_start_is_heard_by_all(culprit: int) -> None:
    """Also rank 0, at which the others look for the store. They would wait for ten minutes otherwise."""
    port = free_port()
    told = _outputs([_start(rank, 3, port, 600, MISTAKE if rank == culprit else "") for rank in range(3)])
    assert told == [f"True True rank {culprit} ({HOST}): head.margin: unknown\n"] * 3


def test_what_all_say_is_said_once() -> None:
    port = free_port()
    assert (
        _outputs([_start(rank, 2, port, 600, MISTAKE) for rank in range(2)]) == ["True True head.margin: unknown\n"] * 2
    )


def test_another_start_may_end_better_after_what_a_file_system_says_today() -> None:
    port = free_port()
    trouble = "import errno; raise OSError(errno.ESTALE, 'Stale file handle', 'small.yaml')"
    told = _outputs([_start(0, 2, port, 600, trouble), _start(1, 2, port, 600)])
    assert told == [f"False True rank 0 ({HOST}): OSError: [Errno 116] Stale file handle: 'small.yaml'\n"] * 2


def test_a_rank_that_cannot_start_does_not_wait_for_one_that_never_comes() -> None:
    port = free_port()
    told = _outputs([_start(0, 3, port, 600), _start(1, 3, port, 3, MISTAKE)])
    assert told == [f"True False rank 1 ({HOST}): head.margin: unknown\n"] * 2


def test_a_rank_that_finds_nobody_says_its_own_error() -> None:
    assert _outputs([_start(1, 2, free_port(), 2, MISTAKE)]) == ["head.margin: unknown\n"]


def test_a_process_on_its_own_has_its_own_error() -> None:
    assert _outputs([_start(0, 1, free_port(), 600, MISTAKE)]) == ["head.margin: unknown\n"]


def test_reports_of_ranks_are_joined_by_what_they_say() -> None:
    reports = [Report(rank, f"node{rank // 2}", "no room" if rank != 2 else "no data") for rank in range(4)]
    assert join_reports(reports, size=4) == "3 ranks (0, 1, 3): no room\nrank 2 (node1): no data"
    assert join_reports(reports[:1], size=1) == "no room"
    many = [Report(rank, "node", f"error {rank}") for rank in range(12)]
    assert join_reports(many, size=12).splitlines()[9:] == ["rank 9 (node): error 9", "and 2 more messages"]
