"""The sharded, sampled head equals the single-process reference: loss, gradients and state, in float64 to 1e-10.

In two passes over tiles of class centers, as they are and so tiny that there are many, and by autograd.
"""

from __future__ import annotations

import itertools

import pytest
from head_cases import cases, check_case
from support import run_distributed

from partialfc.head import tiles


def _check(rank: int, world_size: int, way: str, first: int, every: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if way == "tiny tiles":
            # Tiles of one to twenty classes, whose rows are worked out for a few tiles at once.
            patch.setitem(tiles.TILE_NUMBERS, "cpu", 150)
            patch.setattr(tiles, "ROWS_AT_ONCE", 40)
        for case in itertools.islice(cases(world_size), first, None, every):
            check_case(case, rank, fused=way != "autograd")


@pytest.mark.parametrize(("way", "every"), [("fused", 1), ("tiny tiles", 1), ("autograd", 3)])
def test_one_process_without_a_process_group(way: str, every: int) -> None:
    _check(0, 1, way, 0, every)


# All cases on 4 ranks, and each of them on 2 or on 3.
@pytest.mark.parametrize(("world_size", "first", "every"), [(1, 0, 3), (2, 0, 2), (3, 1, 2), (4, 0, 1)])
def test_sharded(world_size: int, first: int, every: int) -> None:
    run_distributed(_check, world_size, "fused", first, every)


@pytest.mark.parametrize("way", ["tiny tiles", "autograd"])
def test_sharded_over_three_ranks_in_another_way(way: str) -> None:
    run_distributed(_check, 3, way, 0, 3)
