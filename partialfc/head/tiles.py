"""The class centers in play, a tile at a time: so many that what is worked out of them stays in cache.

Shapes: see `partial_fc.py`; c classes of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.head.class_table import Rows
from partialfc.head.sampling import ClassesInPlay
from partialfc.kernels.unit_rows import SMALLEST_NORM

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["ROWS_AT_ONCE", "TILE_NUMBERS", "Tile", "add_at_", "columns_in", "read_tile", "settle", "tiles"]

# Numbers in the centers of a tile and its logits: 2.5 MB in float32, for a CPU's cache; enough to fill a GPU.
TILE_NUMBERS = {"cpu": 5 * 2**17, "cuda": 2**24}
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Tile:
    """Some of the class centers in play.

    Attributes:
        start: the place of the first among the classes in play.
        rows: local.
        raw_cKD: as they are.
        unit_cKD: what embeddings are multiplied with: of length 1, if the margin normalises.
        inverse_norm_cK: of `raw_cKD`, if they were divided by their length and nothing else.
        mixed: (raw, unit) with the graph between them, if it is more than that.
    """

    start: int
    rows: Rows
    raw_cKD: Tensor
    unit_cKD: Tensor
    inverse_norm_cK: Tensor | None = None
    mixed: tuple[Tensor, Tensor] | None = None

    def scale_(self, gradient_Vm: Tensor) -> Tensor:
        """Divides gradients by products by the lengths of the class centers [c K], in place, as `raw_gradient` expects.

        On a gradient [V, c K] that is less work than on one of the class centers.
        """
        return gradient_Vm if self.inverse_norm_cK is None else gradient_Vm.mul_(self.inverse_norm_cK.flatten())

    def raw_gradient(self, gradient_cKD: Tensor) -> Tensor:
        """From the gradient by `unit_cKD`, made of one that was scaled, that by `raw_cKD`, in place where possible."""
        if self.mixed is not None:
            raw, unit = self.mixed
            (found,) = torch.autograd.grad(unit, raw, gradient_cKD)
            return found
        if self.inverse_norm_cK is None:
            return gradient_cKD
        radial_cK = torch.linalg.vecdot(gradient_cKD, self.unit_cKD)
        return gradient_cKD.addcmul_(self.unit_cKD, radial_cK[..., None], value=-1)


def tiles(head: PartialFC, in_play: ClassesInPlay, num_cases: int) -> Iterator[Tile]:
    """All class centers in play. A tile is lost when the next one is asked for."""
    for start, rows in _runs(head, in_play, num_cases):
        yield read_tile(head, rows, start, place=start)


def settle(head: PartialFC, in_play: ClassesInPlay) -> None:
    """Brings the classes in play up to date, if rows move while they are not."""
    if head.class_centers.is_behind:
        for _, rows in _runs(head, in_play, 0):
            head.class_centers.settle(rows)


def _runs(head: PartialFC, in_play: ClassesInPlay, num_cases: int) -> Iterator[tuple[int, slice | Tensor]]:
    """(place of the first, rows) of each tile."""
    num_subcenters, dim = head.class_centers.weight.shape[2:]
    numbers = TILE_NUMBERS["cuda" if head.class_centers.device.type == "cuda" else "cpu"]
    size = max(1, numbers // (num_subcenters * (dim + num_cases)))
    # Whole rows of the vector units of a matrix product.
    size = size if size < 64 else size // 64 * 64
    # Rows of several tiles are worked out at once: it is many small operations however few they are.
    at_once = size * max(1, ROWS_AT_ONCE // size)
    for first in range(0, in_play.count, at_once):
        stop = min(first + at_once, in_play.count)
        rows = in_play.rows_between(first, stop)
        for start in range(first, stop, size):
            end = min(start + size, stop)
            if isinstance(rows, slice):
                yield start, slice(rows.start + start - first, rows.start + end - first)
            else:
                yield start, rows[start - first : end - first]


def read_tile(head: PartialFC, rows: Rows, start: int = 0, place: int | None = None) -> Tile:
    """The class centers at `rows`; `place` as in `ClassCenters.read_rows`."""
    workspace = head.class_centers.workspace
    raw_cKD = head.class_centers.read_rows(rows, place)
    if head.prototypes is not None:
        with torch.enable_grad():
            leaf_cKD = raw_cKD.detach().requires_grad_()
            unit_cKD = F.normalize(head.prototypes.mix(leaf_cKD, rows, head.step), dim=-1)
        return Tile(start, rows, raw_cKD, unit_cKD.detach(), mixed=(leaf_cKD, unit_cKD))
    if not head.margin.normalize_class_centers:
        return Tile(start, rows, raw_cKD, raw_cKD)
    inverse_norm_cK = torch.linalg.vector_norm(raw_cKD, dim=-1).clamp_(min=SMALLEST_NORM).reciprocal_()
    unit_cKD = workspace.get("unit centers", raw_cKD.shape, raw_cKD.dtype, raw_cKD.device)
    torch.mul(raw_cKD, inverse_norm_cK[..., None], out=unit_cKD)
    return Tile(start, rows, raw_cKD, unit_cKD, inverse_norm_cK)


def columns_in(tile: Tile, in_play: ClassesInPlay) -> Tensor:
    """[V] int64, the column of each case's own class in the tile; -1 where it is not there."""
    column_V = in_play.slot_V - tile.start
    inside_V = in_play.owned_V & (column_V >= 0) & (column_V < len(tile.raw_cKD))
    return torch.where(inside_V, column_V, -1)


def add_at_(matrix_Vc: Tensor, columns_VP: Tensor, values_VP: Tensor | float) -> None:
    """Adds values at some columns of each row, in place; -1 is nowhere."""
    values_VP = torch.where(columns_VP >= 0, values_VP, 0.0).to(matrix_Vc.dtype)
    matrix_Vc.scatter_add_(1, columns_VP.clamp(min=0), values_VP)
