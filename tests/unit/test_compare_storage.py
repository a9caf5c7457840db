"""The comparison of storage formats: its measures, its table, what differs between its runs, and what it finds."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from partialfc import CenterSGD
from partialfc.margins import CosFace

TOOL = Path(__file__).parents[2] / "tools" / "compare_storage.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_storage", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tool):
    return tool.Budget(identities=40, embedding_dim=8, batch_size=4, steps=6)


def made_up(tool, name, seed, loss, angle=0.0, length=1.0):
    return tool.Result(name, seed, loss, angle, length, seconds=2.0, budget=tool.Budget())


def test_angle_and_length_are_medians_over_classes(tool):
    angle_C = torch.tensor([30.0, 170.0, 1e-5]).double().deg2rad()
    reference = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    lengths = torch.tensor([[5.0], [1.0], [6.0]])  # 5, 0.5 and 2 times as long
    centers = lengths * torch.stack([angle_C.cos(), angle_C.sin()], dim=1)
    assert tool.median_angle(centers, reference) == pytest.approx(30.0, abs=1e-9)
    assert tool.median_angle(centers[1:2], reference[1:2]) == pytest.approx(170.0, abs=1e-9)
    assert tool.median_angle(centers[2:], reference[2:]) == pytest.approx(1e-5, rel=1e-6)  # 1 - cos is 1.5e-14.
    assert tool.median_angle(-reference, reference) == pytest.approx(180.0)
    assert tool.median_length_ratio(centers, reference) == pytest.approx(2.0)


def test_final_loss_is_the_mean_of_the_last_hundred_steps(tool):
    assert tool.Trained([1000.0] * 50 + [1.0] * 50 + [4.0] * 50, torch.zeros(1, 1)).final_loss == 2.5
    assert tool.Trained([1.0, 2.0], torch.zeros(1, 1)).final_loss == 1.5


def test_rows_compare_with_float32_of_the_same_seed(tool):
    results = [
        made_up(tool, "bfloat16 nearest", 2, 9.0, angle=4.0, length=1.3),
        *(made_up(tool, "float32", seed, loss) for seed, loss in enumerate([3.0, 4.0, 5.0])),
        made_up(tool, "bfloat16 nearest", 0, 4.0, angle=1.0, length=1.1),
        made_up(tool, "bfloat16 nearest", 1, 5.0, angle=1.0, length=1.2),
    ]
    reference, nearest = tool.summarize(results)
    assert (reference.format, nearest.format) == ("float32", "bfloat16 nearest")
    assert (reference.loss, reference.loss_spread) == (4.0, 1.0)
    # Differences 1, 1 and 4: their mean is 2, their squares about it 1 + 1 + 4 over 2.
    assert (nearest.loss, nearest.difference, nearest.seed_spreads) == (6.0, 2.0, 2.0)
    assert nearest.difference_spread == pytest.approx(math.sqrt(3))
    assert nearest.loss_spread == pytest.approx(math.sqrt(7))  # 4, 5, 9: 4 + 1 + 9 over 2
    assert (nearest.angle_degrees, nearest.length_ratio) == (2.0, pytest.approx(1.2))


def test_table(tool):
    results = [made_up(tool, "float32", seed, loss) for seed, loss in enumerate([3.0, 3.5])]
    results += [made_up(tool, "float16", seed, loss, 1.234, 0.9996) for seed, loss in enumerate([3.0, 3.25])]
    lines = tool.format_table(results).splitlines()
    assert lines[0] == "| centers | loss | minus float32 | in seed spreads | angle | length |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| float32 | 3.250 +- 0.354 |  |  |  |  |"
    assert lines[3] == "| float16 | 3.125 +- 0.177 | -0.125 +- 0.177 | -0.35 | 1.23 | 1.000 |"
    assert lines[4] == ""
    assert lines[5] == (
        "Seeds 0, 1; identities 2000, embedding dim 64, batch size 32, steps 2000, learning rate 0.1, noise 0.5; 8 s."
    )
    assert len(lines) == 6


def test_one_seed_has_no_spread(tool):
    results = [made_up(tool, "float32", 0, 3.0), made_up(tool, "float16", 0, 3.5, 2.0, 1.5)]
    lines = tool.format_table(results).splitlines()
    assert lines[2:4] == ["| float32 | 3.000 |  |  |  |  |", "| float16 | 3.500 | +0.500 | - | 2.00 | 1.500 |"]


def test_table_refuses_seeds_that_have_no_partner(tool):
    results = [made_up(tool, "float32", 0, 3.0), made_up(tool, "float16", 1, 3.0)]
    with pytest.raises(ValueError, match=r"float16 has seeds \[1\], but float32 has \[0\]"):
        tool.summarize(results)


def test_batches_are_noisy_directions_and_a_function_of_the_seed(tool, tiny):
    batches = list(tool.batches(tiny, seed=3))
    assert len(batches) == tiny.steps
    again, other = next(tool.batches(tiny, seed=3)), next(tool.batches(tiny, seed=4))
    assert torch.equal(batches[0][0], again[0])
    assert torch.equal(batches[0][1], again[1])
    assert not torch.equal(batches[0][0], other[0])
    assert not torch.equal(batches[0][1], batches[1][1])

    budget = tool.Budget(identities=2, embedding_dim=256, batch_size=400, steps=1, noise=0.5)
    inputs, labels = next(tool.batches(budget, seed=0))
    assert inputs.dtype == torch.float32
    directions = torch.stack([inputs[labels == label].mean(0) for label in (0, 1)])
    # The mean over some 200 inputs leaves 0.5 / sqrt(200) of the noise.
    assert directions.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=0.05)
    assert float((inputs - directions[labels]).norm(dim=1).mean()) == pytest.approx(0.5, abs=0.02)


def test_formats_are_those_of_the_head(tool, tiny):
    for storage in tool.FORMATS.values():
        head = tool.build_head(storage, tiny, seed=5)
        assert head.class_centers.weight.dtype == storage.dtype
        assert head.class_centers.optimizer == CenterSGD(0.1, 0.9, 5e-4, storage.momentum_dtype)
        assert head.margin == CosFace(scale=64.0, margin=0.4)
        assert storage.nearest is None or storage.dtype == torch.float32
    names = {(storage.dtype, storage.momentum_dtype, storage.nearest) for storage in tool.FORMATS.values()}
    assert len(names) == len(tool.FORMATS) - 1  # The perturbed run has the format of the reference.


def test_perturbed_centers_are_a_thousandth_off(tool):
    budget = tool.Budget(identities=500)
    heads = [tool.build_head(tool.FORMATS[name], budget, 0) for name in ("float32", "float32, perturbed")]
    reference, perturbed = (head.gather_class_centers() for head in heads)
    assert float((perturbed / reference - 1).std()) == pytest.approx(1e-3, rel=0.02)


def test_nearest_rounding_loses_what_is_less_than_half_a_gap(tool):
    centers = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, -0.5])
    tool.round_to_nearest_(centers, torch.bfloat16)
    assert centers.tolist() == [1.0, 1 + 2**-7, -0.5]
    assert centers.dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("float16 nearest", torch.float16), ("bfloat16 nearest", torch.bfloat16)])
def test_nearest_runs_end_on_numbers_of_their_format(tool, tiny, name, dtype):
    centers, exact = (tool.train(tool.FORMATS[key], tiny, seed=0).centers_CD for key in (name, "float32"))
    assert torch.equal(centers.to(dtype).float(), centers)
    assert not torch.equal(exact.to(dtype).float(), exact)


def test_both_sides_train_and_the_rate_falls_to_the_end(tool, tiny, monkeypatch):
    layers, heads, rates = [], [], []
    build_layer, build_head, learning_rate_at = tool.build_layer, tool.build_head, tool.learning_rate_at
    monkeypatch.setattr(tool, "build_layer", lambda *given: layers.append(build_layer(*given)) or layers[-1])
    monkeypatch.setattr(tool, "build_head", lambda *given: heads.append(build_head(*given)) or heads[-1])
    monkeypatch.setattr(tool, "learning_rate_at", lambda *a, **k: rates.append(learning_rate_at(*a, **k)) or rates[-1])
    trained = tool.train(tool.FORMATS["float32"], tiny, seed=1)

    assert len(trained.losses) == tiny.steps
    assert rates == pytest.approx([0.1 * (1 - step / 6) ** 2 for step in range(6)])
    assert heads[0].learning_rate == rates[-1]
    assert torch.equal(trained.centers_CD, heads[0].gather_class_centers())
    assert not torch.equal(layers[0].weight, build_layer(tiny, 1).weight)
    assert not torch.equal(trained.centers_CD, build_head(tool.FORMATS["float32"], tiny, 1).gather_class_centers())


def test_command_prints_lines_and_the_table(tool, tmp_path, capsys):
    path = tmp_path / "new" / "out.jsonl"
    sizes = ["--identities", "40", "--embedding-dim", "8", "--batch-size", "4", "--steps", "6"]
    tool.main(["--only", "bfloat16", "bfloat16 nearest", "--seeds", "0", "7", "--json", str(path), *sizes])
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["format"], line["seed"]) for line in lines] == [
        (name, seed) for seed in (0, 7) for name in ("float32", "bfloat16", "bfloat16 nearest")
    ]
    assert [(line["angle_degrees"], line["length_ratio"]) for line in lines[::3]] == [(0.0, 1.0), (0.0, 1.0)]
    assert all(line["angle_degrees"] > 0 for line in lines if line["format"] != "float32")
    assert lines[0]["budget"] == {"noise": 0.5, "learning_rate": 0.1, **_sizes(sizes)}
    assert "6/6 bfloat16 nearest, seed 7: loss " in captured.err
    results = [tool.Result(**{**line, "budget": tool.Budget(**line["budget"])}) for line in lines]
    assert captured.out == tool.format_table(results) + "\n"


def _sizes(options):
    return {name[2:].replace("-", "_"): int(value) for name, value in zip(options[::2], options[1::2], strict=True)}


def test_a_loss_that_is_not_finite_ends_the_command_and_keeps_the_others(tool, monkeypatch, tmp_path):
    def train(storage, budget, seed):
        return tool.Trained([math.nan if storage.nearest else 1.0], torch.ones(2, 2))

    monkeypatch.setattr(tool, "train", train)
    path = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit, match=r"compare_storage: float16 nearest, seed 4: the loss is not finite; give a"):
        tool.main(["--seeds", "4", "--only", "float16", "float16 nearest", "--json", str(path)])
    assert [json.loads(line)["format"] for line in path.read_text().splitlines()] == ["float32", "float16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "float32"], "argument --only: invalid choice: 'float32' (choose from"),
        (["--steps", "0"], "--steps is 0, but must be a positive number"),
        (["--learning-rate", "nan"], "--learning-rate is nan, but must be a positive number"),
    ],
)
def test_bad_options_are_named(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.soak
def test_stochastic_rounding_trains_as_float32_and_rounding_to_nearest_does_not(tool):
    budget = tool.Budget(steps=1000)
    results = tool.perform(["float32", "bfloat16", "bfloat16 nearest"], [0], budget)
    exact, stochastic, nearest = tool.summarize(list(results))
    assert exact.loss < 14  # It began at 53.
    # A change of 0.1 % of the first centers moves the loss by 0.12, and another seed by 0.9.
    assert abs(stochastic.difference) < 0.4
    assert nearest.difference > 0.8
    # Decay that is not lost makes idle centers shorter by (1/3) 1000 5e-4 0.1 / (1 - 0.9), which is 15 %.
    assert stochastic.length_ratio == pytest.approx(1.0, abs=0.01)
    assert nearest.length_ratio > 1.08
