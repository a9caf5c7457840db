"""Distributed Partial-FC: identity embeddings over millions of classes, sharded, sampled and exact."""

from partialfc.head import CenterAdagrad, CenterAdamW, CenterSGD, HeadGroup, PartialFC

__version__ = "0.1.0"

__all__ = ["CenterAdagrad", "CenterAdamW", "CenterSGD", "HeadGroup", "PartialFC", "__version__"]
