"""Which class centers take part in a step, and at which place among them each label is.

The classes are cut into cells, and in each cell the first few elements of a permutation keyed by (seed, step, cell)
are drawn. So a draw costs what it draws, needs no vector over all classes, is the same for any number of ranks, and
whether a label was drawn, and as which element, is arithmetic: the permutation is inverted. Every class is drawn with
the same probability, `inclusion_probability`. The classes of the batch ("positives") always take part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.distributed.partition import ClassPartition, block_size_for
from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["ClassesInPlay", "NegativeSampler", "all_in_play", "owned_classes"]

_SAMPLING_STREAM = 2  # keeps these hashes apart from those of other parts that use the same seed
_RATE_TOLERANCE = 0.02


@dataclass(frozen=True)
class ClassesInPlay:
    """The rows of this rank's class centers that take part in a step.

    Attributes:
        rows: [n] int64, distinct, in [0, num_local_classes); None if all of them, in order.
        owned_V: [V] bool, whether a label of the batch lives on this rank.
        slot_V: [V] int64, where it does: the place of the label among `rows`; 0 elsewhere.
        drawn_probability: the probability with which a class that is not in the batch takes part.
    """

    rows: Tensor | None
    owned_V: Tensor
    slot_V: Tensor
    drawn_probability: float = 1.0


def _owned(labels_V: Tensor, partition: ClassPartition) -> Tensor:
    start = partition.class_start
    return (labels_V >= start) & (labels_V < start + partition.num_local_classes)


def owned_classes(labels_V: Tensor, partition: ClassPartition) -> tuple[Tensor, Tensor]:
    """(which cases have their class on this rank, [r] int64; the local row of the class of each of those, [r])."""
    cases = _owned(labels_V, partition).nonzero()[:, 0]
    return cases, labels_V[cases] - partition.class_start


def all_in_play(labels_V: Tensor, partition: ClassPartition) -> ClassesInPlay:
    """Every class takes part: no sampling."""
    owned_V = _owned(labels_V, partition)
    return ClassesInPlay(None, owned_V, torch.where(owned_V, labels_V - partition.class_start, 0))


class NegativeSampler:
    """Draws a share of the classes anew at each step.

    Args:
        num_classes: classes over all ranks.
        sample_rate: the share to draw, in (0, 1).
        seed: of the run.

    Attributes:
        cell_size: classes in a cell: as few blocks as bring the share within 2 % of `sample_rate`.
        draws_per_cell: how many of them are drawn.
    """

    def __init__(self, num_classes: int, sample_rate: float, *, seed: int) -> None:
        assert 0 < sample_rate < 1
        self.seed = seed
        self.cell_size, self.draws_per_cell = _cell(num_classes, sample_rate)
        self._permutation = KeyedPermutation(self.cell_size)

    @property
    def inclusion_probability(self) -> float:
        """The probability that a class which is not in the batch is drawn, the same for all."""
        return self.draws_per_cell / self.cell_size

    def in_play(self, labels_V: Tensor, partition: ClassPartition, step: int) -> ClassesInPlay:
        """The classes that take part in `step` on the rank of `partition`, for labels [V] of the global batch."""
        start, stop = partition.class_start, partition.class_start + partition.num_local_classes
        first_cell, last_cell = start // self.cell_size, -(-stop // self.cell_size)
        cells = torch.arange(first_cell, max(first_cell, last_cell), device=labels_V.device)[:, None]
        draws = torch.arange(self.draws_per_cell, device=labels_V.device)[None, :]
        drawn = (cells * self.cell_size + self._permutation(draws, self._key(step, cells))).flatten()
        # A cell may straddle the border to another rank, and the last one the end of the classes.
        mine = (drawn >= start) & (drawn < stop)
        place_of_draw = mine.cumsum(0) - 1

        owned_V = _owned(labels_V, partition)
        own_labels = torch.where(owned_V, labels_V, start)
        cell_V = own_labels // self.cell_size
        draw_V = self._permutation.inverse(own_labels % self.cell_size, self._key(step, cell_V))
        drawn_V = draw_V < self.draws_per_cell
        added = torch.unique(labels_V[owned_V & ~drawn_V])

        rows = torch.cat([drawn[mine], added]) - start
        slot_V = mine.sum() + torch.searchsorted(added, own_labels)
        if drawn.numel():
            number_V = torch.where(drawn_V, (cell_V - first_cell) * self.draws_per_cell + draw_V, 0)
            slot_V = torch.where(drawn_V, place_of_draw[number_V], slot_V)
        return ClassesInPlay(rows, owned_V, torch.where(owned_V, slot_V, 0), self.inclusion_probability)

    def _key(self, step: int, cell: Tensor) -> Tensor:
        return hash64(self.seed, _SAMPLING_STREAM, step, cell)


def _cell(num_classes: int, sample_rate: float) -> tuple[int, int]:
    """(cell size, draws): whole blocks, unless all the classes together are too few for the rate."""
    block_size = block_size_for(num_classes)
    for cell_size in range(block_size, num_classes, block_size):
        draws = round(sample_rate * cell_size)
        if draws and abs(draws / cell_size - sample_rate) <= _RATE_TOLERANCE * sample_rate:
            return cell_size, draws
    return num_classes, max(1, round(sample_rate * num_classes))
