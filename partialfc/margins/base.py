"""What a margin is: pure functions of one cosine per row, and what they need to know about the row.

With the target column taken out of the log-sum-exp, the whole softmax family is one formula per row i,

    loss_i = softplus( logsumexp_{j != y_i} scale * h(cos_ij)  -  scale * f(cos_{i,y_i}) )   (+ regularizer_i)

A margin defines f (`target`) and, where it differs from the identity, h (`negative`). Losses that are a sum of
independent yes-or-no questions take another sum over the negatives (`aggregate`) and another loss of the row
(`row_loss`). A margin is a frozen dataclass whose fields are its settings, so it is its own configuration entry.
Nothing else in the package names a margin.

Shapes: B rows of the global batch, n class centers on this rank.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Aggregate",
    "GradientMode",
    "Margin",
    "Need",
    "Parameters",
    "Row",
    "ScaledMargin",
    "State",
    "check_fields",
    "check_setting",
    "target_similarity",
]

_LARGEST = 3.4e38  # of float32

GradientMode = Literal["exact", "detached"]
Parameters = Mapping[str, Tensor]
"""Numbers a margin computes once for each row of the batch, by name, each [B]."""
State = Mapping[str, Tensor]
"""Numbers a margin remembers from step to step (moving averages, annealing), by name, each a scalar."""


class Need(enum.Enum):
    """What a margin asks the head to provide in `Row` beyond what is always there."""

    EMBEDDING_NORM = "embedding_norm"
    NOISE = "noise"
    NEGATIVE_LOGSUMEXP = "negative_logsumexp"


class Aggregate(enum.Enum):
    """The sum over the classes in play but the own one, of their logits z: [B, n] -> [B]."""

    LOGSUMEXP = "log sum exp(z)"
    SOFTPLUS_SUM = "sum log(1 + exp(z))"


@dataclass(frozen=True)
class Row:
    """What is known of each row of the global batch, the same on all ranks.

    Attributes:
        target_cosine: [B], similarity to the row's own class center, detached. 0 where `valid` is False.
        valid: [B] bool; False for a row that is masked (label -1). Statistics must leave such rows out.
        step: training steps done so far, also those that were skipped because the loss was not finite. What anneals
            over the steps that were made counts them in its state.
        embedding_norm: [B], with gradient, if the margin needs `Need.EMBEDDING_NORM`.
        noise: [B], standard normal, a function of (seed, step, row of the global batch), if it needs `Need.NOISE`.
        negative_logsumexp: [B], detached, log of the sum over other classes of exp(`statistic_scale` * cos), if it
            needs `Need.NEGATIVE_LOGSUMEXP`.
        learned: the learnable numbers of the margin, scalars with gradient.
    """

    target_cosine: Tensor
    valid: Tensor
    step: int
    embedding_norm: Tensor | None = None
    noise: Tensor | None = None
    negative_logsumexp: Tensor | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)


def check_setting(owner: Any, good: bool, name: str, allowed: str) -> None:
    """Raises a ValueError that names the setting of a dataclass, its value, and what is allowed, unless `good`."""
    if not good:
        raise ValueError(f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}, but must be {allowed}")


def check_fields(owner: Any) -> None:
    """Checks that the settings of a dataclass are of their types, and numbers are finite, in float32 too."""
    for entry in fields(owner):
        value = getattr(owner, entry.name)
        if entry.type == "bool":
            check_setting(owner, isinstance(value, bool), entry.name, "True or False")
        elif entry.type in ("int", "float") or (entry.type == "float | None" and value is not None):
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            check_setting(owner, is_number, entry.name, "a number")
            check_setting(owner, abs(value) <= _LARGEST, entry.name, "finite, in float32 too")


@dataclass(frozen=True)
class Margin:
    """Base of all margins.

    Attributes:
        gradient: `"exact"`, or `"detached"`: d target / d cosine := 1, called characteristic gradient detachment by
            Liu et al. ("SphereFace Revived", TPAMI 2022, section 4.3), and what insightface trains with. The values
            are equal; the gradient of an angular margin near theta = 0 is not.
    """

    gradient: GradientMode = field(default="exact", kw_only=True)

    normalize_embeddings: ClassVar[bool] = True
    normalize_class_centers: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()
    aggregate: ClassVar[Aggregate] = Aggregate.LOGSUMEXP
    needs_sampling_correction: ClassVar[bool] = False
    """Whether a sampled sum over negatives must be corrected, because the loss depends on its absolute level."""

    def __post_init__(self) -> None:
        """Checks the settings; subclasses extend it."""
        check_fields(self)
        self._check(self.gradient in get_args(GradientMode), "gradient", f"one of {get_args(GradientMode)}")

    def _check(self, good: bool, name: str, allowed: str) -> None:
        check_setting(self, good, name, allowed)

    @property
    def compares_cosines(self) -> bool:
        """Whether similarities are cosines."""
        return self.normalize_embeddings and self.normalize_class_centers

    @property
    def keeps_negatives(self) -> bool:
        """Whether `negative` is the identity, so that logits of negatives are similarities times a scale."""
        return type(self).negative is Margin.negative

    @property
    def allows_several_labels(self) -> bool:
        """Whether the loss of a row with several labels is that of each label with the same negatives: of a softmax."""
        return self.aggregate is Aggregate.LOGSUMEXP

    @property
    def has_class_bias(self) -> bool:
        """Whether the similarity to a class has a learnable bias of that class added to it."""
        return False

    @property
    def logit_bound(self) -> float | None:
        """The largest |logit| a negative can have, if there is one: then the softmax needs no maximum."""
        return None

    def initial_state(self, num_classes: int) -> State:
        """The state before the first step: float64 scalars. The head checkpoints it.

        Ranks do not exchange it: they agree because each of them works it out from the same global batch.
        """
        return {}

    def initial_learned(self, num_classes: int) -> Mapping[str, float]:
        """Learnable numbers and their first values. The head trains and checkpoints them."""
        return {}

    def statistic_scale(self, state: State) -> Tensor:
        """The scale at which `Row.negative_logsumexp` is taken, for margins that need it."""
        raise NotImplementedError

    def prepare(self, row: Row, state: State) -> tuple[Parameters, State]:
        """Per-row numbers for the other functions, and the state after this step.

        Whatever of `row` carries a gradient and enters the logits must pass through the parameters: the head sums the
        gradients of parameters over ranks where that is called for.
        """
        return {}, state

    def target(self, cosine_B: Tensor, parameters: Parameters) -> Tensor:
        """The function f: [B] similarity to the own class center -> [B] similarity with the margin."""
        return cosine_B

    def negative(self, cosine_Bn: Tensor, parameters: Parameters) -> Tensor:
        """The function h, elementwise: [B, n] similarity to other class centers -> [B, n]."""
        return cosine_Bn

    def logit_scale(self, parameters: Parameters) -> float | Tensor:
        """The factor on all similarities of a row: a number, or [B] if it depends on the row."""
        raise NotImplementedError

    def row_loss(self, own_B: Tensor, negatives_B: Tensor) -> Tensor:
        """[B] own logit and [B] aggregate of the negatives -> [B] loss.

        The default is cross entropy with the own class taken out of the sum: nothing is clamped, and nothing cancels
        when the own logit dominates.
        """
        # The default threshold of 20 would cost 2e-9.
        return F.softplus(negatives_B - own_B, threshold=50)

    def regularizer(self, row: Row) -> Tensor | None:
        """A term [B] added to the loss of each row, or None."""
        return None


@dataclass(frozen=True)
class ScaledMargin(Margin):
    """Base of margins with a scale: with no method overridden it is a plain softmax over scaled cosines.

    Attributes:
        scale: the factor s on all similarities before the softmax. At least as large as log(num_classes) in practice.
    """

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.scale > 0, "scale", "a positive number")

    @property
    def logit_bound(self) -> float | None:
        """The scale, if similarities are cosines and stay what they are."""
        as_they_are = self.keeps_negatives and type(self).logit_scale is ScaledMargin.logit_scale
        return self.scale if self.compares_cosines and as_they_are else None

    def logit_scale(self, parameters: Parameters) -> float | Tensor:
        """The scale."""
        return self.scale


def target_similarity(margin: Margin, cosine_B: Tensor, parameters: Parameters) -> Tensor:
    """`margin.target` with the gradient that `margin.gradient` asks for: [B] -> [B]."""
    if margin.gradient == "exact":
        return margin.target(cosine_B, parameters)
    return cosine_B + (margin.target(cosine_B.detach(), parameters) - cosine_B.detach())
