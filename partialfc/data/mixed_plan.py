"""Which sample is seen when, if several sources are mixed by shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from partialfc.data.plan import Draws, Plan, check_positions
from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["MixedPlan"]

_BLOCK = 4096
_BLOCK_ORDER = 31


class MixedPlan:
    """Positions in blocks of 4,096, each with the same number of positions of every source, in an order of its own.

    A source is drawn from in the order of its own plan, without end: sources of a large share begin their next epoch
    while others are still in their first. Batches of 4,096 positions that begin at a multiple of it have exact counts.

    A share becomes a whole number of positions of a block: rounded down, but at least one, and the positions left over
    go to the largest remainders, the first source first. So a share is met to 1/4,096, or to what lifting small shares
    to one position takes from the largest.

    Args:
        plans: the plan of each source.
        shares: the weight of each source, positive; their sum does not matter.
        seed: key of the order within blocks.
        first_ids: what to add to the sample ids of each source.

    Attributes:
        num_samples: stream positions of an epoch: the samples of all sources together. The stream does not start anew
            there.
        lanes: 1. Lanes of the sources do not come at a fixed distance here, so a rank gets consecutive positions, and
            reads from all lanes of all sources.
        counts: positions of each source in a block.

    Raises:
        ValueError: if the numbers of plans, shares and first ids differ, there are none or more than 4,096, or a share
            is not positive and finite.
    """

    def __init__(self, plans: Sequence[Plan], shares: Sequence[float], *, seed: int, first_ids: Sequence[int]) -> None:
        if not 1 <= len(plans) <= _BLOCK or not len(plans) == len(shares) == len(first_ids):
            raise ValueError(
                f"MixedPlan: {len(plans)} plans, {len(shares)} shares and {len(first_ids)} first ids given; needed: "
                f"one of each for each of 1 to {_BLOCK} sources"
            )
        for number, share in enumerate(shares):
            if not 0 < share < float("inf"):
                raise ValueError(
                    f"MixedPlan: share {number} is {share}, but must be positive and finite; leave unwanted sources out"
                )
        self.num_samples = sum(plan.num_samples for plan in plans)
        self.lanes = 1
        self.counts = _quantise(shares)
        self._plans, self._first_ids, self._seed = list(plans), list(first_ids), seed
        self._source_of_slot = torch.repeat_interleave(torch.arange(len(plans)), torch.tensor(self.counts))
        self._order = KeyedPermutation(_BLOCK)

    def draw(self, stream_positions: Tensor) -> Draws:
        """The samples at some stream positions, and how often their source had drawn them before.

        Args:
            stream_positions: int64, not negative, any shape and order.

        Raises:
            ValueError: if a position is negative.
        """
        positions = torch.as_tensor(stream_positions, dtype=torch.int64)
        check_positions(positions, "MixedPlan")
        sources, own_positions = self._sources(positions)
        ids, visits = torch.empty_like(positions), torch.empty_like(positions)
        for source in sources.unique().tolist():
            here = sources == source
            drawn = self._plans[source].draw(own_positions[here])
            ids[here], visits[here] = drawn.ids + self._first_ids[source], drawn.visits
        return Draws(ids, visits)

    def _sources(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The source of each position, and the position in the stream of that source."""
        blocks, places = positions // _BLOCK, positions % _BLOCK
        sources, own_positions = torch.empty_like(positions), torch.empty_like(positions)
        counts = torch.tensor(self.counts)
        starts = counts.cumsum(0) - counts
        for block in blocks.unique().tolist():
            source_of_place = self._source_of_slot[
                self._order(torch.arange(_BLOCK), hash64(self._seed, _BLOCK_ORDER, block))
            ]
            # Within a source the places keep their order, so that its own order is kept.
            rank_of_place = source_of_place.argsort(stable=True).argsort() - starts[source_of_place]
            here = blocks == block
            sources[here] = source_of_place[places[here]]
            own_positions[here] = block * counts[sources[here]] + rank_of_place[places[here]]
        return sources, own_positions


def _quantise(shares: Sequence[float]) -> list[int]:
    """Positive whole numbers with the sum 4,096, as near to the shares as these allow."""
    largest = np.asarray(shares, dtype=np.float64) / max(shares)  # First, as the sum of large numbers may overflow.
    exact = largest / largest.sum() * _BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(_BLOCK - int(counts.sum())):
        counts[np.argmax(exact - counts)] += 1
    for _ in range(int(counts.sum()) - _BLOCK):
        counts[np.argmax(counts)] -= 1
    return [int(count) for count in counts]
