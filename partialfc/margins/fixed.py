"""Margins that are the same for every row: Softmax, NormFace, CosFace, ArcFace and their combination.

Symbols: theta is the angle between an embedding and its class center, cos its cosine, s the scale, m a margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from partialfc.margins.base import Margin, Parameters

__all__ = ["ArcFace", "CombinedMargin", "CosFace", "NormFace", "Softmax", "Tail"]

Tail = Literal["linear", "none", "easy"]

# The arc cosine has no derivative at +-1. Cosines beyond this have zero gradient.
_COSINE_LIMIT = 1.0 - 1e-7


@dataclass(frozen=True)
class Softmax(Margin):
    """Inner products as logits: f = h = <x, w>, neither embeddings nor class centers normalised."""

    scale: float = 1.0

    normalize_embeddings: ClassVar[bool] = False
    normalize_class_centers: ClassVar[bool] = False


@dataclass(frozen=True)
class NormFace(Margin):
    """Scaled cosines without a margin: f = h = cos.

    Wang, Xiang, Cheng and Yuille, "NormFace: L2 Hypersphere Embedding for Face Verification", ACM MM 2017, eq. 6.
    """

    scale: float = 64.0


@dataclass(frozen=True)
class CosFace(Margin):
    """Additive cosine margin: f = cos - m.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, eq. 4. Also AM-Softmax.
    """

    scale: float = 64.0
    margin: float = 0.35

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos - m."""
        return cosine_B - self.margin


@dataclass(frozen=True)
class ArcFace(Margin):
    """Additive angular margin: f = cos(theta + m).

    Deng, Guo, Xue and Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, eq. 3.

    Attributes:
        tail: what happens past theta = pi - m, where cos(theta + m) would rise again. `"linear"`: cos - m sin m, as in
            the authors' first code; `"none"`: the formula as it stands; `"easy"`: the margin acts only where
            theta < pi / 2.
    """

    scale: float = 64.0
    margin: float = 0.5
    tail: Tail = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0 <= self.margin < math.pi, "margin", "in [0, pi), in radians")
        self._check(self.tail in get_args(Tail), "tail", f"one of {get_args(Tail)}")

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos(theta + m)."""
        return _angular_target(cosine_B, 1.0, self.margin, self.tail)


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """SphereFace, ArcFace and CosFace in one: f = cos(m1 theta + m2) - m3.

    Deng et al. (CVPR 2019), eq. 4.

    Attributes:
        m1: factor on the angle, positive.
        m2: added to the angle, in radians, not negative.
        m3: subtracted from the cosine.
        tail: as in `ArcFace`, past m1 theta + m2 = pi. `"linear"` goes on as cos minus a constant: m2 sin m2, or more
            where f would jump up otherwise.
    """

    scale: float = 64.0
    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.2
    tail: Tail = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.m1 > 0, "m1", "a positive number")
        self._check(0 <= self.m2 < math.pi, "m2", "in [0, pi), in radians")
        self._check(self.tail in get_args(Tail), "tail", f"one of {get_args(Tail)}")

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos(m1 theta + m2) - m3."""
        return _angular_target(cosine_B, self.m1, self.m2, self.tail) - self.m3


def _angular_target(cosine: Tensor, factor: float, offset: float, tail: Tail) -> Tensor:
    """cos(factor * theta + offset), with the chosen behaviour where that angle passes pi."""
    theta = torch.acos(cosine.clamp(-_COSINE_LIMIT, _COSINE_LIMIT))
    shifted = torch.cos(factor * theta + offset)
    if tail == "easy":
        return torch.where(cosine > 0, shifted, cosine)
    if tail == "none" or factor * math.pi + offset <= math.pi:
        return shifted
    cosine_at_pi = math.cos((math.pi - offset) / factor)
    drop = max(offset * math.sin(offset), 1.0 + cosine_at_pi)
    return torch.where(cosine > cosine_at_pi, shifted, cosine - drop)
