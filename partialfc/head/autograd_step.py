"""A step by autograd over all logits at once: what `fused_step` does in two passes, as one would write it first.

Shapes: see `partial_fc.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partialfc.distributed.collectives import sum_over_shards
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.rows import HeadStep, RowGradients, auxiliary_loss, case_row, margin_loss, margin_statistics
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.sharded_loss import (
    aggregate_negatives,
    exclude_own_classes,
    log_weights,
    negative_logits,
    similarities,
    target_cosine,
)
from partialfc.head.tiles import settle
from partialfc.margins.base import Aggregate, Need, State

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["autograd_step"]


@dataclass(frozen=True)
class _Leaves:
    """What the loss is differentiated by.

    Attributes:
        embeddings_BD: meet this rank's class centers, so their gradient is a part of a sum over ranks.
        replicated_BD: the same numbers, for what all ranks compute alike: their gradient is already whole.
        centers_nKD: the class centers in play.
        bias_n11: the class biases in play, if the margin has them.
        learned: the learnable numbers of the margin; their gradient is whole.
    """

    embeddings_BD: Tensor
    replicated_BD: Tensor
    centers_nKD: Tensor
    bias_n11: Tensor | None
    learned: dict[str, Tensor]

    @classmethod
    def of(cls, head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay) -> _Leaves:
        """Fresh leaves with the present values."""
        rows, place = in_play.rows, None if in_play.rows is None else 0
        bias = None if head.class_bias is None else head.class_bias.read_rows(rows)
        return cls(
            batch.embeddings_BD.detach().requires_grad_(),
            batch.embeddings_BD.detach().requires_grad_(),
            head.class_centers.read_rows(rows, place).detach().requires_grad_(),
            None if bias is None else bias.detach().requires_grad_(),
            {} if head.learned is None else head.learned.leaves(),
        )


def autograd_step(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, *, with_gradient: bool) -> HeadStep:
    """The loss and, if asked for, its gradients, those of the class centers included. Collective."""
    with torch.no_grad():
        settle(head, in_play)
    with torch.autocast(batch.embeddings_BD.device.type, enabled=False), torch.set_grad_enabled(with_gradient):
        leaves = _Leaves.of(head, batch, in_play)
        mean, state, statistics = _margin_loss(head, batch, in_play, leaves)
        auxiliary, values = auxiliary_loss(head, leaves.embeddings_BD, batch)
        loss = head.loss_weight * (mean + auxiliary)
    state = {name: value.detach() for name, value in state.items()}
    found = HeadStep(loss.detach(), state, statistics | values)
    if not with_gradient:
        return found
    inputs = [leaves.embeddings_BD, leaves.replicated_BD, leaves.centers_nKD, *leaves.learned.values()]
    inputs += [] if leaves.bias_n11 is None else [leaves.bias_n11]
    with torch.autocast(batch.embeddings_BD.device.type, enabled=False):
        embeddings_BD, replicated_BD, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
    centers_nKD, *others = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(inputs[2:], others, strict=True)
    ]
    bias_n11 = None if leaves.bias_n11 is None else others.pop()
    gradients = RowGradients(embeddings_BD, replicated_BD, dict(zip(leaves.learned, others, strict=True)))
    return replace(found, gradients=gradients, move_centers=partial(_move, head, in_play, centers_nKD, bias_n11))


@torch.no_grad()
def _move(
    head: PartialFC, in_play: ClassesInPlay, centers_nKD: Tensor, bias_n11: Tensor | None, learning_rate: float
) -> None:
    rows, place = in_play.rows, None if in_play.rows is None else 0
    for table, gradient in ((head.class_centers, centers_nKD), (head.class_bias, bias_n11)):
        if table is not None and gradient is not None:
            before = table.read_rows(rows, place)
            table.step_(rows, before, gradient, learning_rate=learning_rate, step=head.step, place=place)
    head.class_centers.end_step(learning_rate=learning_rate, step=head.step)


def _margin_loss(
    head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, leaves: _Leaves
) -> tuple[Tensor, State, dict[str, Tensor]]:
    margin, mesh, labels_per_row = head.margin, head.mesh, batch.labels_per_row
    centers_nKD, statistics = leaves.centers_nKD, {}
    if head.prototypes is not None:
        centers_nKD = head.prototypes.mix(centers_nKD, in_play.rows, head.step)
    bias_n = None if leaves.bias_n11 is None else leaves.bias_n11.flatten()
    similarity_Vn = batch.to_cases(similarities(leaves.embeddings_BD, centers_nKD, bias_n, margin))
    target_V = target_cosine(similarity_Vn, in_play, mesh)
    log_weight_n = None
    if head.corrects_sampling:
        column_V = torch.where(in_play.owned_V, in_play.slot_V, -1)
        log_weight_n = log_weights(column_V, similarity_Vn.shape[1], in_play, head.dtype)
    filtered_Vn = None
    if head.interclass_filtering_threshold is not None:
        others_Vn = exclude_own_classes(similarity_Vn.detach().clone(), in_play, labels_per_row)
        filtered_Vn = others_Vn > head.interclass_filtering_threshold
        statistics["filtered_negatives"] = sum_over_shards(
            (filtered_Vn & batch.valid_V[:, None]).sum(), mesh, what="number of filtered negatives"
        )

    def aggregate(which: Aggregate, logits_Vn: Tensor, bounded: bool) -> Tensor:
        # In place: logits are the largest thing there is, and nobody looks at them again.
        logits_Vn = exclude_own_classes(logits_Vn, in_play, labels_per_row)
        logits_Vn = logits_Vn if filtered_Vn is None else logits_Vn.masked_fill_(filtered_Vn, -math.inf)
        return aggregate_negatives(which, logits_Vn, log_weight_n, mesh=mesh, bounded=bounded)

    row = case_row(head, batch, leaves.replicated_BD, target_V.detach(), leaves.learned)
    if Need.NEGATIVE_LOGSUMEXP in margin.needs:
        scale = margin.statistic_scale(head.margin_state).to(head.dtype)
        row = replace(row, negative_logsumexp=aggregate(Aggregate.LOGSUMEXP, scale * similarity_Vn.detach(), False))
    parameters, state = margin.prepare(row, head.margin_state)
    logits_Vn = negative_logits(similarity_Vn, parameters, margin=margin, mesh=mesh)
    negatives_V = aggregate(margin.aggregate, logits_Vn, head.bounded)
    mean = margin_loss(head, target_V, negatives_V, parameters, row, batch)
    return mean, state, statistics | margin_statistics(mean, row)
