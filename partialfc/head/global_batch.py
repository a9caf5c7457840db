"""The global batch on every rank, whatever the sizes of the local ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.distributed.collectives import all_gather_equal
from partialfc.distributed.mesh import ShardMesh

__all__ = ["BatchGather", "GlobalBatch"]


@dataclass(frozen=True)
class GlobalBatch:
    """B rows: `capacity` slots for each rank in turn, some of them empty.

    Attributes:
        embeddings_BD: [B, D]; ones in rows that are not valid, so that no function of them is singular.
        labels_B: [B] int64, -1 in empty slots.
        valid_B: [B] bool: neither empty nor masked.
        number_B: [B] int64: how many filled slots come before; the row's number whatever the ranks' sizes.
        own: the slots filled by this rank.
    """

    embeddings_BD: Tensor
    labels_B: Tensor
    valid_B: Tensor
    number_B: Tensor
    own: slice


class BatchGather:
    """Gathers local batches, padded to a capacity that all ranks agree on, with two collectives a step.

    Each rank sends the size of its batch in front of its labels. So all of them see at once if one has outgrown the
    capacity; then they raise it alike and send the labels again. It never shrinks: sizes vary at the end of a run.
    """

    def __init__(self, mesh: ShardMesh) -> None:
        self.mesh = mesh
        self.capacity = 0

    def __call__(self, embeddings_bD: Tensor, labels_b: Tensor, *, num_classes: int) -> GlobalBatch:
        """Gathers embeddings [b, D] and labels [b] of all ranks, which may differ in b.

        Raises:
            ValueError: on every rank alike, if a label of any rank is neither in [0, num_classes) nor -1.
        """
        sizes, labels = self._gather_labels(labels_b)
        _check_labels(labels, sizes, num_classes)
        filled = torch.arange(self.capacity, device=labels.device) < sizes[:, None]
        labels_B, filled_B = labels.flatten(), filled.flatten()
        valid_B = labels_B >= 0

        padded = embeddings_bD.new_ones((self.capacity, embeddings_bD.shape[1]))
        padded[: len(embeddings_bD)] = embeddings_bD
        embeddings_BD = torch.where(valid_B[:, None], all_gather_equal(padded, self.mesh), 1.0)
        start = self.mesh.rank * self.capacity
        return GlobalBatch(
            embeddings_BD, labels_B, valid_B, filled_B.cumsum(0) - 1, slice(start, start + len(embeddings_bD))
        )

    def _gather_labels(self, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """(sizes [W], labels [W, capacity])."""
        while True:
            message = labels_b.new_full((1, 1 + self.capacity), -1)
            message[0, 0] = len(labels_b)
            count = min(len(labels_b), self.capacity)
            message[0, 1 : 1 + count] = labels_b[:count]
            messages = all_gather_equal(message, self.mesh)
            largest = int(messages[:, 0].max())
            if largest <= self.capacity:
                return messages[:, 0], messages[:, 1:]
            self.capacity = largest


def _check_labels(labels: Tensor, sizes: Tensor, num_classes: int) -> None:
    bad = (labels < -1) | (labels >= num_classes)
    if not bool(bad.any()):
        return
    rank, position = (int(number) for number in bad.nonzero()[0])
    raise ValueError(
        f"labels[{position}] on rank {rank} is {int(labels[rank, position])}, but must be in [0, {num_classes}), or -1 "
        f"to mask the row; {int(bad.sum())} of {int(sizes.sum())} labels of this batch are out of range. "
        "Check num_classes against the data."
    )
