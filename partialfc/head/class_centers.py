"""This rank's class centers and the state of their optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from partialfc.distributed.collectives import gather_rows
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.optimizers import CenterOptimizer
from partialfc.keyed import hash64

__all__ = ["ClassCenters"]

_INITIALISATION_STREAM = 1  # keeps these hashes apart from those of other parts that use the same seed


class ClassCenters(nn.Module):
    """A block-sharded matrix [num_classes, D], and what its optimizer remembers of each row.

    Stored as [local_blocks, block_size, D]. In the state dict every tensor is a DTensor over blocks, placed as
    `Shard(0)`, so that a checkpoint loads on any number of ranks.

    Args:
        partition: which classes live here.
        embedding_dim: D.
        optimizer: moves the rows.
        mesh: the ranks over which the matrix is sharded.
        seed: block k is drawn from N(0, init_std^2) by a generator keyed by (seed, k), whatever rank owns it.
        init_std: standard deviation of each element.
        dtype: float32 or float64.
        device: where the matrix lives.
    """

    weight: Tensor

    def __init__(
        self,
        partition: ClassPartition,
        embedding_dim: int,
        *,
        optimizer: CenterOptimizer,
        mesh: ShardMesh,
        seed: int,
        init_std: float,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.partition, self.optimizer, self.mesh = partition, optimizer, mesh
        shape = (len(partition.local_blocks), partition.block_size, embedding_dim)
        weight = torch.empty(shape, dtype=dtype, device=device)
        for index, block in enumerate(partition.local_blocks):
            # Drawn on the CPU in float32, so that neither device nor dtype changes a run.
            generator = torch.Generator().manual_seed(hash64(seed, _INITIALISATION_STREAM, block))
            weight[index] = init_std * torch.randn(shape[1:], generator=generator)
        self.register_buffer("weight", weight, persistent=False)
        self._state_names = ["weight"]
        for name, value in optimizer.initial_state(weight).items():
            self.register_buffer(name, value, persistent=False)
            self._state_names.append(name)

    def _rows(self, name: str) -> Tensor:
        """[num_local_classes, ...]: a view of weight or state without the phantoms."""
        return getattr(self, name).flatten(0, 1)[: self.partition.num_local_classes]

    def select(self, rows: Tensor | None) -> Tensor:
        """[n, D], the centers at `rows`, or a view of all of this rank's if None."""
        everything = self._rows("weight")
        return everything if rows is None else everything[rows]

    @torch.no_grad()
    def update(self, rows: Tensor | None, gradient_nD: Tensor, *, learning_rate: float) -> None:
        """Moves the centers at `rows` (distinct; None for all) by one step of the optimizer.

        Args:
            rows: [n] int64, local.
            gradient_nD: [n, D], of the mean loss.
            learning_rate: of this step.
        """
        stored = {name: self._rows(name) for name in self._state_names}
        before = {name: value if rows is None else value[rows] for name, value in stored.items()}
        state = {name: value for name, value in before.items() if name != "weight"}
        weight, state = self.optimizer.update(before["weight"], gradient_nD, state, learning_rate=learning_rate)
        for name, after in {"weight": weight, **state}.items():
            if rows is None:
                stored[name].copy_(after)
            else:
                stored[name].index_copy_(0, rows, after)

    def gather(self) -> Tensor:
        """[num_classes, D] on every rank, a copy."""
        return gather_rows(self._rows("weight"), self.mesh).clone()

    @torch.no_grad()
    def set(self, centers: Tensor) -> None:
        """Takes this rank's rows of `centers` [num_classes, D]; optimizer state starts anew.

        Raises:
            ValueError: if the shape is another.
        """
        expected = (self.partition.num_classes, self.weight.shape[-1])
        if tuple(centers.shape) != expected:
            raise ValueError(f"class centers have shape {tuple(centers.shape)}, but must have {expected}")
        start = self.partition.class_start
        self._rows("weight").copy_(centers[start : start + self.partition.num_local_classes])
        for name, value in self.optimizer.initial_state(self.weight).items():
            getattr(self, name).copy_(value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self._state_names:
            destination[prefix + name] = self.mesh.shard(getattr(self, name), self.partition.num_blocks)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {prefix + name for name in self._state_names}
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        for name in self._state_names:
            key, own = prefix + name, getattr(self, name)
            expected = (self.partition.num_blocks, *own.shape[1:])
            if key not in state_dict:
                missing_keys.append(key)
            elif tuple(state_dict[key].shape) != expected:
                error_msgs.append(
                    f"{key} has shape {tuple(state_dict[key].shape)} in the checkpoint, but {expected} here "
                    f"([blocks, classes per block, ...] for {self.partition.num_classes} classes)"
                )
            else:
                with torch.no_grad():
                    own.copy_(self.mesh.own_part(state_dict[key], own))
