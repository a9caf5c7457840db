"""Plans by identity, by weight, with repeats and of several sources: exact counts, as pure functions of a position."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.identity_plan import IdentityPlan
from partialfc.data.mixed_plan import MixedPlan
from partialfc.data.plan import RankSteps, SamplePlan
from partialfc.data.weighted_plan import RepeatPlan, WeightedPlan

REPEAT = 2**40
class_sizes = st.lists(st.integers(1, 13), min_size=1, max_size=12)
seeds = st.integers(0, 2**63)
# So that the sums of weights are exact: they differ by less than 2^30.
plain_weights = st.lists(st.one_of(st.just(0.0), st.floats(2**-10, 2**20, width=32)), min_size=1, max_size=60).filter(
    any
)


def labelled(sizes, shuffle_seed=0):
    """(labels, label_starts, by_label) of samples in random order, `sizes` of each label."""
    labels = np.random.default_rng(shuffle_seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return labels, starts, np.argsort(labels, kind="stable").astype(np.uint32)


def identity_plan(sizes, *, seed=0, k=1, p=1):
    _, starts, by_label = labelled(sizes)
    return IdentityPlan(starts, by_label, seed=seed, images_per_identity=k, identities_per_batch=p)


def repeat_plan(sizes, *, at_least, seed=0, lanes=4, window=8):
    labels, starts, _ = labelled(sizes)
    return RepeatPlan(labels, starts, at_least=at_least, seed=seed, lanes=lanes, window=window)


def weighted_plan(weights, *, seed=0, lanes=4, window=8):
    return WeightedPlan(np.array(weights, dtype=np.float32), seed=seed, lanes=lanes, window=window)


def mixed_plan(*, seed=0):
    plans = [SamplePlan([50, 30], seed=1, lanes=4, window=8), repeat_plan([3, 1, 9], at_least=4, seed=2)]
    plans.append(identity_plan([4, 2, 7], k=2, p=3, seed=3))
    return MixedPlan(plans, [0.5, 0.2, 0.3], seed=seed, first_ids=[0, 80, 93])


PLANS = {
    "identity": lambda: identity_plan([3, 1, 8, 5, 2], k=2, p=3),
    "balanced": lambda: identity_plan([3, 1, 8, 5, 2]),
    "weighted": lambda: weighted_plan([3.0, 0.0, 0.5, 1.0, 1.0, 0.25, 7.0] * 5),
    "repeat": lambda: repeat_plan([3, 1, 8, 5, 2], at_least=4),
    "mixed": mixed_plan,
}


# All of them.


@pytest.mark.parametrize("name", PLANS)
def test_a_draw_depends_on_its_position_alone(name):
    plan = PLANS[name]()
    positions = torch.randperm(600, generator=torch.Generator().manual_seed(0)) * 7
    at_once = plan.draw(positions)
    assert at_once.ids.dtype == at_once.visits.dtype == torch.int64
    one_by_one = [PLANS[name]().draw(position) for position in positions[:20]]
    assert at_once.ids[:20].tolist() == [int(draw.ids) for draw in one_by_one]
    assert at_once.visits[:20].tolist() == [int(draw.visits) for draw in one_by_one]
    for given_positions in (positions.view(20, 30), positions.flip(0).view(20, 30)):
        again = plan.draw(given_positions)
        assert again.ids.shape == again.visits.shape == (20, 30)
        expected = plan.draw(given_positions.flatten())
        assert again.ids.flatten().equal(expected.ids)
        assert again.visits.flatten().equal(expected.visits)
    assert plan.draw(positions.flip(0)).ids.flip(0).equal(at_once.ids)
    assert [len(part) for part in plan.draw(torch.zeros(0, dtype=torch.int64))] == [0, 0]


@pytest.mark.parametrize("name", PLANS)
@given(phases=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 90)), min_size=1, max_size=5))
@settings(max_examples=4, deadline=None)
def test_ranks_and_batch_size_may_change_anywhere(name, phases):
    plan = PLANS[name]()
    seen, consumed = {}, 0
    for number in range(8):
        world_size, global_batch = phases[number % len(phases)]
        for rank in range(world_size):
            steps = RankSteps(
                plan=plan, global_batch=global_batch, rank=rank, world_size=world_size, consumed=consumed, num_batches=2
            )
            for step in range(2):
                draws = steps.draws(step)
                values = zip(draws.ids.tolist(), draws.visits.tolist(), strict=True)
                new = dict(zip(steps.positions(step).tolist(), values, strict=True))
                assert not seen.keys() & new.keys()
                seen |= new
        consumed += 2 * global_batch
    unbroken = PLANS[name]().draw(torch.arange(consumed))
    expected = zip(unbroken.ids.tolist(), unbroken.visits.tolist(), strict=True)
    assert [seen[position] for position in range(consumed)] == list(expected)


@pytest.mark.parametrize("name", PLANS)
def test_no_sample_comes_twice_with_the_same_visit(name):
    plan = PLANS[name]()
    draws = plan.draw(torch.arange(9000))
    assert len(set(zip(draws.ids.tolist(), draws.visits.tolist(), strict=True))) == 9000


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_can_be_sent_to_another_process(name):
    plan, positions = PLANS[name](), torch.arange(3000, 3100)
    assert pickle.loads(pickle.dumps(plan)).draw(positions).ids.equal(plan.draw(positions).ids)


@pytest.mark.parametrize("name", PLANS)
def test_negative_positions_are_refused(name):
    with pytest.raises(ValueError, match=r"Plan: stream position -2 is negative$"):
        PLANS[name]().draw(torch.tensor([1, -2]))


# Runs that were begun with an earlier version must go on in the same order.
PINNED = {
    "identity": ([2, 2, 17, 0, 7, 10, 3, 11, 15, 5, 2, 2], [200, 201, 66, 67, 100, 100, 40, 40, 40, 40, 202, 203]),
    "balanced": ([6, 2, 7, 0, 11, 12, 2, 10, 0, 5, 2, 4], [25, 200, 100, 66, 40, 25, 201, 100, 67, 40, 202, 67]),
    "weighted": (
        [6, 13, 27, 34, 6, 13, 20, 30, 2, 13, 27, 34],
        [
            28,
            28,
            28 + REPEAT,
            28 + 3 * REPEAT,
            28 + 3 * REPEAT,
            28 + REPEAT,
            28 + 2 * REPEAT,
            28,
            28,
            28 + 2 * REPEAT,
            28,
            28 + 2 * REPEAT,
        ],
    ),
    "repeat": (
        [7, 10, 17, 2, 4, 9, 15, 0, 5, 12, 18, 2],
        [37 + REPEAT, 37 + REPEAT, 37, 37 + REPEAT, 37 + REPEAT, 37, 37, 37, 37, 37, 37, 37],
    ),
    "mixed": ([43, 62, 7, 94, 100, 24, 96, 97, 47, 63, 10, 35], [6, 6, 6, 24, 24, 6, 49, 49, 6, 6, 6, 6]),
}


@pytest.mark.parametrize("name", PLANS)
def test_order_is_pinned(name):
    ids, visits = PLANS[name]().draw(torch.arange(1000, 1012))
    assert (ids.tolist(), visits.tolist()) == PINNED[name]


@pytest.mark.parametrize("name", PLANS)
def test_seeds_differ(name):
    make = {
        "identity": lambda seed: identity_plan([5] * 40, k=2, p=3, seed=seed),
        "balanced": lambda seed: identity_plan([5] * 40, seed=seed),
        "weighted": lambda seed: weighted_plan(np.linspace(1, 2, 200), seed=seed, window=64),
        "repeat": lambda seed: repeat_plan([5] * 40, at_least=8, seed=seed, window=64),
        "mixed": lambda seed: mixed_plan(seed=seed),
    }[name]
    first, second = (make(seed).draw(torch.arange(400)).ids for seed in (1, 2))
    assert int((first == second).sum()) < 40


# By identity.


@given(class_sizes, seeds, st.integers(1, 5), st.data())
@settings(max_examples=25, deadline=None)
def test_batches_hold_different_identities_and_all_come_equally_often(sizes, seed, k, data):
    p = data.draw(st.integers(1, len(sizes)))
    labels = torch.from_numpy(labelled(sizes)[0])
    groups_of_cycle = len(sizes) // p * p
    cycles = 2 * len(sizes) + 1
    ids = identity_plan(sizes, seed=seed, k=k, p=p).draw(torch.arange(cycles * groups_of_cycle * k)).ids
    groups = labels[ids].view(-1, k)
    assert bool((groups == groups[:, :1]).all())
    for batch in groups[:, 0].view(-1, p).tolist():
        assert len(set(batch)) == p
    turns = torch.zeros(len(sizes), dtype=torch.int64)
    for cycle in groups[:, 0].view(cycles, -1):
        assert len(cycle.unique()) == groups_of_cycle
        turns += cycle.bincount(minlength=len(sizes))
        assert int(turns.max() - turns.min()) <= 1


@given(class_sizes, seeds, st.integers(1, 16), st.data())
@settings(max_examples=25, deadline=None)
def test_an_identity_hands_out_its_images_pass_by_pass(sizes, seed, k, data):
    p = data.draw(st.integers(1, len(sizes)))
    labels = labelled(sizes)[0]
    draws = identity_plan(sizes, seed=seed, k=k, p=p).draw(torch.arange(20 * len(sizes) * k))
    ids, visits = draws.ids.numpy(), draws.visits.numpy()
    for label, size in enumerate(sizes):
        own = labels[ids] == label
        own_ids, own_visits = ids[own], visits[own]
        assert own_visits.tolist() == [number // size for number in range(len(own_ids))]
        everything = np.flatnonzero(labels == label)
        for images in own_ids[: len(own_ids) // size * size].reshape(-1, size):
            np.testing.assert_array_equal(np.sort(images), everything)
        for group in own_ids.reshape(-1, k):
            assert len(set(group)) == min(k, size)


def test_class_balanced_sampling_shows_each_identity_once_in_a_cycle():
    sizes = [1, 100, 3, 17, 2, 60, 9]
    plan = identity_plan(sizes)
    assert (plan.num_samples, plan.lanes) == (192, 1)
    cycles = torch.from_numpy(labelled(sizes)[0])[plan.draw(torch.arange(700)).ids].view(-1, 7)
    assert bool((cycles.sort(1).values == torch.arange(7)).all())
    assert len({tuple(cycle) for cycle in cycles.tolist()}) > 90


@pytest.mark.parametrize("size", [2, 3, 5, 7, 13, 20, 37])
def test_every_pair_of_images_begins_a_pass_equally_often(size):
    passes = 20_000
    plan = IdentityPlan(np.array([0, size]), np.arange(size), seed=4)
    first, second = plan.draw((torch.arange(passes) * size)[:, None] + torch.arange(2)).ids.T
    pairs = (first * (size - 1) + second - (second > first).long()).bincount(minlength=size * (size - 1))
    expected = passes / len(pairs)
    deviation = float(((pairs - expected) ** 2 / expected).sum() - (len(pairs) - 1)) / (2 * (len(pairs) - 1)) ** 0.5
    assert abs(deviation) < 4


def test_orders_change_between_passes_and_identities():
    plan = identity_plan([50] * 2, k=5, p=2)
    ids = plan.draw(torch.arange(400)).ids.view(-1, 2, 5)
    labels, starts, by_label = labelled([50] * 2)
    place = torch.from_numpy(np.argsort(by_label) - starts[labels])
    streams = [place[ids[torch.from_numpy(labels)[ids] == label]] for label in (0, 1)]
    for first, second in [(streams[0][:50], streams[0][50:100]), (streams[0][:50], streams[1][:50])]:
        assert int((first == second).sum()) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 4}, "identities_per_batch is 4, but there are 3 identities, and those of a batch must differ; lower it"),
        ({"p": 0}, "images_per_identity=1 and identities_per_batch=0, but both must be at least 1"),
        ({"k": 0}, "images_per_identity=0 and identities_per_batch=1, but both must be at least 1"),
    ],
)
def test_impossible_identity_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^IdentityPlan: {message}$"):
        identity_plan([2, 2, 2], **options)


def test_an_identity_without_samples_is_refused():
    with pytest.raises(ValueError, match=r"^IdentityPlan: label 1 has no sample$"):
        IdentityPlan(np.array([0, 2, 2, 3]), np.arange(3), seed=0).draw(torch.arange(9))


# By weight.


def counts_of_epoch(plan, epoch, samples):
    """How often each sample comes in an epoch, after checks of its visits."""
    ids, visits = plan.draw(torch.arange(epoch * plan.num_samples, (epoch + 1) * plan.num_samples))
    assert set((visits % REPEAT).tolist()) == {epoch}
    counts = ids.bincount(minlength=samples)
    assert len(counts) == samples
    # The repeats of a sample in an epoch are numbered from 0.
    assert Counter(zip(ids.tolist(), (visits // REPEAT).tolist(), strict=True)) == Counter(
        (sample, repeat) for sample, count in enumerate(counts.tolist()) for repeat in range(count)
    )
    return counts.tolist()


@given(plain_weights, seeds, st.integers(1, 70), st.integers(1, 50), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_samples_come_as_often_as_their_weights_say_in_every_epoch(weights, seed, lanes, window, epoch):
    plan = weighted_plan(weights, seed=seed, lanes=lanes, window=window)
    assert plan.num_samples == len(weights)
    total = sum(map(Fraction, weights))
    for weight, count in zip(weights, counts_of_epoch(plan, epoch, len(weights)), strict=True):
        exact = len(weights) * Fraction(weight) / total
        assert count in (exact.__floor__(), exact.__ceil__())


def test_counts_are_exact_in_a_larger_set():
    weights = np.random.default_rng(0).exponential(size=100_003).astype(np.float32)
    weights[5000:5400] = 0.0
    weights[77] = 1000.0
    plan = WeightedPlan(weights, seed=1)
    assert plan.lanes == 64
    total = sum(Fraction(float(weight)) for weight in weights)
    counts = np.zeros(len(weights), dtype=np.int64)
    for positions in torch.arange(len(weights)).split(4096):
        np.add.at(counts, plan.draw(positions).ids.numpy(), 1)
    for weight, count in zip(weights.tolist(), counts.tolist(), strict=True):
        assert -1 < count - len(weights) * Fraction(weight) / total < 1
    assert counts[5000:5400].sum() == 0


@given(st.lists(st.floats(0, 2**127, width=32), min_size=1, max_size=30).filter(any), seeds)
@settings(max_examples=25, deadline=None)
def test_weights_of_any_size_are_taken(weights, seed):
    counts = counts_of_epoch(weighted_plan(weights, seed=seed), 3, len(weights))
    total = sum(map(Fraction, weights))
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - len(weights) * Fraction(weight) / total) < 1 + Fraction(1, 10**9)


def test_a_single_sample_may_take_all():
    counts = counts_of_epoch(weighted_plan([1e-30] * 2000 + [1e30] + [0.0] * 999, lanes=16, window=64), 2, 3000)
    assert counts[2000] == 3000


def test_repeats_are_numbered_exactly_at_the_edges_of_64_bits():
    plan = weighted_plan(np.random.default_rng(0).exponential(size=3001))
    slots, total = plan.num_samples, plan._total
    assert total > 2**56
    cases = []
    for repeat in range(1, slots, 7):
        for rest in (0, 1, slots // 2, slots - 1):
            first = -((rest - repeat * total) // slots)  # The least distance that makes `repeat` whole steps.
            cases += [(first, rest, repeat), (first - 1, rest, repeat - 1)]
    distances, rests, repeats = torch.tensor(cases).T
    assert plan._whole_steps(distances, rests).equal(repeats)


def test_the_mean_over_epochs_is_proportional_to_the_weights():
    weights, epochs = np.array([0.1, 1.0, 2.0, 0.0, 0.7, 1.6, 0.3]), 600
    ids = weighted_plan(weights).draw(torch.arange(7 * epochs)).ids
    means = ids.bincount(minlength=7).numpy() / epochs
    np.testing.assert_allclose(means, 7 * weights / weights.sum(), atol=4 * 0.5 / epochs**0.5)


def test_equal_weights_give_each_sample_once():
    assert counts_of_epoch(weighted_plan([0.3] * 1000, lanes=8, window=32), 7, 1000) == [1] * 1000


def test_weighted_reads_of_a_lane_stay_within_a_window():
    plan = weighted_plan([1.0, 3.0, 1.0, 3.0] * 2500, seed=2, lanes=4, window=500)
    lanes = plan.draw(torch.arange(10_000)).ids.view(-1, 4).T
    for window in lanes.reshape(-1, 500):
        # A window is 500 slots, which are about 500 samples, in one of the virtual shards or across two.
        assert int(window.sort().values.diff().clamp(max=100).sum()) < 650


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            [1.0, float("nan")],
            "the weight of sample 1 is nan, but must be finite and not negative; 0 leaves a sample out",
        ),
        ([1.0, 2.0, -0.5], "the weight of sample 2 is -0.5, but must be finite"),
        ([float("inf"), 1.0], "the weight of sample 0 is inf, but must be finite"),
        ([1.0] * 300_000 + [-1.0], "the weight of sample 300000 is -1.0, but"),
        ([0.0, 0.0], "none of the 2 weights is positive, so there is nothing to draw"),
        ([], "none of the 0 weights is positive"),
    ],
    ids=["nan", "negative", "infinite", "far on", "zeros", "none"],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=f"^WeightedPlan: {message}"):
        weighted_plan(weights)


# Repeats of rare identities.


@given(class_sizes, st.integers(1, 40), seeds, st.integers(1, 70), st.integers(1, 50), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_samples_of_rare_identities_are_repeated_exactly(sizes, at_least, seed, lanes, window, epoch):
    plan = repeat_plan(sizes, at_least=at_least, seed=seed, lanes=lanes, window=window)
    repeats = [-(-at_least // sizes[label]) for label in labelled(sizes)[0]]
    assert plan.num_samples == sum(repeats)
    assert counts_of_epoch(plan, epoch, len(repeats)) == repeats


@pytest.mark.parametrize(
    ("sizes", "at_least", "message"),
    [
        ([1], 0, "at_least is 0 and there are 1 samples, but both must be at least 1"),
        ([], 1, "at_least is 1 and there are 0 samples, but both must be at least 1"),
        ([1], 2**31 + 1, "an epoch of 2147483649 samples, but at most 2147483648 are possible"),
    ],
)
def test_impossible_repeats_are_refused(sizes, at_least, message):
    with pytest.raises(ValueError, match=f"^RepeatPlan: {message}$"):
        repeat_plan(sizes, at_least=at_least)


# Several sources.


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), seeds, st.integers(0, 10**9))
@settings(max_examples=15, deadline=None)
def test_blocks_hold_exact_counts_and_sources_keep_their_order(shares, seed, block):
    sources = [SamplePlan([700, number + 1000], seed=number, lanes=3, window=64) for number in range(len(shares))]
    first_ids = [2000 * number for number in range(len(shares))]
    plan = MixedPlan(sources, shares, seed=seed, first_ids=first_ids)
    assert plan.num_samples == sum(source.num_samples for source in sources)
    ids, visits = plan.draw(torch.arange(block * 4096, (block + 1) * 4096))
    for number, (source, count) in enumerate(zip(sources, plan.counts, strict=True)):
        own = ids // 2000 == number
        expected = source.draw(torch.arange(block * count, (block + 1) * count))
        assert ids[own].equal(expected.ids + first_ids[number])
        assert visits[own].equal(expected.visits)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_shares_are_met_to_one_position_of_a_block(shares):
    sources = [SamplePlan([1], seed=0)] * len(shares)
    counts = MixedPlan(sources, shares, seed=0, first_ids=[0] * len(shares)).counts
    assert sum(counts) == 4096
    assert min(counts) >= 1
    exact = [4096 * share / sum(shares) for share in shares]
    if min(exact) >= 1:
        assert max(abs(count - share) for count, share in zip(counts, exact, strict=True)) < 1


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([5.0], [4096]),
        ([1, 1], [2048, 2048]),
        ([1, 1, 1], [1366, 1365, 1365]),
        ([0.2, 0.3, 0.5], [819, 1229, 2048]),
        ([1e-9, 1.0, 1e-300], [1, 4094, 1]),
        ([1e308, 1e308], [2048, 2048]),
        ([1.0] * 4096, [1] * 4096),
    ],
    ids=["one", "halves", "thirds", "tenths", "tiny", "huge", "most"],
)
def test_shares_in_positions_of_a_block(shares, counts):
    sources = [SamplePlan([1], seed=0)] * len(shares)
    assert MixedPlan(sources, shares, seed=0, first_ids=[0] * len(shares)).counts == counts


def test_sources_are_interleaved():
    sources = [SamplePlan([5000], seed=number) for number in range(2)]
    ids = MixedPlan(sources, [1, 3], seed=0, first_ids=[0, 5000]).draw(torch.arange(8192)).ids
    first = ids < 5000
    for part in first.view(-1, 256):
        assert 30 <= int(part.sum()) <= 98  # 64 +- 5 standard deviations
    assert int((first[:4096] == first[4096:]).sum()) < 3000  # Another block has another order.


@pytest.mark.parametrize(
    ("plans", "shares", "first_ids", "message"),
    [
        (
            2,
            [1.0],
            [0, 0],
            "2 plans, 1 shares and 2 first ids given; needed: one of each for each of 1 to 4096 sources",
        ),
        (0, [], [], "0 plans, 0 shares"),
        (2, [1.0, 0.0], [0, 0], "share 1 is 0.0, but must be positive and finite; leave unwanted sources out"),
        (1, [float("nan")], [0], "share 0 is nan"),
        (1, [float("inf")], [0], "share 0 is inf"),
    ],
)
def test_impossible_mixtures_are_refused(plans, shares, first_ids, message):
    with pytest.raises(ValueError, match=f"^MixedPlan: {message}"):
        MixedPlan([SamplePlan([3], seed=0)] * plans, shares, seed=0, first_ids=first_ids)
