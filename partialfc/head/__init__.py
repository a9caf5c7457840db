"""Class centers, negative sampling, the sharded margin losses, and the terms beside them."""

from partialfc.head.group import HeadGroup
from partialfc.head.optimizers import CenterAdagrad, CenterAdamW, CenterOptimizer, CenterSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.head.reference import reference_loss
from partialfc.head.variational import VariationalPrototypes

__all__ = [
    "CenterAdagrad",
    "CenterAdamW",
    "CenterOptimizer",
    "CenterSGD",
    "HeadGroup",
    "PartialFC",
    "VariationalPrototypes",
    "reference_loss",
]
