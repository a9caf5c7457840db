"""The scripts of launch/ alone, with stand-ins for what they start: what they check before, and what they pass on."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import SOON_SECONDS

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(("ends_with", "code"), [(1, 2), (127, 2), (137, 75), (255, 75)])
def test_a_container_that_does_not_start_may_do_so_at_another_time(tmp_path: Path, ends_with: int, code: int) -> None:
    python = _program(tmp_path / "container", 'echo "no image"', f"exit {ends_with}")
    found, output = _launch(tmp_path, "torchrun.sh small.yaml", PARTIALFC_PYTHON=python)
    assert (found, output.count("\n")) == (code, 1), output
    assert f"ended with code {ends_with} and said 'no image'; set it to what runs Python" in output


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
def test_a_job_script_outside_of_slurm_says_so(tmp_path: Path, script: str) -> None:
    variables = {"SLURM_JOB_ID": "", "PARTIALFC_ROOT": ""}
    assert _launch(tmp_path, f"slurm/{script} c.yaml", **variables) == (
        2,
        f"launch/slurm/{script}: SLURM_JOB_ID is not set, but this is a job of Slurm: submit it with sbatch\n",
    )


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
