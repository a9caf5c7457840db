"""Distributed Partial-FC: identity embeddings over millions of classes, sharded, sampled and exact."""

from partialfc.head import CenterAdamW, CenterSGD, PartialFC

__version__ = "0.1.0"

__all__ = ["CenterAdamW", "CenterSGD", "PartialFC", "__version__"]
