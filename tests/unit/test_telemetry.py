"""What a run writes down: the metrics file, TensorBoard scalars, progress lines, profiler ranges."""

from __future__ import annotations

import io
import json
import math
import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from partialfc.telemetry import MetricsLog, ProgressBar, profiled, read_metrics


def test_metrics_are_one_json_object_a_line_and_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    log.write(0, {"loss": 3.25, "learning_rate": 0.1})
    log.write(1, {"loss": torch.tensor(3.0)})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "loss": 3.25, "learning_rate": 0.1}', '{"step": 1, "loss": 3.0}']
    log.close()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_non_finite_metrics_are_valid_json_and_come_back(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 0, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["step"]) == (math.inf, -math.inf, 0)


def test_resuming_drops_the_steps_that_will_come_again_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(5):
            log.write(step, {"loss": 1 / 3 + step, "worst": math.nan})
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before) + '{"step": 5, "lo')
    with MetricsLog(tmp_path, tensorboard=False, resume_step=3) as log:
        log.write(3, {"loss": -1.0})
    assert path.read_text() == "".join(before[:3]) + '{"step": 3, "loss": -1.0}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_resumed_run_may_have_no_metrics_yet(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False, resume_step=3) as log:
        log.write(3, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 1.0}]


def test_a_new_run_does_not_mix_with_another(tmp_path):
    MetricsLog(tmp_path, tensorboard=False).close()
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(0, {"loss": 1.0})
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl holds the metrics of another run: resume that run"):
        MetricsLog(tmp_path, tensorboard=False)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a line of a run: '\{\"step\": 1, \"lo'"):
        MetricsLog(tmp_path, tensorboard=False, resume_step=1)
    assert len(path.read_text().splitlines()) == 3


def test_a_metric_may_not_be_named_step(tmp_path):
    with (
        MetricsLog(tmp_path, tensorboard=False) as log,
        pytest.raises(ValueError, match='a metric may not be named "step"'),
    ):
        log.write(0, {"step": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_disabled_metrics_leave_no_trace(tmp_path):
    with MetricsLog(tmp_path / "run", enabled=False) as log:
        log.write(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_same_numbers_and_each_step_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of names, where the tenth of a process comes before its ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with MetricsLog(tmp_path) as log:
        for step in range(3):
            log.write(step, {"loss": step / 4})
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write(2, {"loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.0), (1, 0.25), (2, 7.0)]


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_progress_lines_in_a_log_file():
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(5000, description="train", unit="images", log_interval_seconds=10, stream=stream, clock=clock)
    with bar:
        for _ in range(4):
            clock.seconds += 4
            bar.update(400, loss=1.23456, lr=0.1)
        assert (
            stream.getvalue() == "train: 1,200/5,000 images (24.0%), 100.0 images/s, 0:00:38 left, loss=1.235, lr=0.1\n"
        )
        clock.seconds += 12
        bar.update(3400, loss=0.5, skipped=3)
    lines = stream.getvalue().splitlines()
    assert lines[1] == ("train: 5,000/5,000 images (100.0%), 237.5 images/s, 0:00:00 left, loss=0.5, lr=0.1, skipped=3")
    assert lines[2:] == [
        "train: 5,000/5,000 images (100.0%), 178.6 images/s, took 0:00:28, loss=0.5, lr=0.1, skipped=3"
    ]


def test_progress_of_a_resumed_run_rates_only_what_it_did_itself():
    clock, stream = Clock(), io.StringIO()
    with ProgressBar(10000, description="train", unit="steps", initial=9000, stream=stream, clock=clock) as bar:
        clock.seconds += 4000
        bar.update(500)
        clock.seconds += 4000
    assert stream.getvalue().splitlines() == [
        "train: 9,500/10,000 steps (95.0%), 0.1 steps/s, 1:06:40 left",
        "train: 9,500/10,000 steps (95.0%), 0.1 steps/s, took 2:13:20",
    ]


def test_progress_that_fails_still_says_how_far_it_came():
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(10, description="index", unit="tars", stream=stream, clock=clock)

    def index_and_fail() -> None:
        with bar:
            clock.seconds += 2
            bar.update(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        index_and_fail()
    bar.close()
    assert stream.getvalue() == "index: 1/10 tars (10.0%), 0.5 tars/s, took 0:00:02\n"


def test_progress_that_stands_still_or_has_nothing_to_do():
    clock, stream = Clock(), io.StringIO()
    with ProgressBar(0, description="a", unit="files", stream=stream, clock=clock) as bar:
        clock.seconds += 10
        bar.update(0)
    assert stream.getvalue().splitlines() == [
        "a: 0/0 files (100.0%), 0.0 files/s, unknown time left",
        "a: 0/0 files (100.0%), 0.0 files/s, took 0:00:10",
    ]


def test_disabled_progress_counts_in_silence():
    stream = io.StringIO()
    with ProgressBar(2, description="a", unit="files", enabled=False, log_interval_seconds=0, stream=stream) as bar:
        bar.update(2)
    assert stream.getvalue() == ""
    assert bar.count == 2


def test_progress_goes_to_standard_error(capsys):
    with ProgressBar(1, description="a", unit="files") as bar:
        bar.update(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("a: 1/1 files (100.0%), ")


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    total = 8_000_000  # so many that there is more than one in a second, however slow
    with ProgressBar(total, description="train", unit="images", initial=total // 4, stream=stream) as bar:
        bar.update(3 * total // 4, loss=0.123456)
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert "train: 100%" in last
    assert "8000000/8000000" in last
    assert "images/s" in last
    assert "loss=0.1235" in last


def test_profiled_blocks_carry_their_name_and_let_errors_through():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with profiled("backbone forward"):
            torch.ones(2).sum()
        with pytest.raises(RuntimeError, match="stop"), profiled("head"):
            raise RuntimeError("stop")
    assert {"backbone forward", "head"} <= {event.key for event in profiler.key_averages()}


def test_profiled_opens_and_closes_an_nvtx_range_once_cuda_is_in_use(monkeypatch):
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("end"))
    with pytest.raises(RuntimeError, match="stop"), profiled("head"):
        raise RuntimeError("stop")
    assert ranges == ["head", "end"]
    with profiled("backbone"):
        assert ranges[2:] == ["backbone"]
