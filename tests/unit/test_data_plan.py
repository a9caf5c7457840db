"""The sampling plan: each sample once an epoch, whatever the ranks and batch sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data import RankSteps, SamplePlan, rank_slice

shard_lists = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)


@given(shard_lists, st.integers(0, 2**63), st.integers(1, 70), st.integers(1, 50), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_epoch_holds_each_sample_once(sizes, seed, lanes, window, epoch):
    total = sum(sizes)
    plan = SamplePlan(sizes, seed=seed, lanes=lanes, window=window)
    ids = plan.sample_ids(torch.arange(epoch * total, (epoch + 1) * total))
    assert sorted(ids.tolist()) == list(range(total))


@given(
    shard_lists,
    st.lists(st.tuples(st.integers(1, 8), st.integers(7, 90)), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(1, 50),
)
@settings(max_examples=40, deadline=None)
def test_ranks_and_batch_size_may_change_in_mid_epoch(sizes, phases, lanes, window):
    total, epochs = sum(sizes), 2
    seen, consumed, step = [], 0, 0
    while consumed < epochs * total:
        world_size, global_batch = phases[step // 2 % len(phases)]
        plan = SamplePlan(sizes, seed=5, lanes=lanes, window=window)
        for rank in range(world_size):
            steps = RankSteps(
                plan=plan,
                global_batch=global_batch,
                rank=rank,
                world_size=world_size,
                consumed=consumed,
                num_batches=1,
            )
            draws = steps.draws(0)
            seen += zip(draws.visits.tolist(), draws.ids.tolist(), strict=True)
        consumed += global_batch
        step += 1
    complete = [pair for pair in seen if pair[0] < epochs]
    assert sorted(complete) == [(epoch, sample) for epoch in range(epochs) for sample in range(total)]


@settings(deadline=None)
@given(st.integers(0, 10**12), st.integers(0, 5000), st.integers(1, 65))
def test_rank_slices_are_the_batch(consumed, global_batch, world_size):
    slices = [rank_slice(consumed, global_batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [part.start for part in slices] + [consumed + global_batch] == [consumed] + [part.stop for part in slices]
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_order_is_a_function_of_position_alone():
    plan = SamplePlan([100, 0, 57, 200], seed=3, lanes=8, window=16)
    positions = torch.randperm(3 * 357, generator=torch.Generator().manual_seed(0))
    at_once = plan.sample_ids(positions)
    one_by_one = [int(SamplePlan([100, 0, 57, 200], seed=3, lanes=8, window=16).sample_ids(p)) for p in positions[:50]]
    assert at_once[:50].tolist() == one_by_one
    assert plan.sample_ids(positions.numpy()).equal(at_once)
    assert plan.sample_ids(positions.view(3, 357)).equal(at_once.view(3, 357))


def test_order_is_pinned():
    # Runs that were begun with an earlier version must go on in the same order.
    plan = SamplePlan([5, 3, 4], seed=1, lanes=2, window=4)
    expected = [7, 9, 0, 8, 5, 3, 6, 4, 1, 10, 2, 11, 2, 10, 1, 9, 0, 11, 3, 5, 8, 7, 4, 6]
    assert plan.sample_ids(torch.arange(24)).tolist() == expected


def test_epochs_and_seeds_differ():
    plan = SamplePlan([500] * 4, seed=1)
    first, second = plan.sample_ids(torch.arange(4000)).view(2, 2000)
    other = SamplePlan([500] * 4, seed=2).sample_ids(torch.arange(2000))
    for a, b in ((first, second), (first, other)):
        assert int((a == b).sum()) < 20


def test_reads_of_a_lane_stay_within_a_window():
    plan = SamplePlan([100] * 100, seed=7, lanes=4, window=50)
    lane = plan.sample_ids(torch.arange(10_000))[0::4]
    for window in lane.view(-1, 50):
        assert int(window.max() - window.min()) < 50


@given(shard_lists, st.integers(1, 9), st.integers(1, 60), st.integers(0, 200), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_the_same_sequence_for_any_number_of_ranks(sizes, lanes, window, consumed, global_batch):
    plan = SamplePlan(sizes, seed=2, lanes=lanes, window=window)

    def batch(world_size):
        steps = [
            RankSteps(
                plan=plan, global_batch=global_batch, rank=r, world_size=world_size, consumed=consumed, num_batches=2
            )
            for r in range(world_size)
        ]
        return [step.positions(1) for step in steps]

    (alone,) = batch(1)
    assert sorted(alone.tolist()) == list(range(consumed + global_batch, consumed + 2 * global_batch))
    own_lanes = alone % plan.num_samples % plan.lanes
    assert own_lanes.tolist() == sorted(own_lanes.tolist())
    for world_size in (2, 3, 8):
        slices = batch(world_size)
        assert torch.cat(slices).equal(alone)
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(shard_lists, st.integers(1, 9), st.integers(1, 60), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_windows_hold_what_the_plan_draws_there(sizes, lanes, window, epoch):
    plan = SamplePlan(sizes, seed=2, lanes=lanes, window=window)
    total = plan.num_samples
    ids = plan.sample_ids(torch.arange(epoch * total, (epoch + 1) * total))
    for lane in range(plan.lanes):
        of_lane = ids[lane :: plan.lanes]
        assert plan.windows_of_lane(lane) == -(-len(of_lane) // window)
        for number in range(plan.windows_of_lane(lane)):
            ranges = plan.window_ids(epoch, number, lane)
            assert all(ranges)
            inside = [sample for part in ranges for sample in part]
            assert sorted(inside) == sorted(of_lane[number * window : (number + 1) * window].tolist())


def test_many_shards_change_places_in_runs():
    plan = SamplePlan([3] * 2000 + [0] * 50, seed=1, lanes=1, window=1)
    ids = plan.sample_ids(torch.arange(6000))
    assert sorted(ids.tolist()) == list(range(6000))
    breaks = int((ids.diff() != 1).sum())
    assert 300 < breaks < 512


def test_an_epoch_of_100_million_samples_takes_no_more_memory_than_its_shards():
    plan = SamplePlan([10_000] * 10_000, seed=0)
    positions = torch.tensor([0, 99_999_999, 100_000_000, 12_345_678_901])
    first, second = plan.draw(positions), SamplePlan([10_000] * 10_000, seed=0).draw(positions)
    assert first.ids.tolist() == second.ids.tolist()
    assert first.visits.tolist() == [0, 0, 1, 123]
    kept = [value for value in vars(plan).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in kept) < 2000


def test_identity_sorted_samples_are_mixed():
    plan = SamplePlan([10_000] * 20, seed=0)
    identities = plan.sample_ids(torch.arange(4096)) // 20
    assert len(identities.unique()) > 3000


def test_neighbours_and_fixed_points_are_as_in_a_random_order():
    counts = np.zeros(2)
    for seed in range(200):
        ids = SamplePlan([300], seed=seed, lanes=1, window=300).sample_ids(torch.arange(300))
        counts += [int((ids == torch.arange(300)).sum()), int((ids.diff() == 1).sum())]
    np.testing.assert_allclose(counts / 200, [1.0, 1.0], atol=0.25)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, "0 data shards hold 0 samples"),
        ([0, 0], {}, "needed: at least 1 sample"),
        ([3, -1], {}, "smallest shard -1"),
        ([3], {"lanes": 0}, "lanes=0"),
        ([3], {"window": 0}, "window=0"),
    ],
)
def test_impossible_plans_are_refused(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        SamplePlan(sizes, seed=0, **options)


def test_impossible_positions_are_refused():
    with pytest.raises(ValueError, match="stream position -2 is negative"):
        SamplePlan([3], seed=0).sample_ids(torch.tensor([1, -2]))
    with pytest.raises(ValueError, match=r"rank is 2, but must be in \[0, 2\)"):
        rank_slice(0, 8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="global_batch=0 must be at least 1"):
        RankSteps(plan=SamplePlan([3], seed=0), global_batch=0, rank=0, world_size=1, consumed=0, num_batches=1)
    with pytest.raises(ValueError, match=r"rank is 1, but must be in \[0, 1\)"):
        RankSteps(plan=SamplePlan([3], seed=0), global_batch=1, rank=1, world_size=1, consumed=0, num_batches=1)
    with pytest.raises(ValueError, match="consumed=-1"):
        rank_slice(-1, 8, rank=0, world_size=2)
