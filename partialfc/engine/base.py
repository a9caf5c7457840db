"""What trains a backbone on many ranks. The head never enters an engine."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["BackboneEngine", "StepOutcome"]


class StepOutcome(NamedTuple):
    """What a step of the backbone came to, the same on all ranks.

    Attributes:
        gradient_norm: of the mean loss over the global batch, before clipping; maybe not finite.
        updated: whether the backbone moved. It does not if the gradient is not finite on any rank.
        loss_scale: with which the gradient was computed; 1 where there is none, and where it cannot be smaller.
    """

    gradient_norm: float
    updated: bool
    loss_scale: float = 1.0


class BackboneEngine(Protocol):
    """A backbone, its optimizer, and their way of running on many ranks.

    The contract with the head: its loss is the mean over the global batch, and its backward leaves the gradient of
    that mean for this rank's embeddings. So the gradient of a parameter is the sum over ranks of what each computes.
    An engine whose wrapper averages over ranks instead makes up for it in `backward`.

    A batch may go through the backbone in several portions, of which only one has its activations in memory. The head
    still sees the whole batch at once, so results do not depend on their number but through batch statistics.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [b, D] in float32, a leaf that requires a gradient, of normalised images [b, 3, H, W]."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of the global mean loss, the same on all ranks, of the embeddings that `forward` last gave."""
        ...

    def step(self, *, learning_rate: float) -> StepOutcome:
        """Clips, and updates the backbone unless the gradient is not finite; clears the gradients. Collective."""
        ...

    def evaluation_backbone(self) -> nn.Module:
        """The bare network, equal on all ranks, which communicates with nobody: averaged weights if it has those.

        Collective. To be used and let go before the next step.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """`backbone`, `optimizer` (as `state.PARAMETER.KEY`), and if there are such `ema` and `loss_scale`.

        Parameters have the names of the bare network; keys and shapes are the same for every engine. Tensors may be
        DTensors, other values are equal on all ranks. Collective.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` of any engine gave. Collective."""
        ...
