"""One training step of the head, as autograd sees it: the loss in forward, the update of all that learns in backward.

Shapes: see `partial_fc.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partialfc.distributed.collectives import start_reduce_scatter
from partialfc.head.autograd_step import autograd_step
from partialfc.head.fused_step import fused_step
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.rows import HeadStep
from partialfc.head.sampling import ClassesInPlay

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["PendingStep", "TrainingStep", "head_step"]


def head_step(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, *, with_gradient: bool) -> HeadStep:
    """The loss and, if asked for, its gradients, by the way that the head goes. Collective."""
    way = fused_step if head.fused else autograd_step
    return way(head, batch, in_play, with_gradient=with_gradient)


@dataclass
class PendingStep:
    """What forward has worked out and backward carries through.

    Attributes:
        steps: bool, a scalar, equal on all ranks: whether anything moves in backward.
    """

    batch: GlobalBatch
    found: HeadStep
    steps: Tensor


def _begin(head: PartialFC, embeddings: Tensor, labels: Tensor) -> PendingStep:
    batch = head.gather_batch(
        embeddings.to(head.dtype), head.label_rows(labels), num_classes=head.partition.num_classes
    )
    in_play = head.classes_in_play(batch.labels_V)
    head.class_centers.begin_step(in_play, head.step)
    found = head_step(head, batch, in_play, with_gradient=True)
    # The loss is the same on all ranks, so they decide alike. Without a row there is nothing to follow but momentum.
    return PendingStep(batch, found, found.loss.isfinite() & (batch.num_valid_rows > 0))


@torch.no_grad()
def _finish(head: PartialFC, pending: PendingStep) -> Tensor:
    """Updates all that the head has; returns the gradient of the loss for this rank's embeddings, [b, D]."""
    batch, found, rate = pending.batch, pending.found, head.learning_rate
    gradients = found.gradients
    assert gradients is not None
    assert found.move_centers is not None
    # Under way while the centers move.
    wait = start_reduce_scatter(gradients.embeddings_BD, head.mesh)
    if bool(pending.steps):
        head.margin_state, head.statistics = found.state, found.statistics
        # A caller may run backward inside of autocast, which would have 16-bit sums.
        with torch.autocast(gradients.embeddings_BD.device.type, enabled=False):
            found.move_centers(rate)
        if head.learned is not None:
            head.learned.update(gradients.learned, learning_rate=rate)
        for term in head.auxiliary_terms:
            term.update(batch)
        if head.prototypes is not None:
            head.prototypes.update(batch, head.step)
    head.step += 1
    head.class_centers.finish_step(head.drawn_next, head.step)
    gradient_bD = wait()[: batch.own.stop - batch.own.start]
    return gradient_bD if gradients.replicated_BD is None else gradient_bD + gradients.replicated_BD[batch.own]


class TrainingStep(torch.autograd.Function):
    """Works out loss and gradients in forward; updates the head and hands the gradient on in backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, anchor: Tensor, head: PartialFC, labels: Tensor) -> Tensor:
        """The loss, a scalar."""
        ctx.head, ctx.dtype = head, embeddings.dtype
        ctx.pending = head.pending = _begin(head, embeddings.detach(), labels)
        return ctx.pending.found.loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the embeddings [b, D].

        Raises:
            RuntimeError: the second time, or if the head has since worked out another loss or got other class centers.
        """
        if ctx.pending is None:
            raise RuntimeError(
                "backward was called twice on one loss of PartialFC: its class centers were updated already"
            )
        if ctx.head.pending is not ctx.pending:
            # The second pass looks at the class centers again: they must be those of the first.
            raise RuntimeError(
                "backward was called on a loss of PartialFC after the head had worked out another one, or was given "
                "other class centers; call it before that, or put both batches into one"
            )
        pending, ctx.pending, ctx.head.pending = ctx.pending, None, None
        # The incoming gradient (a loss scale, the number of ranks) belongs to the embeddings alone.
        return (_finish(ctx.head, pending) * gradients[0]).to(ctx.dtype), None, None, None
