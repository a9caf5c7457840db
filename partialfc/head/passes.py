"""The two passes of a step over the class centers in play. Nothing of size [V, n] is ever there.

The first pass adds up, for each row, what its negatives amount to, and which way they pull the embedding: for that one
needs no second look, since the pull of each negative is that of its exponential, divided by the sum at the end. The
second pass, when the loss is known, works out the same products once more, and moves the centers of the tile at once.

Shapes: see `tiles.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.collectives import sum_over_shards_
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.negatives import Negatives
from partialfc.head.products import Products
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.sharded_loss import log_weights
from partialfc.head.tiles import Tile, add_at_, columns_in, tiles
from partialfc.kernels.exponentials import exponentials_
from partialfc.margins.base import Aggregate

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["NegativeSums", "Pass", "SecondPass"]


@dataclass
class NegativeSums:
    """What the first pass adds up, over this rank's classes.

    Attributes:
        shift_V: of a sum of exponentials: it is that of exp(logit - shift); -inf where there is no class.
        sum_V: of exponentials, or of what each class costs.
        pull_VD: sum of gradient by product, times class center; None if it was not asked for.
        num_filtered: negatives of valid rows that were left out, a scalar, if there is a threshold.
    """

    shift_V: Tensor
    sum_V: Tensor
    pull_VD: Tensor | None
    num_filtered: Tensor | None = None


@dataclass(frozen=True)
class SecondPass:
    """What the second pass has to know of each row.

    Attributes:
        shift_V: the log of the sum over all classes of exp(logit); inf for a row that pulls at no negative.
        factor_V: derivative of the loss by that log, or by the sum of what each class costs.
        own_gradient_V: derivative of the loss by the product with the own class center.
    """

    shift_V: Tensor
    factor_V: Tensor
    own_gradient_V: Tensor


class Pass:
    """The classes in play as `negatives` sees them.

    Args:
        head: whose class centers.
        batch: the rows.
        in_play: the classes, with the places of the labels of all replicas.
        negatives: what becomes of products.
        aggregate: what is added up.
        bounded: logits need no shift.
    """

    def __init__(
        self,
        head: PartialFC,
        batch: GlobalBatch,
        in_play: ClassesInPlay,
        negatives: Negatives,
        *,
        aggregate: Aggregate,
        bounded: bool,
    ) -> None:
        self.head, self.batch, self.negatives = head, batch, negatives
        self.in_play, self._positives = in_play.of_cases(batch.here), in_play
        self.aggregate, self.needs_shift = aggregate, aggregate is Aggregate.LOGSUMEXP and not bounded
        self.products = Products(head.matmul_dtype, head.class_centers.workspace)
        # Not in the workspace: others use that between the two passes.
        self._operand_VD = negatives.operand_VD.to(head.matmul_dtype or negatives.operand_VD.dtype)

    def first(self, *, with_pull: bool) -> NegativeSums:
        """Adds everything up; the parameters' part is in `negatives.parameter_sums`."""
        operand_VD = self.negatives.operand_VD
        shape, start = operand_VD.shape[:1], -math.inf if self.needs_shift else 0.0
        pull_VD = torch.zeros_like(operand_VD) if with_pull else None
        sums = NegativeSums(operand_VD.new_full(shape, start), operand_VD.new_zeros(shape), pull_VD)
        if self.head.interclass_filtering_threshold is not None:
            sums.num_filtered = torch.zeros((), dtype=torch.int64, device=operand_VD.device)
        for tile in tiles(self.head, self.in_play, len(operand_VD)):
            logits_Vc, winner_Vc, columns_VP = self._logits(tile, sums)
            if self.needs_shift:
                self._raise_shift(sums, logits_Vc)
            log_weight_c = self._log_weights(tile)
            shift_V = torch.where(sums.shift_V == -math.inf, 0.0, sums.shift_V)
            cost_V, gradient_Vc = _COSTS[self.aggregate](logits_Vc, shift_V, columns_VP, log_weight_c, None)
            sums.sum_V += cost_V
            if sums.pull_VD is not None:
                gradient_Vm = self._by_subcenter(self.negatives.pull_back(gradient_Vc), winner_Vc, tile)
                unit_mD = self.products.operand(tile.unit_cKD.flatten(0, 1), "centers operand")
                self.products.add_(sums.pull_VD, gradient_Vm, unit_mD)
        return sums

    def second(self, rows: SecondPass, learning_rate: float) -> None:
        """Moves the class centers, and their biases, by the gradient of the loss.

        Where there are replicas, gradients are summed over them, a tile at a time: of the same classes on all.
        """
        head = self.head
        step: dict[str, Any] = {"learning_rate": learning_rate, "step": head.step}
        own_gradient_V1 = rows.own_gradient_V[:, None]
        for tile in tiles(head, self.in_play, len(own_gradient_V1)):
            logits_Vc, winner_Vc, columns_VP = self._logits(tile, None)
            log_weight_c = self._log_weights(tile)
            terms = _COSTS[self.aggregate](logits_Vc, rows.shift_V, columns_VP, log_weight_c, rows.factor_V)
            gradient_Vc = self.negatives.pull_back(terms[1])
            add_at_(gradient_Vc, columns_in(tile, self.in_play)[:, None], own_gradient_V1)
            if head.class_bias is not None:
                # Where classes have a bias, that is a number: see `negatives_of`.
                bias_c = self._over_replicas_(gradient_Vc.sum(0) * self.negatives.unit_logit, "class biases")
                before_c11 = head.class_bias.read_rows(tile.rows)
                head.class_bias.step_(tile.rows, before_c11, bias_c.view(-1, 1, 1), **step)
            gradient_Vm = tile.scale_(self._by_subcenter(gradient_Vc, winner_Vc, tile))
            by_unit_mD = self.products.transposed(gradient_Vm, self._operand_VD, "centers gradient")
            gradient_cKD = tile.raw_gradient(by_unit_mD.view_as(tile.raw_cKD))
            self._over_replicas_(gradient_cKD, "class centers")
            head.class_centers.step_(tile.rows, tile.raw_cKD, gradient_cKD, place=tile.start, **step)
        head.class_centers.end_step(learning_rate=learning_rate, step=head.step)

    def _over_replicas_(self, gradient: Tensor, what: str) -> Tensor:
        return sum_over_shards_(gradient, self.head.mesh.replicas, what=f"gradient of {what} of replicas")

    def _logits(self, tile: Tile, sums: NegativeSums | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits [V, c], the nearest sub-centers [V, c] if there are several, the columns that are no negatives."""
        num_labels, num_subcenters = self.batch.labels_per_row, tile.raw_cKD.shape[1]
        products = self.products.logits(self.negatives.operand_VD, tile.unit_cKD.flatten(0, 1), "logits")
        winner_Vc = None
        if num_subcenters > 1:
            products, winner_Vc = products.unflatten(1, (-1, num_subcenters)).max(2)
        if self.head.class_bias is not None:
            bias_c = self.head.class_bias.read_rows(tile.rows).flatten()
            unit_logit = self.negatives.unit_logit
            products += bias_c * (unit_logit[:, None] if isinstance(unit_logit, Tensor) else unit_logit)
        column_BP = columns_in(tile, self.in_play).unflatten(0, (-1, num_labels))
        columns_VP = column_BP.repeat_interleave(num_labels, 0) if num_labels > 1 else column_BP
        filtered_Vc = self._filtered(products, columns_VP, sums)
        logits_Vc = self.negatives.logits(products)
        if self.needs_shift:
            add_at_(logits_Vc, columns_VP, -math.inf)
        if filtered_Vc is not None:
            logits_Vc.masked_fill_(filtered_Vc, -math.inf)
        return logits_Vc, winner_Vc, columns_VP

    def _filtered(self, products_Vc: Tensor, columns_VP: Tensor, sums: NegativeSums | None) -> Tensor | None:
        threshold = self.head.interclass_filtering_threshold
        if threshold is None:
            return None
        unit_logit = self.negatives.unit_logit
        limit = threshold * (unit_logit[:, None] if isinstance(unit_logit, Tensor) else unit_logit)
        padded = torch.zeros((len(products_Vc), products_Vc.shape[1] + 1), dtype=torch.bool, device=products_Vc.device)
        own_Vc = padded.scatter_(1, torch.where(columns_VP < 0, padded.shape[1] - 1, columns_VP), True)[:, :-1]
        filtered_Vc = (products_Vc > limit) & ~own_Vc
        if sums is not None and sums.num_filtered is not None:
            sums.num_filtered += (filtered_Vc & self.batch.valid_V[:, None]).sum()
        return filtered_Vc

    def _log_weights(self, tile: Tile) -> Tensor | None:
        if not self.head.corrects_sampling:
            return None
        return log_weights(columns_in(tile, self._positives), len(tile.raw_cKD), self._positives, tile.unit_cKD.dtype)

    def _raise_shift(self, sums: NegativeSums, logits_Vc: Tensor) -> None:
        """Raises the shift to the largest logit so far, and what was added up becomes less in proportion."""
        shift_V = torch.maximum(sums.shift_V, logits_Vc.amax(1))
        ratio_V = torch.where(shift_V == -math.inf, 1.0, (sums.shift_V - shift_V).exp())
        sums.shift_V, sums.sum_V = shift_V, sums.sum_V * ratio_V
        if sums.pull_VD is not None:
            sums.pull_VD *= ratio_V[:, None]
        for name, sum_V in self.negatives.parameter_sums.items():
            self.negatives.parameter_sums[name] = sum_V * ratio_V

    def _by_subcenter(self, gradient_Vc: Tensor, winner_Vc: Tensor | None, tile: Tile) -> Tensor:
        """[V, c K], all of it at the nearest sub-center of each class."""
        if winner_Vc is None:
            return gradient_Vc
        spread = gradient_Vc.new_zeros((*gradient_Vc.shape, tile.raw_cKD.shape[1]))
        return spread.scatter_(2, winner_Vc[..., None], gradient_Vc[..., None]).flatten(1)


def _exponentials(
    logits_Vc: Tensor, shift_V: Tensor, columns_VP: Tensor, log_weight_c: Tensor | None, factor_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of exp(logit - shift), and the derivatives of that by the logits, in their place; times a factor."""
    weights = {"log_weight_c": log_weight_c, "factor_V": factor_V}
    return exponentials_(logits_Vc, shift_V=shift_V, columns_VP=columns_VP, **weights), logits_Vc


def _softpluses(
    logits_Vc: Tensor, shift_V: Tensor, columns_VP: Tensor, log_weight_c: Tensor | None, factor_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of log(1 + exp(logit)), and the derivatives of that by the logits, times a factor."""
    add_at_(logits_Vc, columns_VP, -math.inf)
    # The default threshold of 20 would cost 2e-9.
    terms_Vc, slopes_Vc = F.softplus(logits_Vc, threshold=50), logits_Vc.sigmoid_()
    if log_weight_c is not None:
        terms_Vc, slopes_Vc = terms_Vc * log_weight_c.exp(), slopes_Vc.mul_(log_weight_c.exp())
    return terms_Vc.sum(1), slopes_Vc if factor_V is None else slopes_Vc.mul_(factor_V[:, None])


_COSTS: dict[Aggregate, Callable[..., tuple[Tensor, Tensor]]] = {
    Aggregate.LOGSUMEXP: _exponentials,
    Aggregate.SOFTPLUS_SUM: _softpluses,
}
