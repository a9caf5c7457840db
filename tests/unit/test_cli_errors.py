"""With which code the command line ends because of checkpoints or settings, and who says why."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import make_faces, write_config
from support import running_ranks

from partialfc.cli import main
from partialfc.supervision.exit_codes import EXIT_BUG, EXIT_OK, EXIT_RETRY, EXIT_USER_ERROR


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("data") / "faces")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """The configuration of a finished run, with a checkpoint."""
    config = write_config(tmp_path_factory.mktemp("trained"), faces, steps=1, evaluation={"enabled": False})
    assert main(["train", str(config)]) == EXIT_OK
    return config


def fail_on(patch: pytest.MonkeyPatch, method: str, name: str, number: int) -> None:
    """Has a method of paths fail with an error of the system on a file or folder of this name."""
    original = getattr(Path, method)

    def failing(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return original(self, *arguments, **options)

    patch.setattr(Path, method, failing)


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        ("iterdir", "checkpoints", "restoring {checkpoints}: "),
        ("read_bytes", "MANIFEST.json", "verifying {checkpoints}/step-00000001: MANIFEST.json cannot be read: "),
        ("open", "__0_0.distcp", "verifying {checkpoints}/step-00000001: __0_0.distcp cannot be read: "),
    ],
)
@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, EXIT_RETRY), (errno.ESTALE, EXIT_RETRY), (errno.EACCES, EXIT_USER_ERROR)]
)
def test_what_the_storage_may_do_next_time_is_tried_again(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    name: str,
    said: str,
    number: int,
    code: int,
) -> None:
    fail_on(monkeypatch, method, name, number)
    assert main(["train", str(trained)]) == code
    errors = capsys.readouterr().err
    assert said.format(checkpoints=trained.parent / "run" / "checkpoints") in errors
    assert os.strerror(number) in errors


def test_an_evaluation_is_tried_again_too(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_on(monkeypatch, "iterdir", "checkpoints", errno.ESTALE)
    run = trained.parent / "run"
    assert main(["evaluate", str(run)]) == EXIT_RETRY
    assert f"error: listing {run}/checkpoints: OSError: [Errno 116] " in capsys.readouterr().err


def test_ranks_that_all_say_the_same_say_it_once(tmp_path: Path, faces: Path) -> None:
    config = write_config(tmp_path, faces, steps=1, evaluation={"enabled": False})
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    command = [sys.executable, "-m", "partialfc.cli", "train", str(config)]
    with running_ranks(tmp_path, [command] * 2) as ranks:
        assert ranks.ended(120) == [EXIT_USER_ERROR] * 2
        assert ranks.errors(0).count("1 checkpoints and none is good; restore one, or move the directory away") == 1
        assert "partialfc: error" not in ranks.errors(1)
        assert "none is good" not in ranks.errors(1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["backbone.options.width=-3"], "backbone.options.width is -3, but must be an integer of at least 1"),
        (["backbone.options.width=abc"], "backbone.options.width is 'abc', but must be an integer of at least 1"),
        (["backbone.options.dropout=7"], "backbone.options.dropout is 7, but must be a number in [0, 1)"),
        (
            ["backbone.options={bogus: 1}"],
            'backbone.options.bogus is no option of backbone "iresnet10"; allowed are dropout, width',
        ),
        (["data.image_size=40"], "data.image_size is 40, but must be a positive multiple of 16, such as 32"),
        (
            ["engine.sync_batch_norm=true"],
            "engine.sync_batch_norm needs CUDA, as torch has it for nothing else, but the backbone is on cpu; set it "
            "to false",
        ),
        (
            ["engine.name=deepspeed", "engine.deepspeed_json={file}"],
            "engine.deepspeed_json {file} sets steps_per_print to 0, but must be a positive integer",
        ),
    ],
)
def test_a_setting_is_named_by_its_path(
    tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"steps_per_print": 0}', encoding="utf-8")
    config = write_config(tmp_path, faces, steps=1, evaluation={"enabled": False})
    given = [override.replace("{file}", str(file)) for override in overrides]
    assert main(["train", str(config), *given]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"partialfc: error: {said.replace('{file}', str(file))}\n"


SAID_LATE = """
import os, signal, sys, time
from partialfc import cli
say = cli._say

def say_after_a_signal(error):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    say(error)

cli._say = say_after_a_signal
sys.exit(cli.main(["train", "not_there.yaml"]))
"""


def test_what_is_wrong_is_said_although_the_launcher_has_seen_another_rank_end() -> None:
    done = subprocess.run([sys.executable, "-c", SAID_LATE], capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_USER_ERROR
    assert "not_there.yaml" in done.stderr
    assert "told to stop" not in done.stderr


def test_a_fault_of_ours_is_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such state")

    monkeypatch.setattr("partialfc.config.load_config", fail)
    assert main(["train", "config.yaml"]) == EXIT_BUG
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith("RuntimeError: no such state\n")
