"""The backbone replicated on every rank, its gradients all-reduced by DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from partialfc.distributed.mesh import ShardMesh
from partialfc.engine.prepare import InPrecision
from partialfc.engine.settings import EngineSettings
from partialfc.engine.torch_engine import TorchEngine

__all__ = ["DDPEngine"]

# Batch statistics stay each rank's own until somebody looks at them: see evaluation_backbone. torch 2.13 renamed it.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_BUFFERS_STAY_LOCAL: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class DDPEngine(TorchEngine):
    """See `BackboneEngine`.

    Args:
        backbone: on its device already, equal on all ranks. Belongs to the engine from then on.
        make_optimizer: makes the optimizer of its parameters.
        mesh: the ranks that share the batch.
        settings: see there.

    Raises:
        ValueError: if the backbone does not go with the settings.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        make_optimizer: Callable[[nn.Module], Optimizer],
        mesh: ShardMesh,
        settings: EngineSettings,
    ) -> None:
        backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        blocks = settings.compile and settings.activation_checkpointing
        super().__init__(backbone, mesh=mesh, settings=settings, compile_blocks=blocks)
        self._network = InPrecision(self._backbone, settings.autocast_dtype)
        if mesh.group is not None:
            self._network = DistributedDataParallel(
                self._network, process_group=mesh.group, gradient_as_bucket_view=True, **_BUFFERS_STAY_LOCAL
            )
        if settings.compile and not blocks:
            self._network.compile()
        self._make_optimizer(make_optimizer)

    def _before_portion(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._network, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[None] = self._network.no_sync()
        return context

    def _gradient_factor(self) -> float:
        # DistributedDataParallel averages over ranks.
        return super()._gradient_factor() * self._mesh.size
