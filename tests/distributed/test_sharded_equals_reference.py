"""The sharded, sampled head equals the single-process reference: loss, gradients and state, in float64 to 1e-10."""

from __future__ import annotations

import pytest
from head_cases import cases, check_case
from support import run_distributed


def _check_all(rank: int, world_size: int) -> None:
    for case in cases(world_size):
        check_case(case, rank)


def test_one_process_without_a_process_group() -> None:
    _check_all(0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sharded(world_size: int) -> None:
    run_distributed(_check_all, world_size)
