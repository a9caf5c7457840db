"""A Slurm cluster of several nodes on this host: daemons of our own in a folder of our own, gone at the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2", "n3")

_CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=10
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=60
SlurmdTimeout=20
KillWait=15
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
LaunchParameters=use_interactive_step
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10
"""


class Cluster:
    """Commands of a cluster that runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """The standard output of a command."""
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=cwd, env={**self.environment, **variables}
        )
        if check:
            assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        return finished.stdout

    def start_node(self, node: str) -> None:
        """Unless its daemon runs."""
        if node not in self._daemons:
            self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """As if its power went: the daemon and every process of jobs on it, at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        # A job's step on a node is a slurmstepd with the node's spool folder in its environment or open files.
        spool = str(self.directory / f"spool-{node}")
        for pid in _steps_of(spool, node):
            for child in [*_descendants(pid), pid]:
                _kill(child)

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job, check=False)
        found = re.search(r"JobState=(\S+)", shown)
        return found[1] if found else "GONE"

    def show(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"after {seconds:g} s: {what()}"
            time.sleep(0.3)

    def _start(self, name: str, command: Sequence[str]) -> None:
        log = (self.directory / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def start(self) -> None:
        directory = self.directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            base = 24000 + probe.getsockname()[1] % 4000
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (directory / name).mkdir()
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={base + 1 + index} "
            "CPUs=4 State=UNKNOWN"
            for index, node in enumerate(NODES)
        ]
        config = _CONFIG.format(
            host=socket.gethostname(), port=base, directory=directory, nodes="\n".join(lines), names=",".join(NODES)
        )
        (directory / "slurm.conf").write_text(config)
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._start("munge", ["munged", "--foreground", "--force", f"--socket={directory}/munge.socket", *munge])
        self.wait_for((directory / "munge.socket").exists, 240, lambda: self._log("munge.out"))
        self._start("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        self.wait_for(self.all_idle, 240, lambda: self.run("sinfo", "-N", check=False) + self._log("slurmctld.log"))

    def all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def stop(self) -> None:
        self.run("scancel", "--state=RUNNING,PENDING,SUSPENDED", "--full", "--signal=KILL", check=False)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons[name]
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for node in NODES:
            for pid in _steps_of(str(self.directory / f"spool-{node}"), node):
                for child in [*_descendants(pid), pid]:
                    _kill(child)

    def _log(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    for command in ("munged", "slurmctld", "slurmd", "sbatch"):
        assert shutil.which(command), f"{command} is not installed; `make slurm-test` installs it"
    # Munge trusts only folders that others cannot write to, and its socket one that all can reach.
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _steps_of(spool: str, node: str) -> list[int]:
    """Processes slurmstepd that belong to one node of this cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if not command.startswith(b"slurmstepd"):
                continue
            opened = {os.readlink(link) for link in (folder / "fd").iterdir()}
            if any(spool in name or f"slurmd-{node}.log" in name for name in opened):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found, waiting = [], [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
