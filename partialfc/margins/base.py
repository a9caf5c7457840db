"""What a margin is: pure functions of one cosine per row, and what they need to know about the row.

With the target column taken out of the log-sum-exp, the whole softmax family is one formula per row i,

    loss_i = softplus( logsumexp_{j != y_i} scale * h(cos_ij)  -  scale * f(cos_{i,y_i}) )   (+ regularizer_i)

A margin defines f (`target`) and, where it differs from the identity, h (`negative`). It is a frozen dataclass whose
fields are its settings, so it is its own configuration entry. Nothing else in the package names a margin.

Shapes: B rows of the global batch, n class centers on this rank.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

__all__ = ["GradientMode", "Margin", "Need", "Parameters", "Row", "State", "target_similarity"]

GradientMode = Literal["exact", "detached"]
Parameters = Mapping[str, Tensor]
"""Numbers a margin computes once for each row of the batch, by name, each [B]."""
State = Mapping[str, Tensor]
"""What a margin remembers from step to step (moving averages, annealing), by name. The head checkpoints it."""


class Need(enum.Enum):
    """What a margin asks the head to provide in `Row` beyond what is always there."""

    EMBEDDING_NORM = "embedding_norm"
    NOISE = "noise"


@dataclass(frozen=True)
class Row:
    """What is known of each row of the global batch, the same on all ranks.

    Attributes:
        target_cosine: [B], similarity to the row's own class center, detached. 0 where `valid` is False.
        valid: [B] bool; False for a row that is masked (label -1). Statistics must leave such rows out.
        step: training steps done so far.
        embedding_norm: [B], with gradient, if the margin needs `Need.EMBEDDING_NORM`.
        noise: [B], standard normal, a function of (seed, step, row of the global batch), if it needs `Need.NOISE`.
    """

    target_cosine: Tensor
    valid: Tensor
    step: int
    embedding_norm: Tensor | None = None
    noise: Tensor | None = None


@dataclass(frozen=True)
class Margin:
    """Base of all margins: with no method overridden it is a plain softmax over scaled cosines.

    Attributes:
        scale: the factor s on all similarities before the softmax. At least as large as log(num_classes) in practice.
        gradient: `"exact"`, or `"detached"`: d target / d cosine := 1, called characteristic gradient detachment by
            Liu et al. ("SphereFace Revived", TPAMI 2022, section 4.3), and what insightface trains with. The values
            are equal; the gradient of an angular margin near theta = 0 is not.
    """

    scale: float
    gradient: GradientMode = "exact"

    normalize_embeddings: ClassVar[bool] = True
    normalize_class_centers: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        """Checks the settings; subclasses extend it."""
        self._check(self.scale > 0, "scale", "a positive number")
        self._check(self.gradient in get_args(GradientMode), "gradient", f"one of {get_args(GradientMode)}")

    def _check(self, good: bool, field: str, allowed: str) -> None:
        if not good:
            raise ValueError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}, but must be {allowed}")

    @property
    def logit_bound(self) -> float | None:
        """The largest |logit| a negative can have, if there is one: then the softmax needs no maximum."""
        bounded = self.normalize_embeddings and self.normalize_class_centers
        return self.scale if bounded and type(self).negative is Margin.negative else None

    def initial_state(self) -> State:
        """The state before the first step."""
        return {}

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """Per-row numbers for `target` and `negative`, and the state after this step."""
        return {}, state

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """The function f: [B] similarity to the own class center -> [B] similarity with the margin."""
        return cosine_B

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        """The function h, elementwise: [B, n] similarity to other class centers -> [B, n]."""
        return cosine_Bn

    def logit_scale(self, row: Row) -> float | Tensor:
        """The factor on all similarities of a row: a number, or [B] if it depends on the row."""
        return self.scale

    def regularizer(self, row: Row) -> Tensor | None:
        """A term [B] added to the loss of each row, or None."""
        return None


def target_similarity(margin: Margin, cosine_B: Tensor, parameters: Parameters) -> Tensor:
    """`margin.target` with the gradient that `margin.gradient` asks for: [B] -> [B]."""
    if margin.gradient == "exact":
        return margin.target(cosine_B, parameters)
    return cosine_B + (margin.target(cosine_B.detach(), parameters) - cosine_B.detach())
