"""One step of the head: the loss, its gradients with respect to everything that learns, and the update.

Shapes: see `partial_fc.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partialfc.distributed.collectives import reduce_scatter_equal, sum_over_shards
from partialfc.head.auxiliary import AuxiliaryTerm
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.sharded_loss import (
    aggregate_negatives,
    log_weights,
    negative_logits,
    own_classes,
    similarities,
    target_similarity,
)
from partialfc.keyed import normal
from partialfc.margins.base import Aggregate, Need, Row, State
from partialfc.margins.base import target_similarity as with_margin

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["HeadLoss", "Leaves", "TrainingStep", "head_loss"]

_NOISE_STREAM = 3  # keeps these hashes apart from those of other parts that use the same seed


@dataclass(frozen=True)
class Leaves:
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
        """Those of `loss`; zeros where it does not depend on something."""
        inputs = [self.embeddings_BD, self.replicated_BD, self.centers_nKD, *self.learned.values()]
        inputs += [] if self.bias_n11 is None else [self.bias_n11]
        embeddings_BD, replicated_BD, centers_nKD, *others = torch.autograd.grad(
            loss, inputs, allow_unused=True, materialize_grads=True
        )
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
        for number, term in enumerate(head.auxiliaries):
            assert isinstance(term, AuxiliaryTerm)
            value = term.value(leaves.embeddings_BD, batch)
            statistics[f"auxiliary_{number}"] = value.detach()
            loss = loss + term.weight * value
        if len(head.auxiliaries):
            statistics["margin_loss"] = mean.detach()
    return HeadLoss(head.loss_weight * loss, state, statistics)


def _margin_loss(
    head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, leaves: Leaves
) -> tuple[Tensor, State, dict[str, Tensor]]:
    margin, mesh = head.margin, head.mesh
    centers_nKD = leaves.centers_nKD
    if head.prototypes is not None:
        centers_nKD = head.prototypes.mix(centers_nKD, in_play.rows, head.step)
    bias_n = None if leaves.bias_n11 is None else leaves.bias_n11.flatten()
    similarity_Vn = batch.to_cases(similarities(leaves.embeddings_BD, centers_nKD, bias_n, margin))
    target_V = target_similarity(similarity_Vn, in_play, mesh)

    num_in_play = similarity_Vn.shape[1]
    log_weight_n = log_weights(in_play, num_in_play, head.dtype) if head.corrects_sampling else None
    excluded_Vn = own_classes(in_play, num_in_play, batch.labels_per_row)
    statistics = {}
    if head.interclass_filtering_threshold is not None:
        filtered_Vn = (similarity_Vn.detach() > head.interclass_filtering_threshold) & ~excluded_Vn
        statistics["filtered_negatives"] = sum_over_shards((filtered_Vn & batch.valid_V[:, None]).sum(), mesh)
        excluded_Vn = excluded_Vn | filtered_Vn

    def aggregate(which: Aggregate, logits_Vn: Tensor, bounded: bool) -> Tensor:
        return aggregate_negatives(which, logits_Vn, excluded_Vn, log_weight_n, mesh=mesh, bounded=bounded)

    norm_V = noise_V = logsumexp_V = None
    if Need.EMBEDDING_NORM in margin.needs:
        norm_V = batch.to_cases(leaves.replicated_BD.norm(dim=1))
    if Need.NOISE in margin.needs:
        noise_V = normal(head.seed, _NOISE_STREAM, head.step, batch.number_V).to(head.dtype)
    if Need.NEGATIVE_LOGSUMEXP in margin.needs:
        scale = margin.statistic_scale(head.margin_state).to(head.dtype)
        logsumexp_V = aggregate(Aggregate.LOGSUMEXP, scale * similarity_Vn.detach(), False)
    row = Row(target_V.detach(), batch.valid_V, head.step, norm_V, noise_V, logsumexp_V, leaves.learned)
    parameters, state = margin.prepare(row, head.margin_state)

    negatives_V = aggregate(
        margin.aggregate, negative_logits(similarity_Vn, parameters, margin=margin, mesh=mesh), head.bounded
    )
    own_V = margin.logit_scale(parameters) * with_margin(margin, target_V, parameters)
    loss_V = margin.row_loss(own_V, negatives_V)
    regularizer_V = margin.regularizer(row)
    loss_V = loss_V if regularizer_V is None else loss_V + regularizer_V
    mean = torch.where(batch.valid_V, loss_V, 0.0).sum() / batch.num_valid_rows.clamp(min=1)
    return mean, state, statistics


@dataclass
class _PendingStep:
    """What forward has worked out and backward carries through."""

    batch: GlobalBatch
    in_play: ClassesInPlay
    loss: Tensor
    gradients: Leaves
    state: State
    statistics: dict[str, Tensor]


def _begin(head: PartialFC, embeddings: Tensor, labels: Tensor) -> _PendingStep:
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
    return _PendingStep(batch, in_play, found.loss.detach(), gradients, state, found.statistics)


@torch.no_grad()
def _finish(head: PartialFC, pending: _PendingStep) -> Tensor:
    """Updates all that the head has; returns the gradient of the loss for this rank's embeddings, [b, D]."""
    batch, rows, gradients, rate = pending.batch, pending.in_play.rows, pending.gradients, head.learning_rate
    gradient_bD = reduce_scatter_equal(gradients.embeddings_BD, head.mesh)[: batch.own.stop - batch.own.start]
    gradient_bD = gradient_bD + gradients.replicated_BD[batch.own]
    # The loss is the same on all ranks, so they decide alike.
    if bool(pending.loss.isfinite()):
        head.margin_state, head.statistics = pending.state, pending.statistics
        head.class_centers.update(rows, gradients.centers_nKD, learning_rate=rate)
        if head.class_bias is not None and gradients.bias_n11 is not None:
            head.class_bias.update(rows, gradients.bias_n11, learning_rate=rate)
        if head.learned is not None:
            head.learned.update(gradients.learned, learning_rate=rate)
        for term in head.auxiliaries:
            assert isinstance(term, AuxiliaryTerm)
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
        ctx.pending = _begin(head, embeddings.detach(), labels)
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
        pending, ctx.pending = ctx.pending, None
        # The incoming gradient (a loss scale, the number of ranks) belongs to the embeddings alone.
        return (_finish(ctx.head, pending) * gradients[0]).to(ctx.dtype), None, None, None
