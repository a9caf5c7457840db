"""The head: class centers sharded over ranks, negatives sampled, any margin, exact softmax, sparse update.

Shapes: B rows of the global batch, b of this rank's, n class centers in play on this rank, D embedding dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.distributed.collectives import reduce_scatter_equal
from partialfc.distributed.mesh import ProcessGroup, ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_centers import ClassCenters
from partialfc.head.global_batch import BatchGather, GlobalBatch
from partialfc.head.optimizers import CenterOptimizer, CenterSGD
from partialfc.head.sampling import ClassesInPlay, NegativeSampler, all_in_play
from partialfc.head.sharded_loss import cosines, negative_logsumexp, rows_loss, target_cosine
from partialfc.keyed import normal
from partialfc.margins.base import Margin, Need, Row, State

__all__ = ["PartialFC"]

_NOISE_STREAM = 3  # keeps these hashes apart from those of other parts that use the same seed


@dataclass
class _PendingStep:
    """What forward has worked out and backward carries through."""

    batch: GlobalBatch
    in_play: ClassesInPlay
    loss: Tensor
    embeddings_gradient_BD: Tensor
    norm_gradient_BD: Tensor | None
    centers_gradient_nD: Tensor | None
    state: State


class PartialFC(nn.Module):
    """Margin softmax over `num_classes` class centers, each rank holding and updating its own share of them.

    Calling it is collective: every rank of `process_group` must call it in the same step, each with its own batch, of
    any size. `loss.backward()` leaves d(mean loss over the global batch) / d(embeddings of this rank), times the
    incoming gradient, in the embeddings' gradient, and moves the class centers in play by one step of `optimizer`
    along the gradient of the loss itself. If the loss is not finite, no center moves, on any rank.

    In `eval()` mode or without gradients, all classes take part and nothing is updated.

    Args:
        num_classes: identities over all ranks, at least 1.
        embedding_dim: D.
        margin: the loss, from `partialfc.margins`.
        sample_rate: share of the classes that take part in a step besides those of the batch, in (0, 1].
        optimizer: how class centers move.
        dtype: float32, or float64 for tests.
        device: where the class centers live.
        seed: of initialisation, sampling and noise; the same on all ranks. None of them depends on their number.
        init_std: standard deviation of the initial elements of class centers.
        process_group: over which the centers are sharded; None for the default group, or for a process on its own if
            torch.distributed is not initialised.

    Attributes:
        learning_rate: of the next update; a schedule may set it before each step.
        step: updates done so far.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: Margin,
        sample_rate: float = 1.0,
        optimizer: CenterOptimizer | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
        init_std: float = 0.01,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(margin, Margin):
            raise ValueError(f"margin is {margin!r}, but must be a margin of partialfc.margins, such as ArcFace()")
        _check_arguments(embedding_dim, sample_rate, dtype, init_std)
        optimizer = CenterSGD() if optimizer is None else optimizer
        self.margin, self.seed = margin, seed
        self.learning_rate = optimizer.learning_rate
        self.step = 0
        self.mesh = ShardMesh.from_group(process_group)
        self.partition = ClassPartition(num_classes, self.mesh.rank, self.mesh.size)
        self.class_centers = ClassCenters(
            self.partition,
            embedding_dim,
            optimizer=optimizer,
            mesh=self.mesh,
            seed=seed,
            init_std=init_std,
            dtype=dtype,
            device=device,
        )
        self.sampler = NegativeSampler(num_classes, sample_rate, seed=seed) if sample_rate < 1 else None
        self._margin_state: State = margin.initial_state()
        self._gather = BatchGather(self.mesh)
        # exp(logit) and its sum over classes must stay finite in float32 for the softmax to do without a maximum.
        bound = margin.logit_bound
        self._bounded = bound is not None and bound + math.log(num_classes) < 88
        # Makes the loss require a gradient even where the embeddings do not: the centers of a frozen backbone train.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the valid rows of the global batch: a scalar, equal on all ranks.

        Args:
            embeddings: [b, D], this rank's, of any floating dtype; the head computes in its own. b may be 0.
            labels: [b] int64, global class ids; -1 masks a row.

        Raises:
            ValueError: if shapes or dtypes are wrong; on every rank, if a label of any rank is out of range.
        """
        self._check_batch(embeddings, labels)
        if self.training and torch.is_grad_enabled():
            loss: Tensor = _TrainingStep.apply(embeddings, self._anchor, self, labels)
            return loss
        batch = self._gather(embeddings.to(self._dtype), labels, num_classes=self.partition.num_classes)
        in_play = all_in_play(batch.labels_B, self.partition)
        with torch.no_grad():
            return self._loss(
                batch, in_play, batch.embeddings_BD, batch.embeddings_BD, self.class_centers.select(None)
            )[0]

    def gather_class_centers(self) -> Tensor:
        """[num_classes, D] on every rank, a copy. Collective."""
        return self.class_centers.gather()

    def set_class_centers(self, centers: Tensor) -> None:
        """Replaces the class centers by `centers` [num_classes, D], the same on every rank; their momentum starts anew.

        Raises:
            ValueError: if the shape is another.
        """
        self.class_centers.set(centers)

    @property
    def _dtype(self) -> torch.dtype:
        return self.class_centers.weight.dtype

    def _loss(
        self,
        batch: GlobalBatch,
        in_play: ClassesInPlay,
        embeddings_BD: Tensor,
        replicated_BD: Tensor,
        centers_nD: Tensor,
    ) -> tuple[Tensor, State]:
        """The mean loss and the margin's next state.

        `embeddings_BD` meet this rank's centers, so their gradient is a part of a sum over ranks; `replicated_BD`, the
        same numbers, only serve what all ranks compute alike, so their gradient is already whole.
        """
        margin, mesh = self.margin, self.mesh
        with torch.autocast(embeddings_BD.device.type, enabled=False):
            cosine_Bn = cosines(embeddings_BD, centers_nD, margin)
            target_B = target_cosine(cosine_Bn, in_play, mesh)
            row = Row(
                target_B.detach(),
                batch.valid_B,
                self.step,
                replicated_BD.norm(dim=1) if Need.EMBEDDING_NORM in margin.needs else None,
                self._noise(batch) if Need.NOISE in margin.needs else None,
            )
            parameters, state = margin.prepare(row, self._margin_state)
            logsumexp_B = negative_logsumexp(
                cosine_Bn, in_play, parameters, row, margin=margin, mesh=mesh, bounded=self._bounded
            )
            loss_B = rows_loss(target_B, logsumexp_B, parameters, row, margin=margin)
            mean = torch.where(batch.valid_B, loss_B, 0.0).sum() / batch.valid_B.sum().clamp(min=1)
        return mean, state

    def _noise(self, batch: GlobalBatch) -> Tensor:
        return normal(self.seed, _NOISE_STREAM, self.step, batch.number_B).to(self._dtype)

    def _begin_step(self, embeddings: Tensor, labels: Tensor) -> _PendingStep:
        batch = self._gather(embeddings.to(self._dtype), labels, num_classes=self.partition.num_classes)
        if self.sampler is None:
            in_play = all_in_play(batch.labels_B, self.partition)
        else:
            in_play = self.sampler.in_play(batch.labels_B, self.partition, self.step)
        with torch.enable_grad():
            embeddings_BD = batch.embeddings_BD.detach().requires_grad_()
            replicated_BD = batch.embeddings_BD.detach().requires_grad_()
            centers_nD = self.class_centers.select(in_play.rows).detach().requires_grad_()
            loss, state = self._loss(batch, in_play, embeddings_BD, replicated_BD, centers_nD)
            through_cosines, through_norms, centers_gradient_nD = torch.autograd.grad(
                loss, (embeddings_BD, replicated_BD, centers_nD), allow_unused=True
            )
        # A state made from numbers with a gradient would hold on to the graphs of all steps.
        state = {name: value.detach() for name, value in state.items()}
        return _PendingStep(batch, in_play, loss.detach(), through_cosines, through_norms, centers_gradient_nD, state)

    def _finish_step(self, pending: _PendingStep) -> Tensor:
        """Updates centers and state; returns the gradient of the mean loss for this rank's embeddings, [b, D]."""
        own, mesh = pending.batch.own, self.mesh
        gradient_bD = reduce_scatter_equal(pending.embeddings_gradient_BD, mesh)[: own.stop - own.start]
        if pending.norm_gradient_BD is not None:
            gradient_bD = gradient_bD + pending.norm_gradient_BD[own]
        # The loss is the same on all ranks, so they decide alike.
        if bool(pending.loss.isfinite()):
            self._margin_state = pending.state
            if pending.centers_gradient_nD is not None:
                self.class_centers.update(
                    pending.in_play.rows, pending.centers_gradient_nD, learning_rate=self.learning_rate
                )
        self.step += 1
        return gradient_bD

    def _check_batch(self, embeddings: Tensor, labels: Tensor) -> None:
        dim = self.class_centers.weight.shape[-1]
        if embeddings.ndim != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
            raise ValueError(
                f"embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}, but must be floating [b, {dim}]"
            )
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}, but must be torch.int64 of shape "
                f"{tuple(embeddings.shape[:1])}, one for each embedding"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """The step and the margin's state, for the state dict."""
        return {"step": self.step, "margin": dict(self._margin_state)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what `get_extra_state` gave.

        Raises:
            ValueError: if the state is that of another margin.
        """
        if state["margin"].keys() != self._margin_state.keys():
            raise ValueError(
                f"the saved margin state has {sorted(state['margin'])}, but {type(self.margin).__name__} has "
                f"{sorted(self._margin_state)}; load it into the margin that it was saved from"
            )
        self.step = int(state["step"])
        self._margin_state = dict(state["margin"])


class _TrainingStep(torch.autograd.Function):
    """Works out loss and gradients in forward; updates the centers and hands the gradient on in backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, anchor: Tensor, head: PartialFC, labels: Tensor) -> Tensor:
        ctx.head, ctx.dtype = head, embeddings.dtype
        ctx.pending = head._begin_step(embeddings.detach(), labels)
        loss: Tensor = ctx.pending.loss.clone()
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.pending is None:
            raise RuntimeError(
                "backward was called twice on one loss of PartialFC: its class centers were updated already"
            )
        pending, ctx.pending = ctx.pending, None
        # The incoming gradient (a loss scale, the number of ranks) belongs to the embeddings alone.
        return (ctx.head._finish_step(pending) * gradients[0]).to(ctx.dtype), None, None, None


def _check_arguments(embedding_dim: int, sample_rate: float, dtype: torch.dtype, init_std: float) -> None:
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim is {embedding_dim}, but must be at least 1")
    if not 0 < sample_rate <= 1:
        raise ValueError(
            f"sample_rate is {sample_rate}, but must be in (0, 1]: the share of classes drawn at each step"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, but class centers are stored in torch.float32 or torch.float64")
    if not init_std > 0:
        raise ValueError(f"init_std is {init_std}, but must be positive")
