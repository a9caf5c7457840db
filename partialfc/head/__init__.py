"""Class centers, negative sampling and the sharded margin softmax."""

from partialfc.head.optimizers import CenterAdamW, CenterOptimizer, CenterSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.head.reference import reference_loss

__all__ = ["CenterAdamW", "CenterOptimizer", "CenterSGD", "PartialFC", "reference_loss"]
