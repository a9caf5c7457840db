"""How a class center moves: pure functions of the rows in play, their gradients and their state.

An optimizer sees only the rows of one step. A row that is not in play keeps its value and its momentum ("lazy"), or is
caught up with when it is next in play ("dense"); so a step costs what its rows cost. With every row in play the updates
are those of `torch.optim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from partialfc.head.storage import Field, MomentumDtype

__all__ = ["CenterAdagrad", "CenterAdamW", "CenterOptimizer", "CenterSGD", "Decay"]

Decay = Literal["lazy", "dense"]


class CenterOptimizer(Protocol):
    """What the head asks of an optimizer of class centers.

    Attributes:
        learning_rate: the rate at which the head starts; a schedule may set another one (`PartialFC.learning_rate`).
        fields: what it remembers of a row, by name. Before the first step all of it is zero.
        moves_idle_rows: whether rows that are not in play move too, as `idle_step` says.
    """

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    @property
    def fields(self) -> Mapping[str, Field]: ...  # noqa: D102

    @property
    def moves_idle_rows(self) -> bool: ...  # noqa: D102

    def update_(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> None:
        """Moves the rows in play, [n, ..., D], and their state, in place. The gradient may be overwritten."""
        ...

    def idle_step(self, learning_rate: float) -> Tensor:
        """[2, 2] float64: what a step without gradient does to (center, momentum) of a row."""
        ...

    def without_decay(self) -> CenterOptimizer:
        """The same for biases and other numbers that 0 means nothing to: no weight decay, nothing rounded."""
        ...


def _check_not_negative(optimizer: object, *fields: str) -> None:
    for field in fields:
        value = getattr(optimizer, field)
        if not value >= 0:
            raise ValueError(f"{type(optimizer).__name__}.{field} is {value!r}, but must not be negative")


@dataclass(frozen=True)
class CenterSGD:
    """Stochastic gradient descent with momentum and L2 weight decay, as `torch.optim.SGD`.

    Attributes:
        momentum_dtype: how momentum is stored: "float32", or with stochastic rounding in "bfloat16", or in "int8" with
            a scale for each block of 64 elements.
        decay: "lazy": momentum and decay of a row act when it is in play. "dense": they act in every step, as if all
            rows were updated; a row that was idle is brought up to date when it is next in play. Biases stay lazy.
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    momentum_dtype: MomentumDtype = "float32"
    decay: Decay = "lazy"

    def __post_init__(self) -> None:
        _check_not_negative(self, "learning_rate", "weight_decay")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"CenterSGD.momentum is {self.momentum!r}, but must be in [0, 1)")
        for name, allowed in (("momentum_dtype", get_args(MomentumDtype)), ("decay", get_args(Decay))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"CenterSGD.{name} is {getattr(self, name)!r}, but must be one of {allowed}")

    @property
    def fields(self) -> Mapping[str, Field]:
        """`momentum`, of the shape of the class centers."""
        return {"momentum": Field(dtype=self.momentum_dtype)} if self.momentum else {}

    @property
    def moves_idle_rows(self) -> bool:
        """Whether `decay` is dense."""
        return self.decay == "dense"

    def update_(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> None:
        """Momentum m <- momentum * m + (gradient + weight_decay * w); centers w <- w - learning_rate * m."""
        direction = gradient_nD.add_(centers_nD, alpha=self.weight_decay)
        if self.momentum:
            momentum = state["momentum"]
            direction = torch.add(direction, momentum, alpha=self.momentum, out=momentum)
        centers_nD.sub_(direction, alpha=learning_rate)

    def idle_step(self, learning_rate: float) -> Tensor:
        """See `CenterOptimizer.idle_step`."""
        rows = [
            [1 - learning_rate * self.weight_decay, -learning_rate * self.momentum],
            [self.weight_decay, self.momentum],
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def without_decay(self) -> CenterSGD:
        """See `CenterOptimizer.without_decay`."""
        return replace(self, weight_decay=0.0, momentum_dtype="float32", decay="lazy")


@dataclass(frozen=True)
class CenterAdagrad:
    """Adagrad with one accumulator for each row: 4 bytes a row where momentum takes 4 an element.

    The accumulator of a row grows by the mean of its squared gradient (Duchi, Hazan and Singer, JMLR 2011, with the
    diagonal averaged over the row). Weight decay is L2, as in `torch.optim.Adagrad`. In the first step of a row its
    elements move by the learning rate, in the root mean square; it should not be much more than they are.
    """

    learning_rate: float = 0.01
    epsilon: float = 1e-10
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check_not_negative(self, "learning_rate", "weight_decay")
        if not self.epsilon > 0:
            raise ValueError(f"CenterAdagrad.epsilon is {self.epsilon!r}, but must be positive")

    @property
    def fields(self) -> Mapping[str, Field]:
        """`squares`, one number a row."""
        return {"squares": Field(per_row=True)}

    moves_idle_rows = False

    def update_(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> None:
        """Squares s <- s + mean(g^2), g with decay; centers w <- w - learning_rate * g / (sqrt(s) + epsilon)."""
        direction = gradient_nD.add_(centers_nD, alpha=self.weight_decay)
        squares = state["squares"].add_(torch.linalg.vector_norm(direction, dim=-1) ** 2 / direction.shape[-1])
        centers_nD.addcmul_(direction, (1 / (squares.sqrt() + self.epsilon))[..., None], value=-learning_rate)

    def idle_step(self, learning_rate: float) -> Tensor:
        """Not called: idle rows do not move."""
        raise NotImplementedError

    def without_decay(self) -> CenterAdagrad:
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

    @property
    def fields(self) -> Mapping[str, Field]:
        """`mean` and `variance`, of the shape of the class centers, and `updates`, one number a row."""
        return {"mean": Field(), "variance": Field(), "updates": Field(per_row=True, dtype="int32")}

    moves_idle_rows = False

    def update_(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> None:
        """Algorithm 2 of the paper, with the step counted for each row."""
        updates, mean, variance = state["updates"].add_(1), state["mean"], state["variance"]
        mean.lerp_(gradient_nD, 1 - self.beta1)
        variance.lerp_(gradient_nD.square_(), 1 - self.beta2)
        count = updates.to(centers_nD.dtype)[..., None]
        size = (variance / (1 - self.beta2**count)).sqrt_().add_(self.epsilon)
        centers_nD.mul_(1 - learning_rate * self.weight_decay)
        centers_nD.addcdiv_(mean / (1 - self.beta1**count), size, value=-learning_rate)

    def idle_step(self, learning_rate: float) -> Tensor:
        """Not called: idle rows do not move."""
        raise NotImplementedError

    def without_decay(self) -> CenterAdamW:
        """See `CenterOptimizer.without_decay`."""
        return replace(self, weight_decay=0.0)
