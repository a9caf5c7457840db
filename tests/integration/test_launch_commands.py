"""The commands of docs/clusters.md that need no cluster, and how launch/torchrun.sh ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
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


# The scripts alone, with stand-ins for what they start.


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python that answers for launch/slurm/describe.py, says what else it is to run, and leaves a file behind."""
    return _program(
        tmp_path / "python",
        f"touch {tmp_path}/started",
        f'case $1 in -c) exec {sys.executable} "$@" ;; *describe.py) printf "run\\nhost\\n29500\\n" ;; esac',
        'echo "python $*"',
    )


def _program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def _launch(directory: Path, command: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of a script, which finds in `directory` what is not given by its path."""
    job = (
        {"SLURM_JOB_ID": "7", "PARTIALFC_ROOT": str(ROOT)} if command.startswith("slurm/") else {"NPROC_PER_NODE": "1"}
    )
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", **job, **variables}
    done = subprocess.run(
        ["bash", "-c", f"exec {ROOT}/launch/{command}"], cwd=directory, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SOON_SECONDS, check=False,
        start_new_session=True,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(("rank", "is_host"), [("0", 1), ("00", 1), ("1", 0), ("08", 0), ("010", 0)])
def test_the_number_of_a_machine_may_begin_with_zeros(tmp_path: Path, python: str, rank: str, is_host: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        port = str(meeting.getsockname()[1])
        where = {"NNODES": "9", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code, output = _launch(tmp_path, "torchrun.sh small.yaml", PARTIALFC_PYTHON=python, **where)
    assert (code, output.count("\n")) == (0, 1), output
    assert f"--rdzv-endpoint 127.0.0.1:{port} --rdzv-id partialfc --rdzv-conf is_host={is_host}," in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODE_RANK": "x8"}, "NODE_RANK is 'x8', but must be a number from 0 on"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536', but must be a number from 1 to 65535"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0', but must be a number from 1 on"),
        ({"NNODES": "2"}, "NNODES is 2, so set MASTER_ADDR"),
        ({"NNODES": "1:4", "MASTER_ADDR": "node0"}, "NNODES is 1:4, so set NODE_RANK"),
    ],
)
def test_torchrun_sh_starts_nothing_before_all_is_checked(
    tmp_path: Path, python: str, variables: dict[str, str], message: str
) -> None:
    # It asks Python for the number of GPUs.
    variables = {"NPROC_PER_NODE": "", **variables}
    code, output = _launch(tmp_path, "torchrun.sh small.yaml", PARTIALFC_PYTHON=python, **variables)
    assert (code, output.count("\n")) == (2, 1), output
    assert output.startswith(f"launch/torchrun.sh: {message}")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm/train.sbatch", "slurm/interactive.sh"])
@pytest.mark.parametrize(
    ("python", "tried"),
    [
        ("false", "but this does not run Python: 'false -c \"print(6 * 7)\"' ended with code 1 and said ''"),
        ("env true", "'env true -c \"print(6 * 7)\"' ended with code 0"),
        ("echo", "ended with code 0 and said '-c print(6 * 7)'"),
        ("/no/python -u", "but '/no/python' is no program that can be started; set it to what runs Python"),
        (" ", "which has no word in it; set it to what runs Python"),
    ],
)
def test_a_python_that_is_none_is_named(tmp_path: Path, script: str, python: str, tried: str) -> None:
    code, output = _launch(tmp_path, f"{script} small.yaml", PARTIALFC_PYTHON=python)
    assert (code, output.count("\n")) == (2, 1), output
    assert f": PARTIALFC_PYTHON is '{python}', " in output
    assert tried in output


def test_a_machine_without_python_is_told(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [tmp_path / "launch" / "torchrun.sh", "small.yaml"], env={"PATH": str(tmp_path / "bin")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SOON_SECONDS, check=False,
    )  # fmt: skip
    assert done.stderr == (
        "launch/torchrun.sh: PARTIALFC_PYTHON is not set, which means 'python', but 'python' is no program that can be "
        "started; run 'make setup', or set it to what runs Python\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        ("train.sbatch", {}, "usage: sbatch [options of sbatch] launch/slurm/train.sbatch CONFIG [key.sub=value ...]"),
        ("interactive.sh", {}, "usage: salloc [options of salloc] launch/slurm/interactive.sh CONFIG"),
        ("interactive.sh c.yaml", {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set, but this script runs in a job"),
        ("train.sbatch c.yaml", {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set, but this script runs in a job"),
        ("train.sbatch c.yaml", {"LAUNCH": "mpirun"}, "LAUNCH is 'mpirun', but must be srun or torchrun"),
        ("array.sbatch", {}, "usage: sbatch --array=1-N [options of sbatch] launch/slurm/array.sbatch SWEEP CONFIG "),
        ("array.sbatch two.txt", {"SLURM_ARRAY_TASK_ID": "1"}, "usage: sbatch --array=1-N "),
        (
            "array.sbatch two.txt c.yaml",
            {},
            "SLURM_ARRAY_TASK_ID is '', so this is no task of an array; submit with --",
        ),
        ("array.sbatch no.txt c.yaml", {"SLURM_ARRAY_TASK_ID": "1"}, "the sweep 'no.txt' is no file that can be read"),
        ("array.sbatch . c.yaml", {"SLURM_ARRAY_TASK_ID": "1"}, "the sweep '.' is no file that can be read from /"),
        ("array.sbatch none.txt c.yaml", {"SLURM_ARRAY_TASK_ID": "1"}, "none.txt is empty, but must have a line"),
        (
            "array.sbatch one.txt c.yaml",
            {"SLURM_ARRAY_TASK_ID": "5"},
            "one.txt has 1 line, but this is task 5; submit with --array=1-1\n",
        ),
        (
            "array.sbatch two.txt c.yaml",
            {"SLURM_ARRAY_TASK_ID": "0"},
            "two.txt has 2 lines, but this is task 0; submit with --array=1-2\n",
        ),
        ("array.sbatch two.txt c.yaml", {"SLURM_ARRAY_TASK_ID": "1"}, "line 1 of two.txt sets no run.directory"),
    ],
)
def test_a_job_that_cannot_start_says_so_once(
    tmp_path: Path, python: str, command: str, variables: dict[str, str], message: str
) -> None:
    _sweeps(tmp_path)
    code, output = _launch(tmp_path, f"slurm/{command}", PARTIALFC_PYTHON=python, **variables)
    said = re.sub(
        r"^(\d\d:\d\d:\d\d launch/slurm: (job 7, start 1, .*|not queued again: .*)\n)", "", output, flags=re.M
    )
    assert (code, said.count("\n")) == (2, 1), output
    assert said[8:].startswith(f" launch/slurm: {message}"), output
    assert (tmp_path / "started").exists() == ("LAUNCH" in variables)


@pytest.mark.parametrize(
    ("sweep", "task", "added"), [("one", "1", "run.directory=a"), ("two", "2", "run.directory=b x=2")]
)
def test_a_task_of_an_array_adds_its_line(tmp_path: Path, python: str, sweep: str, task: str, added: str) -> None:
    _sweeps(tmp_path)
    _program(tmp_path / "srun", 'echo "srun $*"')
    command = f"slurm/array.sbatch {sweep}.txt c.yaml training.epochs=1"
    code, output = _launch(tmp_path, command, PARTIALFC_PYTHON=python, SLURM_ARRAY_TASK_ID=task)
    assert f" -m partialfc.cli train c.yaml training.epochs=1 {added}\n" in output
    assert output.endswith("finished\n")
    assert code == 0


def _sweeps(directory: Path) -> None:
    (directory / "none.txt").touch()
    (directory / "one.txt").write_text("run.directory=a\n")
    (directory / "two.txt").write_text("x=1\nrun.directory=b x=2")


def test_a_job_that_is_told_to_end_does_not_blame_python(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes of a job, also to the Python that is being tried."""
    lines = ("[ $1 != -c ] || kill -TERM 0", 'printf "run\\nhost\\n29500\\n"')
    python = _program(tmp_path / "python", *lines)
    code, output = _launch(tmp_path, "slurm/train.sbatch c.yaml", PARTIALFC_PYTHON=python)
    assert output.endswith("launch/slurm: told to end; Slurm decides whether this job goes on\n")
    assert code == 85
