"""The auxiliary terms of `partialfc.margins`, sharded: centers by class, pairs by row.

Shapes: B rows of the global batch, b those of this rank, u different classes of the batch on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.distributed.collectives import sum_over_shards
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_table import ClassTable
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.sampling import owned_classes
from partialfc.margins.auxiliary import Auxiliary, CenterTerm, Kind, PairTerm

__all__ = ["AuxiliaryTerm", "build_auxiliaries"]


class AuxiliaryTerm(nn.Module):
    """What the head asks of a term of any kind.

    Attributes:
        name: what it is called where its value is shown.
        weight: the factor on it.
    """

    name: str
    weight: float

    def value(self, embeddings_BD: Tensor, batch: GlobalBatch) -> Tensor:
        """The term without its weight, a scalar, the same on all ranks.

        Gradients of different ranks for `embeddings_BD` are parts of a sum.
        """
        raise NotImplementedError

    def update(self, batch: GlobalBatch) -> None:
        """Moves what the term has of its own, after a step with a finite loss."""


class _Centers(AuxiliaryTerm):
    """A center for every class, on the rank that has the class. One all-reduce for the value, none for the update."""

    def __init__(
        self, term: CenterTerm, partition: ClassPartition, embedding_dim: int, mesh: ShardMesh, like: Tensor
    ) -> None:
        super().__init__()
        self.term, self.mesh = term, mesh
        self.centers = ClassTable(partition, mesh=mesh)
        shape = (len(partition.local_blocks), partition.block_size, embedding_dim)
        self.centers.add("weight", like.new_zeros(shape))

    def value(self, embeddings_BD: Tensor, batch: GlobalBatch) -> Tensor:
        rows, classes = owned_classes(batch.labels_V, self.centers.partition)
        terms = self.term.row_terms(embeddings_BD[rows], self.centers.read("weight", classes))
        return sum_over_shards(terms.sum(), self.mesh, what=self.name) / batch.num_valid_rows.clamp(min=1)

    @torch.no_grad()
    def update(self, batch: GlobalBatch) -> None:
        rows, classes = owned_classes(batch.labels_V, self.centers.partition)
        classes_u, which = torch.unique(classes, return_inverse=True)
        centers_uD = self.centers.read("weight", classes_u)
        pull_rD = centers_uD[which] - batch.embeddings_BD[rows]
        # Of the ways to add up rows, the one that does so in the same order each time on a GPU.
        pull_uD = torch.zeros_like(centers_uD).index_put_((which,), pull_rD, accumulate=True)
        count_u = torch.zeros_like(classes_u).index_put_((which,), torch.ones_like(which), accumulate=True)
        self.centers.write("weight", classes_u, self.term.moved(centers_uD, pull_uD, count_u, batch.num_valid_rows))


class _Pairs(AuxiliaryTerm):
    """Pairs of this rank's rows with all rows; those of the other ranks are theirs. One all-reduce."""

    def __init__(
        self, term: PairTerm, partition: ClassPartition, embedding_dim: int, mesh: ShardMesh, like: Tensor
    ) -> None:
        super().__init__()
        self.term, self.mesh = term, mesh

    def value(self, embeddings_BD: Tensor, batch: GlobalBatch) -> Tensor:
        x_BD = F.normalize(embeddings_BD) if self.term.normalize else embeddings_BD
        distance_bB: Tensor = _Distance.apply(x_BD[batch.own], x_BD)
        labels_B, valid_B, own = batch.labels_V, batch.valid_V, batch.own
        place_B = torch.arange(len(labels_B), device=labels_B.device)
        both_bB = valid_B[own, None] & valid_B & (place_B[own, None] != place_B)
        equal_bB = labels_B[own, None] == labels_B
        sums = self.term.sums(distance_bB, both_bB & equal_bB, both_bB & ~equal_bB)
        return self.term.value(sum_over_shards(sums, self.mesh, what=self.name))


class _Distance(torch.autograd.Function):
    """Euclidean distances [b, D], [B, D] -> [b, B]; the gradient of a distance of 0 is 0.

    Forward does not go by way of a matrix product, which would leave only rounding noise of rows that are near each
    other. Backward does: that of `torch.cdist` makes a buffer [b, B, D] on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_bD: Tensor, y_BD: Tensor) -> Tensor:
        distance_bB = torch.cdist(x_bD, y_BD, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x_bD, y_BD, distance_bB)
        return distance_bB

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_bD, y_BD, distance_bB = ctx.saved_tensors
        share_bB = torch.where(distance_bB > 0, gradients[0] / distance_bB, 0.0)
        x_gradient_bD = share_bB.sum(1)[:, None] * x_bD - share_bB @ y_BD
        y_gradient_BD = share_bB.sum(0)[:, None] * y_BD - share_bB.T @ x_bD
        return x_gradient_bD, y_gradient_BD


_KINDS: dict[Kind, Callable[..., AuxiliaryTerm]] = {"centers": _Centers, "pairs": _Pairs}


def build_auxiliaries(
    terms: Sequence[Auxiliary], partition: ClassPartition, embedding_dim: int, *, mesh: ShardMesh, like: Tensor
) -> list[AuxiliaryTerm]:
    """The sharded form of `terms`; what they store is of the dtype and on the device of `like`."""
    modules = []
    for number, term in enumerate(terms):
        sharded = _KINDS[term.kind](term, partition, embedding_dim, mesh, like)
        name = type(term).__name__
        again = sum(type(other) is type(term) for other in terms[:number])
        sharded.name, sharded.weight = f"{name}_{again + 1}" if again else name, term.weight
        modules.append(sharded)
    return modules
