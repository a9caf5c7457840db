"""Margins that are the same for every row: no margin, one on the cosine, one on the angle, and Circle loss.

Symbols: theta is the angle between an embedding and its class center, cos its cosine, s the scale, m a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from partialfc.margins.angles import Tail, margin_angle
from partialfc.margins.base import Parameters, Row, ScaledMargin, State

__all__ = ["ArcFace", "CircleLoss", "CombinedMargin", "CosFace", "NormFace", "Softmax"]


@dataclass(frozen=True)
class Softmax(ScaledMargin):
    """Inner products as logits: f = h = <x, w> + b, neither embeddings nor class centers normalised.

    Attributes:
        bias: whether each class has a learnable bias b.
    """

    scale: float = 1.0
    bias: bool = True

    normalize_embeddings: ClassVar[bool] = False
    normalize_class_centers: ClassVar[bool] = False

    @property
    def has_class_bias(self) -> bool:
        """The setting `bias`."""
        return self.bias


@dataclass(frozen=True)
class NormFace(ScaledMargin):
    """Scaled cosines without a margin: f = h = cos.

    Wang, Xiang, Cheng and Yuille, "NormFace: L2 Hypersphere Embedding for Face Verification", ACM MM 2017, eq. 6.

    Attributes:
        learned: whether the scale is trained too (section 3.3 of the paper), from `scale` on. It is the magnitude of
            the learned number, so that it cannot turn the loss around.
    """

    scale: float = 64.0
    learned: bool = False

    @property
    def logit_bound(self) -> float | None:
        """None if the scale is trained."""
        return None if self.learned else self.scale

    def initial_learned(self, num_classes: int) -> Mapping[str, float]:
        """`scale`, if it is trained."""
        return {"scale": self.scale} if self.learned else {}

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """The trained scale, the same for each row."""
        return {name: value.abs().expand_as(row.target_cosine) for name, value in row.learned.items()}, state

    def logit_scale(self, parameters: Parameters) -> float | Tensor:
        """The scale, trained or not."""
        return parameters["scale"] if self.learned else self.scale


@dataclass(frozen=True)
class CosFace(ScaledMargin):
    """Additive cosine margin: f = cos - m.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, eq. 4. Also AM-Softmax.
    """

    scale: float = 64.0
    margin: float = 0.35

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos - m."""
        return cosine_B - self.margin


@dataclass(frozen=True)
class ArcFace(ScaledMargin):
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
        return margin_angle(cosine_B, offset=self.margin, tail=self.tail)


@dataclass(frozen=True)
class CombinedMargin(ScaledMargin):
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
        return margin_angle(cosine_B, factor=self.m1, offset=self.m2, tail=self.tail) - self.m3


@dataclass(frozen=True)
class CircleLoss(ScaledMargin):
    """Similarities weighted by their distance from the optimum: f = [1 + m - cos]_+ (cos - (1 - m)), and for the others
    h = [cos + m]_+ (cos - m). The weights in brackets are constants of the step: they pace the gradient.

    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020, eq. 6 and 8 with class
    centers as the other half of each pair (section 3.3).
    """

    scale: float = 256.0
    margin: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(-1 < self.margin < 1, "margin", "in (-1, 1)")
        self._check(self.gradient == "exact", "gradient", "'exact', in which the weights are constants of the step")

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], the weighted similarity to the own class."""
        weight_B = (1 + self.margin - cosine_B.detach()).clamp(min=0)
        return weight_B * (cosine_B - (1 - self.margin))

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        """[B, n] -> [B, n], the weighted similarity to the others."""
        weight_Bn = (cosine_Bn.detach() + self.margin).clamp(min=0)
        return weight_Bn * (cosine_Bn - self.margin)
