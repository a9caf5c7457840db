"""What trains a backbone on many ranks. The head never enters an engine."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["BackboneEngine"]


class BackboneEngine(Protocol):
    """A backbone, its optimizer, and their way of running on many ranks.

    The contract with the head: its loss is the mean over the global batch, and its backward leaves the gradient of
    that mean for this rank's embeddings. So the gradient of a parameter is the sum over ranks of what each computes.
    An engine whose wrapper averages over ranks instead makes up for it in `backward`.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [b, D] of normalised images [b, 3, H, W]."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of the global mean loss, the same on all ranks."""
        ...

    def step(self, *, learning_rate: float) -> tuple[float, bool]:
        """Clips, and updates the backbone unless the gradient is not finite; clears the gradients.

        Returns:
            The gradient's norm before clipping, and whether the backbone was updated; the same on all ranks.
        """
        ...

    def evaluation_backbone(self) -> nn.Module:
        """The bare network, equal on all ranks, which communicates with nobody. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """`backbone` and `optimizer`, under plain parameter names, equal on all ranks. Collective."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...
