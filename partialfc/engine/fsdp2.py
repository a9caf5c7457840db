"""Weights, gradients and optimizer state of the backbone sharded over the ranks by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from partialfc.distributed.mesh import ShardMesh
from partialfc.engine.groups import group_of
from partialfc.engine.prepare import InPrecision, blocks_of
from partialfc.engine.settings import EngineSettings
from partialfc.engine.torch_engine import TorchEngine

__all__ = ["FSDP2Engine"]


class FSDP2Engine(TorchEngine):
    """See `BackboneEngine`. A block of the backbone is whole on a rank only while it is computed.

    Precision is that of autocast, as in the other engines, and not of a mixed-precision policy, which would cast the
    parameters of batch norms, and the last layer, which the backbones keep in float32.

    Args:
        backbone: on its device already, equal on all ranks. Belongs to the engine from then on.
        make_optimizer: makes the optimizer of its parameters.
        mesh: the ranks that share the batch.
        settings: see there.

    Raises:
        ValueError: if the backbone does not go with the settings.
    """

    _backbone_stays_bare = False
    _sharded = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        make_optimizer: Callable[[nn.Module], Optimizer],
        mesh: ShardMesh,
        settings: EngineSettings,
    ) -> None:
        device_type = next(backbone.parameters()).device.type
        super().__init__(backbone, mesh=mesh, settings=settings, compile_blocks=settings.compile)
        device_mesh = DeviceMesh.from_group(group_of(mesh, device_type), device_type)
        for module in (*blocks_of(self._backbone), self._backbone):
            sharded = fully_shard(module, mesh=device_mesh)
            # The sum over ranks. gloo knows neither averages nor factors.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        self._network = InPrecision(self._backbone, settings.autocast_dtype)
        self._make_optimizer(make_optimizer)

    def _before_portion(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self._backbone, FSDPModule)
        self._backbone.set_requires_gradient_sync(last)
        self._backbone.set_is_last_backward(last)
        return nullcontext()
