"""Real jobs on a real Slurm: whatever happens to one, it ends as if nothing had happened, or stays ended."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cluster import NODES, Cluster
from clusters_doc import ROOT, documented
from support import checkpoint_tensors

from partialfc.data import synthesize
from partialfc.telemetry import read_metrics

# In the place of what the commands of the page ask for.
SMALL = {"--ntasks-per-node=8 --gpus-per-node=8": "--ntasks-per-node=1"}
STEPS = 150
SAVE_EVERY = 20
SECONDS = 240.0  # for a run that is disturbed, on a busy machine

pytestmark = pytest.mark.usefixtures("quiet_cluster")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "faces"
    synthesize(directory, identities=24, images_per_identity=4, seed=1, image_size=32, verification_identities=12)
    return directory


@pytest.fixture
def quiet_cluster(cluster: Cluster) -> Any:
    yield
    cluster.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
    for node in NODES:
        cluster.start_node(node)
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    cluster.wait_for(cluster.all_idle, SECONDS, lambda: cluster.run("sinfo", "-N", "-l") + cluster.run("squeue"))


class Job:
    """One run of the trainer as a job of two ranks on two nodes."""

    def __init__(self, cluster: Cluster, directory: Path, faces: Path, **sections: dict[str, Any]) -> None:
        self.cluster, self.directory, self.run = cluster, directory, directory / "run"
        directory.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            # The quickstart, cut down to what two cores do in half a minute.
            "extends": str(ROOT / "configs" / "quickstart.yaml"),
            "run": {"directory": "run", "log_every_steps": 1, "device": "cpu"},
            "data": {"directory": str(faces), "image_size": 32, "num_workers": 0},
            "backbone": {"name": "iresnet10", "embedding_dim": 16, "options": {"width": 8, "dropout": 0.2}},
            "training": {"epochs": STEPS * 16 / 96, "global_batch_size": 16},
            "evaluation": {"enabled": False, "at_start": False},
            "checkpoint": {"every_steps": SAVE_EVERY},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        (directory / "config.yaml").write_text(yaml.safe_dump(values))

    def submit(self, *options: str, launch: str = "srun", **variables: str) -> None:
        """The command of the page for `launch`, on this cluster."""
        changes = {
            **SMALL,
            "--cpus-per-task=8": "--cpus-per-task=1",
            "--time=24:00:00": " ".join([f"--chdir={self.directory}", "--output=log", *options]),
            "configs/webface42m_iresnet100.yaml": "config.yaml",
        }
        command = documented("slurm", changes) if launch == "srun" else documented("slurm-torchrun", changes)
        told = self.cluster.run("bash", "-euc", command, cwd=ROOT, **variables)
        self.id, self.launch = told.split()[-1], launch

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _tell(self) -> str:
        return f"job {self.id} is {self.state}\n{self.log[-6000:]}"

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)

    @property
    def restarts(self) -> int:
        return int(self.cluster.show(self.id)["Restarts"])

    def losses(self) -> list[float]:
        path = self.run / "metrics.jsonl"
        return [line["loss"] for line in read_metrics(path) if "loss" in line] if path.exists() else []

    def checkpoints(self) -> list[int]:
        """The steps that are saved, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.run / "checkpoints").glob("step-*"))

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_for(lambda: len(self.losses()) >= step, SECONDS, self._tell)

    def wait_for_state(self, *states: str, seconds: float = SECONDS) -> None:
        self.cluster.wait_for(lambda: self.state in states, seconds, self._tell)

    def resumed_at(self) -> list[int]:
        """The steps at which the run went on, in order."""
        return [int(step) for step in re.findall(r"going on from .*, step (\d+) of", self.log)]

    def wait_for_resume(self, times: int) -> None:
        self.cluster.wait_for(lambda: len(self.resumed_at()) >= times, SECONDS, self._tell)

    def finish(self) -> None:
        self.cluster.wait_for(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING"), SECONDS, self._tell)
        assert self.state == "COMPLETED", self._tell()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed"), faces)
    job.submit()
    job.finish()
    assert job.restarts == 0
    assert len(job.losses()) == STEPS
    return job


def _assert_as_undisturbed(job: Job, undisturbed: Job) -> None:
    assert job.losses() == undisturbed.losses(), job.log[-6000:]
    tensors, expected = (checkpoint_tensors(one.run, f"step-{STEPS:08d}") for one in (job, undisturbed))
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(("running_mean", "running_var")):
            # Averaged over ranks whenever a checkpoint is written, which rounds once more.
            torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=1e-6)
        else:
            same = torch.equal(tensors[name], value) if isinstance(value, torch.Tensor) else tensors[name] == value
            assert same, name


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path, faces: Path) -> Job:
    return Job(cluster, tmp_path / "job", faces)


def test_a_finished_job_that_is_started_again_ends_well(undisturbed: Job) -> None:
    before = undisturbed.losses()
    undisturbed.submit()
    undisturbed.finish()
    assert undisturbed.losses() == before


def test_torchrun_trains_as_srun_does(job: Job, undisturbed: Job) -> None:
    job.submit(launch="torchrun")
    job.finish()
    _assert_as_undisturbed(job, undisturbed)


# What may happen to a job that runs, and whether it is then queued again.


def _is_requeued(job: Job) -> bool:
    job.cluster.run("scontrol", "requeue", job.id)
    return True


def _is_preempted(job: Job) -> bool:
    wanted = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
    job.cluster.run("sbatch", *wanted, "--wrap", "sleep 1")
    return True


def _is_told_of_the_time_limit(job: Job) -> bool:
    job.cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    return True


def _loses_a_node_to_the_administrator(job: Job) -> bool:
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    return True


def _loses_a_node_to_a_power_failure(job: Job) -> bool:
    job.cluster.kill_node("n2")
    return True


def _loses_a_rank(job: Job) -> bool:
    os.kill(max(_ranks(job)), signal.SIGKILL)
    return job.launch == "srun"  # torchrun starts its ranks again itself


@pytest.mark.parametrize(
    ("launch", "events"),
    [
        ("srun", [_is_requeued, _is_told_of_the_time_limit, _loses_a_node_to_the_administrator]),
        ("srun", [_loses_a_rank, _is_preempted, _loses_a_node_to_a_power_failure]),
        ("torchrun", [_loses_a_rank, _is_told_of_the_time_limit, _is_requeued]),
    ],
)
def test_a_job_goes_on_as_if_nothing_had_happened(
    job: Job, undisturbed: Job, launch: str, events: list[Callable[[Job], bool]]
) -> None:
    job.submit(launch=launch)
    starts, saved = 0, [_is_requeued, _is_preempted, _is_told_of_the_time_limit, _loses_a_node_to_the_administrator]
    for number, event in enumerate(events):
        job.wait_for_step(STEPS * (number + 1) // 5)
        before = len(job.losses())
        starts += event(job)
        job.wait_for_resume(number + 1)
        assert job.restarts == starts
        assert job.resumed_at()[-1] >= before - (0 if event in saved else 2 * SAVE_EVERY), f"lost too much in {event}"
        if event is _loses_a_node_to_a_power_failure:
            assert job.cluster.show(job.id)["NodeList"] == "n[1,3]"
    job.finish()
    _assert_as_undisturbed(job, undisturbed)


def test_time_limit(cluster: Cluster, tmp_path: Path, faces: Path) -> None:
    """Slurm looks at limits twice a minute, so the run is a longer one, and its limit one or two minutes away."""
    longer = {"training": {"epochs": 4 * STEPS * 16 / 96, "global_batch_size": 16}}
    job, alone = (Job(cluster, tmp_path / name, faces, **longer) for name in ("job", "alone"))
    job.submit("--time=30", "--signal=B:USR2@120")
    job.wait_for_step(30)
    hours, minutes, _ = map(int, cluster.show(job.id)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 2}")
    cluster.wait_for(lambda: job.restarts == 1, SECONDS, lambda: job.log)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    job.finish()
    assert "told to stop by SIGUSR2; saved after step" in job.log
    assert job.restarts == 1
    alone.submit()
    alone.finish()
    assert job.losses() == alone.losses()


def test_a_cancelled_job_stays_cancelled(job: Job) -> None:
    job.submit()
    job.wait_for_step(SAVE_EVERY + 5)
    job.cluster.run("scancel", job.id)
    job.wait_for_state("CANCELLED")
    time.sleep(15)  # a job that is queued again would begin after 11 seconds
    assert job.state == "CANCELLED"
    assert job.restarts == 0
    (saved,) = re.findall(r"told to stop by SIGTERM; saved after step (\d+)", job.log)
    assert job.checkpoints()[-1] == int(saved) == len(job.losses())


def test_a_job_that_always_crashes_is_given_up(job: Job, tmp_path: Path) -> None:
    crashing = tmp_path / "python"
    crashing.write_text(f'#!/bin/sh\n[ "$2" = partialfc.cli ] && kill -SEGV $$\nexec {sys.executable} "$@"\n')
    crashing.chmod(0o755)
    job.submit(PARTIALFC_PYTHON=str(crashing))
    job.wait_for_state("FAILED")
    assert job.restarts == 2
    assert "giving up: 3 starts in a row have not come beyond the checkpoint of step 0" in job.log


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
def test_a_mistake_of_the_user_is_told_once(cluster: Cluster, tmp_path: Path, faces: Path, launch: str) -> None:
    job = Job(cluster, tmp_path / "job", faces, trainin={})
    job.submit(launch=launch)
    job.wait_for_state("FAILED")
    assert job.log.count("unknown key; did you mean 'training'?") == 1
    assert job.cluster.show(job.id)["ExitCode"] == "2:0"
    # A mistake that only the ranks can see.
    job = Job(cluster, tmp_path / "other", faces, data={"directory": str(tmp_path / "nowhere")})
    job.submit(launch=launch)
    job.wait_for_state("FAILED")
    assert "nowhere" in job.log
    assert job.cluster.show(job.id)["ExitCode"] == "2:0"
    assert job.restarts == 0


def test_an_array_trains_each_line(cluster: Cluster, tmp_path: Path, faces: Path) -> None:
    job = Job(cluster, tmp_path / "job", faces, training={"epochs": 1})
    (job.directory / "sweep.txt").write_text(
        "run.directory=runs/a head.margin.margin=0.1\nrun.directory=runs/b head.margin.margin=0.3\nrun.seed=3\n"
    )
    changes = {
        "--array=1-2": f"--array=1-3 --chdir={job.directory} --output=log-%a",
        "configs/ms1mv3_iresnet100.yaml": "config.yaml",
    }
    told = cluster.run("bash", "-euc", documented("slurm-array", {**SMALL, **changes}), cwd=ROOT)
    array = told.split()[-1]
    cluster.wait_for(
        lambda: not cluster.run("squeue", "-h", "-j", array, check=False).strip(),
        SECONDS,
        lambda: (job.directory / "log-1").read_text(),
    )
    margins = [
        yaml.safe_load((job.directory / "runs" / name / "config.yaml").read_text())["head"]["margin"]["margin"]
        for name in ("a", "b")
    ]
    assert margins == [0.1, 0.3]
    for name in ("a", "b"):
        assert (job.directory / "runs" / name / "checkpoints" / "step-00000006").is_dir()
    assert "line 3 of sweep.txt sets no run.directory" in (job.directory / "log-3").read_text()


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
def test_an_allocation_of_salloc(cluster: Cluster, tmp_path: Path, faces: Path, launch: str) -> None:
    job = Job(cluster, tmp_path / "job", faces, training={"epochs": 1})
    here = {"launch/": f"{ROOT}/launch/"}
    command = documented("slurm-interactive", {**SMALL, **here, "configs/ms1mv3_iresnet100.yaml": "config.yaml"})
    cluster.run("bash", "-euc", command, cwd=job.directory, LAUNCH=launch)
    assert len(job.losses()) == 6


def _ranks(job: Job) -> list[int]:
    """The processes of the ranks of a job, by their environment."""
    ranks = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        starts = {b"partialfc.cli", str(ROOT / "launch" / "rank.py").encode()} & set(words[:3])
        if f"SLURM_JOB_ID={job.id}".encode() in environment and starts:
            ranks.append(int(folder.name))
    assert ranks, job.log[-3000:]
    return ranks
