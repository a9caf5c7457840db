"""What wraps a backbone for many ranks, behind one protocol."""

from partialfc.engine.base import BackboneEngine
from partialfc.engine.ddp import DDPEngine

__all__ = ["BackboneEngine", "DDPEngine"]
