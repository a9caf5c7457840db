"""The measurement of mixing: what it counts, and what it prints for a small set."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from partialfc.data.plan import RankSteps, SamplePlan

TOOL = Path(__file__).parents[2] / "tools" / "mixing_quality.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("mixing_quality", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_distinct_identities_are_counted_by_batch(tool):
    counts = tool.count_distinct(torch.tensor([[3, 1, 3, 1], [0, 5, 2, 9], [7, 7, 7, 7]]))
    assert (counts.fewest, counts.mean) == (1, pytest.approx(7 / 3))
    assert str(tool.Counts(3990, 4017.25)) == "3,990 / 4,017.2"


def test_slices_are_those_that_ranks_get(tool):
    plan = SamplePlan(tool.shards_of(25_000), seed=0, lanes=16, window=500)
    identities = tool.batches(plan, by_lane=True)
    assert identities.shape == (6, 4096)
    rank_5 = RankSteps(plan=plan, global_batch=4096, rank=5, world_size=8, consumed=0, num_batches=6)
    for step in range(6):
        assert identities[step].view(8, 512)[5].equal(rank_5.draws(step).ids // 20)
    unsorted = tool.batches(plan, by_lane=False)
    assert unsorted[3].equal(plan.draw(torch.arange(3 * 4096, 4 * 4096)).ids // 20)


def test_the_last_data_shard_may_be_short(tool):
    assert tool.shards_of(25_000) == [10_000, 10_000, 5000]
    assert tool.shards_of(20_000) == [10_000, 10_000]


def test_both_tables_are_printed(tool, capsys):
    tool.main(["--images", "100000", "--timed-images", "200000"])
    mixing, timing = capsys.readouterr().out.split("Goals for 2,000,000 images: at least 470 and 3,800.")
    assert mixing.startswith("100,000 images, 20 of each identity, sorted by identity:\n\n| lanes |")
    rows = {tuple(cells(line)[:3]): cells(line)[3:] for line in mixing.splitlines()[4:] if line}
    assert len(rows) == 13
    in_ranks, in_all = (
        [float(number.replace(",", "")) for number in cell.split(" / ")]
        for cell in rows["1", "all (full shuffle)", "consecutive"]
    )
    # Of 5,000 identities, 512 of 100,000 images leave out (1 - 512 / 100,000)^20 of them, near enough.
    assert in_ranks[1] == pytest.approx(5000 * (1 - (1 - 0.00512) ** 20), rel=0.01)
    assert in_all[1] == pytest.approx(5000 * (1 - (1 - 0.04096) ** 20), rel=0.01)
    assert in_ranks[0] <= in_ranks[1]
    # How the global batch is cut changes nothing of it.
    assert rows["64", "65,536 (default)", "by lane"][1] == rows["64", "65,536 (default)", "consecutive"][1]
    names = [cells(line)[0] for line in timing.splitlines() if line]
    expected = ["200,000 images", "---", "one position", "one position, first of its epoch", "a batch of 512"]
    assert names == expected


def test_a_set_below_one_batch_is_refused(tool, capsys):
    for option in ("--images", "--timed-images"):
        with pytest.raises(SystemExit):
            tool.main([option, "4095"])
        assert f"{option} is 4095, but must be at least a global batch, 4096" in capsys.readouterr().err
