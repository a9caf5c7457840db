"""How launched processes meet, and how they learn of those that will not come."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support import free_port
from torch.distributed import TCPStore

from partialfc.distributed.errors import Report, join_reports
from partialfc.distributed.meeting import RendezvousError, _Roll, meet, tell
from partialfc.distributed.ranks import Launched

MEETING = """
import os, sys
from partialfc.distributed import meeting
from partialfc.distributed.launch import process_group
from partialfc.supervision.exit_codes import leave

timeout, trouble, device = float(sys.argv[1]), sys.argv[2], "cpu"
meeting._TELL_SECONDS = timeout
meeting._READ_SECONDS = 120.0  # a busy machine may keep one from reading

def wait(text):
    os.write(1, f"{text}\\n".encode())
    sys.stdin.readline()

if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
    wait("imported")
try:
    with meeting.getting_ready():
        exec(trouble)
    with process_group(device, timeout_seconds=timeout) as (mesh, _):
        sys.stdout.write(f"met {mesh.rank} {mesh.size}\\n")
except meeting.RendezvousError as error:
    sys.stdout.write(f"{error.lasting} {error.agreed} {error}\\n")
except ValueError as error:
    sys.stdout.write(f"{error}\\n")
leave(0)
"""


def _start(rank: int, size: int, port: int, timeout: float, trouble: str = "", **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **more, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEETING, str(timeout), trouble]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _when(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{text}\n"


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What they say, once they all have imported torch and go on: their limits of time are of meeting alone."""
    try:
        for process in processes:
            _when(process, "imported")
        for process in processes:
            _go_on(process)
        return [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


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
        [*command, str(script), "30", ""], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.split("\n")) == ["", "met 0 2", "met 1 2"]


HOST = socket.gethostname()
MISTAKE = "raise ValueError('head.margin: unknown')"


def test_a_process_that_cannot_start_is_heard_by_all() -> None:
    """Also rank 0, at which the others look for the store. They would wait for ten minutes otherwise."""
    port = free_port()
    told = _outputs([_start(0, 3, port, 600, MISTAKE), *(_start(rank, 3, port, 600) for rank in (1, 2))])
    assert told == [f"True True rank 0 ({HOST}): head.margin: unknown\n"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a process without a GPU")
def test_a_process_without_its_gpu_is_heard_by_all() -> None:
    port = free_port()
    told = _outputs([_start(0, 2, port, 600), _start(1, 2, port, 600, "device = 'cuda'")])
    assert told[0] == told[1]
    assert told[0].startswith(f"True True rank 1 ({HOST}): device is 'cuda', and local rank 1 needs a GPU of its own")


def test_a_process_on_its_own_has_its_own_error() -> None:
    assert _outputs([_start(0, 1, free_port(), 600, MISTAKE)]) == ["head.margin: unknown\n"]


class Meeting:
    """Ranks that are threads."""

    def __init__(self, size: int) -> None:
        port = free_port()
        self.places = [Launched("torchrun", rank, size, rank, size, "127.0.0.1", port) for rank in range(size)]
        self.pool = ThreadPoolExecutor(size)

    def wait_for(self, rank: int) -> None:
        """Until it is there."""
        self.store().wait([f"meeting 0/here/{rank}"])

    def store(self) -> TCPStore:
        """As any of the ranks reaches it."""
        port = self.places[0].port
        return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))

    def come(
        self, rank: int, *, seconds: float = 60.0, **options: Callable[[], None]
    ) -> Future[RendezvousError | None]:
        """Gives what `meet` raises."""

        def come() -> RendezvousError | None:
            try:
                meet(self.places[rank], timedelta(seconds=seconds), **options)
            except RendezvousError as error:
                return error
            return None

        return self.pool.submit(come)

    def tell(
        self, rank: int, error: Exception, *, seconds: float = 60.0, **options: Callable[[], None]
    ) -> Future[RendezvousError | None]:
        return self.pool.submit(lambda: tell(self.places[rank], error, timeout_seconds=seconds, **options))


def _said(*futures: Future[RendezvousError | None]) -> set[tuple[bool, bool, str]]:
    errors = [future.result(60) for future in futures]
    return {(error.lasting, error.agreed, str(error)) for error in errors if error is not None}


UNKNOWN = ValueError("head.margin: unknown")


@pytest.fixture(autouse=True)
def time_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep a rank from reading."""
    monkeypatch.setattr("partialfc.distributed.meeting._READ_SECONDS", 120.0)


def test_what_all_say_is_said_once() -> None:
    meeting = Meeting(3)
    assert _said(*(meeting.tell(rank, UNKNOWN) for rank in range(3))) == {(True, True, "head.margin: unknown")}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ESTALE, "Stale file handle", "small.yaml"),
            "OSError: [Errno 116] Stale file handle: 'small.yaml'",
        ),
        (RuntimeError("CUDA error: busy"), "RuntimeError: CUDA error: busy"),
    ],
)
def test_another_start_may_end_better(error: Exception, text: str) -> None:
    meeting = Meeting(2)
    assert _said(meeting.tell(0, error), meeting.come(1)) == {(False, True, f"rank 0 ({HOST}): {text}")}


def test_all_stay_until_the_last_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends all when it sees one end, and nobody would say why."""
    meeting, late, go_on = Meeting(3), threading.Event(), threading.Event()
    read = _Roll._refusal

    def read_late(roll: _Roll) -> RendezvousError:
        if roll._place.rank == 2:
            late.set()
            go_on.wait(60)
        return read(roll)

    monkeypatch.setattr(_Roll, "_refusal", read_late)
    ranks = [meeting.tell(0, UNKNOWN), meeting.come(1), meeting.come(2)]
    assert late.wait(60)
    assert wait(ranks, timeout=1).done == set()
    go_on.set()
    assert _said(*ranks) == {(True, True, f"rank 0 ({HOST}): head.margin: unknown")}


def test_none_ends_before_each_has_done_what_it_must_before() -> None:
    """It lets signals wait, say: a launcher that sees one end tells the others to end too."""
    for culprit in range(2):
        meeting, all_may_end = Meeting(2), []

        def answer(meeting: Meeting = meeting, all_may_end: list[bool] = all_may_end) -> None:
            all_may_end.append(meeting.store().check(["meeting 0/all read"]))

        ranks = [meeting.tell(culprit, UNKNOWN, on_refusal=answer), meeting.come(1 - culprit, on_refusal=answer)]
        assert _said(*ranks) == {(True, True, f"rank {culprit} ({HOST}): head.margin: unknown")}
        assert all_may_end == [False, False]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> tuple[Meeting, TCPStore]:
    """Ranks whose store is that of an agent, and is kept for all starts."""
    meeting = Meeting(2)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return meeting, TCPStore("127.0.0.1", meeting.places[0].port, is_master=True, wait_for_workers=False)


def test_what_was_said_at_an_earlier_start_does_not_count(agent: tuple[Meeting, TCPStore]) -> None:
    meeting, _ = agent
    assert len(_said(meeting.tell(0, UNKNOWN), meeting.come(1))) == 1
    assert _said(meeting.come(0), meeting.come(1)) == set()
    # It does not take rank 0 for here that was here at the last start.
    assert "waited 1 s for rank 0, which never came" in str(meeting.come(1, seconds=1).result(60))


def test_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(4)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = TCPStore("127.0.0.1", meeting.places[0].port, is_master=True, wait_for_workers=False)
    other = meeting.come(2)
    meeting.wait_for(2)
    told = str(meeting.come(0, seconds=1).result(60))
    assert "rank 0 of 4 (host" in told
    assert "waited 1 s for ranks 1, 3, which never came" in told
    del store
    assert "lost rank 0 at the start" in str(other.result(60))


def test_who_comes_after_the_others_have_given_up_hears_why(agent: tuple[Meeting, TCPStore]) -> None:
    meeting, _ = agent
    alone = (True, False, f"rank 0 ({HOST}): head.margin: unknown")
    assert _said(meeting.tell(0, UNKNOWN, seconds=1)) == {alone}
    ((_, _, text),) = _said(meeting.come(1))
    assert text == alone[2]


def test_a_store_with_marks_of_an_earlier_start_is_told_apart(agent: tuple[Meeting, TCPStore]) -> None:
    meeting, store = agent
    store.add("meeting 0/cannot come", 1)
    errors = [rank.result(60) for rank in [meeting.come(0), meeting.come(1)]]
    assert all("finds marks of an earlier start in the store of torchrun" in str(error) for error in errors)


def test_a_rank_that_cannot_start_does_not_wait_for_one_that_never_comes() -> None:
    meeting = Meeting(3)
    first = meeting.come(0)
    meeting.wait_for(0)
    assert _said(first, meeting.tell(1, UNKNOWN, seconds=5)) == {
        (True, False, f"rank 1 ({HOST}): head.margin: unknown")
    }


def test_who_finds_nobody_tells_nobody() -> None:
    assert Meeting(2).tell(1, UNKNOWN, seconds=1).result(60) is None


def test_reports_of_ranks_are_joined_by_what_they_say() -> None:
    reports = [Report(rank, f"node{rank // 2}", "no room" if rank != 2 else "no data") for rank in range(4)]
    assert join_reports(reports, size=4) == "ranks 0-1, 3 (node0, node1): no room\nrank 2 (node1): no data"
    assert join_reports(reports[:1], size=1) == "no room"
    many = [Report(rank, "node", f"error {rank}") for rank in range(12)]
    assert join_reports(many, size=12).splitlines()[9:] == ["rank 9 (node): error 9", "and 2 more messages"]
