"""The comparison of the losses: its table, what it trains, and how it goes on. Nothing is trained here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from partialfc.head import PartialFC
from partialfc.margins import MARGINS, CenterLoss
from partialfc.train import DivergedError

TOOL = Path(__file__).parents[2] / "tools" / "compare_losses.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_losses", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def made_up(tool, entry, seed, rate, accuracy, tar, **changes):
    run, budget = tool.Run(entry, seed, rate), changes.pop("budget", tool.Budget())
    known = {"settings": tool.describe(entry), "settings_hash": tool.settings_hash(run, budget), **changes}
    return tool.Result(entry, seed, rate, accuracy, tar, loss=1.5, seconds=30.0, budget=budget, **known)


def line(result):
    return json.dumps(dataclasses.asdict(result)) + "\n"


def configured(tool, entry, **changes):
    run = tool.Run(entry, 3, 0.1)
    budget = dataclasses.replace(tool.Budget(), **changes)
    return tool.build_config(run, budget, data=Path("data"), directory=Path("run"))


def test_table_has_means_and_sample_deviations(tool):
    results = [
        made_up(tool, "CosFace", 0, 0.1, 0.6, 0.02),
        made_up(tool, "ArcFace", 0, 1.0, 0.75, 0.1),
        made_up(tool, "CosFace", 0, 1.0, 0.7, 0.1),
        made_up(tool, "CosFace", 1, 1.0, 0.8, 0.1),
        made_up(tool, "CosFace", 2, 1.0, 0.9, 0.4),
    ]
    lines = tool.format_table(results).splitlines()
    assert lines[0] == (
        "| loss | accuracy, rate 1 | TAR@FAR=0.001, rate 1 | accuracy, rate 0.1 | TAR@FAR=0.001, rate 0.1 | settings |"
    )
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | --- |"
    # 0.7, 0.8, 0.9: squares 0.01 + 0 + 0.01 over 2. 0.1, 0.1, 0.4: 0.01 + 0.01 + 0.04 over 2, whose root is 0.1732.
    assert (
        lines[2]
        == "| CosFace | 0.800 +- 0.100 | 0.200 +- 0.173 | 0.600 | 0.020 | `margin: {name: CosFace, scale: 24.0}` |"
    )
    assert lines[3] == "| ArcFace | 0.750 | 0.100 | - | - | `margin: {name: ArcFace, scale: 24.0}` |"
    assert lines[4] == ""
    assert lines[5].startswith("Mean +- standard deviation over seeds 0, 1, 2. Budget: identities 1000, ")
    assert len(lines) == 6


def test_table_counts_what_diverged(tool):
    results = [made_up(tool, "ArcFace", seed, 1.0, *figures) for seed, figures in enumerate([(0.7, 0.1), (None, None)])]
    assert "| ArcFace | 0.700 (1 of 2 diverged) | 0.100 (1 of 2 diverged) |" in tool.format_table(results)
    assert "| ArcFace | - (1 of 1 diverged) | - (1 of 1 diverged) |" in tool.format_table(results[1:])


def test_table_refuses_mixed_budgets_and_nothing(tool):
    results = [
        made_up(tool, "ArcFace", seed, 1.0, 0.7, 0.1, budget=tool.Budget(images=images))
        for seed, images in enumerate([100, 200])
    ]
    with pytest.raises(ValueError, match="results of one budget, but there are 2"):
        tool.format_table(results)
    with pytest.raises(ValueError, match="results of one budget, but there are 0"):
        tool.format_table([])


def test_every_loss_has_an_entry_that_says_its_settings(tool):
    assert {head["margin"]["name"] for head in tool.ENTRIES.values()} == set(MARGINS)
    assert tool.describe("Softmax") == "margin: {name: Softmax}"
    assert tool.describe("CosFace + CenterLoss") == (
        "margin: {name: CosFace, scale: 24.0}, auxiliaries: [{name: CenterLoss, weight: 0.003}]"
    )


def test_entries_build(tool):
    for entry in tool.ENTRIES:
        head = configured(tool, entry).head
        assert type(head.margin).__name__ == tool.ENTRIES[entry]["margin"]["name"]
        PartialFC(
            50,
            8,
            margin=head.margin,
            sample_rate=head.sample_rate,
            num_subcenters=head.num_subcenters,
            variational=head.variational,
            auxiliaries=head.auxiliaries,
        )
    assert configured(tool, "Sub-center ArcFace").head.num_subcenters == 3
    assert configured(tool, "CosFace + CenterLoss").head.auxiliaries == (CenterLoss(weight=0.003),)
    assert configured(tool, "ArcFace, variational").head.variational.start_step == 100


def test_budget_and_run_become_the_configuration(tool):
    config = configured(tool, "CosFace", images=4000, identities=100, images_per_identity=10, learning_rate=0.3)
    assert (config.run.seed, config.head.sample_rate, config.evaluation.far) == (3, 0.1, 1e-3)
    assert (config.training.epochs, config.optimizer.learning_rate, config.head.optimizer.learning_rate) == (
        4,
        0.3,
        0.3,
    )
    assert not config.evaluation.at_start
    untrained = configured(tool, tool.UNTRAINED)
    assert untrained.evaluation.at_start
    assert untrained.training.epochs * 1000 * 20 == pytest.approx(64)  # One step.


def test_hash_tells_settings_apart_but_not_seeds(tool):
    def hashed(entry="ArcFace", seed=0, rate=1.0, **changes):
        return tool.settings_hash(tool.Run(entry, seed, rate), tool.Budget(**changes))

    assert hashed() == hashed(seed=1)
    others = [hashed("CosFace"), hashed("Sub-center ArcFace"), hashed(rate=0.1), hashed(images=1), hashed(identities=9)]
    assert len({hashed(), *others}) == 6


def test_results_come_back_from_the_file(tool, tmp_path):
    path = tmp_path / "out.jsonl"
    results = [made_up(tool, "ArcFace", 0, 1.0, 0.7, 0.1), made_up(tool, "ArcFace", 1, 0.1, None, None)]
    path.write_text("".join(map(line, results)))
    assert tool.read_results(path) == results
    first = json.loads(path.read_text().splitlines()[0])
    assert {"entry": "ArcFace", "seed": 0, "sample_rate": 1.0, "accuracy": 0.7, "tar": 0.1}.items() <= first.items()


def test_torn_last_line_is_cut_off_and_others_are_refused(tool, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    whole = line(made_up(tool, "ArcFace", 0, 1.0, 0.7, 0.1))
    path.write_text(whole + whole[:30])
    assert len(tool.read_results(path)) == 1  # Reading alone, perhaps while it is written, leaves the file as it is.
    assert path.read_text() == whole + whole[:30]
    assert len(tool.read_results(path, repair=True)) == 1
    assert "the last line is not finished and is left out" in capsys.readouterr().err
    assert path.read_text() == whole

    path.write_text(whole + "{}\n")
    with pytest.raises(ValueError, match=r"out.jsonl, line 2, is no result of this command"):
        tool.read_results(path)
    path.write_text(whole + whole)
    with pytest.raises(ValueError, match=r"line 2: ArcFace, seed 0, sample rate 1 is there already"):
        tool.read_results(path)


def test_done_runs_are_skipped(tool):
    wanted = [tool.Run("ArcFace", seed, 1.0) for seed in range(3)]
    done = [made_up(tool, "ArcFace", 1, 1.0, 0.7, 0.1), made_up(tool, "CosFace", 0, 1.0, 0.7, 0.1)]
    assert tool.missing_runs(wanted, done, tool.Budget(), Path("x")) == [wanted[0], wanted[2]]


def test_other_settings_are_refused(tool):
    wanted, done = [tool.Run("ArcFace", 0, 1.0)], [made_up(tool, "ArcFace", 0, 1.0, 0.7, 0.1)]
    message = (
        r"out.jsonl has ArcFace, seed 0, sample rate 1, made with other settings \(images 32000, now 7; hash \w+\)"
    )
    with pytest.raises(ValueError, match=message):
        tool.missing_runs(wanted, done, tool.Budget(images=7), Path("out.jsonl"))
    # Even of another row: a table of two budgets compares nothing.
    with pytest.raises(ValueError, match="images 32000, now 7"):
        tool.missing_runs([tool.Run("CosFace", 0, 1.0)], done, tool.Budget(images=7), Path("out.jsonl"))

    done = [dataclasses.replace(done[0], settings="margin: {name: Old}", settings_hash="old")]
    with pytest.raises(
        ValueError, match=r"\(margin: {name: Old}, now margin: {name: ArcFace, scale: 24.0}, or other .*; hash old\)"
    ):
        tool.missing_runs(wanted, done, tool.Budget(), Path("out.jsonl"))


def pretend(tool, monkeypatch, outcome):
    """Has `outcome(config)` instead of a training, and no data made."""
    monkeypatch.setattr(tool, "train", outcome)
    monkeypatch.setattr(tool, "prepare_data", lambda budget, folder: folder)
    monkeypatch.setattr(tool, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))


def verified(accuracy, tar):
    return SimpleNamespace(result=SimpleNamespace(accuracy=accuracy, tar_at_far={1e-3: tar}))


def test_command_trains_what_is_missing_and_prints_the_table(tool, monkeypatch, tmp_path, capsys):
    trained = []

    def outcome(config):
        trained.append((type(config.head.margin).__name__, config.run.seed))
        if config.run.seed == 9:
            raise DivergedError("too high")
        (config.run.directory / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "other": 1}\n'
        )
        found = {"trained": verified(0.8 + 0.1 * config.run.seed, 0.5)}
        if config.evaluation.at_start:
            found["untrained"] = verified(0.5, 0.001)
        return SimpleNamespace(verifications=found)

    pretend(tool, monkeypatch, outcome)
    out = tmp_path / "new" / "out.jsonl"
    options = ["--out", str(out), "--rates", "1", "--only", "CosFace"]
    tool.main([*options, "--seeds", "0"])
    tool.main([*options, tool.UNTRAINED, "ArcFace", "--seeds", "0", "1", "9"])
    assert trained[0] == ("CosFace", 0)
    assert len(trained) == len(set(trained)) + 3 == 9  # The untrained network has the margin of CosFace.
    captured = capsys.readouterr()
    assert "1 of 9 runs are done" in captured.err
    assert "8/8 ArcFace, seed 9, sample rate 1: diverged" in captured.err
    assert "| CosFace | 0.850 +- 0.071 (1 of 3 diverged) | 0.500 +- 0.000 (1 of 3 diverged) |" in captured.out
    assert "| (untrained) | 0.500 +- 0.000 (1 of 3 diverged) |" in captured.out
    losses = {(result.entry, result.seed): result.loss for result in tool.read_results(out)}
    assert losses["CosFace", 1] == 2.0
    assert losses[tool.UNTRAINED, 0] is None
    assert "diverged: too high" in out.with_suffix(".log").read_text()

    tool.main(["--table", str(out)])
    assert capsys.readouterr().out == captured.out[captured.out.rindex("| loss |") :]


def test_a_failed_run_ends_the_command_and_keeps_the_others(tool, monkeypatch, tmp_path):
    def outcome(config):
        if config.run.seed:
            raise ValueError("no such data")
        (config.run.directory / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
        return SimpleNamespace(verifications={"trained": verified(0.8, 0.5)})

    pretend(tool, monkeypatch, outcome)
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit, match="compare_losses: no such data"):
        tool.main(["--out", str(out), "--only", "CosFace", "--rates", "1", "--seeds", "0", "1"])
    assert [result.seed for result in tool.read_results(out)] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ArcFac"], "argument --only: invalid choice: 'ArcFac' (choose from"),
        (["--workers", "0"], "--workers is 0, but must be at least 1"),
        (["--rates", "2"], "head.sample_rate"),
        (["--identities", "0"], "--identities is 0, but must be positive"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0, but must be positive"),
    ],
)
def test_bad_options_are_named(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.main(["--out", "out.jsonl", *arguments])
    assert message in capsys.readouterr().err
