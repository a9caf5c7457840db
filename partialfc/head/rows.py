"""What a step works out of the rows of the batch, the same on all ranks: it meets no class centers.

Shapes: see `partial_fc.py` and, for replicas, `global_batch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partialfc.distributed.collectives import all_gather_equal, sum_over_shards
from partialfc.head.global_batch import GlobalBatch
from partialfc.keyed import normal
from partialfc.margins.base import Margin, Need, Parameters, Row, State, target_similarity

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC

__all__ = [
    "HeadStep",
    "RowGradients",
    "auxiliary_loss",
    "case_row",
    "margin_loss",
    "margin_statistics",
    "row_of_all_replicas",
]

_NOISE_STREAM = 3  # keeps these hashes apart from those of other parts that use the same seed


@dataclass(frozen=True)
class RowGradients:
    """Derivatives of the loss.

    Attributes:
        embeddings_BD: by way of this rank's class centers: a part of a sum over ranks.
        replicated_BD: by way of what all ranks compute alike: whole. None for zero.
        learned: by the learnable numbers of the margin: whole.
    """

    embeddings_BD: Tensor
    replicated_BD: Tensor | None
    learned: dict[str, Tensor]


@dataclass(frozen=True)
class HeadStep:
    """A loss and what follows from it.

    Attributes:
        loss: a scalar, equal on all ranks.
        state: of the margin, after the step.
        statistics: numbers to look at, scalars.
        gradients: by all but the class centers; None if they were not asked for.
        move_centers: moves class centers and their biases by one step along their gradient, at a learning rate.
    """

    loss: Tensor
    state: State
    statistics: dict[str, Tensor]
    gradients: RowGradients | None = None
    move_centers: Callable[[float], None] | None = None


def case_row(
    head: PartialFC, batch: GlobalBatch, replicated_BD: Tensor, target_V: Tensor, learned: Mapping[str, Tensor]
) -> Row:
    """What the margin asks to know of each case, but for sums over classes."""
    norm_V = None
    if Need.EMBEDDING_NORM in head.margin.needs:
        norm_V = batch.to_cases(replicated_BD.norm(dim=1))
    return Row(target_V, batch.valid_V, head.step, norm_V, _noise(head, batch.number_V), learned=learned)


def _noise(head: PartialFC, number: Tensor) -> Tensor | None:
    if Need.NOISE not in head.margin.needs:
        return None
    return normal(head.seed, _NOISE_STREAM, head.step, number).to(head.dtype)


_SHARED = ("target_cosine", "embedding_norm", "negative_logsumexp")


def row_of_all_replicas(head: PartialFC, batch: GlobalBatch, row: Row) -> Row:
    """What the margin asks to know of the cases of all replicas, [U], from what this one knows of its own, [V].

    A graph leads to this replica's own alone: those of the others are theirs. One all-gather over replicas, if there
    are any, and none for a margin that does not look at rows.
    """
    replicas, margin = head.mesh.replicas, head.margin
    if replicas.size == 1 or type(margin).prepare is Margin.prepare:
        return row
    own = {name: value for name in _SHARED if (value := getattr(row, name)) is not None}
    own_kV = torch.stack([value.detach() for value in own.values()])
    all_kU = all_gather_equal(own_kV[None], replicas, what="numbers of rows of replicas").transpose(0, 1).flatten(1)
    start, stop = batch.here.start, batch.here.stop
    shared: dict[str, Any] = {
        name: torch.cat([all_U[:start], value, all_U[stop:]])
        for (name, value), all_U in zip(own.items(), all_kU, strict=True)
    }
    return replace(row, valid=batch.valid_U, noise=_noise(head, batch.number_U), **shared)


def margin_loss(
    head: PartialFC, similarity_V: Tensor, negatives_V: Tensor, parameters: Parameters, row: Row, batch: GlobalBatch
) -> Tensor:
    """The mean over valid rows, from the similarity to the own class and the sum over the negatives of each case.

    One all-reduce over replicas, if there are any.
    """
    margin = head.margin
    own_V = margin.logit_scale(parameters) * target_similarity(margin, similarity_V, parameters)
    loss_V, regularizer_V = margin.row_loss(own_V, negatives_V), margin.regularizer(row)
    loss_V = loss_V if regularizer_V is None else loss_V + regularizer_V
    share = torch.where(batch.valid_V, loss_V, 0.0).sum() / batch.num_valid_rows.clamp(min=1)
    replicas = head.mesh.replicas
    return share if replicas.size == 1 else sum_over_shards(share, replicas, what="loss of replicas")


def auxiliary_loss(head: PartialFC, shared_BD: Tensor, batch: GlobalBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The sum of the auxiliary terms with their weights, and each of them. Collective, if there are any."""
    loss: Tensor | float = 0.0
    values = {}
    for term in head.auxiliary_terms:
        value = term.value(shared_BD, batch)
        values[term.name] = value.detach()
        loss = loss + term.weight * value
    return loss, values


def margin_statistics(mean: Tensor, row: Row) -> dict[str, Tensor]:
    """What there is to see of the margin loss, of the rows of all replicas."""
    statistics = {"margin_loss": mean.detach()}
    if row.embedding_norm is not None:
        norms = torch.where(row.valid, row.embedding_norm.detach(), 0.0)
        statistics["embedding_norm"] = norms.sum() / row.valid.sum().clamp(min=1)
    return statistics
