"""Losses that ask of each class apart whether it is the right one: a sum of binary cross entropies, no softmax.

A row costs  positive_weight softplus(-z_y) + negative_weight sum_{j != y} softplus(z_j)  with logits z = s f and s h.
The classes of different ranks do not compete, so nothing but this sum is exchanged. It depends on how many classes
are in it; when they are sampled, each counts by the inverse of its probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from partialfc.margins.base import Aggregate, Parameters, Row, ScaledMargin, State

__all__ = ["SphereFace2", "UniFace"]


@dataclass(frozen=True)
class _BinaryMargin(ScaledMargin):
    """A margin with a learnable bias, the same for all logits, and the loss above."""

    aggregate: ClassVar[Aggregate] = Aggregate.SOFTPLUS_SUM
    needs_sampling_correction: ClassVar[bool] = True

    @property
    def _weights(self) -> tuple[float, float]:
        """Of the own class and of the others."""
        raise NotImplementedError

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """The bias, the same for each row, in units of the similarity."""
        return {"bias": (row.learned["bias"] / self.scale).expand_as(row.target_cosine)}, state

    def row_loss(self, own_B: Tensor, negatives_B: Tensor) -> Tensor:
        """[B], both halves of the sum with their weights."""
        positive, negative = self._weights
        return positive * F.softplus(-own_B, threshold=50) + negative * negatives_B


@dataclass(frozen=True)
class SphereFace2(_BinaryMargin):
    """f = g(cos) - m + b / s and h = g(cos) + m + b / s, with g(z) = 2 ((z + 1) / 2)^t - 1 and a learnable bias b.

    Wen, Liu, Weller, Raj and Singh, "SphereFace2: Binary Classification is All You Need for Deep Face Recognition",
    ICLR 2022, eq. 6 with the additive margin ("C").

    Attributes:
        scale: r of the paper.
        balance: lambda of the paper, the share of the own class, in (0, 1).
        exponent: t of g.
        loss_scale: a factor on the whole, since the loss is small.
    """

    scale: float = 40.0
    margin: float = 0.4
    balance: float = 0.7
    exponent: float = 3.0
    loss_scale: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.margin >= 0, "margin", "a number that is not negative")
        self._check(0 < self.balance < 1, "balance", "in (0, 1)")
        self._check(self.exponent >= 1, "exponent", "a number of at least 1")
        self._check(self.loss_scale > 0, "loss_scale", "a positive number")

    @property
    def _weights(self) -> tuple[float, float]:
        share = self.loss_scale / self.scale
        return share * self.balance, share * (1 - self.balance)

    def initial_learned(self, num_classes: int) -> Mapping[str, float]:
        """The bias at which, with all cosines 0, the own class and the others pull on it alike.

        That is lambda sigmoid(-(own + b)) = (1 - lambda) (C - 1) sigmoid(other + b), a quadratic equation for exp(b).
        """
        if num_classes < 2:
            raise ValueError(f"SphereFace2 tells classes apart and needs 2 or more, but num_classes is {num_classes}")
        level = 2 * 0.5**self.exponent - 1
        own, other = self.scale * (level - self.margin), self.scale * (level + self.margin)
        ratio = self.balance / ((1 - self.balance) * (num_classes - 1))
        # In logarithms, since exp(own - other) may be too small for a number.
        log_gap = math.log(abs(1 - ratio)) if ratio != 1 else -math.inf
        log_root = _log_sum(2 * log_gap, math.log(4 * ratio) + own - other) / 2
        log_sum = _log_sum(log_gap, log_root)
        # Two forms of the positive root, of which one cancels: with few classes the other.
        if ratio > 1:
            return {"bias": log_sum - math.log(2) - own}
        return {"bias": math.log(2 * ratio) - other - log_sum}

    def _shape(self, cosine: Tensor) -> Tensor:
        # Rounding may bring a cosine below -1, and a power of a negative number is none.
        return 2 * ((cosine + 1) / 2).clamp(min=0) ** self.exponent - 1

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], g(cos) - m + b / s."""
        return self._shape(cosine_B) - self.margin + parameters["bias"]

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        """[B, n] -> [B, n], g(cos) + m + b / s; the slope of g too is 1 if the gradient is detached."""
        shaped_Bn = self._shape(cosine_Bn)
        if self.gradient == "detached":
            shaped_Bn = cosine_Bn + (shaped_Bn - cosine_Bn).detach()
        return shaped_Bn + self.margin + parameters["bias"][:, None]


@dataclass(frozen=True)
class UniFace(_BinaryMargin):
    """f = cos - m - b / s and h = cos - b / s: one learnable threshold b for all pairs, the unified cross entropy.

    Zhou, Jia, Li, Shen and Duan, "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition", ICCV 2023, eq. 13.

    Attributes:
        negative_weight: l of the paper's code, of the sum over the other classes.
    """

    scale: float = 64.0
    margin: float = 0.4
    negative_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.negative_weight > 0, "negative_weight", "a positive number")

    @property
    def _weights(self) -> tuple[float, float]:
        return 1.0, self.negative_weight

    def initial_learned(self, num_classes: int) -> Mapping[str, float]:
        """`bias`, log(10 C), as in the authors' code."""
        return {"bias": math.log(10 * num_classes)}

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos - m - b / s."""
        return cosine_B - self.margin - parameters["bias"]

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        """[B, n] -> [B, n], cos - b / s."""
        return cosine_Bn - parameters["bias"][:, None]


def _log_sum(first: float, second: float) -> float:
    """The function log(exp(first) + exp(second)) of two numbers that are not both -inf."""
    return max(first, second) + math.log1p(math.exp(-abs(first - second)))
