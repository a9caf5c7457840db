"""What wraps a backbone for many ranks, behind one protocol."""

from partialfc.engine.base import BackboneEngine, StepOutcome
from partialfc.engine.build import ENGINES, build_engine
from partialfc.engine.ddp import DDPEngine
from partialfc.engine.fsdp2 import FSDP2Engine
from partialfc.engine.loss_scale import LossScale
from partialfc.engine.settings import PRECISIONS, EngineSettings
from partialfc.engine.zero import DeepSpeedEngine

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "BackboneEngine",
    "DDPEngine",
    "DeepSpeedEngine",
    "EngineSettings",
    "FSDP2Engine",
    "LossScale",
    "StepOutcome",
    "build_engine",
]
