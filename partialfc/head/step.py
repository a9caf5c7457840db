"""One training step of the head, as autograd sees it: the loss in forward, the update of all that learns in backward.

Or, where something else has a say in whether the step is made at all, the update comes later, when that is known.

Shapes: see `partial_fc.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partialfc.distributed.collectives import start_reduce_scatter
from partialfc.head.autograd_step import autograd_step
from partialfc.head.checks import check_learning_rate
from partialfc.head.fused_step import fused_step
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.rows import HeadStep
from partialfc.head.sampling import ClassesInPlay
from partialfc.telemetry.profiler import profiled

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = ["PendingStep", "TrainingStep", "finish", "head_step"]


def head_step(head: PartialFC, batch: GlobalBatch, in_play: ClassesInPlay, *, with_gradient: bool) -> HeadStep:
    """The loss and, if asked for, its gradients, by the way that the head goes. Collective."""
    way = fused_step if head.fused else autograd_step
    return way(head, batch, in_play, with_gradient=with_gradient)


@dataclass
class PendingStep:
    """What forward has worked out and backward carries through.

    Attributes:
        steps: bool, a scalar, equal on all ranks: whether anything moves.
    """

    batch: GlobalBatch
    found: HeadStep
    steps: Tensor


def _begin(head: PartialFC, embeddings: Tensor, labels: Tensor) -> PendingStep:
    batch = head.gather_batch(
        embeddings.to(head.dtype), head.label_rows(labels), num_classes=head.partition.num_classes
    )
    in_play = head.classes_in_play(batch.labels_U)
    head.class_centers.begin_step(in_play, head.step)
    found = head_step(head, batch, in_play, with_gradient=True)
    # The loss is the same on all ranks, so they decide alike. Without a row there is nothing to follow but momentum.
    return PendingStep(batch, found, found.loss.isfinite() & (batch.num_valid_rows > 0))


@torch.no_grad()
def finish(head: PartialFC, pending: PendingStep) -> None:
    """Updates all that the head has, if the step is made; it counts in any case."""
    batch, found, rate = pending.batch, pending.found, head.learning_rate
    assert found.gradients is not None
    assert found.move_centers is not None
    with profiled("update of class centers"):
        if bool(pending.steps):
            head.margin_state, head.statistics = found.state, found.statistics
            # A caller may be inside of autocast, which would have 16-bit sums.
            with torch.autocast(found.gradients.embeddings_BD.device.type, enabled=False):
                found.move_centers(rate)
            if head.learned is not None:
                head.learned.update(found.gradients.learned, learning_rate=rate)
            for term in head.auxiliary_terms:
                term.update(batch)
            if head.prototypes is not None:
                head.prototypes.update(batch, head.step)
        head.step += 1
        head.class_centers.finish_step(head.drawn_next, head.step)


@torch.no_grad()
def _hand_out(head: PartialFC, pending: PendingStep) -> Tensor:
    """The gradient of the loss for this rank's embeddings, [b, D]. Collective."""
    batch, gradients = pending.batch, pending.found.gradients
    assert gradients is not None
    with profiled("reduce-scatter of the embedding gradient"):
        parts_BD = gradients.embeddings_BD.to(head.gather_dtype or head.dtype)
        wait = start_reduce_scatter(parts_BD, head.mesh, what="embedding gradient")
        # Under way while the centers move.
        if head.defers_updates:
            head.unfinished = pending
        else:
            finish(head, pending)
        gradient_bD = wait()[: batch.own.stop - batch.own.start].to(head.dtype)
    return gradient_bD if gradients.replicated_BD is None else gradient_bD + gradients.replicated_BD[batch.own]


class TrainingStep(torch.autograd.Function):
    """Works out loss and gradients in forward; updates the head and hands the gradient on in backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, anchor: Tensor, head: PartialFC, labels: Tensor) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: if the learning rate of the head is none.
        """
        check_learning_rate(head.learning_rate)
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
        return (_hand_out(ctx.head, pending) * gradients[0]).to(ctx.dtype), None, None, None
