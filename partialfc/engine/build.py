"""An engine by its name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from partialfc.distributed.mesh import ShardMesh
from partialfc.engine.base import BackboneEngine
from partialfc.engine.ddp import DDPEngine
from partialfc.engine.fsdp2 import FSDP2Engine
from partialfc.engine.settings import EngineSettings
from partialfc.engine.zero import DeepSpeedEngine

__all__ = ["ENGINES", "build_engine"]

ENGINES = {"ddp": DDPEngine, "fsdp2": FSDP2Engine, "deepspeed": DeepSpeedEngine}


def build_engine(
    name: str,
    backbone: nn.Module,
    *,
    make_optimizer: Callable[[nn.Module], Optimizer],
    mesh: ShardMesh,
    settings: EngineSettings,
) -> BackboneEngine:
    """Puts a backbone into an engine. Collective.

    Args:
        name: a key of `ENGINES`.
        backbone: on its device already, equal on all ranks. Belongs to the engine from then on.
        make_optimizer: makes the optimizer of its parameters, whatever the engine has made of them.
        mesh: the ranks that share the batch.
        settings: see there.

    Raises:
        ValueError: if the name is unknown, or the backbone does not go with the settings.
        ImportError: if the engine needs a library that is not installed; it says which.
    """
    if name not in ENGINES:
        raise ValueError(f'unknown engine "{name}"; known are {", ".join(ENGINES)}')
    return ENGINES[name](backbone, make_optimizer=make_optimizer, mesh=mesh, settings=settings)
