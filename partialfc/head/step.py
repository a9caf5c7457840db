"""One step of the head: the loss, its gradients with respect to everything that learns, and the update.

Shapes: see `partial_fc.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partialfc.distributed.collectives import reduce_scatter_equal, sum_over_shards
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.sharded_loss import (
    aggregate_negatives,
    exclude_own_classes,
    log_weights,
    negative_logits,
    similarities,
    target_cosine,
)
from partialfc.keyed import normal
from partialfc.margins.base import Aggregate, Need, Row, State, target_similarity

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["HeadLoss", "Leaves", "PendingStep", "TrainingStep", "head_loss"]

_NOISE_STREAM = 3  # keeps these hashes apart from those of other parts that use the same seed


@dataclass(frozen=True)
class Leaves:
    """What the loss is differentiated by; or, from `gradients`, its derivative by each.

    Attributes:
        embeddings_BD: meet this rank's class centers, so their gradient is a part of a sum over ranks.
        replicated_BD: the same numbers, for what all ranks compute alike: their gradient is already whole. A gradient
            of None is zero.
        centers_nKD: the class centers in play.
        bias_n11: the class biases in play, if the margin has them.
        learned: the learnable numbers of the margin; their gradient is whole.
    """

    embeddings_BD: Tensor
    replicated_BD: Tensor | None
    centers_nKD: Tensor
    bias_n11: Tensor | None
    learned: dict[str, Tensor]

    @classmethod
    def of(cls, head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay) -> Leaves:
        """Fresh leaves with the present values."""
        bias = None if head.class_bias is None else head.class_bias.select(in_play.rows)
        return cls(
            batch.embeddings_BD.detach().requires_grad_(),
            batch.embeddings_BD.detach().requires_grad_(),
            head.class_centers.select(in_play.rows).detach().requires_grad_(),
            None if bias is None else bias.detach().requires_grad_(),
            {} if head.learned is None else head.learned.leaves(),
        )

    def gradients(self, loss: Tensor) -> Leaves:
        """Those of `loss`."""
        inputs = [self.embeddings_BD, self.replicated_BD, self.centers_nKD, *self.learned.values()]
        inputs += [] if self.bias_n11 is None else [self.bias_n11]
        found = torch.autograd.grad(loss, [leaf for leaf in inputs if leaf is not None], allow_unused=True)
        embeddings_BD, replicated_BD, *others = found
        centers_nKD, *others = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(inputs[2:], others, strict=True)
        ]
        bias_n11 = None if self.bias_n11 is None else others.pop()
        return Leaves(embeddings_BD, replicated_BD, centers_nKD, bias_n11, dict(zip(self.learned, others, strict=True)))


@dataclass(frozen=True)
class HeadLoss:
    """The loss, a scalar; the margin's next state; numbers to look at, scalars."""

    loss: Tensor
    state: State
    statistics: dict[str, Tensor]


def head_loss(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, leaves: Leaves) -> HeadLoss:
    """The mean margin loss over the valid rows of the batch and the auxiliary terms, with their weights."""
    with torch.autocast(leaves.embeddings_BD.device.type, enabled=False):
        mean, state, statistics = _margin_loss(head, batch, in_play, leaves)
        loss = mean
        for term in head.auxiliary_terms:
            value = term.value(leaves.embeddings_BD, batch)
            statistics[term.name] = value.detach()
            loss = loss + term.weight * value
    return HeadLoss(head.loss_weight * loss, state, statistics)


def _margin_loss(
    head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, leaves: Leaves
) -> tuple[Tensor, State, dict[str, Tensor]]:
    margin, mesh, labels_per_row = head.margin, head.mesh, batch.labels_per_row
    centers_nKD, statistics = leaves.centers_nKD, {}
    if head.prototypes is not None:
        centers_nKD = head.prototypes.mix(centers_nKD, in_play.rows, head.step)
    bias_n = None if leaves.bias_n11 is None else leaves.bias_n11.flatten()
    similarity_Vn = batch.to_cases(similarities(leaves.embeddings_BD, centers_nKD, bias_n, margin))
    target_V = target_cosine(similarity_Vn, in_play, mesh)
    log_weight_n = log_weights(in_play, similarity_Vn.shape[1], head.dtype) if head.corrects_sampling else None
    filtered_Vn = None
    if head.interclass_filtering_threshold is not None:
        others_Vn = exclude_own_classes(similarity_Vn.detach().clone(), in_play, labels_per_row)
        filtered_Vn = others_Vn > head.interclass_filtering_threshold
        statistics["filtered_negatives"] = sum_over_shards((filtered_Vn & batch.valid_V[:, None]).sum(), mesh)

    def aggregate(which: Aggregate, logits_Vn: Tensor, bounded: bool) -> Tensor:
        # In place: logits are the largest thing there is, and nobody looks at them again.
        logits_Vn = exclude_own_classes(logits_Vn, in_play, labels_per_row)
        logits_Vn = logits_Vn if filtered_Vn is None else logits_Vn.masked_fill_(filtered_Vn, -math.inf)
        return aggregate_negatives(which, logits_Vn, log_weight_n, mesh=mesh, bounded=bounded)

    row = _row(head, batch, leaves, target_V.detach())
    if Need.NEGATIVE_LOGSUMEXP in margin.needs:
        scale = margin.statistic_scale(head.margin_state).to(head.dtype)
        row = replace(row, negative_logsumexp=aggregate(Aggregate.LOGSUMEXP, scale * similarity_Vn.detach(), False))
    parameters, state = margin.prepare(row, head.margin_state)
    logits_Vn = negative_logits(similarity_Vn, parameters, margin=margin, mesh=mesh)
    negatives_V = aggregate(margin.aggregate, logits_Vn, head.bounded)
    own_V = margin.logit_scale(parameters) * target_similarity(margin, target_V, parameters)
    loss_V = margin.row_loss(own_V, negatives_V)
    regularizer_V = margin.regularizer(row)
    loss_V = loss_V if regularizer_V is None else loss_V + regularizer_V
    mean = torch.where(batch.valid_V, loss_V, 0.0).sum() / batch.num_valid_rows.clamp(min=1)
    statistics["margin_loss"] = mean.detach()
    if row.embedding_norm is not None:
        norms = torch.where(batch.valid_V, row.embedding_norm.detach(), 0.0)
        statistics["embedding_norm"] = norms.sum() / batch.valid_V.sum().clamp(min=1)
    return mean, state, statistics


def _row(head: PartialFC, batch: GlobalBatch, leaves: Leaves, target_V: Tensor) -> Row:
    """What the margin asks to know of each case, but for sums over classes."""
    norm_V = noise_V = None
    if Need.EMBEDDING_NORM in head.margin.needs:
        assert leaves.replicated_BD is not None
        norm_V = batch.to_cases(leaves.replicated_BD.norm(dim=1))
    if Need.NOISE in head.margin.needs:
        noise_V = normal(head.seed, _NOISE_STREAM, head.step, batch.number_V).to(head.dtype)
    return Row(target_V, batch.valid_V, head.step, norm_V, noise_V, learned=leaves.learned)


@dataclass
class PendingStep:
    """What forward has worked out and backward carries through.

    Attributes:
        steps: bool, a scalar, equal on all ranks: whether anything moves in backward.
    """

    batch: GlobalBatch
    in_play: ClassesInPlay
    loss: Tensor
    gradients: Leaves
    state: State
    statistics: dict[str, Tensor]
    steps: Tensor


def _begin(head: PartialFC, embeddings: Tensor, labels: Tensor) -> PendingStep:
    batch = head.gather_batch(
        embeddings.to(head.dtype), head.label_rows(labels), num_classes=head.partition.num_classes
    )
    in_play = head.classes_in_play(batch.labels_V)
    with torch.enable_grad():
        leaves = Leaves.of(head, batch, in_play)
        found = head_loss(head, batch, in_play, leaves)
        gradients = leaves.gradients(found.loss)
    # A state made from numbers with a gradient would hold on to the graphs of all steps.
    state = {name: value.detach() for name, value in found.state.items()}
    loss = found.loss.detach()
    # The loss is the same on all ranks, so they decide alike. Without a row there is nothing to follow but momentum.
    steps = loss.isfinite() & (batch.num_valid_rows > 0)
    return PendingStep(batch, in_play, loss, gradients, state, found.statistics, steps)


@torch.no_grad()
def _finish(head: PartialFC, pending: PendingStep) -> Tensor:
    """Updates all that the head has; returns the gradient of the loss for this rank's embeddings, [b, D]."""
    batch, rows, gradients, rate = pending.batch, pending.in_play.rows, pending.gradients, head.learning_rate
    gradient_bD = reduce_scatter_equal(gradients.embeddings_BD, head.mesh)[: batch.own.stop - batch.own.start]
    if gradients.replicated_BD is not None:
        gradient_bD = gradient_bD + gradients.replicated_BD[batch.own]
    if bool(pending.steps):
        head.margin_state, head.statistics = pending.state, pending.statistics
        head.class_centers.update(rows, gradients.centers_nKD, learning_rate=rate)
        if head.class_bias is not None and gradients.bias_n11 is not None:
            head.class_bias.update(rows, gradients.bias_n11, learning_rate=rate)
        if head.learned is not None:
            head.learned.update(gradients.learned, learning_rate=rate)
        for term in head.auxiliary_terms:
            term.update(batch)
        if head.prototypes is not None:
            head.prototypes.update(batch, head.step)
    head.step += 1
    return gradient_bD


class TrainingStep(torch.autograd.Function):
    """Works out loss and gradients in forward; updates the head and hands the gradient on in backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, anchor: Tensor, head: PartialFC, labels: Tensor) -> Tensor:
        """The loss, a scalar."""
        ctx.head, ctx.dtype = head, embeddings.dtype
        ctx.pending = head.pending = _begin(head, embeddings.detach(), labels)
        loss: Tensor = ctx.pending.loss.clone()
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the embeddings [b, D].

        Raises:
            RuntimeError: the second time.
        """
        if ctx.pending is None:
            raise RuntimeError(
                "backward was called twice on one loss of PartialFC: its class centers were updated already"
            )
        pending, ctx.pending, ctx.head.pending = ctx.pending, None, None
        # The incoming gradient (a loss scale, the number of ranks) belongs to the embeddings alone.
        return (_finish(ctx.head, pending) * gradients[0]).to(ctx.dtype), None, None, None
