"""The learnable numbers of a margin: a scale, a bias. Every rank has them all, and moves them alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from partialfc.head.optimizers import CenterOptimizer

__all__ = ["LearnedNumbers"]


class LearnedNumbers(nn.Module):
    """Some named scalars, and what their optimizer remembers of each.

    Each is a buffer of its name, so that one margin's number is never loaded as another's.

    Args:
        initial: their first values.
        optimizer: moves them.
        like: a tensor whose dtype and device they have.
    """

    def __init__(self, initial: Mapping[str, float], *, optimizer: CenterOptimizer, like: Tensor) -> None:
        super().__init__()
        self.names, self.optimizer = list(initial), optimizer
        for name, number in initial.items():
            # One row of one number, as optimizers of class centers expect.
            value = like.new_full((1, 1), number)
            self.register_buffer(f"value_{name}", value)
            for key, field in optimizer.fields.items():
                zeros = torch.zeros_like(field.shape_for(value), dtype=field.working(value.dtype))
                self.register_buffer(f"{key}_{name}", zeros)

    def values(self) -> dict[str, Tensor]:
        """The scalars by name, as they are."""
        return {name: getattr(self, f"value_{name}")[0, 0] for name in self.names}

    def leaves(self) -> dict[str, Tensor]:
        """The scalars by name, each wanting a gradient."""
        return {name: value.clone().requires_grad_() for name, value in self.values().items()}

    def update(self, gradients: Mapping[str, Tensor], *, learning_rate: float) -> None:
        """Moves them by one step of the optimizer along the gradients of the loss, the same on all ranks."""
        for name in self.names:
            state = {key: getattr(self, f"{key}_{name}") for key in self.optimizer.fields}
            value, gradient = getattr(self, f"value_{name}"), gradients[name].view(1, 1)
            self.optimizer.update_(value, gradient, state, learning_rate=learning_rate)
