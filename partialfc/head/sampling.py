"""Which class centers take part in a step, and at which place among them each label is.

The classes are cut into cells, and in each cell a few elements of a keyed permutation are drawn. So a draw costs what
it draws, needs no vector over all classes, is the same for any number of ranks, and whether a label was drawn, and as
which element, is arithmetic: the permutation is inverted. Every class is drawn with the same probability,
`inclusion_probability`. The classes of the batch ("positives") always take part.

The classes in play on a rank have places: those drawn in the cell that straddles the rank's first class, those of the
cells that lie on this rank as a whole, those of the cell that straddles its end, and the positives that were not
drawn. Only the draws of the two straddling cells have to be looked through for those of this rank; they are worked
out on the host. The row at any other place is arithmetic, so nobody has to hold all rows at once.

Letters: V cases (labels of the global batch), n classes in play on this rank, c cells, d draws of a cell, b draws of
a straddling cell that live on this rank, a places for added positives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from partialfc.distributed.partition import ClassPartition, block_size_for
from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["SAMPLING_LAWS", "ClassesInPlay", "NegativeSampler", "all_in_play", "owned_classes"]

SAMPLING_LAWS = ("uniform", "cyclic")

_SAMPLING_STREAM = 2  # keeps these hashes apart from those of other parts that use the same seed
_RATE_TOLERANCE = 0.02


@dataclass(frozen=True)
class ClassesInPlay:
    """The rows of this rank's class centers that take part in a step.

    Attributes:
        count: n, the number of places.
        owned_V: [V] bool, whether a label of the batch lives on this rank.
        slot_V: [V] int64, where it does: the place of the label; 0 elsewhere.
        drawn_probability: the probability with which a class that is not in the batch takes part.
        source: where the rows come from; None if all take part, in order.
    """

    count: int
    owned_V: Tensor
    slot_V: Tensor
    drawn_probability: float = 1.0
    source: _Rows | None = None

    @cached_property
    def rows(self) -> Tensor | None:
        """[n] int64, the rows at all places, kept from then on; None if all take part, in order.

        They are distinct and in [0, num_local_classes). Only places that `in_play(..., static=True)` left unused hold
        -1.
        """
        return None if self.source is None else self.source.between(0, self.count)

    def of_cases(self, cases: slice) -> ClassesInPlay:
        """The same classes, with the places of the labels of some cases alone."""
        return replace(self, owned_V=self.owned_V[cases], slot_V=self.slot_V[cases])

    def rows_between(self, start: int, stop: int) -> slice | Tensor:
        """The rows at the places [start, stop) of [0, count), worked out for this call.

        Returns:
            A slice if all classes take part, else [stop - start] int64, not to be changed in place; see `rows`.
        """
        assert 0 <= start <= stop <= self.count
        return slice(start, stop) if self.source is None else self.source.between(start, stop)


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
    slot_V = torch.where(owned_V, labels_V - partition.class_start, 0)
    return ClassesInPlay(partition.num_local_classes, owned_V, slot_V)


class NegativeSampler:
    """Draws a share of the classes at each step.

    Law "uniform" draws anew at each step, independent of all others: the published way. Law "cyclic" walks through a
    permutation of each cell: step t of a round draws the positions t * draws_per_cell and following, modulo cell_size.
    A round has cell_size / gcd(cell_size, draws_per_cell) steps, the fewest after which the walk ends where it began;
    then a new permutation takes over. So over a round each class is drawn draws_per_cell / gcd times exactly, at any
    time two classes of a cell were drawn equally often up to one, and no step draws a class twice. Over the
    permutations, each class has the probability `inclusion_probability` at each step, whatever the law.

    Args:
        num_classes: classes over all ranks.
        sample_rate: the share to draw, in (0, 1).
        seed: of the run.
        law: "uniform" or "cyclic".

    Attributes:
        cell_size: classes in a cell: as few blocks as bring the share within 2 % of `sample_rate`.
        draws_per_cell: how many of them are drawn.
        steps_per_round: how many steps share the permutations; 1 if uniform.

    Raises:
        ValueError: if the law is another.
    """

    def __init__(self, num_classes: int, sample_rate: float, *, seed: int, law: str = "uniform") -> None:
        assert 0 < sample_rate < 1
        if law not in SAMPLING_LAWS:
            raise ValueError(f"sampling is {law!r}, but must be one of {', '.join(SAMPLING_LAWS)}")
        self.seed = seed
        self.cell_size, self.draws_per_cell = _cell(num_classes, sample_rate)
        self.steps_per_round = 1
        if law == "cyclic":
            self.steps_per_round = self.cell_size // math.gcd(self.cell_size, self.draws_per_cell)
        self._permutation = KeyedPermutation(self.cell_size, static=True)

    @property
    def inclusion_probability(self) -> float:
        """The probability that a class which is not in the batch is drawn, the same for all."""
        return self.draws_per_cell / self.cell_size

    def in_play(self, labels_V: Tensor, partition: ClassPartition, step: int, *, static: bool = False) -> ClassesInPlay:
        """The classes that take part in `step` on the rank of `partition`.

        Args:
            labels_V: [V] int64, of the global batch; those that are no class are owned by nobody.
            partition: which classes live here.
            step: of the run.
            static: whether no shape depends on the labels, so that none of them is read back from a device. Then the
                last V places are one for each case. It is used by the first case of a label that lives here and was
                not drawn; all others are unused.
        """
        owned_V = _owned(labels_V, partition)
        # Labels that are not here must be some class that is, or could be, for the arithmetic to hold.
        class_V = torch.where(owned_V, labels_V, partition.class_start)
        cell_V = class_V // self.cell_size
        draw_V = self._draw_number(class_V, cell_V, step)
        drawn_V = draw_V < self.draws_per_cell
        added_a, place_V = _added(class_V, owned_V & ~drawn_V, static=static)
        rows = _Rows(self, partition, step, torch.where(added_a < 0, -1, added_a - partition.class_start))
        slot_V = torch.where(drawn_V, rows.place_of_draw(cell_V, draw_V), rows.num_drawn + place_V)
        slot_V = torch.where(owned_V, slot_V, 0)
        return ClassesInPlay(rows.num_drawn + len(added_a), owned_V, slot_V, self.inclusion_probability, rows)

    def drawn(self, cells_c: Tensor, step: int) -> Tensor:
        """[c, d] int64, the classes that `step` draws in the cells [c]; in the last cell they may be phantoms."""
        start, key_c = self._walk(cells_c, step)
        position_d = torch.arange(start, start + self.draws_per_cell, device=cells_c.device) % self.cell_size
        return self._permutation.for_each_key(position_d, key_c).add_((cells_c * self.cell_size)[:, None])

    def _draw_number(self, class_V: Tensor, cell_V: Tensor, step: int) -> Tensor:
        """[V] int64 in [0, cell_size): `drawn(cell, step)[draw_number] == class`, if below draws_per_cell."""
        start, key_V = self._walk(cell_V, step)
        return (self._permutation.inverse(class_V - cell_V * self.cell_size, key_V) - start) % self.cell_size

    def _walk(self, cell: Tensor, step: int) -> tuple[int, Tensor]:
        """(the position at which the draws of `step` start, the key of the permutation of each cell)."""
        number, step_of_round = divmod(step, self.steps_per_round)
        start = step_of_round * self.draws_per_cell % self.cell_size
        return start, hash64(self.seed, _SAMPLING_STREAM, number, cell)


@dataclass(frozen=True)
class _StraddlingCell:
    """A cell that lies on this rank in part, and those of its draws that do.

    Attributes:
        cell: its number, or -1 where there is none.
        draws_b: [b] int64, ascending, in [0, draws_per_cell).
        rows_b: [b] int64, the local row of each.
    """

    cell: int
    draws_b: Tensor
    rows_b: Tensor


class _Rows:
    """The local rows in play, by place.

    Args:
        sampler: draws them.
        partition: which classes live here.
        step: of the run.
        added_a: [a] int64, the rows at the last places.

    Attributes:
        num_drawn: number of places before those.
    """

    def __init__(self, sampler: NegativeSampler, partition: ClassPartition, step: int, added_a: Tensor) -> None:
        self.sampler, self.step, self.class_start, self.added_a = sampler, step, partition.class_start, added_a
        own, size = range(partition.class_start, partition.class_start + partition.num_local_classes), sampler.cell_size
        first, last = own.start // size, own.stop // size
        self.whole_cells = range(-(-own.start // size), last)
        self.head = self._straddling(first if own and own.start % size else -1, own)
        self.tail = self._straddling(last if own and own.stop % size and self.head.cell != last else -1, own)
        self.whole_place = len(self.head.rows_b)
        self.tail_place = self.whole_place + len(self.whole_cells) * sampler.draws_per_cell
        self.num_drawn = self.tail_place + len(self.tail.rows_b)

    def between(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64, the rows at the places [start, stop)."""
        if self.whole_place <= start < stop <= self.tail_place:
            return self._of_whole_cells(start - self.whole_place, stop - self.whole_place)
        pieces = [self.head.rows_b[start:stop]]
        whole_start, whole_stop = max(start, self.whole_place), min(stop, self.tail_place)
        if whole_start < whole_stop:
            pieces.append(self._of_whole_cells(whole_start - self.whole_place, whole_stop - self.whole_place))
        for place, rows in ((self.tail_place, self.tail.rows_b), (self.num_drawn, self.added_a)):
            pieces.append(rows[max(start - place, 0) : max(stop - place, 0)])
        return torch.cat(pieces)

    def place_of_draw(self, cell_V: Tensor, draw_V: Tensor) -> Tensor:
        """[V] int64, the place of draw [V] of cell [V], for those that live here; any number for others."""
        place_V = self.whole_place + (cell_V - self.whole_cells.start) * self.sampler.draws_per_cell + draw_V
        for place, straddling in ((0, self.head), (self.tail_place, self.tail)):
            if straddling.cell >= 0:
                inside_V = place + torch.searchsorted(straddling.draws_b, draw_V)
                place_V = torch.where(cell_V == straddling.cell, inside_V, place_V)
        return place_V

    def _of_whole_cells(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64, the rows at these places, counted from the first whole cell."""
        draws = self.sampler.draws_per_cell
        skipped = start // draws
        cells = self.whole_cells[skipped : -(-stop // draws)]
        cells_c = torch.arange(cells.start, cells.stop, device=self.added_a.device)
        rows_cd = self.sampler.drawn(cells_c, self.step).sub_(self.class_start)
        return rows_cd.flatten()[start - skipped * draws : stop - skipped * draws]

    def _straddling(self, cell: int, own: range) -> _StraddlingCell:
        """Those of the draws of `cell` that are classes of `own`."""
        drawn = [] if cell < 0 else self.sampler.drawn(torch.tensor([cell], device="cpu"), self.step)[0].tolist()
        kept = [(draw, class_id - own.start) for draw, class_id in enumerate(drawn) if class_id in own]
        draws_and_rows_2b = torch.tensor(kept, dtype=torch.int64, device="cpu").reshape(-1, 2).T.contiguous()
        draws_b, rows_b = draws_and_rows_2b.to(self.added_a.device, non_blocking=True)
        return _StraddlingCell(cell, draws_b, rows_b)


def _added(class_V: Tensor, wanted_V: Tensor, *, static: bool) -> tuple[Tensor, Tensor]:
    """The distinct ones of those classes that are wanted.

    Returns:
        ([a] int64, the classes, or -1; [V] int64, the place among them of each class that is wanted). If static, a = V.
    """
    if not static:
        added_a = torch.unique(class_V[wanted_V])
        return added_a, torch.searchsorted(added_a, class_V)
    class_V = torch.where(wanted_V, class_V, -1)
    sorted_V, order_V = class_V.sort(stable=True)
    first_V = order_V[torch.searchsorted(sorted_V, class_V)]
    number_V = torch.arange(len(class_V), device=class_V.device)
    return torch.where(first_V == number_V, class_V, -1), first_V


def _cell(num_classes: int, sample_rate: float) -> tuple[int, int]:
    """(cell size, draws): whole blocks, unless all the classes together are too few for the rate."""
    block_size = block_size_for(num_classes)
    for cell_size in range(block_size, num_classes, block_size):
        draws = round(sample_rate * cell_size)
        if draws and abs(draws / cell_size - sample_rate) <= _RATE_TOLERANCE * sample_rate:
            return cell_size, draws
    return num_classes, max(1, round(sample_rate * num_classes))
