"""The global batch on every rank, whatever the sizes of the local ones.

A row may have several labels, up to P. Then each pair of a row and one of its labels is a case of its own for the
loss: V = B P cases, those of a row next to each other. With P = 1 cases are rows.

Where class centers are replicated, each replica has only its own rows of the global batch: then B and V count those,
and U the cases of all replicas, of which it knows the labels. Without replicas, U = V.
"""

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
        labels_U: [U] int64, -1 in empty slots, and for the second and further times that a row has the same label.
        labels_per_row: P.
        valid_U: [U] bool: neither empty nor masked.
        number_U: [U] int64, the case's number whatever the ranks' sizes: filled slots that come before, times P.
        here: the V cases of this replica, of U.
        own: the slots filled by this rank, of B.
    """

    embeddings_BD: Tensor
    labels_U: Tensor
    labels_per_row: int
    valid_U: Tensor
    number_U: Tensor
    here: slice
    own: slice

    @property
    def labels_V(self) -> Tensor:
        """[V], of `labels_U`."""
        return self.labels_U[self.here]

    @property
    def valid_V(self) -> Tensor:
        """[V], of `valid_U`."""
        return self.valid_U[self.here]

    @property
    def number_V(self) -> Tensor:
        """[V], of `number_U`."""
        return self.number_U[self.here]

    @property
    def num_valid_rows(self) -> Tensor:
        """How many rows have a label, over all replicas, a scalar."""
        return self.valid_U.unflatten(0, (-1, self.labels_per_row)).any(1).sum()

    def to_cases(self, rows: Tensor) -> Tensor:
        """[B, ...] -> [V, ...]."""
        return rows if self.labels_per_row == 1 else rows.repeat_interleave(self.labels_per_row, 0)

    def sum_cases(self, cases: Tensor) -> Tensor:
        """[V, ...] -> [B, ...]: the gradient of `to_cases`."""
        return cases if self.labels_per_row == 1 else cases.unflatten(0, (-1, self.labels_per_row)).sum(1)


class BatchGather:
    """Gathers local batches, padded to a capacity that all ranks agree on, with two collectives a step.

    Each rank sends the size of its batch in front of its labels. So all of them see at once if one has outgrown the
    capacity; then they raise it alike and send the labels again. It never shrinks: sizes vary at the end of a run.

    Args:
        mesh: the ranks; where there are replicas, their labels take one more collective.
        dtype: in which embeddings travel; None for their own. All ranks get what has become of them, also of their own,
            so that a run does not depend on the number of ranks.
    """

    def __init__(self, mesh: ShardMesh, *, dtype: torch.dtype | None = None) -> None:
        self.mesh, self.dtype = mesh, dtype
        self.capacity = 0

    def __call__(self, embeddings_bD: Tensor, labels_bP: Tensor, *, num_classes: int) -> GlobalBatch:
        """Gathers embeddings [b, D] and labels [b, P] of all ranks, which may differ in b.

        R rows of all replicas.

        Raises:
            ValueError: on every rank alike, if a label of any rank is neither in [0, num_classes) nor -1.
        """
        sizes_W, labels_WSP = self._gather_labels(labels_bP)
        _check_labels(labels_WSP, sizes_W, num_classes)
        labels_RP = _without_repetitions(labels_WSP.flatten(0, 1))
        filled_R = (torch.arange(self.capacity, device=labels_RP.device) < sizes_W[:, None]).flatten()
        valid_RP, num_labels = labels_RP >= 0, labels_RP.shape[1]
        number_RP = (filled_R.cumsum(0) - 1)[:, None] * num_labels + torch.arange(num_labels, device=labels_RP.device)

        padded = embeddings_bD.new_ones((self.capacity, embeddings_bD.shape[1]), dtype=self.dtype)
        padded[: len(embeddings_bD)] = embeddings_bD
        gathered_BD = all_gather_equal(padded, self.mesh, what="embeddings").to(embeddings_bD.dtype)
        first = self.mesh.replicas.rank * len(gathered_BD)
        rows = slice(first, first + len(gathered_BD))
        embeddings_BD = torch.where(valid_RP[rows].any(1)[:, None], gathered_BD, 1.0)
        start = self.mesh.rank * self.capacity
        return GlobalBatch(
            embeddings_BD,
            labels_RP.flatten(),
            num_labels,
            valid_RP.flatten(),
            number_RP.flatten(),
            here=slice(rows.start * num_labels, rows.stop * num_labels),
            own=slice(start, start + len(embeddings_bD)),
        )

    def _gather_labels(self, labels_bP: Tensor) -> tuple[Tensor, Tensor]:
        """(sizes [W], labels [W, capacity, P])."""
        num_labels = labels_bP.shape[1]
        while True:
            message = labels_bP.new_full((1, 1 + self.capacity * num_labels), -1)
            message[0, 0] = len(labels_bP)
            sent = labels_bP[: self.capacity].flatten()
            message[0, 1 : 1 + len(sent)] = sent
            messages = all_gather_equal(message, self.mesh, what="labels")
            messages = all_gather_equal(messages, self.mesh.replicas, what="labels of replicas")
            largest = int(messages[:, 0].max())
            if largest <= self.capacity:
                return messages[:, 0], messages[:, 1:].unflatten(1, (self.capacity, num_labels))
            self.capacity = largest


def _without_repetitions(labels_BP: Tensor) -> Tensor:
    """Keeps the first of equal labels of a row, and puts -1 for the others."""
    for column in range(1, labels_BP.shape[1]):
        repeated_B = (labels_BP[:, :column] == labels_BP[:, column : column + 1]).any(1)
        labels_BP = labels_BP.clone()
        labels_BP[:, column] = torch.where(repeated_B, -1, labels_BP[:, column])
    return labels_BP


def _check_labels(labels_WSP: Tensor, sizes_W: Tensor, num_classes: int) -> None:
    bad = (labels_WSP < -1) | (labels_WSP >= num_classes)
    if not bool(bad.any()):
        return
    rank, row, column = (int(number) for number in bad.nonzero()[0])
    position = f"{row}, {column}" if labels_WSP.shape[2] > 1 else f"{row}"
    raise ValueError(
        f"labels[{position}] on rank {rank} is {int(labels_WSP[rank, row, column])}, but must be in "
        f"[0, {num_classes}), or -1 to mask the row; {int(bad.sum())} of {int(sizes_W.sum()) * labels_WSP.shape[2]} "
        "labels of this batch are out of range. Check num_classes against the data."
    )
