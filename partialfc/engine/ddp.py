"""The backbone replicated on every rank, its gradients all-reduced by DistributedDataParallel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from partialfc.distributed.collectives import average_over_ranks
from partialfc.distributed.mesh import ShardMesh
from partialfc.optim import set_learning_rate

__all__ = ["DDPEngine"]

# Batch statistics stay each rank's own until somebody looks at them: see evaluation_backbone. torch 2.13 renamed it.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_BUFFERS_STAY_LOCAL: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class DDPEngine:
    """See `BackboneEngine`.

    Args:
        backbone: on its device already, equal on all ranks.
        optimizer: of its parameters.
        mesh: the ranks that share the batch.
        autocast_dtype: precision of the forward pass; None leaves the backbone as it is.
        max_gradient_norm: the gradient is scaled down to this norm; None leaves it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: Optimizer,
        *,
        mesh: ShardMesh,
        autocast_dtype: torch.dtype | None = None,
        max_gradient_norm: float | None = None,
    ) -> None:
        # Convolutions are 15 to 50 % faster so, on the CPU too.
        self._backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = optimizer
        self._mesh = mesh
        self._autocast_dtype = autocast_dtype
        self._max_gradient_norm = max_gradient_norm
        self._replica = backbone
        if mesh.group is not None:
            self._replica = DistributedDataParallel(
                backbone, process_group=mesh.group, gradient_as_bucket_view=True, **_BUFFERS_STAY_LOCAL
            )

    def forward(self, images: Tensor) -> Tensor:
        """See `BackboneEngine.forward`."""
        enabled = self._autocast_dtype is not None
        with torch.autocast(images.device.type, dtype=self._autocast_dtype, enabled=enabled):
            embeddings: Tensor = self._replica(images.contiguous(memory_format=torch.channels_last))
        return embeddings

    def backward(self, loss: Tensor) -> None:
        """See `BackboneEngine.backward`. DistributedDataParallel averages over ranks, hence the factor."""
        (loss * self._mesh.size).backward()

    def step(self, *, learning_rate: float) -> tuple[float, bool]:
        """See `BackboneEngine.step`."""
        limit = float("inf") if self._max_gradient_norm is None else self._max_gradient_norm
        norm = nn.utils.clip_grad_norm_(self._backbone.parameters(), limit)
        finite = bool(norm.isfinite())
        if finite:
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm), finite

    def evaluation_backbone(self) -> nn.Module:
        """See `BackboneEngine.evaluation_backbone`. The batch statistics become their mean over ranks.

        As moving averages are linear, it does not matter how often that is done.
        """
        average_over_ranks([buffer for buffer in self._backbone.buffers() if buffer.is_floating_point()], self._mesh)
        return self._backbone

    def state_dict(self) -> dict[str, Any]:
        """See `BackboneEngine.state_dict`. An optimizer that has not stepped yet is filled with zero steps first."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return {
            "backbone": get_model_state_dict(self.evaluation_backbone()),
            "optimizer": get_optimizer_state_dict(self._backbone, self._optimizer, options=options),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BackboneEngine.load_state_dict`. Weight decay, momentum and the like stay those of this run."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        groups = self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        set_model_state_dict(self._backbone, state["backbone"])
        set_optimizer_state_dict(self._backbone, self._optimizer, state["optimizer"], options=options)
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)
