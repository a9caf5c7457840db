"""A step in two passes over the class centers in play: loss and embedding gradient, then the update.

Autograd works on numbers of the rows alone, and on tiles where a margin transforms negatives.
Shapes: see `partial_fc.py` and, for replicas, `global_batch.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.collectives import max_over_shards, sum_over_shards, sum_over_shards_
from partialfc.distributed.mesh import ShardMesh
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.negatives import ScaledNegatives, negatives_of
from partialfc.head.passes import NegativeSums, Pass, SecondPass
from partialfc.head.rows import (
    HeadStep,
    RowGradients,
    auxiliary_loss,
    case_row,
    margin_loss,
    margin_statistics,
    row_of_all_replicas,
)
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.tiles import read_tile, settle
from partialfc.margins.base import Aggregate, Need, Parameters, Row, State

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["fused_step"]


@dataclass(frozen=True)
class _Rows:
    """The rows of the batch before they meet a negative.

    Attributes:
        shared_BD: embeddings as they meet this rank's class centers.
        replicated_BD: the same, as all ranks compute alike with them.
        unit_BD: what is multiplied with class centers, of length 1 if the margin normalises, with graph to `shared_BD`.
        own_unit_VD: the nearest center of the own class; 0 if that does not live on this rank.
        own_similarity_V: to it, wherever it lives.
        row: what the margin has been told of this replica's cases.
        row_U: the same of the cases of all replicas.
        learned: the learnable numbers of the margin.
        parameters: of the margin, with graph to `replicated_BD` and `learned`.
        leaves: those of them that have a graph, without it.
        state: of the margin, after the step.
    """

    shared_BD: Tensor
    replicated_BD: Tensor
    unit_BD: Tensor
    own_unit_VD: Tensor
    own_similarity_V: Tensor
    row: Row
    row_U: Row
    learned: dict[str, Tensor]
    parameters: Parameters
    leaves: dict[str, Tensor]
    state: State

    @property
    def separate(self) -> Parameters:
        """The parameters, with the leaves in their place."""
        return {**self.parameters, **self.leaves}


@dataclass(frozen=True)
class _Totals:
    """Sums over the negatives of all ranks.

    Attributes:
        total_V: as `Margin.row_loss` takes it.
        shift_V: as the second pass takes it.
        share_V: d total / d (this rank's sum).
    """

    total_V: Tensor
    shift_V: Tensor
    share_V: Tensor


@torch.no_grad()
def fused_step(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, *, with_gradient: bool) -> HeadStep:
    """The loss and, if asked for, its gradients for all but the class centers. Collective.

    For a margin without `Need.NEGATIVE_LOGSUMEXP`, and a head without further options, three all-reduces at most: of
    the similarity to the own class, of the maximum of the logits if they are not bounded, and of the sums; and one more
    if per-row numbers that carry a gradient enter the logits of negatives. All of them join the shards of one replica;
    what goes between replicas is in `rows.py` and in `Pass.second`.
    """
    with torch.autocast(batch.embeddings_BD.device.type, enabled=False):
        settle(head, in_play)
        rows = _prepare(head, batch, in_play)
        unit_VD, margin = batch.to_cases(rows.unit_BD), head.margin
        with torch.enable_grad():
            has_bias = head.class_bias is not None
            negatives = negatives_of(unit_VD.detach(), margin, rows.separate, rows.leaves, has_bias=has_bias)
        passes = Pass(head, batch, in_play, negatives, aggregate=margin.aggregate, bounded=head.bounded)
        sums = passes.first(with_pull=with_gradient)
        totals = _over_shards(head, sums, passes)
        loss, statistics = _loss(head, batch, rows, totals)
        if sums.num_filtered is not None:
            statistics["filtered_negatives"] = _count_over_all(sums.num_filtered, head)
        # A state made from numbers with a gradient would hold on to the graphs of all steps.
        state = {name: value.detach() for name, value in rows.state.items()}
        found = HeadStep(loss.detach(), state, statistics)
        if not with_gradient:
            return found
        gradients, second = _gradients(head, batch, rows, passes, sums, totals, loss)
        return replace(found, gradients=gradients, move_centers=partial(passes.second, second))


def _prepare(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay) -> _Rows:
    margin = head.margin
    shared_BD, replicated_BD = (batch.embeddings_BD.detach().requires_grad_() for _ in range(2))
    learned = {} if head.learned is None else head.learned.leaves()
    with torch.enable_grad():
        unit_BD = F.normalize(shared_BD) if margin.normalize_embeddings else shared_BD.view_as(shared_BD)
    unit_VD = batch.to_cases(unit_BD.detach())
    own_unit_VD, own_similarity_V = _own(head, batch, in_play, unit_VD)
    with torch.enable_grad():
        # A copy, since the loss is to be differentiated by the similarity and not by what the margin made of it.
        row = case_row(head, batch, replicated_BD, own_similarity_V.clone(), learned)
        if Need.NEGATIVE_LOGSUMEXP in margin.needs:
            row = replace(row, negative_logsumexp=_statistic(head, batch, in_play, unit_VD))
        row_U = row_of_all_replicas(head, batch, row)
        parameters_U, state = margin.prepare(row_U, head.margin_state)
        parameters = dict(parameters_U)
        if row_U is not row:
            parameters = {name: value_U[batch.here] for name, value_U in parameters_U.items()}
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items() if value.requires_grad}
    return _Rows(
        shared_BD, replicated_BD, unit_BD, own_unit_VD, own_similarity_V, row, row_U, learned, parameters, leaves, state
    )


def _own(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, unit_VD: Tensor) -> tuple[Tensor, Tensor]:
    """(the nearest own center [V, D], 0 on ranks that do not have it; the similarity to it [V]). One all-reduce."""
    in_play = in_play.of_cases(batch.here)
    own_unit_VD, similarity_V = torch.zeros_like(unit_VD), unit_VD.new_zeros(len(unit_VD))
    if head.partition.num_local_classes:
        rows_V = torch.where(in_play.owned_V, batch.labels_V - head.partition.class_start, 0)
        unit_VKD = read_tile(head, rows_V).unit_cKD
        similarity_VK = torch.linalg.vecdot(unit_VKD, unit_VD[:, None])
        nearest_V, winner_V = similarity_VK.max(1)
        if head.class_bias is not None:
            nearest_V = nearest_V + head.class_bias.read_rows(rows_V).flatten()
        nearest_VD = unit_VKD.gather(1, winner_V[:, None, None].expand(-1, 1, unit_VD.shape[1]))[:, 0]
        own_unit_VD = torch.where(in_play.owned_V[:, None], nearest_VD, 0.0)
        similarity_V = torch.where(in_play.owned_V, nearest_V, 0.0)
    return own_unit_VD, sum_over_shards(similarity_V, head.mesh, what="similarity to the own class")


def _statistic(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, unit_VD: Tensor) -> Tensor:
    """[V], log of the sum over negatives of exp(similarity), at the scale at which the margin wants it."""
    scale = head.margin.statistic_scale(head.margin_state).to(head.dtype)
    negatives = ScaledNegatives(unit_VD, scale.expand(len(unit_VD)), {})
    passes = Pass(head, batch, in_play, negatives, aggregate=Aggregate.LOGSUMEXP, bounded=False)
    return _over_shards(head, passes.first(with_pull=False), passes).total_V


def _over_shards(head: PartialFC, sums: NegativeSums, passes: Pass) -> _Totals:
    if passes.aggregate is not Aggregate.LOGSUMEXP:
        ones_V = torch.ones_like(sums.sum_V)
        total_V = sum_over_shards(sums.sum_V, head.mesh, what="sum over negatives")
        return _Totals(total_V, torch.zeros_like(ones_V), ones_V)
    shift_V = sums.shift_V
    if passes.needs_shift:
        shift_V = max_over_shards(shift_V, head.mesh, what="maximum of logits")
        shift_V = torch.where(shift_V == -math.inf, 0.0, shift_V)
    sum_V = sums.sum_V * (sums.shift_V - shift_V).exp()
    total_V = shift_V + sum_over_shards(sum_V, head.mesh, what="sum over negatives").log()
    # A row without a single negative has a total of -inf, and pulls at none.
    some_V = total_V > -math.inf
    share_V = torch.where(some_V, (sums.shift_V - total_V).exp(), 0.0)
    return _Totals(total_V, torch.where(some_V, total_V, math.inf), share_V)


def _loss(head: PartialFC, batch: GlobalBatch, rows: _Rows, totals: _Totals) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, with graph to all that is in `rows` and `totals`, and numbers to look at."""
    similarity_V, total_V = rows.own_similarity_V.requires_grad_(), totals.total_V.requires_grad_()
    with torch.enable_grad():
        mean = margin_loss(head, similarity_V, total_V, rows.separate, rows.row, batch)
        auxiliary, statistics = auxiliary_loss(head, rows.shared_BD, batch)
        loss = head.loss_weight * (mean + auxiliary)
    return loss, statistics | margin_statistics(mean, rows.row_U)


def _gradients(
    head: PartialFC,
    batch: GlobalBatch,
    rows: _Rows,
    passes: Pass,
    sums: NegativeSums,
    totals: _Totals,
    loss: Tensor,
) -> tuple[RowGradients, SecondPass]:
    leaves, learned, negatives = rows.leaves, rows.learned, passes.negatives
    inputs = [rows.own_similarity_V, totals.total_V, *leaves.values()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    own_gradient_V, factor_V, *direct = map(_or_zeros, found, inputs)
    share_V = factor_V * totals.share_V
    assert sums.pull_VD is not None
    pull_VD = sums.pull_VD.mul_(share_V[:, None])
    by_negatives = _sum_all(negatives.parameter_gradients(share_V, pull_VD), head.mesh, "parameters of rows")
    whole = [value + by_negatives.get(name, 0.0) for name, value in zip(leaves, direct, strict=True)]

    unit_logit_V = torch.as_tensor(negatives.unit_logit, dtype=pull_VD.dtype, device=pull_VD.device).expand_as(share_V)
    unit_VD = (pull_VD * unit_logit_V[:, None]).addcmul_(rows.own_unit_VD, own_gradient_V[:, None])
    inputs = [rows.shared_BD, rows.replicated_BD, *learned.values()]
    shared_BD, replicated_BD, *others = torch.autograd.grad(
        [loss, rows.unit_BD, *(rows.parameters[name] for name in leaves)],
        inputs,
        [torch.ones_like(loss), batch.sum_cases(unit_VD), *whole],
        allow_unused=True,
    )
    by_learned = dict(zip(learned, map(_or_zeros, others, learned.values()), strict=True))
    by_learned = _sum_all(by_learned, head.mesh.replicas, "learned numbers of replicas")
    # Of the similarity, the product with a class center is `unit_logit_V` times as much.
    own_product_V = torch.where(unit_logit_V == 0, 0.0, own_gradient_V / unit_logit_V)
    return RowGradients(shared_BD, replicated_BD, by_learned), SecondPass(totals.shift_V, factor_V, own_product_V)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _sum_all(parts: dict[str, Tensor], mesh: ShardMesh, what: str) -> dict[str, Tensor]:
    """The sum over ranks of each of some gradients of one shape, in one all-reduce."""
    if not parts or mesh.size == 1:
        return parts
    return dict(
        zip(parts, sum_over_shards_(torch.stack(list(parts.values())), mesh, what=f"gradient of {what}"), strict=True)
    )


def _count_over_all(count: Tensor, head: PartialFC) -> Tensor:
    what = "number of filtered negatives"
    return sum_over_shards_(
        sum_over_shards_(count, head.mesh, what=what), head.mesh.replicas, what=f"{what} of replicas"
    )
