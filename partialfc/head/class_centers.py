"""This rank's class centers and the state of their optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_table import ClassTable
from partialfc.head.optimizers import CenterOptimizer
from partialfc.keyed import hash64

__all__ = ["ClassCenters"]

_INITIALISATION_STREAM = 1  # keeps these hashes apart from those of other parts that use the same seed


class ClassCenters(ClassTable):
    """A matrix of K rows of D numbers for each class, learnable, and what its optimizer remembers of each row.

    Args:
        partition: which classes live here.
        row_shape: (K, D).
        optimizer: moves the rows.
        mesh: the ranks over which the classes are sharded.
        seed: block k is drawn from N(0, init_std^2) by a generator keyed by (seed, k), whatever rank owns it.
        init_std: standard deviation of each element.
        dtype: float32 or float64.
        device: where the matrix lives.
    """

    weight: Tensor

    def __init__(
        self,
        partition: ClassPartition,
        row_shape: tuple[int, int],
        *,
        optimizer: CenterOptimizer,
        mesh: ShardMesh,
        seed: int,
        init_std: float,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(partition, mesh=mesh)
        self.optimizer = optimizer
        shape = (len(partition.local_blocks), partition.block_size, *row_shape)
        weight = torch.zeros(shape, dtype=dtype, device=device)
        for index, block in enumerate(partition.local_blocks if init_std else ()):
            # Drawn on the CPU in float32, so that neither device nor dtype changes a run.
            generator = torch.Generator().manual_seed(hash64(seed, _INITIALISATION_STREAM, block))
            weight[index] = init_std * torch.randn(shape[1:], generator=generator)
        self.add("weight", weight)
        for name, value in optimizer.initial_state(weight).items():
            self.add(name, value)

    def select(self, rows: Tensor | None) -> Tensor:
        """[n, K, D], the centers at `rows`, or a view of all of this rank's if None."""
        return self.read("weight", rows)

    @torch.no_grad()
    def update(self, rows: Tensor | None, gradient_nKD: Tensor, *, learning_rate: float) -> None:
        """Moves the centers at `rows` (distinct; None for all) by one step of the optimizer.

        Args:
            rows: [n] int64, local.
            gradient_nKD: [n, K, D], of the loss.
            learning_rate: of this step.
        """
        before = {name: self.read(name, rows) for name in self._names}
        weight = before.pop("weight")
        weight, state = self.optimizer.update(weight, gradient_nKD, before, learning_rate=learning_rate)
        for name, after in {"weight": weight, **state}.items():
            self.write(name, rows, after)

    def gather(self) -> Tensor:
        """[num_classes, K, D] on every rank, a copy. Collective."""
        return self.gather_all("weight")

    @torch.no_grad()
    def set(self, centers: Tensor) -> None:
        """Takes this rank's rows of `centers` [num_classes, K, D]; optimizer state starts anew."""
        assert centers.shape == (self.partition.num_classes, *self.weight.shape[2:])
        start = self.partition.class_start
        self.write("weight", None, centers[start : start + self.partition.num_local_classes])
        for name, value in self.optimizer.initial_state(self.weight).items():
            getattr(self, name).copy_(value)
