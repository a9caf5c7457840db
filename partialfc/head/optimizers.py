"""How a class center moves: pure functions of the rows in play, their gradients and their state.

An optimizer sees only the rows of one step. A row that is not in play keeps its value, its momentum and its decay
("lazy" semantics), so a step costs what its rows cost. With every row in play the updates are those of `torch.optim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CenterAdamW", "CenterOptimizer", "CenterSGD"]


class CenterOptimizer(Protocol):
    """What the head asks of an optimizer of class centers.

    Attributes:
        learning_rate: the rate at which the head starts; a schedule may set another one (`PartialFC.learning_rate`).
    """

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    def initial_state(self, class_centers: Tensor) -> dict[str, Tensor]:
        """State for [..., D] class centers, by name: tensors whose leading dimensions are theirs."""
        ...

    def update(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows in play, [n, ..., D], and their state after a step; the arguments are left as they are."""
        ...

    def without_decay(self) -> CenterOptimizer:
        """The same without weight decay: for biases and other numbers that 0 means nothing to."""
        ...


def _check_not_negative(optimizer: object, *fields: str) -> None:
    for field in fields:
        value = getattr(optimizer, field)
        if not value >= 0:
            raise ValueError(f"{type(optimizer).__name__}.{field} is {value!r}, but must not be negative")


@dataclass(frozen=True)
class CenterSGD:
    """Stochastic gradient descent with momentum and L2 weight decay, as `torch.optim.SGD`."""

    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check_not_negative(self, "learning_rate", "weight_decay")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"CenterSGD.momentum is {self.momentum!r}, but must be in [0, 1)")

    def initial_state(self, class_centers: Tensor) -> dict[str, Tensor]:
        """`momentum`, of the shape of the class centers."""
        return {"momentum": torch.zeros_like(class_centers)} if self.momentum else {}

    def update(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Momentum m <- momentum * m + (gradient + weight_decay * w); centers w <- w - learning_rate * m."""
        direction = torch.add(gradient_nD, centers_nD, alpha=self.weight_decay)
        if not self.momentum:
            return centers_nD - learning_rate * direction, {}
        direction.add_(state["momentum"], alpha=self.momentum)
        return torch.sub(centers_nD, direction, alpha=learning_rate), {"momentum": direction}

    def without_decay(self) -> CenterSGD:
        """See `CenterOptimizer.without_decay`."""
        return replace(self, weight_decay=0.0)


@dataclass(frozen=True)
class CenterAdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, algorithm 2), as `torch.optim.AdamW`.

    The bias correction of a row counts that row's own updates, not the steps of the run: a class that is first drawn
    late would otherwise start with a step several times too long.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        _check_not_negative(self, "learning_rate", "epsilon", "weight_decay")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"CenterAdamW.{field} is {getattr(self, field)!r}, but must be in [0, 1)")

    def initial_state(self, class_centers: Tensor) -> dict[str, Tensor]:
        """`mean` and `variance`, of the shape of the class centers, and `updates`, int32, one number a row."""
        return {
            "mean": torch.zeros_like(class_centers),
            "variance": torch.zeros_like(class_centers),
            "updates": torch.zeros(class_centers.shape[:-1], dtype=torch.int32, device=class_centers.device),
        }

    def update(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 2 of the paper, with the step counted for each row."""
        updates = state["updates"] + 1
        mean = torch.lerp(state["mean"], gradient_nD, 1 - self.beta1)
        variance = torch.lerp(state["variance"], gradient_nD * gradient_nD, 1 - self.beta2)
        count = updates.to(centers_nD.dtype)[..., None]
        step = mean / (1 - self.beta1**count) / ((variance / (1 - self.beta2**count)).sqrt() + self.epsilon)
        centers = centers_nD * (1 - learning_rate * self.weight_decay) - learning_rate * step
        return centers, {"mean": mean, "variance": variance, "updates": updates}

    def without_decay(self) -> CenterAdamW:
        """See `CenterOptimizer.without_decay`."""
        return replace(self, weight_decay=0.0)
