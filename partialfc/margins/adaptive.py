"""Margins that differ from row to row or from step to step.

Symbols: theta is the angle between an embedding and its class center, cos its cosine, s the scale, m a margin, a the
norm of the embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from partialfc.margins.angles import Tail, angle, margin_angle
from partialfc.margins.base import Margin, Need, Parameters, Row, ScaledMargin, State

__all__ = ["AdaCos", "AdaFace", "CurricularFace", "ElasticFace", "MagFace"]


@dataclass(frozen=True)
class MagFace(ScaledMargin):
    """Angular margin that grows with the norm of the embedding, and a term that rewards the norm.

    f = cos(theta + m(a)), with m linear from margin_low at norm_low to margin_high at norm_high, and the regularizer
    lambda_g (1 / a + a / norm_high^2); a is clamped to [norm_low, norm_high]. Neither margin nor regularizer is
    detached: their balance is what gives the norm its meaning.

    Meng, Zhao, Huang and Zhou, "MagFace: A Universal Representation for Face Recognition and Quality Assessment",
    CVPR 2021, eq. 2 to 4.

    Attributes:
        tail: as in `ArcFace`; the authors' code trains with `"easy"`.
    """

    scale: float = 64.0
    norm_low: float = 10.0
    norm_high: float = 110.0
    margin_low: float = 0.45
    margin_high: float = 0.8
    lambda_g: float = 35.0
    tail: Tail = "linear"

    needs: ClassVar[frozenset[Need]] = frozenset({Need.EMBEDDING_NORM})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.norm_low > 0, "norm_low", "a positive number")
        self._check(self.norm_high > self.norm_low, "norm_high", f"more than norm_low, {self.norm_low}")
        self._check(0 <= self.margin_low < math.pi, "margin_low", "in [0, pi), in radians")
        allowed = f"in [margin_low, pi), {self.margin_low} to pi, in radians"
        self._check(self.margin_low <= self.margin_high < math.pi, "margin_high", allowed)
        self._check(self.lambda_g >= 0, "lambda_g", "a number that is not negative")
        self._check(self.tail in get_args(Tail), "tail", f"one of {get_args(Tail)}")

    def _norm(self, row: Row) -> Tensor:
        assert row.embedding_norm is not None
        return row.embedding_norm.clamp(self.norm_low, self.norm_high)

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """The margin of each row, with gradient."""
        slope = (self.margin_high - self.margin_low) / (self.norm_high - self.norm_low)
        return {"margin": self.margin_low + slope * (self._norm(row) - self.norm_low)}, state

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos(theta + m(a))."""
        return margin_angle(cosine_B, offset=parameters["margin"], tail=self.tail)

    def regularizer(self, row: Row) -> Tensor:
        """[B], lambda_g (1 / a + a / norm_high^2)."""
        norm = self._norm(row)
        return self.lambda_g * (1 / norm + norm / self.norm_high**2)


@dataclass(frozen=True)
class AdaFace(ScaledMargin):
    """Angular and additive margin by image quality, for which the norm of the embedding stands.

    f = cos(theta - m z) - (m + m z), with z = clip(concentration (a - mean) / (deviation + eps), -1, 1); mean and
    standard deviation of the norm are moving averages over the global batch. The norm is detached.

    Kim, Jain and Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, eq. 14 to 17.

    Attributes:
        concentration: h of the paper.
        batch_weight: how much the present batch counts in the moving averages.
    """

    scale: float = 64.0
    margin: float = 0.4
    concentration: float = 0.333
    batch_weight: float = 0.01

    needs: ClassVar[frozenset[Need]] = frozenset({Need.EMBEDDING_NORM})
    epsilon: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0 <= self.margin < math.pi / 2, "margin", "in [0, pi / 2), in radians")
        self._check(self.concentration >= 0, "concentration", "a number that is not negative")
        self._check(0 < self.batch_weight <= 1, "batch_weight", "in (0, 1]")

    def initial_state(self, num_classes: int) -> State:
        """`norm_mean` 20 and `norm_deviation` 100, as in the authors' code."""
        return {
            "norm_mean": torch.tensor(20.0, dtype=torch.float64),
            "norm_deviation": torch.tensor(100.0, dtype=torch.float64),
        }

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """`quality` z of each row, by the averages after this batch."""
        assert row.embedding_norm is not None
        norm = row.embedding_norm.detach().clamp(1e-3, 100.0)
        count = row.valid.sum()
        mean = torch.where(row.valid, norm, 0.0).sum() / count.clamp(min=1)
        squares = torch.where(row.valid, (norm - mean) ** 2, 0.0).sum()
        deviation = (squares / (count - 1).clamp(min=1)).sqrt()
        # A batch without rows has no mean, and one of a single row no deviation.
        state = {
            "norm_mean": _moving_average(state["norm_mean"], mean, self.batch_weight, count >= 1),
            "norm_deviation": _moving_average(state["norm_deviation"], deviation, self.batch_weight, count >= 2),
        }
        relative = (norm - state["norm_mean"]) / (state["norm_deviation"] + self.epsilon)
        return {"quality": (self.concentration * relative).clamp(-1.0, 1.0)}, state

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos(theta - m z) - (m + m z)."""
        shift = self.margin * parameters["quality"]
        theta = (angle(cosine_B) - shift).clamp(self.epsilon, math.pi - self.epsilon)
        return torch.cos(theta) - (self.margin + shift)


@dataclass(frozen=True)
class CurricularFace(ScaledMargin):
    """Angular margin, and negatives that count more the further training is, if they are hard.

    f = cos(theta + m); a negative is hard if its cosine is above cos(theta + m) of its row, and then
    h = cos (t + cos). t is a moving average of the target cosine over the global batch.

    Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR 2020, eq. 9 to 13.

    Attributes:
        momentum: t <- momentum t + (1 - momentum) mean. The paper prints the two factors the other way round, which
            is 0.01 here; the authors' code is as the default.
        tail: as in `ArcFace`, of the target alone.
    """

    scale: float = 64.0
    margin: float = 0.5
    momentum: float = 0.99
    tail: Tail = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0 <= self.margin < math.pi, "margin", "in [0, pi), in radians")
        self._check(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        self._check(self.tail in get_args(Tail), "tail", f"one of {get_args(Tail)}")

    def initial_state(self, num_classes: int) -> State:
        """`t`, 0."""
        return {"t": torch.zeros((), dtype=torch.float64)}

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """`t`, already with this batch, and the cosine above which a negative of the row is `hard`."""
        count = row.valid.sum()
        mean = torch.where(row.valid, row.target_cosine, 0.0).sum() / count.clamp(min=1)
        t = _moving_average(state["t"], mean, 1 - self.momentum, count >= 1)
        hard = margin_angle(row.target_cosine, offset=self.margin, tail="none")
        return {"t": t.to(hard.dtype).expand_as(hard), "hard": hard}, {"t": t}

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos(theta + m)."""
        return margin_angle(cosine_B, offset=self.margin, tail=self.tail)

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        """[B, n] -> [B, n], cos (t + cos) where that class is hard for the row."""
        is_hard_Bn = cosine_Bn.detach() > parameters["hard"][:, None]
        return torch.where(is_hard_Bn, cosine_Bn * (parameters["t"][:, None] + cosine_Bn), cosine_Bn)


@dataclass(frozen=True)
class ElasticFace(ScaledMargin):
    """A margin drawn anew for each row and step from a normal distribution, on the angle or on the cosine.

    f = cos(theta + m_i) or cos - m_i, m_i from N(margin, deviation^2). ElasticFace+ gives the largest of the drawn
    margins to the row with the smallest target cosine, the next to the next, over the global batch.

    Boutros, Damer, Kirchbuchner and Kuijper, "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPRW 2022,
    eq. 4 to 6.

    Attributes:
        variant: `"arc"` or `"cos"`.
        margin: mean of the margins; None for 0.5 (arc, in radians) or 0.35 (cos).
        deviation: standard deviation of the margins; None for 0.05, or, with `sort`, 0.0175 (arc) or 0.025 (cos).
        sort: ElasticFace+.
        tail: as in `ArcFace`, for arc.
    """

    scale: float = 64.0
    variant: Literal["arc", "cos"] = "arc"
    margin: float | None = None
    deviation: float | None = None
    sort: bool = False
    tail: Tail = "linear"

    needs: ClassVar[frozenset[Need]] = frozenset({Need.NOISE})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.variant in ("arc", "cos"), "variant", "one of ('arc', 'cos')")
        self._check(self.margin is None or 0 <= self.margin < math.pi, "margin", "in [0, pi), or null")
        good = self.deviation is None or self.deviation >= 0
        self._check(good, "deviation", "a number that is not negative, or null")
        self._check(self.tail in get_args(Tail), "tail", f"one of {get_args(Tail)}")

    @property
    def mean_and_deviation(self) -> tuple[float, float]:
        """Of the margins that are drawn."""
        arc = self.variant == "arc"
        mean = (0.5 if arc else 0.35) if self.margin is None else self.margin
        sorted_deviation = 0.0175 if arc else 0.025
        published = sorted_deviation if self.sort else 0.05
        return mean, published if self.deviation is None else self.deviation

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """The margin of each row."""
        assert row.noise is not None
        mean, deviation = self.mean_and_deviation
        margin = mean + deviation * row.noise
        if self.sort:
            margin = _largest_to_hardest(margin, row)
        return {"margin": margin}, state

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """[B] -> [B], cos(theta + m_i) or cos - m_i."""
        if self.variant == "cos":
            return cosine_B - parameters["margin"]
        return margin_angle(cosine_B, offset=parameters["margin"], tail=self.tail)


@dataclass(frozen=True)
class AdaCos(Margin):
    """Scaled cosines without a margin, and the scale from the data: f = h = cos.

    s = log(B) / cos(min(pi / 4, median theta)), B the mean over the global batch of the sum of exp(s_before cos) over
    the other classes; it starts with sqrt(2) log(C - 1). When classes are sampled, B is corrected for it.

    Zhang, Zhao, Qiao, Wang and Li, "AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
    Representations", CVPR 2019, eq. 11 to 15.

    Attributes:
        dynamic: False keeps the first scale, "fixed AdaCos".
    """

    dynamic: bool = True

    needs: ClassVar[frozenset[Need]] = frozenset({Need.NEGATIVE_LOGSUMEXP})
    needs_sampling_correction: ClassVar[bool] = True

    def initial_state(self, num_classes: int) -> State:
        """`scale`."""
        if num_classes < 3:
            raise ValueError(f"AdaCos has a scale for 3 classes or more, but num_classes is {num_classes}")
        return {"scale": torch.tensor(math.sqrt(2) * math.log(num_classes - 1), dtype=torch.float64)}

    def statistic_scale(self, state: State) -> Tensor:
        """The scale of the step before."""
        return state["scale"]

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """The `scale` of this step, the same for each row."""
        assert row.negative_logsumexp is not None
        scale = state["scale"]
        if self.dynamic and len(row.valid):
            count = row.valid.sum()
            sums = torch.where(row.valid, row.negative_logsumexp, -math.inf)
            mean_of_sums = sums.logsumexp(0) - count.to(sums.dtype).log()
            theta = torch.where(row.valid, angle(row.target_cosine), math.inf).sort().values
            median = theta.gather(0, ((count - 1) // 2).clamp(min=0)[None])[0]
            estimate = (mean_of_sums / torch.cos(median.clamp(max=math.pi / 4))).to(scale.dtype)
            # Without rows, or without negatives in play, there is nothing to estimate from.
            scale = torch.where((estimate > 0) & estimate.isfinite(), estimate, scale)
        return {"scale": scale.to(row.target_cosine.dtype).expand_as(row.target_cosine)}, {"scale": scale}

    def logit_scale(self, parameters: Parameters) -> Tensor:
        """[B], the scale of this step."""
        return parameters["scale"]


def _moving_average(before: Tensor, now: Tensor, weight: float, there_is_one: Tensor) -> Tensor:
    return torch.where(there_is_one, (1 - weight) * before + weight * now, before)


def _largest_to_hardest(margin_B: Tensor, row: Row) -> Tensor:
    """The same margins, dealt out over the valid rows so that they fall as the target cosine rises."""
    hardest_first = torch.where(row.valid, row.target_cosine, math.inf).argsort(stable=True)
    largest_first = torch.where(row.valid, margin_B, -math.inf).sort(descending=True).values
    dealt = torch.empty_like(margin_B).scatter(0, hardest_first, largest_first)
    return torch.where(row.valid, dealt, margin_B)
