"""The commands of docs/clusters.md that need no cluster, and how launch/torchrun.sh ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clusters_doc import PAGE, ROOT, documented
from support import SOON_SECONDS, free_port

from partialfc.data import synthesize
from partialfc.telemetry import read_metrics

TESTS = ("integration/test_launch_commands.py", "slurm/test_slurm.py")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "faces"
    synthesize(directory, identities=24, images_per_identity=4, seed=1, image_size=32)
    return directory


class Runner:
    """Commands of the page, on a small configuration in the place of theirs."""

    def __init__(self, directory: Path, faces: Path) -> None:
        self.directory, self.faces = directory, faces
        values: dict[str, Any] = {
            "run": {"directory": "run", "log_every_steps": 1, "device": "cpu"},
            "data": {"directory": str(faces), "image_size": 32, "num_workers": 0},
            "backbone": {"name": "iresnet10", "embedding_dim": 16, "options": {"width": 8}},
            "head": {"margin": {"name": "ArcFace", "scale": 16.0}},
            "training": {"epochs": 1, "global_batch_size": 16},
            "evaluation": {"enabled": False},
        }
        self.config = directory / "small.yaml"
        self.config.write_text(yaml.safe_dump(values))

    def start(self, command: str, *overrides: str, **variables: str) -> subprocess.Popen[str]:
        recipe = re.search(r"configs/\w+\.yaml", command)
        if recipe is not None:
            command = command.replace(recipe[0], " ".join([str(self.config), *overrides]))
        assert recipe is not None or not overrides
        command = command.replace("launch/", f"{ROOT}/launch/")
        tools = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment |= {"PARTIALFC_PYTHON": sys.executable, "NPROC_PER_NODE": "2", **variables}
        # Whoever runs the tests may do so under nohup.
        return subprocess.Popen(
            ["env", "--default-signal=HUP", "bash", "-euc", command.strip()],
            cwd=self.directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, command: str, *overrides: str, code: int = 0, **variables: str) -> str:
        return end(self.start(command, *overrides, **variables), code=code)

    def world_sizes(self, output: str) -> list[int]:
        return [int(size) for size in re.findall(r"preflight: (\d+) ", output)]

    def losses(self, run: str = "run") -> list[float]:
        path = self.directory / run / "metrics.jsonl"
        return [line["loss"] for line in read_metrics(path) if "loss" in line] if path.exists() else []

    def wait_for_losses(self, number: int, run: str = "run") -> None:
        start = time.monotonic()
        while len(self.losses(run)) < number:
            assert time.monotonic() < start + SOON_SECONDS
            time.sleep(0.1)


def end(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """The output of a process that must end with `code`."""
    try:
        output, _ = process.communicate(timeout=2 * SOON_SECONDS)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


@pytest.fixture
def runner(tmp_path: Path, faces: Path) -> Runner:
    return Runner(tmp_path, faces)


def test_every_command_of_the_page_is_run_by_a_test() -> None:
    text = PAGE.read_text()
    named = re.findall(r"<!-- command: ([\w-]+) -->\n```bash\n", text)
    assert text.count("```bash") == len(named), "a block of commands without a name"
    run = {
        name for file in TESTS for name in re.findall(r'documented\(\s*"([\w-]+)"', (ROOT / "tests" / file).read_text())
    }
    assert set(named) == run
    assert len(named) == len(set(named))


def test_one_machine_stopped_and_started_again(runner: Runner) -> None:
    command = documented("one-machine", {"data.directory=/data/ms1mv3": f"data.directory={runner.faces}"})
    process = runner.start(command, "training.epochs=1000")
    runner.wait_for_losses(10, "runs/ms1mv3")
    process.send_signal(signal.SIGTERM)
    output = end(process, code=85)
    (step,) = re.findall(r"told to stop by SIGTERM; saved after step (\d+)", output)
    assert "launch/torchrun.sh: told to stop by SIGTERM; start again to go on" in output
    output = runner.run(command, f"training.epochs={(int(step) + 6) / 6}")
    assert f"step {step} of {int(step) + 6}" in output
    assert runner.world_sizes(output) == [2]
    assert len(runner.losses("runs/ms1mv3")) == int(step) + 6
    output = runner.run(documented("checkpoints", {}))
    assert "good" in output
    assert np.load(runner.directory / "centers.npy").shape == (24, 16)
    assert list((runner.directory / "resharded").glob("step-*/__7_0.distcp"))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_a_run_is_saved_when_the_session_ends(runner: Runner, number: signal.Signals) -> None:
    process = runner.start("launch/torchrun.sh configs/quickstart.yaml\n", "training.epochs=1000")
    runner.wait_for_losses(1)
    process.send_signal(number)
    assert "told to stop by SIGTERM; saved after step" in end(process, code=85)


def test_a_run_under_nohup_outlives_the_session(runner: Runner) -> None:
    # nohup itself would send the output to a file.
    command = "trap '' HUP; exec launch/torchrun.sh configs/quickstart.yaml\n"
    process = runner.start(command, "training.epochs=1000")
    runner.wait_for_losses(1)
    process.send_signal(signal.SIGHUP)
    # Heard, it would end the run within a step or two.
    runner.wait_for_losses(len(runner.losses()) + 20)
    process.send_signal(signal.SIGTERM)
    assert end(process, code=85).count("told to stop by SIGTERM; saved") == 1


def test_two_machines(runner: Runner) -> None:
    here = {"node0.example": "127.0.0.1", "29500": str(free_port())}
    variables = {"NPROC_PER_NODE": "1", "LOCAL_ADDR": "127.0.0.1"}
    second = runner.start(documented("two-machines-second", here), **variables)
    first = runner.start(documented("two-machines-first", here), **variables)
    output = end(first) + end(second)
    assert runner.world_sizes(output) == [2]
    assert len(runner.losses()) == 6


def test_a_mistake_of_the_user_is_not_tried_again(runner: Runner) -> None:
    output = runner.run("launch/torchrun.sh configs/quickstart.yaml\n", "trainin.epochs=1", code=2)
    # A rank that waits for another to come may note besides what it has to tell.
    (said,) = re.findall(r"^partialfc: error.*(?:\n .*)*", output, re.MULTILINE)
    assert "trainin: unknown key; did you mean 'training'?" in said
    assert (
        runner.run("launch/torchrun.sh configs/quickstart.yaml\n", code=2, NNODES="two").count("NNODES is 'two'") == 1
    )
    output = runner.run("launch/torchrun.sh configs/quickstart.yaml\n", code=2, NNODES="2")
    assert "set MASTER_ADDR" in output


def test_a_mistake_on_one_of_two_machines_ends_both(runner: Runner) -> None:
    """At once: the limit of collectives is ten minutes."""
    port = str(free_port())
    variables = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables["LOCAL_ADDR"] = "127.0.0.1"
    wrong = runner.start("launch/torchrun.sh not_there.yaml\n", NODE_RANK="1", **variables)
    right = runner.start("launch/torchrun.sh configs/quickstart.yaml\n", NODE_RANK="0", **variables)
    output = end(right, code=2) + end(wrong, code=2)
    said = re.findall("partialfc: error.*", output)
    assert len(said) == 1
    assert re.fullmatch(r"partialfc: error: rank [01] \(\S+\): FileNotFoundError: .*not_there.yaml.*", said[0])
    assert not (runner.directory / "run").exists()


def test_mpirun(runner: Runner) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun: apt-get install openmpi-bin")
    allowed = {f"OMPI_{name}": "1" for name in ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM")}
    allowed["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    port = {"MASTER_PORT": str(free_port())}
    output = runner.run(documented("mpirun", {"-np 8": "-np 2"}), **allowed, **port)
    assert runner.world_sizes(output) == [2]
    hosts = {"-np 16": "-np 2", "node0:8,node1:8": "localhost:2", "=node0": "=127.0.0.1", "29500": port["MASTER_PORT"]}
    output = runner.run(documented("mpirun-hosts", hosts), "run.directory=hosts", **allowed)
    assert runner.world_sizes(output) == [2]
    assert len(runner.losses("hosts")) == 6


@pytest.mark.soak
def test_a_single_process_and_other_numbers_of_them(runner: Runner) -> None:
    assert runner.world_sizes(runner.run(documented("one-process", {}))) == [1]
    assert runner.world_sizes(runner.run(documented("some-gpus", {}))) == [2, 1]


@pytest.mark.soak
def test_another_python(runner: Runner) -> None:
    python = f"env PARTIALFC_TEST=1 {sys.executable}"
    output = runner.run(documented("container", {"apptainer exec --nv partialfc.sif python": python}))
    assert runner.world_sizes(output) == [2]


@pytest.mark.soak
def test_an_elastic_run_starts_with_the_machines_that_are_there(runner: Runner) -> None:
    here = {"node0.example": "127.0.0.1", "NODE_RANK=1": "NODE_RANK=0"}
    output = runner.run(
        documented("elastic", here), NPROC_PER_NODE="1", LOCAL_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    assert runner.world_sizes(output) == [1]


@pytest.mark.soak
def test_the_deepspeed_launcher(runner: Runner) -> None:
    command = documented("deepspeed", {"--num_gpus 8": f"--num_gpus 2 --master_port {free_port()}"})
    assert runner.world_sizes(runner.run(command, DS_ACCELERATOR="cpu")) == [2]
