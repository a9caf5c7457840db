"""Variational prototypes: class centers mixed with the embedding that the class had last.

Deng, Guo, Yang, Lattas and Zafeiriou, "Variational Prototype Learning for Deep Face Recognition", CVPR 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_table import ClassTable, Rows
from partialfc.head.global_batch import GlobalBatch
from partialfc.head.sampling import owned_classes

__all__ = ["PrototypeMemory", "VariationalPrototypes"]

_NEVER = -1


@dataclass(frozen=True)
class VariationalPrototypes:
    """Settings: a class center becomes the direction of (1 - weight) w + weight q, q the last embedding of its class.

    Both w and q are of unit length before they are mixed, and the mixture is normalised like any class center.

    Attributes:
        weight: lambda of the paper, in [0, 1).
        max_age: for how many steps after it was seen an embedding counts.
        start_step: steps done before any of them counts.
    """

    weight: float = 0.15
    max_age: int = 200
    start_step: int = 8000

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.weight < 1:
            raise ValueError(f"{name}.weight is {self.weight}, but must be in [0, 1)")
        for field in ("max_age", "start_step"):
            if getattr(self, field) < 0:
                raise ValueError(f"{name}.{field} is {getattr(self, field)}, but must not be negative")


class PrototypeMemory(ClassTable):
    """The last embedding of each class and the step in which it was seen, on the rank that has the class.

    The age of an embedding is worked out from the step when the class is in play, so that no step touches other rows.
    """

    embedding: Tensor
    seen: Tensor

    def __init__(
        self,
        settings: VariationalPrototypes,
        partition: ClassPartition,
        embedding_dim: int,
        *,
        mesh: ShardMesh,
        like: Tensor,
    ) -> None:
        super().__init__(partition, mesh=mesh)
        self.settings = settings
        shape = (len(partition.local_blocks), partition.block_size)
        self.add("embedding", like.new_zeros((*shape, embedding_dim)))
        self.add("seen", torch.full(shape, _NEVER, dtype=torch.int64, device=like.device))

    def mix(self, centers_nKD: Tensor, rows: Rows, step: int) -> Tensor:
        """The class centers at `rows`, those of classes that were seen lately mixed with their embedding."""
        settings = self.settings
        if step < settings.start_step:
            return centers_nKD
        unit_nKD = F.normalize(centers_nKD, dim=-1)
        seen_n, embedding_nD = self.read("seen", rows), self.read("embedding", rows)
        counts_n = (seen_n != _NEVER) & (step - seen_n <= settings.max_age)
        weight_n11 = settings.weight * counts_n.to(unit_nKD.dtype)[:, None, None]
        return (1 - weight_n11) * unit_nKD + weight_n11 * embedding_nD[:, None]

    @torch.no_grad()
    def update(self, batch: GlobalBatch, step: int) -> None:
        """Remembers the embeddings of a step; of a class that occurs several times, the last of the global batch."""
        cases, classes = owned_classes(batch.labels_V, self.partition)
        classes_u, which = torch.unique(classes, return_inverse=True)
        last_u = torch.zeros_like(classes_u).scatter_reduce(0, which, cases, "amax")
        embedding_uD = F.normalize(batch.embeddings_BD[last_u // batch.labels_per_row])
        self.write("embedding", classes_u, embedding_uD)
        self.write("seen", classes_u, torch.full_like(classes_u, step))
