"""Distributed Partial-FC: identity embeddings over millions of classes, sharded, sampled and exact."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partialfc.head import CenterAdagrad, CenterAdamW, CenterSGD, HeadGroup, PartialFC

__version__ = "0.1.0"

__all__ = ["CenterAdagrad", "CenterAdamW", "CenterSGD", "HeadGroup", "PartialFC", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the head, and torch with it, when it is first asked for: signals are handled before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from partialfc import head

    return getattr(head, name)
