"""Negative sampling: the laws it draws from, where labels land, independence of the number of ranks, and its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialfc.distributed.partition import ClassPartition
from partialfc.head.sampling import SAMPLING_LAWS, ClassesInPlay, NegativeSampler, all_in_play
from partialfc.keyed import hash64

NO_LABELS = torch.tensor([], dtype=torch.int64)

# Cells that lie on ranks as a whole, that straddle borders, that are all there is, and that permute by cycle walking.
SIZES_AND_RATES = [
    (1, 0.5),
    (3, 0.3),
    (37, 0.1),
    (130, 0.3),
    (1001, 0.02),
    (1009, 0.0005),
    (5000, 0.9),
    (20_000, 0.1),
    (20_000, 0.0003),
]

# (num_classes, sample_rate, seed, step): the number of classes drawn, the first few, and the sum of their hashes.
# Runs that are resumed depend on these. If a value below changes, what they draw does.
KNOWN_UNIFORM_DRAWS = {
    (37, 0.1, 5, 3): (4, [4, 10, 21, 33], -6070731317115610907),
    (130, 0.3, 5, 3): (39, [2, 4, 7, 10, 12, 17], 1198418803384276768),
    (1001, 0.02, 5, 3): (19, [46, 53, 107, 210, 218, 302], 1554350623840600087),
    (20_000, 0.1, 7, 11): (2030, [4, 5, 9, 14, 15, 24], -8182291123377148388),
    (2_059_906, 0.1, 7, 11): (209_209, [4, 5, 9, 14, 15, 24], 9113691287485194442),
    (93_431, 0.0003, 7, 11): (28, [2074, 5745, 9054, 10431, 13566, 17684], -2985810734084140368),
    (1009, 0.0005, 1, 2): (1, [413], 8502313878358545344),
}
KNOWN_CYCLIC_DRAWS = {
    (130, 0.3, 5, 3): (39, [0, 4, 6, 10, 17, 18], 7687064065511332515),
    (1001, 0.02, 5, 400): (20, [88, 93, 144, 215, 226, 283], 2966763266448764590),
    (20_000, 0.1, 7, 9): (2033, [18, 19, 26, 35, 52, 68], 8605607102349227608),
    (20_000, 0.1, 7, 1000): (2030, [14, 27, 44, 48, 52, 57], -8116742007607399168),
}


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


def assert_whole(in_play: ClassesInPlay, count: int, owned: list[int], slots: list[int]) -> None:
    assert in_play.count == count
    assert in_play.rows is None
    assert in_play.rows_between(3, 17) == slice(3, 17)
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


class NoReadBack(TorchDispatchMode):
    """Refuses what gives a number to the host, or a shape that depends on values."""

    refused = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        indexed = "index" in name and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1:])
        )
        if indexed or name.lstrip("_").startswith(tuple(one.lstrip("_") for one in self.refused)):
            raise AssertionError(f"{name} reads back")
        return func(*args, **(kwargs or {}))


def assert_known(sampler: NegativeSampler, num_classes: int, step: int, known: tuple[int, list[int], int]) -> None:
    drawn = draw(sampler, ClassPartition(num_classes), step)
    count, first, hashes = known
    assert len(drawn) == count
    assert drawn[:6].tolist() == first
    assert hash64(drawn).sum().item() == hashes


@pytest.mark.parametrize("case", KNOWN_UNIFORM_DRAWS, ids=str)
def test_uniform_draws_are_known(case):
    num_classes, sample_rate, seed, step = case
    assert_known(NegativeSampler(num_classes, sample_rate, seed=seed), num_classes, step, KNOWN_UNIFORM_DRAWS[case])


@pytest.mark.parametrize("case", KNOWN_CYCLIC_DRAWS, ids=str)
def test_cyclic_draws_are_known(case):
    num_classes, sample_rate, seed, step = case
    sampler = NegativeSampler(num_classes, sample_rate, seed=seed, law="cyclic")
    assert_known(sampler, num_classes, step, KNOWN_CYCLIC_DRAWS[case])


def test_another_law_is_refused():
    with pytest.raises(ValueError, match=r"^sampling is 'poisson', but must be one of uniform, cyclic$"):
        NegativeSampler(100, 0.1, seed=0, law="poisson")


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


@pytest.mark.parametrize(
    ("num_classes", "sample_rate", "cell_size", "draws"),
    [
        (1, 0.5, 1, 1),
        (37, 0.1, 10, 1),
        (130, 0.3, 10, 3),
        (100, 0.24, 17, 4),
        (1001, 0.02, 152, 3),
        (5000, 0.9, 64, 58),
        (20_000, 0.1, 256, 26),
    ],
)
def test_cyclic_draws_the_classes_of_a_cell_equally_often(num_classes, sample_rate, cell_size, draws):
    sampler = NegativeSampler(num_classes, sample_rate, seed=1, law="cyclic")
    assert (sampler.cell_size, sampler.draws_per_cell) == (cell_size, draws)
    assert sampler.inclusion_probability == draws / cell_size
    per_round = draws // math.gcd(cell_size, draws)
    assert sampler.steps_per_round * draws == per_round * cell_size
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for step in range(2 * sampler.steps_per_round):
        counts[draw(sampler, ClassPartition(num_classes), step)] += 1
        for cell in counts.split(cell_size):
            # The last cell has phantoms, which are drawn as often, so that the bounds are those of whole cells.
            assert cell.min() >= (step + 1) * draws // cell_size
            assert cell.max() <= -(-(step + 1) * draws // cell_size)
        rounds, rest = divmod(step + 1, sampler.steps_per_round)
        if rest == 0:
            assert counts.unique().tolist() == [rounds * per_round]


def test_cyclic_takes_a_new_permutation_for_each_round_and_cell():
    sampler, partition = NegativeSampler(2048, 0.25, seed=5, law="cyclic"), ClassPartition(2048)
    cell_size = sampler.cell_size
    orders = []
    for number in range(3):
        steps = range(number * sampler.steps_per_round, (number + 1) * sampler.steps_per_round)
        rows_sxd = [sampler.in_play(NO_LABELS, partition, step).rows.view(-1, sampler.draws_per_cell) for step in steps]
        orders += [tuple(order) for order in (torch.cat(rows_sxd, 1) % cell_size).tolist()]
    assert all(sorted(order) == list(range(cell_size)) for order in orders)
    assert len(set(orders)) == 3 * 2048 // cell_size


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


@pytest.mark.parametrize("law", SAMPLING_LAWS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_classes", "sample_rate"), SIZES_AND_RATES)
def test_positives_are_in_play_and_slots_point_at_them(num_classes, sample_rate, world_size, static, law):
    sampler = NegativeSampler(num_classes, sample_rate, seed=2, law=law)
    labels = torch.cat([labels_for(num_classes, 50), torch.tensor([0, num_classes - 1, num_classes - 1])])
    for step in range(5):
        owners = torch.zeros_like(labels)
        for rank in range(world_size):
            partition = ClassPartition(num_classes, rank, world_size)
            in_play = sampler.in_play(labels, partition, step, static=static)
            own = in_play.owned_V
            assert in_play.count == len(in_play.rows)
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


@pytest.mark.parametrize("law", SAMPLING_LAWS)
@pytest.mark.parametrize(("num_classes", "sample_rate"), [*SIZES_AND_RATES, (20_000, 0.01)])
def test_the_classes_in_play_do_not_depend_on_the_number_of_ranks(num_classes, sample_rate, law):
    labels = labels_for(num_classes, 20)
    for step in range(5):
        unions = []
        for world_size in (1, 2, 3, 4, 7):
            # A sampler for each rank, as in a run.
            unions.append(
                torch.cat(
                    [
                        draw(
                            NegativeSampler(num_classes, sample_rate, seed=3, law=law),
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


@pytest.mark.parametrize("law", SAMPLING_LAWS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("num_classes", "sample_rate"), SIZES_AND_RATES)
def test_tiles_one_after_another_are_the_rows(num_classes, sample_rate, world_size, static, law):
    sampler = NegativeSampler(num_classes, sample_rate, seed=2, law=law)
    labels = labels_for(num_classes, 30)
    for rank in range(world_size):
        in_play = sampler.in_play(labels, ClassPartition(num_classes, rank, world_size), 9, static=static)
        for size in {1, 7, 64, 1000} if in_play.count < 500 else {97, 1000}:
            starts = range(0, in_play.count, size)
            tiles = [in_play.rows_between(start, min(start + size, in_play.count)) for start in starts]
            assert all(tile.dtype == torch.int64 for tile in tiles)
            assert torch.equal(torch.cat([NO_LABELS, *tiles]), in_play.rows)
        assert in_play.rows_between(in_play.count, in_play.count).tolist() == []


@pytest.mark.parametrize("law", SAMPLING_LAWS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_classes", "sample_rate"), SIZES_AND_RATES)
def test_static_puts_the_same_classes_at_places_that_no_label_decides(num_classes, sample_rate, world_size, law):
    sampler = NegativeSampler(num_classes, sample_rate, seed=2, law=law)
    labels = labels_for(num_classes, 30)
    for rank in range(world_size):
        partition = ClassPartition(num_classes, rank, world_size)
        plain, static = (sampler.in_play(labels, partition, 5, static=static) for static in (False, True))
        num_drawn = static.count - len(labels)
        assert num_drawn == sampler.in_play(NO_LABELS, partition, 5).count
        assert torch.equal(static.rows[:num_drawn], plain.rows[:num_drawn])
        assert torch.equal(static.owned_V, plain.owned_V)
        seen = set(static.rows[:num_drawn].tolist())
        expected_rows, place_of = [], {}
        for case, (label, owned) in enumerate(zip(labels.tolist(), static.owned_V.tolist(), strict=True)):
            row = label - partition.class_start
            adds = owned and row not in seen
            expected_rows.append(row if adds else -1)
            if adds:
                seen.add(row)
                place_of[label] = num_drawn + case
        assert static.rows[num_drawn:].tolist() == expected_rows
        for case, label in enumerate(labels.tolist()):
            if label in place_of:
                assert static.slot_V[case] == place_of[label]


@pytest.mark.parametrize("law", SAMPLING_LAWS)
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("num_classes", "sample_rate"), SIZES_AND_RATES)
def test_static_reads_nothing_back(num_classes, sample_rate, rank, law):
    sampler = NegativeSampler(num_classes, sample_rate, seed=2, law=law)
    labels, partition = labels_for(num_classes, 30), ClassPartition(num_classes, rank, 3)
    with NoReadBack():
        in_play = sampler.in_play(labels, partition, 5, static=True)
        middle = in_play.count // 2
        tiles = [in_play.rows_between(0, middle), in_play.rows_between(middle, in_play.count)]
    assert torch.equal(torch.cat(tiles), in_play.rows)
    with NoReadBack(), pytest.raises(AssertionError, match="reads back"):
        sampler.in_play(labels, partition, 5)


@pytest.mark.parametrize("law", SAMPLING_LAWS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sample_rate", [0.001, 0.1, 0.5])
def test_nothing_as_large_as_the_classes_in_play_is_made(sample_rate, static, law):
    num_classes, batch_size, tile = 2_000_000, 512, 600
    sampler = NegativeSampler(num_classes, sample_rate, seed=0, law=law)
    labels = torch.randint(num_classes, (batch_size,), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        in_play = sampler.in_play(labels, ClassPartition(num_classes, 1, 3), step=3, static=static)
    assert largest.numel <= batch_size
    # Each of the 6 rounds of the permutation has its own numbers, for at most as many halves as there are draws.
    with LargestTensor() as largest:
        for start in (0, (in_play.count - tile) // 2, in_play.count - tile):
            assert len(in_play.rows_between(start, start + tile)) == tile
    assert tile <= largest.numel <= 6 * (tile + 2 * sampler.draws_per_cell)
    assert in_play.count >= sample_rate * num_classes / 3


def test_without_sampling_slots_are_local_ids():
    labels = torch.tensor([0, -1, 64, 63, 129, 127])
    assert_whole(all_in_play(labels, ClassPartition(130, 0, 2)), 66, [1, 0, 1, 1, 0, 0], [0, 0, 64, 63, 0, 0])
    assert_whole(all_in_play(labels, ClassPartition(130, 1, 2)), 64, [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 63, 61])
