"""The auxiliary terms of `partialfc.margins`, sharded: centers by class, pairs by row.

Shapes: B rows of the global batch, b those of this rank, u different classes of the batch on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.distributed.collectives import sum_over_shards
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_table import ClassTable
from partialfc.head.global_batch import GlobalBatch
from partialfc.margins.auxiliary import Auxiliary, CenterTerm, Kind, PairTerm

__all__ = ["AuxiliaryTerm", "build_auxiliary", "owned_rows"]


def owned_rows(labels_B: Tensor, partition: ClassPartition) -> tuple[Tensor, Tensor]:
    """(which rows of the batch have their class on this rank, [r] int64; the local row of each one's class, [r])."""
    local_B = labels_B - partition.class_start
    rows = ((local_B >= 0) & (local_B < partition.num_local_classes)).nonzero()[:, 0]
    return rows, local_B[rows]


class AuxiliaryTerm(nn.Module):
    """What the head asks of a term of any kind.

    Attributes:
        weight: the factor on it.
    """

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
        self.centers = _CenterTable(partition, embedding_dim, mesh, like)

    def value(self, embeddings_BD: Tensor, batch: GlobalBatch) -> Tensor:
        rows, classes = owned_rows(batch.labels_V, self.centers.partition)
        terms = self.term.row_terms(embeddings_BD[rows], self.centers.rows(classes))
        return sum_over_shards(terms.sum(), self.mesh) / batch.num_valid_rows.clamp(min=1)

    @torch.no_grad()
    def update(self, batch: GlobalBatch) -> None:
        rows, classes = owned_rows(batch.labels_V, self.centers.partition)
        classes_u, which = torch.unique(classes, return_inverse=True)
        centers_uD = self.centers.rows(classes_u)
        pull_uD = torch.zeros_like(centers_uD).index_add_(0, which, centers_uD[which] - batch.embeddings_BD[rows])
        count_u = torch.zeros_like(centers_uD[:, 0]).index_add_(0, which, torch.ones_like(which, dtype=pull_uD.dtype))
        self.centers.set_rows(classes_u, self.term.moved(centers_uD, pull_uD, count_u, batch.num_valid_rows))


class _CenterTable(ClassTable):
    def __init__(self, partition: ClassPartition, embedding_dim: int, mesh: ShardMesh, like: Tensor) -> None:
        super().__init__(partition, mesh=mesh)
        self._register("weight", like.new_zeros((len(partition.local_blocks), partition.block_size, embedding_dim)))

    def rows(self, classes: Tensor) -> Tensor:
        return self._select("weight", classes)

    def set_rows(self, classes: Tensor, values: Tensor) -> None:
        self._write("weight", classes, values)

    def gather(self) -> Tensor:
        return self._gather("weight")


class _Pairs(AuxiliaryTerm):
    """Pairs of this rank's rows with all rows; those of the other ranks are theirs. One all-reduce."""

    def __init__(
        self, term: PairTerm, partition: ClassPartition, embedding_dim: int, mesh: ShardMesh, like: Tensor
    ) -> None:
        super().__init__()
        self.term, self.mesh = term, mesh

    def value(self, embeddings_BD: Tensor, batch: GlobalBatch) -> Tensor:
        x_BD = F.normalize(embeddings_BD) if self.term.normalize else embeddings_BD
        # Not by way of a matrix product: of near rows it would leave rounding noise, and of equal ones no gradient.
        distance_bB = torch.cdist(x_BD[batch.own], x_BD, compute_mode="donot_use_mm_for_euclid_dist")
        labels_B, valid_B, own = batch.labels_V, batch.valid_V, batch.own
        place_B = torch.arange(len(labels_B), device=labels_B.device)
        both_bB = valid_B[own, None] & valid_B & (place_B[own, None] != place_B)
        equal_bB = labels_B[own, None] == labels_B
        sums = self.term.sums(distance_bB, both_bB & equal_bB, both_bB & ~equal_bB)
        return self.term.value(sum_over_shards(sums, self.mesh))


_KINDS: dict[Kind, Callable[..., AuxiliaryTerm]] = {"centers": _Centers, "pairs": _Pairs}


def build_auxiliary(
    term: Auxiliary, partition: ClassPartition, embedding_dim: int, *, mesh: ShardMesh, like: Tensor
) -> AuxiliaryTerm:
    """The sharded form of `term`; what it stores is of the dtype and on the device of `like`."""
    sharded = _KINDS[term.kind](term, partition, embedding_dim, mesh, like)
    sharded.weight = term.weight
    return sharded
