"""The moving average of the weights, which often verifies better than the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["WeightAverage"]


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after each update. It starts at the weights.

    Args:
        tracked: what this rank holds of weights and batch statistics, by name.
        decay: in (0, 1).

    Attributes:
        values: the averages, by name, in float32 (float64 of float64).
    """

    def __init__(self, tracked: Mapping[str, Tensor], *, decay: float) -> None:
        self.values: dict[str, Tensor] = {}
        self._decay = decay
        self.restart(tracked)

    def restart(self, tracked: Mapping[str, Tensor]) -> None:
        """Begins anew at the weights."""
        self.values = {name: _widened(value).clone() for name, value in tracked.items()}

    @torch.no_grad()
    def update(self, tracked: Mapping[str, Tensor]) -> None:
        """After an update of the weights."""
        now = [_widened(tracked[name]) for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), now, 1.0 - self._decay)


def _widened(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
