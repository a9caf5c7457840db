"""Negative sampling: the law it draws from, where labels land, independence of the number of ranks, and its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialfc.distributed.partition import ClassPartition
from partialfc.head.sampling import ClassesInPlay, NegativeSampler, all_in_play

NO_LABELS = torch.tensor([], dtype=torch.int64)


def draw(sampler: NegativeSampler, partition: ClassPartition, step: int, labels: Tensor = NO_LABELS) -> Tensor:
    """Global ids of the classes in play on the rank of `partition`, sorted; checked to be distinct and its own."""
    rows = sampler.in_play(labels, partition, step).rows
    assert rows is not None
    assert rows.dtype == torch.int64
    assert len(rows.unique()) == len(rows)
    assert bool(((rows >= 0) & (rows < partition.num_local_classes)).all())
    return (rows + partition.class_start).sort().values


def labels_for(num_classes: int, count: int) -> Tensor:
    labels = torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(num_classes))
    labels[::7] = -1
    return labels


def assert_whole(in_play: ClassesInPlay, owned: list[int], slots: list[int]) -> None:
    assert in_play.rows is None
    assert in_play.owned_V.tolist() == [bool(one) for one in owned]
    assert in_play.slot_V.tolist() == slots


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that anything returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize(
    ("num_classes", "sample_rate"), [(3, 0.3), (10, 0.5), (37, 0.1), (130, 0.3), (131, 0.9), (1000, 0.1), (1001, 0.02)]
)
def test_every_class_is_drawn_with_the_same_probability(num_classes, sample_rate):
    steps = 500
    sampler = NegativeSampler(num_classes, sample_rate, seed=1)
    partition = ClassPartition(num_classes)
    drawn = torch.cat([sampler.in_play(NO_LABELS, partition, step).rows for step in range(steps)])
    counts = drawn.bincount(minlength=num_classes)
    probability = sampler.inclusion_probability
    deviations = (counts - steps * probability) / math.sqrt(steps * probability * (1 - probability))
    assert float(deviations.abs().max()) < 4.5
    assert float((deviations**2).mean()) < 1.6


@pytest.mark.parametrize("num_classes", [1000, 1001, 4097, 93_431, 2_059_906, 10_000_000])
@pytest.mark.parametrize("sample_rate", [0.001, 0.0033, 0.01, 0.05, 0.1, 0.3, 0.37, 0.5, 0.9, 0.99])
def test_share_is_within_two_percent_of_the_rate(num_classes, sample_rate):
    probability = NegativeSampler(num_classes, sample_rate, seed=0).inclusion_probability
    assert probability == pytest.approx(sample_rate, rel=0.02)


@pytest.mark.parametrize(("num_classes", "sample_rate"), [(4096, 0.1), (93_431, 0.05), (16_384, 0.3)])
def test_the_share_drawn_is_that_probability_at_every_step(num_classes, sample_rate):
    sampler = NegativeSampler(num_classes, sample_rate, seed=0)
    # Only the last cell may have phantoms, so each step draws as many, to within those of one cell.
    for step in range(5):
        share = len(draw(sampler, ClassPartition(num_classes), step)) / num_classes
        assert share == pytest.approx(sampler.inclusion_probability, abs=sampler.draws_per_cell / num_classes)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 37])
@pytest.mark.parametrize("sample_rate", [1e-9, 0.001, 0.4, 0.999])
def test_few_classes_and_tiny_rates_still_draw_something(num_classes, sample_rate):
    sampler = NegativeSampler(num_classes, sample_rate, seed=0)
    drawn = [draw(sampler, ClassPartition(num_classes), step) for step in range(60)]
    assert sum(map(len, drawn)) > 0
    assert all(len(ids) <= num_classes for ids in drawn)
    if num_classes == 37 and sample_rate < 0.01:
        # One of all the classes: the least there is.
        assert {len(ids) for ids in drawn} == {1}
        assert len(torch.cat(drawn).unique()) > 20


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("num_classes", "sample_rate"), [(3, 0.3), (37, 0.1), (130, 0.3), (1001, 0.02), (20_000, 0.1), (20_000, 0.0003)]
)
def test_positives_are_in_play_and_slots_point_at_them(num_classes, sample_rate, world_size):
    sampler = NegativeSampler(num_classes, sample_rate, seed=2)
    labels = torch.cat([labels_for(num_classes, 50), torch.tensor([0, num_classes - 1, num_classes - 1])])
    for step in range(5):
        owners = torch.zeros_like(labels)
        for rank in range(world_size):
            partition = ClassPartition(num_classes, rank, world_size)
            in_play = sampler.in_play(labels, partition, step)
            own = in_play.owned_V
            owners += own
            assert torch.equal(in_play.rows[in_play.slot_V[own]] + partition.class_start, labels[own])
            assert bool((in_play.slot_V[~own] == 0).all())
            draw(sampler, partition, step, labels)
        assert torch.equal(owners, (labels >= 0).long())


def test_positives_come_on_top_of_what_is_drawn():
    sampler, partition = NegativeSampler(1000, 0.1, seed=0), ClassPartition(1000)
    labels = torch.arange(0, 1000, 3)
    negatives, everything = draw(sampler, partition, 4), draw(sampler, partition, 4, labels)
    assert torch.equal(everything, torch.cat([negatives, labels]).unique())
    assert len(everything) > len(negatives)


@pytest.mark.parametrize(("num_classes", "sample_rate"), [(3, 0.3), (130, 0.3), (1001, 0.02), (20_000, 0.01)])
def test_the_classes_in_play_do_not_depend_on_the_number_of_ranks(num_classes, sample_rate):
    labels = labels_for(num_classes, 20)
    for step in range(5):
        unions = []
        for world_size in (1, 2, 3, 4):
            # A sampler for each rank, as in a run.
            unions.append(
                torch.cat(
                    [
                        draw(
                            NegativeSampler(num_classes, sample_rate, seed=3),
                            ClassPartition(num_classes, rank, world_size),
                            step,
                            labels,
                        )
                        for rank in range(world_size)
                    ]
                )
            )
        # Ranks own ascending classes, so their sorted shares, one after another, are sorted as well.
        assert all(torch.equal(union, unions[0]) for union in unions)


def test_ranks_do_not_draw_the_same_local_rows():
    sampler = NegativeSampler(2048, 0.25, seed=0)
    first, second = (
        sampler.in_play(NO_LABELS, ClassPartition(2048, rank, 2), step=0).rows.sort().values for rank in range(2)
    )
    assert len(first) == len(second) == 256
    # Independent draws share a quarter of the 256 in expectation, with a standard deviation of about 6.
    assert int(torch.isin(first, second).sum()) == pytest.approx(64, abs=30)


def test_steps_and_seeds_differ_and_the_same_key_draws_the_same():
    partition = ClassPartition(2048)
    base = draw(NegativeSampler(2048, 0.25, seed=5), partition, 7)
    assert torch.equal(draw(NegativeSampler(2048, 0.25, seed=5), partition, 7), base)
    for seed, step in ((5, 8), (6, 7), (7, 5)):
        other = draw(NegativeSampler(2048, 0.25, seed=seed), partition, step)
        # Independent draws share a quarter of the 512 in expectation, with a standard deviation of about 9.
        assert int(torch.isin(base, other).sum()) == pytest.approx(128, abs=40)


def test_a_draw_costs_what_it_draws():
    num_classes, batch_size = 10_000_000, 512
    sampler = NegativeSampler(num_classes, 0.001, seed=0)
    labels = torch.randint(num_classes, (batch_size,), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        in_play = sampler.in_play(labels, ClassPartition(num_classes), step=3)
    assert 10_000 < len(in_play.rows) < 11_000
    assert largest.numel <= 2 * (0.001 * num_classes + batch_size)


def test_without_sampling_slots_are_local_ids():
    labels = torch.tensor([0, -1, 64, 63, 129, 127])
    assert_whole(all_in_play(labels, ClassPartition(130, 0, 2)), [1, 0, 1, 1, 0, 0], [0, 0, 64, 63, 0, 0])
    assert_whole(all_in_play(labels, ClassPartition(130, 1, 2)), [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 63, 61])
