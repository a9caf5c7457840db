"""The benchmark of the head: its arithmetic, its baselines against the reference, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from partialfc.head import reference_loss

TOOL = Path(__file__).parents[2] / "tools" / "bench_head.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_head", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def test_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians(bench):
    ratio = bench.paired_ratio([2.0, 20.0, 9.0], [1.0, 4.0, 9.0])
    assert ratio == bench.Ratio(2.0, 1.0, 5.0)  # The medians would give 9 / 4.
    assert bench.paired_ratio([3.0, 8.0], [1.0, 2.0]).middle == 3.5
    assert str(ratio) == "2.00 (1.00-5.00)"
    with pytest.raises(ValueError, match="zip"):
        bench.paired_ratio([1.0, 2.0], [1.0])


def test_a_slow_spell_of_the_machine_leaves_the_ratio_alone(bench):
    ours, theirs = [1.0, 10.0, 100.0], [3.0, 30.0, 300.0]
    assert bench.paired_ratio(theirs, ours) == bench.Ratio(3.0, 3.0, 3.0)


def test_table_has_a_line_for_each_contestant(bench):
    outcome = bench.Outcome(
        bench.Case(1000, 8, 4, 0.1, "cpu"),
        seconds={"ours": [0.001, 0.002, 0.002], "plain": [0.003, 0.004, 0.006], "floor": [0.001, 0.001, 0.001]},
        peak_bytes={"ours": 2**20, "plain": 5 * 2**20},
        load_average=0.5,
    )
    lines = str(outcome).splitlines()
    assert lines[0] == "C=1,000 D=8 B=4 sample rate 0.1 (n=100), load average before 0.5"
    assert lines[2].split() == ["ours", "2.0", "1.00", "(1.00-1.00)", "2.00", "(1.00-2.00)", "1", "1.00"]
    assert lines[3].split() == ["plain", "4.0", "3.00", "(2.00-3.00)", "4.00", "(3.00-6.00)", "5", "5.00"]
    assert lines[4].split() == ["floor", "1.0", "0.50", "(0.50-1.00)", "1.00", "(1.00-1.00)"]


def test_table_without_a_measurable_peak(bench):
    case = bench.Case(10, 8, 4, 1.0, "cpu")
    seconds = {"ours": [0.001], "plain": [0.001], "floor": [0.001]}
    lines = str(bench.Outcome(case, seconds, {"ours": 0, "plain": 2**20}, load_average=0.0)).splitlines()
    assert lines[2].split()[-2:] == ["0", "-"]
    assert lines[3].split()[-2:] == ["1", "-"]


def test_classes_in_play(bench):
    assert bench.Case(1000, 8, 4, 0.1, "cpu").classes_in_play == 100
    assert bench.Case(1000, 8, 4, 1.0, "cpu").classes_in_play == 1000
    # There must be room for every class of the batch.
    assert bench.Case(1000, 8, 400, 0.1, "cpu").classes_in_play == 400
    assert bench.Case(10, 8, 400, 0.1, "cpu").classes_in_play == 10


def test_three_heads_agree(bench):
    assert bench.check_parity(bench.Case(300, 16, 8, 0.1, "cpu")) < bench.PARITY_TOLERANCE


def test_parity_sees_another_update(bench, monkeypatch):
    # The first loss is the same; only the one after the update can tell.
    monkeypatch.setattr(bench, "OPTIMIZER", bench.CenterSGD(learning_rate=0.1, momentum=0.0))
    original = bench.PlainSoftmax.__init__

    def faster(self, case, centers):
        original(self, case, centers)
        self.optimizer.param_groups[0]["lr"] = 0.11

    monkeypatch.setattr(bench.PlainSoftmax, "__init__", faster)
    with pytest.raises(RuntimeError, match=r"differ by .* in the loss of step 2"):
        bench.check_parity(bench.Case(300, 16, 8, 1.0, "cpu"))


def test_dense_partial_head_is_the_reference_on_the_classes_it_draws(bench, monkeypatch):
    case = bench.Case(200, 6, 5, 0.2, "cpu")
    centers = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    embeddings, labels = bench.draw_batch(case, 0)
    score = torch.rand(200, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: score.clone())
    head = bench.DensePartial(case, centers.clone())
    loss = head.loss(embeddings, labels)
    loss.backward()

    rows = score.index_fill(0, labels, 2.0).argsort(descending=True)[:40].sort().values
    assert set(labels.tolist()) <= set(rows.tolist())
    x, w = embeddings.detach().requires_grad_(), centers[rows].requires_grad_()
    expected, _ = reference_loss(x, torch.searchsorted(rows, labels), w, bench.MARGIN)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(embeddings.grad, x.grad)
    torch.testing.assert_close(head.weight.grad, torch.zeros(200, 6).index_copy(0, rows, w.grad))


def test_floor_computes_the_three_products(bench):
    case = bench.Case(200, 6, 5, 0.2, "cpu")
    centers = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    floor = bench.Floor(case, centers)
    embeddings, labels = bench.draw_batch(case, 0)
    floor.step(embeddings, labels)
    logits = embeddings.detach() @ centers[:40].T
    torch.testing.assert_close(floor.logits, logits)
    torch.testing.assert_close(floor.embeddings_gradient, logits @ centers[:40])
    torch.testing.assert_close(floor.centers_gradient, logits.T @ embeddings.detach())


def test_it_runs(tmp_path):
    arguments = ["--classes", "300", "--dim", "16", "--batch", "8", "--sample-rate", "0.5", "--repeats", "2"]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments, "--json", str(out)], capture_output=True, text=True, check=True
    )
    assert "ours, plain and dense agree in three losses at sample rate 1" in done.stdout
    assert "C=300 D=16 B=8 sample rate 0.5 (n=150)" in done.stdout
    record = json.loads(out.read_text())
    assert f"torch {torch.__version__}" in record["machine"]
    [case] = record["cases"]
    assert case["case"]["classes"] == 300
    assert {name: len(seconds) for name, seconds in case["seconds"].items()} == dict.fromkeys(
        ("ours", "plain", "dense", "floor"), 2
    )
    assert all(second > 0 for seconds in case["seconds"].values() for second in seconds)
    assert case["peak_bytes"].keys() == {"ours", "plain", "dense"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample-rate", "0"], "--sample-rate is 0.0, but must be in (0, 1]"),
        (["--classes", "0"], "--classes is 0, but must be at least 1"),
        (["--repeats", "0"], "--repeats is 0, but must be at least 1"),
    ],
)
def test_bad_options_are_named(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
