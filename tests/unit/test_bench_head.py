"""The benchmark of the head: its arithmetic, its baselines against the reference, and that it runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from partialfc.head import reference_loss

TOOLS = Path(__file__).parents[2] / "tools"


def _load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return _load("bench_head")


@pytest.fixture(scope="module")
def measuring() -> ModuleType:
    return _load("bench_measuring")


@pytest.fixture(scope="module")
def contestants() -> ModuleType:
    return _load("bench_contestants")


@pytest.fixture(scope="module")
def case(contestants):
    return contestants.Case(200, 6, 5, 0.2, "cpu")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


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


@pytest.fixture
def outcome(bench, contestants):
    timing = bench.Timing
    return bench.Outcome(
        contestants.Case(1000, 8, 4, 0.1, "cpu"),
        "plain",
        rounds=[
            {
                "fused": timing([0.002, 0.004, 0.004], {"forward": [0.001, 0.003, 0.003], "backward": [0.001] * 3}),
                "plain": timing([0.004, 0.006, 0.008]),
                "floor": timing([0.001, 0.001, 0.003]),
                "copy": timing([0.001, 0.002, 0.002]),
            },
            {
                "dense": timing([0.04, 0.04, 0.06]),
                "plain": timing([0.02, 0.02, 0.02]),
                "floor_bf16": timing([0.01] * 3),
            },
        ],
        peak_bytes={"fused": 2**20, "plain": 5 * 2**20, "dense": None},
        load_average=0.5,
    )


def test_table_has_a_line_for_each_contestant(outcome):
    lines = [line.split() for line in str(outcome).splitlines()]
    assert str(outcome).splitlines()[0] == "C=1,000 D=8 B=4 sample rate 0.1 (n=100), load average before 0.5"
    assert lines[2] == ["fused", "4.0", "3.0", "1.0", "0.50", "(0.50-0.67)", "0.50", "-", "1", "1049"]
    assert lines[3] == ["plain", "6.0", "-", "-", "1.00", "(1.00-1.00)", "0.25", "0.50", "5", "5243"]
    assert lines[4] == ["floor", "1.0", "-", "-", "0.25", "(0.17-0.38)", "1.00", "-", "1.92e-05", "TFLOP/s"]
    assert lines[5] == ["copy", "2.0", "-", "-", "0.25", "(0.25-0.33)", "1.00", "-", "0.0032", "GB/s"]
    assert lines[6] == ["dense", "40.0", "-", "-", "2.00", "(2.00-3.00)", "-", "0.25", "no", "room"]


def test_ratio_is_taken_within_a_round(bench, outcome):
    assert outcome.ratio("dense", "plain") == bench.Ratio(2.0, 2.0, 3.0)  # Other steps of plain would give 6.67.
    assert outcome.ratio("dense", "fused") is None


def test_record_has_every_figure(outcome):
    record = json.loads(json.dumps(outcome.record()))
    assert record["baseline"] == "plain"
    assert record["case"]["classes"] == 1000
    assert record["contestants"]["fused"] == {
        "seconds": [0.002, 0.004, 0.004],
        "phases": {"forward": [0.001, 0.003, 0.003], "backward": [0.001] * 3},
        "peak_bytes": 2**20,
        "time_over_baseline": {"middle": 0.5, "low": 0.5, "high": pytest.approx(2 / 3)},
        "share": {"floor": 0.5, "floor_bf16": None},
    }
    assert record["contestants"]["copy"]["peak_bytes"] is None


def test_a_contestant_that_ran_out_of_memory_has_its_line(bench, contestants):
    rounds = [{"plain": bench.Timing(), "floor": bench.Timing([0.001])}]
    case = contestants.Case(10, 8, 4, 1.0, "cpu")
    found = bench.Outcome(case, "floor", rounds, {"plain": None}, load_average=0.0)
    assert str(found).splitlines()[2].split() == ["plain", "no", "room", "-", "-", "-", "-", "no", "room"]
    assert found.record()["contestants"]["plain"]["time_over_baseline"] is None


def test_contestants_stay_with_the_baseline_when_apart(bench, case, monkeypatch):
    groups = []

    def fresh(function, case, *arguments, environment):
        if function is bench.measure_peak_bytes:
            return arguments[0]
        groups.append(arguments[0])
        return {name: bench.Timing([1.0]) for name in arguments[0]}

    monkeypatch.setattr(bench, "in_fresh_process", fresh)
    names = ["fused", "plain", "dense", "floor", "copy"]
    plan = {"baseline": "plain", "repeats": 1, "warmup": 0}
    outcome = bench.measure(case, names, apart=True, **plan)
    assert groups == [["plain", "floor", "copy", "fused"], ["plain", "floor", "copy", "dense"]]
    assert outcome.peak_bytes == {"fused": "fused", "plain": "plain", "dense": "dense"}
    groups.clear()
    bench.measure(case, names, apart=False, **plan)
    bench.measure(case, ["floor"], apart=True, **(plan | {"baseline": "floor"}))
    assert groups == [names, ["floor"]]


def test_classes_in_play(contestants):
    case = contestants.Case
    assert case(1000, 8, 4, 0.1, "cpu").classes_in_play == 100
    assert case(1000, 8, 4, 1.0, "cpu").classes_in_play == 1000
    # There must be room for every class of the batch.
    assert case(1000, 8, 400, 0.1, "cpu").classes_in_play == 400
    assert case(10, 8, 400, 0.1, "cpu").classes_in_play == 10


def test_steps_are_counted_after_warmup_and_in_turns(measuring, case, monkeypatch):
    made = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def step(self, embeddings, labels):
            made.append(self.name)
            if self.name == "large" and len(made) > 3:
                raise torch.OutOfMemoryError

        def phases(self):
            return {"forward": float(len(made))}

    monkeypatch.setattr(measuring, "build", lambda case, name: Fake(name))
    timings = measuring.measure_seconds(case, ["a", "b"], 2, 1)
    assert made == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 2, "b": 2}
    assert timings["a"].phases == {"forward": [4.0, 5.0]}
    made.clear()
    timings = measuring.measure_seconds(case, ["a", "large"], 3, 0)
    assert made == ["a", "large", "large", "a", "a", "large"]
    assert timings["large"] == measuring.Timing()
    assert len(timings["a"].seconds) == 3


HEADS = ["fused", "fused_bf16", "fused_16bit", "fused_adagrad", "autograd", "dense"]


def test_heads_agree(measuring, contestants, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    case = contestants.Case(1000, 128, 32, 0.1, "cpu")
    differences = measuring.check_parity(case, [*HEADS, "plain", "floor", "peer_plug:factory"])
    assert list(differences) == [*HEADS, "peer_plug:factory"]
    assert max(differences[name] for name in ("fused", "autograd", "dense")) < contestants.EXACT
    # They would not be in 16 bits if they agreed better.
    assert all(differences[name] > contestants.EXACT for name in ("fused_bf16", "fused_16bit"))


def test_parity_sees_another_update(measuring, contestants, monkeypatch):
    # The first loss is the same; only those after the update can tell.
    slower = replace(contestants.OPTIMIZER, learning_rate=0.09)
    entry = contestants.Entry(lambda case, centers: contestants.Own(case, centers, optimizer=slower))
    monkeypatch.setitem(contestants.CONTESTANTS, "fused", entry)
    case = contestants.Case(300, 16, 8, 1.0, "cpu")
    with pytest.raises(RuntimeError, match=r"fused differs from plain by .* in the loss of step [23]"):
        measuring.check_parity(case, ["fused"])
    monkeypatch.setitem(contestants.CONTESTANTS, "fused", replace(entry, compared_losses=1))
    assert measuring.check_parity(case, ["fused"])["fused"] < contestants.EXACT


def test_dense_partial_head_is_the_reference_on_the_classes_it_draws(measuring, contestants, case, monkeypatch):
    centers = normal(200, 6)
    embeddings, labels = measuring.draw_batch(case, 0)
    score = torch.rand(200, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: score.clone())
    head = contestants.DensePartial(case, centers)
    loss = head.loss(embeddings, labels)
    loss.backward()

    rows = score.index_fill(0, labels, 2.0).argsort(descending=True)[:40].sort().values
    assert set(labels.tolist()) <= set(rows.tolist())
    x, w = embeddings.detach().requires_grad_(), centers[rows].requires_grad_()
    expected, _ = reference_loss(x, torch.searchsorted(rows, labels), w, contestants.MARGIN)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(embeddings.grad, x.grad)
    torch.testing.assert_close(head.weight.grad, torch.zeros(200, 6).index_copy(0, rows, w.grad))


@pytest.mark.parametrize("chunk", [1000, 16])  # 40 classes: all at once, and two chunks and a half
def test_floor_computes_the_three_products(measuring, contestants, case, monkeypatch, chunk):
    monkeypatch.setattr(contestants, "FLOOR_CHUNK", chunk)
    centers = normal(200, 6)
    floor = contestants.Floor(case, centers)
    for number in range(2):  # Nothing of the first step may be left in the second.
        embeddings, labels = measuring.draw_batch(case, number)
        floor.step(embeddings, labels)
        logits = embeddings.detach() @ centers[:40].T
        torch.testing.assert_close(floor.embeddings_gradient_BD, logits @ centers[:40])
        torch.testing.assert_close(floor.centers_gradient_nD, logits.T @ embeddings.detach())


def test_floor_in_bfloat16_and_copy(measuring, contestants, case):
    centers, batch = normal(200, 6), measuring.draw_batch(case, 0)
    floor = contestants.entry_of("floor_bf16").make(case, centers)
    floor.step(*batch)
    assert floor.centers_gradient_nD.dtype == torch.bfloat16
    exact = batch[0].detach() @ centers[:40].T @ centers[:40]
    torch.testing.assert_close(floor.embeddings_gradient_BD.float(), exact, rtol=0.05, atol=0.3)
    copy = contestants.build(case, "copy", centers)
    copy.step(*batch)
    assert torch.equal(copy.target_nD, centers[:40])


def test_phases_add_up_to_the_step(measuring, contestants, case):
    for name in ("fused", "plain"):
        head = contestants.build(case, name)
        seconds, phases = measuring._timed_step(case, head, 0)
        assert list(phases) == ["forward", "backward"]
        assert all(part > 0 for part in phases.values())
        assert sum(phases.values()) <= seconds


def test_external_head_is_given_its_configuration(measuring, contestants, case, monkeypatch):
    given = []

    class Plug:
        def step(self, embeddings, labels):
            return 1.5

    def factory(config):
        given.append(config)
        return Plug()

    monkeypatch.setitem(sys.modules, "elsewhere", SimpleNamespace(factory=factory))
    head = contestants.build(case, "elsewhere:factory")
    assert float(head.step(*measuring.draw_batch(case, 0))) == 1.5
    assert head.phases() == {}
    [config] = given
    assert (config.num_classes, config.embedding_size, config.batch_per_rank, config.sample_rate) == (200, 6, 5, 0.2)
    assert (config.class_start, config.num_local, config.world_size) == (0, 200, 1)
    assert (config.scale, config.margin, config.lr, config.momentum) == (64.0, (1.0, 0.5, 0.0), 0.1, 0.9)
    # It cannot be given class centers, so there is nothing to compare.
    assert measuring.check_parity(case, ["elsewhere:factory"]) == {}


def test_it_runs():
    arguments = ["--classes", "300", "--dim", "16", "--batch", "8", "--sample-rate", "0.5", "--repeats", "2"]
    done = subprocess.run(
        [sys.executable, str(TOOLS / "bench_head.py"), *arguments, "--contestants", "fused"],
        capture_output=True,
        text=True,
        check=True,
    )
    about, parity, _, title, header, *lines = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in about
    assert parity.startswith("largest difference from the losses of plain at sample rate 1: fused ")
    assert title.startswith("C=300 D=16 B=8 sample rate 0.5 (n=150)")
    assert header.split()[:3] == ["ms/step", "forward", "backward"]
    assert [line.split()[0] for line in lines] == ["fused", "floor"]


def test_cases_are_appended_to_the_file(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "in_fresh_process", lambda function, *arguments, environment: function(*arguments))
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = tmp_path / "out.jsonl"
    out.write_text("{}\n")
    arguments = ["--classes", "300", "--dim", "16", "--batch", "8", "--sample-rate", "0.5", "1", "--repeats", "2"]
    names = ["fused", "dense", "floor_bf16"]
    bench.main([*arguments, "--contestants", *names, "--json", str(out)])
    before, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert before == {}
    assert [record["case"]["sample_rate"] for record in records] == [0.5, 1.0]
    for record in records:
        assert f"torch {torch.__version__}" in record["machine"]
        assert list(record["contestants"]) == [*names, "floor"]
        assert all(len(entry["seconds"]) == 2 for entry in record["contestants"].values())
        assert all(second > 0 for entry in record["contestants"].values() for second in entry["seconds"])
        assert list(record["contestants"]["fused"]["phases"]) == ["forward", "backward"]
        assert record["contestants"]["floor"]["share"]["floor"] == 1.0
        assert record["contestants"]["dense"]["peak_bytes"] >= 0
        assert record["parity"].keys() == {"fused", "dense"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample-rate", "0"], "--sample-rate is 0.0, but must be in (0, 1]"),
        (["--classes", "0"], "--classes is 0, but must be at least 1"),
        (["--repeats", "0"], "--repeats is 0, but must be at least 1"),
        (["--warmup", "-1"], "--warmup is -1, but must not be negative"),
        (["--contestants", "fast"], "contestant 'fast' is unknown; there are fused, fused_bf16,"),
        (["--baseline", "slow"], "contestant 'slow' is unknown; there are fused, fused_bf16,"),
        (["--external", "elsewhere"], "--external is elsewhere, but must be module:factory"),
    ],
)
def test_bad_options_are_named(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
