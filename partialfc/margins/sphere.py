"""Multiplicative angular margins with annealing: SphereFace, and SphereFace with the feature norm replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.margins.angles import monotone_multiple_angle
from partialfc.margins.base import Margin, Need, Parameters, Row, ScaledMargin, State

__all__ = ["FNormSphereFace", "SphereFace"]

_LARGEST_MULTIPLE = 32


@dataclass(frozen=True)
class _AnnealedMultipleAngle(Margin):
    """f = (lambda cos + psi(theta)) / (1 + lambda), psi the monotone extension of cos(m theta).

    lambda = max(lambda_min, lambda_start (1 + lambda_rate k)^(-lambda_power)) in step k, counted from 1; k is state.

    Attributes:
        lambda_start: how much the cosine without a margin counts at the start; with lambda_min = 0 too, not at all.
        lambda_min: how much it counts in the end.
        lambda_rate: how fast it falls.
        lambda_power: in which power of the step.
    """

    lambda_start: float = field(default=1000.0, kw_only=True)
    lambda_min: float = field(default=5.0, kw_only=True)
    lambda_rate: float = field(default=0.12, kw_only=True)
    lambda_power: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_start", "lambda_min", "lambda_rate", "lambda_power"):
            self._check(getattr(self, name) >= 0, name, "a number that is not negative")

    @property
    def _multiple(self) -> float:
        raise NotImplementedError

    def initial_state(self, num_classes: int) -> State:
        """`iteration`: steps done, of which lambda is a function."""
        return {"iteration": torch.zeros((), dtype=torch.float64)}

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """`lambda`, the same for each row."""
        iteration = state["iteration"] + 1
        annealed = self.lambda_start * (1 + self.lambda_rate * iteration) ** -self.lambda_power
        annealed = annealed.clamp(min=self.lambda_min).to(row.target_cosine.dtype)
        return {"lambda": annealed.expand_as(row.target_cosine)}, {"iteration": iteration}

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], the blend of cos and psi."""
        blend = parameters["lambda"]
        return (blend * cosine_B + monotone_multiple_angle(cosine_B, self._multiple)) / (1 + blend)


@dataclass(frozen=True)
class SphereFace(_AnnealedMultipleAngle):
    """A-Softmax: the angle to the own class times m, and the norm of the embedding as scale. Class centers normalised.

    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017, eq. 7; the schedule of lambda
    is that of the authors' training configuration.

    Attributes:
        margin: m, an integer from 1 to 32.
    """

    margin: int = 4

    needs: ClassVar[frozenset[Need]] = frozenset({Need.EMBEDDING_NORM})

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 1 <= self.margin <= _LARGEST_MULTIPLE and self.margin == int(self.margin)
        self._check(good, "margin", f"an integer from 1 to {_LARGEST_MULTIPLE}")

    @property
    def _multiple(self) -> float:
        return self.margin

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """`lambda`, and the norm of the embedding as `scale`."""
        assert row.embedding_norm is not None
        parameters, state = super().prepare(row, state)
        return {**parameters, "scale": row.embedding_norm}, state

    def logit_scale(self, parameters: Parameters) -> Tensor:
        """[B], the norm of the embedding."""
        return parameters["scale"]


@dataclass(frozen=True)
class FNormSphereFace(ScaledMargin, _AnnealedMultipleAngle):
    """SphereFace with the norm of the embedding replaced by a fixed scale.

    Liu et al., "SphereFace Revived: Unifying Hyperspherical Face Recognition", TPAMI 2022, section 4.1. The authors
    train it with s = 30 or 64, m = 1.7, the detached gradient and no annealing.

    Attributes:
        margin: m, a number from 1 to 32.
    """

    scale: float = 64.0
    margin: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(1 <= self.margin <= _LARGEST_MULTIPLE, "margin", f"a number from 1 to {_LARGEST_MULTIPLE}")

    @property
    def _multiple(self) -> float:
        return self.margin
