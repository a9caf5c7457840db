"""The learnable numbers of a margin: a scale, a bias. Every rank has them all, and moves them alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from partialfc.head.optimizers import CenterOptimizer

__all__ = ["LearnedNumbers"]


class LearnedNumbers(nn.Module):
    """Some named scalars, and what their optimizer remembers of each.

    Args:
        initial: their first values.
        optimizer: moves them.
        like: a tensor whose dtype and device they have.
    """

    value: Tensor

    def __init__(self, initial: Mapping[str, float], *, optimizer: CenterOptimizer, like: Tensor) -> None:
        super().__init__()
        self.names, self.optimizer = list(initial), optimizer
        # One row for each, as optimizers of class centers expect.
        self.register_buffer("value", like.new_tensor(list(initial.values()))[:, None])
        self._state_names = []
        for name, value in optimizer.initial_state(self.value).items():
            self.register_buffer(name, value)
            self._state_names.append(name)

    def leaves(self) -> dict[str, Tensor]:
        """The scalars by name, each wanting a gradient."""
        return {name: self.value[index, 0].clone().requires_grad_() for index, name in enumerate(self.names)}

    def update(self, gradients: Mapping[str, Tensor], *, learning_rate: float) -> None:
        """Moves them by one step of the optimizer along the gradients of the loss, the same on all ranks."""
        gradient = torch.stack([gradients[name] for name in self.names])[:, None]
        state = {name: getattr(self, name) for name in self._state_names}
        value, state = self.optimizer.update(self.value, gradient, state, learning_rate=learning_rate)
        for name, after in {"value": value, **state}.items():
            getattr(self, name).copy_(after)
