"""What clusters do to the real trainer: signals at any moment, hangs, bad ranks and lost launchers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import IDENTITIES, make_faces, set_back, steps_of, write_config
from support import SOON_SECONDS, checkpoint_tensors, running_ranks

from partialfc.data import synthesize
from partialfc.supervision.exit_codes import EXIT_OK, EXIT_RETRY, EXIT_STOPPED, EXIT_USER_ERROR
from partialfc.telemetry import read_metrics

STEPS, EVALUATE_EVERY = 60, 10


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("data") / "faces")


def _config(directory: Path, faces: Path, **sections: dict[str, Any]) -> Path:
    evaluation = {"every_steps": EVALUATE_EVERY, **sections.pop("evaluation", {})}
    checkpoint = {"every_steps": 20, **sections.pop("checkpoint", {})}
    return write_config(directory, faces, steps=STEPS, evaluation=evaluation, checkpoint=checkpoint, **sections)


def _train(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "partialfc.cli", "train", str(config), *overrides]


def _agent(ranks: int, config: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # On a busy machine the save before they leave may take longer than the 30 seconds of its own.
    return [*torchrun, f"--shutdown-timeout={SOON_SECONDS:.0f}", "-m", "partialfc.cli", "train", str(config)]


@contextmanager
def _running(command: list[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (directory / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _lines(run: Path, key: str) -> int:
    """How many lines of the metrics so far have a value of that name."""
    path = run / "metrics.jsonl"
    return path.read_text().count(f'"{key}"') if path.exists() else 0


def _moments(directory: Path) -> dict[str, tuple[signal.Signals, Callable[[int], object]]]:
    """By phase, a signal and whether a process is in that phase, in which it is sent. To be made before the start."""
    run, errors = directory / "run", directory / "stderr"
    losses = _lines(run, "loss")
    saves = set((run / "checkpoints").glob("*")) if run.exists() else set()
    return {
        "import": (signal.SIGUSR2, lambda pid: _hears(pid, signal.SIGUSR2)),
        "start": (signal.SIGTERM, lambda _: b"preflight: 1 process" in errors.read_bytes()),
        "steps": (signal.SIGINT, lambda _: _lines(run, "loss") > losses + 8),
        "save": (signal.SIGTERM, lambda _: set((run / "checkpoints").glob("*")) - saves),
        # Any of them: on a busy machine this process may sleep through one.
        "evaluation": (
            signal.SIGUSR2,
            lambda _: _lines(run, "loss") // EVALUATE_EVERY > _lines(run, "verification_accuracy"),
        ),
        "end": (signal.SIGTERM, lambda _: _lines(run, "loss") == STEPS),
    }


def _hears(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; before, it would die of it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("undisturbed")
    with _running(_train(_config(directory, faces)), directory) as process:
        assert process.wait(SOON_SECONDS) == EXIT_OK, (directory / "stderr").read_text()
    return checkpoint_tensors(directory / "run", f"step-{STEPS:08d}")


def _assert_as_undisturbed(run: Path, undisturbed: dict[str, Any]) -> None:
    tensors = checkpoint_tensors(run, f"step-{STEPS:08d}")
    assert tensors.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        same = torch.equal(value, tensors[name]) if isinstance(value, torch.Tensor) else value == tensors[name]
        assert same, f"{name} differs"
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_signal_in_each_phase_and_in_the_end_the_run_is_as_if_undisturbed(
    tmp_path: Path, faces: Path, undisturbed: dict[str, Any]
) -> None:
    config, run = _config(tmp_path, faces), tmp_path / "run"
    missed = []
    for phase in ("import", "start", "steps", "save", "evaluation", "end"):
        number, due = _moments(tmp_path)[phase]
        before = _lines(run, "loss")
        with _running(_train(config), tmp_path) as process:
            _wait(lambda due=due, pid=process.pid: due(pid), process)
            process.send_signal(number)
            at = _lines(run, "loss")
            code = process.wait(SOON_SECONDS)
        message, done = (tmp_path / "stderr").read_text(), _lines(run, "loss")
        saved = _as_it_should_end(run, code, number, before=before, message=f"{phase}: {message}")
        # A few more steps may be made until it is heard.
        assert code == EXIT_STOPPED or at >= STEPS - 5, f"{phase}: the signal was lost"
        assert saved or not before < at < STEPS - 5, f"{phase}: {message}"
        if saved != (phase in {"steps", "save", "evaluation"}):
            missed.append(phase)
    # On a busy machine this process may sleep through a moment.
    assert len(missed) <= 1, missed
    assert done == STEPS
    with _running(_train(config), tmp_path) as process:
        assert process.wait(SOON_SECONDS) == EXIT_OK, (tmp_path / "stderr").read_text()
    _assert_as_undisturbed(run, undisturbed)


def _as_it_should_end(run: Path, code: int, number: signal.Signals, *, before: int, message: str) -> bool:
    """Whether a run that was told to stop has saved: after its last step, or else no step was made or it was over."""
    done = _lines(run, "loss")
    if code == EXIT_OK:
        assert done == STEPS, message
        return False
    assert code == EXIT_STOPPED, message
    assert f"told to stop by {number.name}" in message
    if (saved := re.search(r"saved after step (\d+)", message)) is not None:
        assert int(saved[1]) == done, message
        assert (run / "checkpoints" / f"step-{done:08d}").is_dir(), message
        return True
    assert "leaving; what was saved before stands" in message
    assert done in (before, STEPS), message
    return False


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_a_signal_at_any_moment(tmp_path: Path, faces: Path, undisturbed: dict[str, Any], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    config = _config(tmp_path, faces)
    for leg in range(20):
        pause = 1.0 + 6.0 * float(torch.rand((), generator=draw))
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)[int(torch.randint(3, (), generator=draw))]
        with _running(_train(config), tmp_path) as process:
            if leg < 4:
                try:
                    process.wait(pause)
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
            code = process.wait(SOON_SECONDS)
        assert code in (EXIT_STOPPED, EXIT_OK), (tmp_path / "stderr").read_text()
        if code == EXIT_OK:
            break
    _assert_as_undisturbed(tmp_path / "run", undisturbed)


def test_torchrun_told_to_stop_saves_and_goes_on(tmp_path: Path, faces: Path) -> None:
    # Without an end: it would come while this process sleeps.
    config = _config(tmp_path, faces, data={"num_workers": 1}, training={"epochs": 1e5})
    run = tmp_path / "run"
    with _running(_agent(2, config), tmp_path) as agent:
        _wait(lambda: _lines(run, "loss") > 8, agent)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(SOON_SECONDS) != EXIT_OK
    assert re.search(r"told to stop by SIGTERM; saved after step \d+", (tmp_path / "stderr").read_text())
    saved = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert f"step-{_lines(run, 'loss'):08d}" in saved

    # Now it dies without a word: its ranks, and their data workers, do not live on.
    with _running(_agent(2, config), tmp_path) as agent:
        before = _lines(run, "loss")
        _wait(lambda: _lines(run, "loss") > before + 2, agent)
        descendants = _descendants(agent.pid)
        assert len(descendants) >= 4
        agent.kill()
        agent.wait()
        _wait(lambda: not any(map(_runs, descendants)))
    assert "the launcher (pid" in (tmp_path / "stderr").read_text()


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # one that has ended meanwhile
        return []
    return [below for child in map(int, children) for below in [child, *_descendants(child)]]


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


SLOW_STAGE = """
import os, time
def stages():
    def sleep_at_some_moment(samples):
        for sample in samples:
            if os.environ["RANK"] == "1" and sample["__position__"] >= 8 * 16:
                time.sleep(600)
            yield sample
    return [sleep_at_some_moment]
"""


def test_a_rank_that_hangs_in_a_users_stage_is_named_with_its_stack(tmp_path: Path, faces: Path) -> None:
    (tmp_path / "slow_stage.py").write_text(SLOW_STAGE)
    config = _config(
        tmp_path,
        faces,
        data={"loader": "webdataset", "stages": "slow_stage:stages"},
        supervision={"hang_timeout_seconds": 20},  # in which a busy machine makes a step
    )
    with running_ranks(tmp_path, [_train(config)] * 2, PYTHONPATH=str(tmp_path)) as ranks:
        assert ranks.ended() == [EXIT_RETRY, EXIT_RETRY]
    named = r"rank 1 \(\S+, pid \d+\) is behind the others; last seen after step 8, in .*\(sleep_at_some_moment\)"
    assert re.search(named, ranks.errors(0)), ranks.errors(0)
    report = (tmp_path / "run" / "faults" / "step-00000008-rank-00001.txt").read_text()
    assert re.search(r"in sleep_at_some_moment\n", report)


@pytest.mark.soak
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_goes_on_when_started_again(
    tmp_path: Path, faces: Path, culprit: int
) -> None:
    config, run = _config(tmp_path, faces, supervision={"hang_timeout_seconds": 4}), tmp_path / "run"
    with running_ranks(tmp_path, [_train(config)] * 2) as ranks:
        _wait(lambda: _lines(run, "loss") > 8, ranks.processes[0])
        ranks.processes[culprit].send_signal(signal.SIGSTOP)
        named = rf"rank {culprit} \(\S+, pid {ranks.processes[culprit].pid}\) is stopped"
        assert ranks.seconds_until(1 - culprit, named) < 4 + 10
        assert ranks.processes[1 - culprit].wait(SOON_SECONDS) == EXIT_RETRY
    with running_ranks(tmp_path, [_train(config)] * 2) as ranks:
        assert ranks.ended() == [EXIT_OK, EXIT_OK], ranks.errors(0)


def test_ranks_that_do_not_fit_together_are_named_before_the_first_step(tmp_path: Path, faces: Path) -> None:
    config = _config(tmp_path, faces)
    with running_ranks(tmp_path, [_train(config), _train(config, "optimizer.learning_rate=0.2")]) as ranks:
        assert ranks.ended() == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert "the ranks cannot train together:\n" in ranks.errors(0)
    found = r"optimizer.learning_rate: 0.1 on rank 0, 0.2 on rank 1|configuration: \w+ on rank 0\D*, \w+ on rank 1"
    assert re.search(found, ranks.errors(0)), ranks.errors(0)
    assert "partialfc: error" not in ranks.errors(1)
    assert not (tmp_path / "run").exists()


OTHER_NUMPY = """
import sys, numpy
numpy.__version__ = "0.1"
from partialfc.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_hosts_with_other_data_or_packages_by_the_same_name_are_named(tmp_path: Path, faces: Path) -> None:
    hosts = [tmp_path / "host 0", tmp_path / "host 1"]
    for host in hosts:
        host.mkdir()
    (hosts[0] / "faces").symlink_to(faces)
    synthesize(hosts[1] / "faces", identities=IDENTITIES, images_per_identity=4, seed=2, image_size=32)
    config = str(_config(tmp_path, Path("faces"), evaluation={"enabled": False, "every_steps": None}))
    commands = [_train(Path(config)), [sys.executable, "-c", OTHER_NUMPY, "train", config]]
    with running_ranks(
        tmp_path, [["env", f"--chdir={host}", *command] for host, command in zip(hosts, commands, strict=True)]
    ) as ranks:
        assert ranks.ended() == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert "the ranks cannot train together:\n" in ranks.errors(0)
    assert re.search(r"^  numpy: \d\S+ on rank 0\D*, 0\.1 on rank 1", ranks.errors(0), re.MULTILINE)
    assert re.search(r"^  data of main: [0-9a-f]+ on rank 0.*, [0-9a-f]+ on rank 1", ranks.errors(0), re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_hosts_without_a_common_run_directory_are_named(tmp_path: Path, faces: Path) -> None:
    hosts = [tmp_path / "host 0", tmp_path / "host 1"]
    for host in hosts:
        host.mkdir()
    config = _config(tmp_path, faces, run={"directory": "run"})
    with running_ranks(tmp_path, [["env", f"--chdir={host}", *_train(config)] for host in hosts]) as ranks:
        assert ranks.ended() == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert re.search(
        r"run.directory run is not the same folder on all ranks: rank 1 \(\S+\) cannot see what rank 0 \(\S+\) writes",
        ranks.errors(0),
    ), ranks.errors(0)
    assert not any(path for host in hosts for path in host.iterdir())


def test_a_rank_that_cannot_start_ends_all_at_once_with_its_message(tmp_path: Path, faces: Path) -> None:
    config = _config(tmp_path, faces)
    missing = tmp_path / "not there"
    with running_ranks(tmp_path, [_train(config), _train(config, f"data.directory={missing}")]) as ranks:
        # At once: the limit of collectives is ten minutes, that of this call is less.
        assert ranks.ended() == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    said = [re.findall(r"^partialfc: error.*", ranks.errors(rank), re.MULTILINE) for rank in range(2)]
    assert len(said[0]) == 1
    assert re.search(rf"rank 1 \(\S+\): .*{missing}", said[0][0])
    assert said[1] == []


BEHIND_ITS_TIME = """
import sys, time
real = time.time
time.time = lambda: real() - 400
from partialfc.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.soak
def test_a_clock_that_is_wrong_is_warned_of_and_harms_nothing(tmp_path: Path, faces: Path) -> None:
    config = _config(tmp_path, faces)
    skewed = [sys.executable, "-c", BEHIND_ITS_TIME, "train", str(config)]
    with running_ranks(tmp_path, [_train(config), skewed]) as ranks:
        assert ranks.ended(150) == [EXIT_OK, EXIT_OK], ranks.errors(0)
    assert re.search(r"the clock of rank 1 \(\S+\) is -\d+\.\d seconds from those of the others", ranks.errors(0))


@pytest.mark.soak
def test_a_loss_that_is_not_finite_stops_all_ranks_and_the_run_goes_on_from_the_last_checkpoint(
    tmp_path: Path, faces: Path
) -> None:
    straight = _config(tmp_path / "straight", faces)
    config, run = _config(tmp_path / "spoilt", faces), tmp_path / "spoilt" / "run"
    with running_ranks(tmp_path, [_train(straight)] * 2) as ranks:
        assert ranks.ended() == [EXIT_OK, EXIT_OK], ranks.errors(0)
    shutil.copytree(tmp_path / "straight" / "run", run)
    set_back(run, 40)
    too_fast = ("optimizer.learning_rate=1e30", "optimizer.max_gradient_norm=null", "supervision.max_skipped_steps=3")
    with running_ranks(tmp_path, [_train(config, *too_fast)] * 2) as ranks:
        assert ranks.ended() == [EXIT_USER_ERROR, EXIT_USER_ERROR], ranks.errors(0)
    for number, step in enumerate((42, 43, 44), start=1):
        skipped = f"not move in step {step}, as not all is finite: loss nan, gradient norm nan; {number} in a row, and"
        assert skipped in ranks.errors(0), ranks.errors(0)
    assert "loss or gradient was not finite for 3 steps up to step 44" in ranks.errors(0)
    assert f"the checkpoints in {run / 'checkpoints'} are good" in ranks.errors(0)
    assert ranks.errors(1) == ""
    assert steps_of(run)[-1] == 40
    with running_ranks(tmp_path, [_train(config)] * 2) as ranks:
        assert ranks.ended() == [EXIT_OK, EXIT_OK], ranks.errors(0)
    _assert_as_undisturbed(run, checkpoint_tensors(tmp_path / "straight" / "run", f"step-{STEPS:08d}"))
