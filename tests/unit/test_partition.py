"""The class partition, exhaustively for small numbers and by arithmetic for large ones."""

from __future__ import annotations

import pytest
import torch

from partialfc.distributed.partition import ClassPartition, block_size_for

SMALL = [*range(1, 140), 255, 256, 257, 1000, 1023, 4097]
LARGE = [85_742, 360_232, 2_059_906, 10_000_019, 93_431, 2**24 + 1, 500_000_001]
WORLD_SIZES = [1, 2, 3, 4, 5, 7, 8, 64, 200]


def partitions(num_classes: int, world_size: int) -> list[ClassPartition]:
    return [ClassPartition(num_classes, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_class_lives_on_exactly_one_rank(world_size):
    for num_classes in SMALL:
        owned = [
            number
            for own in partitions(num_classes, world_size)
            for number in range(own.class_start, own.class_start + own.num_local_classes)
        ]
        assert owned == list(range(num_classes)), (num_classes, world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_runs_of_classes_join_without_gap_for_large_numbers_too(world_size):
    for num_classes in LARGE:
        expected_start = 0
        for own in partitions(num_classes, world_size):
            assert own.class_start == expected_start
            assert own.num_local_classes <= len(own.local_blocks) * own.block_size
            expected_start += own.num_local_classes
        assert expected_start == num_classes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_blocks_are_dealt_as_torch_chunk_deals_them(world_size):
    for num_classes in SMALL:
        num_blocks = ClassPartition(num_classes).num_blocks
        chunks = [chunk.tolist() for chunk in torch.arange(num_blocks).chunk(world_size)]
        chunks += [[] for _ in range(world_size - len(chunks))]
        assert [list(own.local_blocks) for own in partitions(num_classes, world_size)] == chunks


def test_ranks_past_the_last_block_own_nothing():
    # 64 blocks over 9 ranks are 8 for each of the first eight.
    sizes = [own.num_local_classes for own in partitions(64, 9)]
    assert sizes == [8, 8, 8, 8, 8, 8, 8, 8, 0]
    last = ClassPartition(3, rank=3, world_size=4)
    assert (len(last.local_blocks), last.class_start, last.num_local_classes) == (0, 3, 0)


def test_phantoms_are_counted_on_the_last_rank_with_classes_alone():
    # 130 classes are 65 blocks of 2; 131 are 66 blocks, the last of them with a phantom.
    assert [own.num_local_classes for own in partitions(131, 2)] == [66, 65]
    assert [len(own.local_blocks) for own in partitions(131, 2)] == [33, 33]


@pytest.mark.parametrize(
    ("num_classes", "block_size"),
    [(1, 1), (63, 1), (127, 1), (128, 2), (255, 2), (256, 4), (1000, 8), (16_383, 128), (16_384, 256), (10**9, 256)],
)
def test_block_size_has_its_known_value_whatever_the_number_of_ranks(num_classes, block_size):
    # Initial class centers and samples of every run are keyed by block: this must not change.
    assert block_size_for(num_classes) == block_size
    assert {own.block_size for size in (1, 3, 8) for own in partitions(num_classes, size)} == {block_size}


def test_there_are_at_least_64_blocks_where_there_are_64_classes():
    for num_classes in [*range(64, 3000), *LARGE]:
        partition = ClassPartition(num_classes)
        assert partition.num_blocks >= 64
        assert (partition.num_blocks - 1) * partition.block_size < num_classes
        assert num_classes <= partition.num_blocks * partition.block_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_classes is 0, but must be at least 1"),
        ((-5, 0, 2), "num_classes is -5, but must be at least 1"),
        ((10, 2, 2), r"rank is 2, but must be in \[0, 2\)"),
        ((10, -1, 2), r"rank is -1, but must be in \[0, 2\)"),
        ((10, 0, 0), r"rank is 0, but must be in \[0, 0\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ClassPartition(*arguments)
