"""Terms that are added to a margin loss: Center loss, and contrastive and triplet loss over pairs of the batch.

Each is a frozen dataclass with a few pure functions; `partialfc/head/auxiliary.py` shards them. There are two kinds: a
`CenterTerm` has a center of its own for every class, a `PairTerm` compares the rows of the global batch.

Shapes: B rows of the global batch, b those of this rank, D embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from partialfc.margins.base import check_fields, check_setting

__all__ = ["Auxiliary", "CenterLoss", "CenterTerm", "ContrastiveLoss", "PairTerm", "TripletLoss"]

Kind = Literal["centers", "pairs"]


@dataclass(frozen=True)
class Auxiliary:
    """Base of both kinds.

    Attributes:
        weight: the factor on the term.
    """

    weight: float

    kind: ClassVar[Kind]

    def __post_init__(self) -> None:
        """Checks the settings; subclasses extend it."""
        check_fields(self)
        check_setting(self, self.weight > 0, "weight", "a positive number")


@dataclass(frozen=True)
class CenterTerm(Auxiliary):
    """The mean over valid rows of what each row costs against its class's own center."""

    kind: ClassVar[Kind] = "centers"

    def row_terms(self, embeddings_BD: Tensor, centers_BD: Tensor) -> Tensor:
        """[B], of each row and the center of its class."""
        raise NotImplementedError

    def moved(self, center_nD: Tensor, pull_nD: Tensor, count_n: Tensor, num_rows: Tensor) -> Tensor:
        """The centers after a step.

        Args:
            center_nD: before it.
            pull_nD: sum over the rows of that class of (center - embedding).
            count_n: how many rows that are.
            num_rows: valid rows of the global batch, a scalar.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CenterLoss(CenterTerm):
    """1/2 |x - k|^2 between an embedding, not normalised, and the center k of its class; its mean over the batch.

    Wen, Zhang, Li and Qiao, "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, eq. 2 to
    5. Centers start at 0.

    Attributes:
        weight: lambda of the paper.
        alpha: how far the centers move.
        update: `"paper"`: k <- k - alpha sum (k - x) / (1 + rows of the class); `"gradient"`: descent on the mean
            1/2 |x - k|^2 of the batch with the rate alpha.
    """

    weight: float = 0.003
    alpha: float = 0.5
    update: Literal["paper", "gradient"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, self.alpha >= 0, "alpha", "a number that is not negative")
        check_setting(self, self.update in ("paper", "gradient"), "update", "one of ('paper', 'gradient')")

    def row_terms(self, embeddings_BD: Tensor, centers_BD: Tensor) -> Tensor:
        """[B], half the squared distance."""
        return 0.5 * (embeddings_BD - centers_BD).square().sum(1)

    def moved(self, center_nD: Tensor, pull_nD: Tensor, count_n: Tensor, num_rows: Tensor) -> Tensor:
        """See `CenterTerm.moved`."""
        share = 1 + count_n[:, None] if self.update == "paper" else num_rows.clamp(min=1)
        return center_nD - self.alpha * pull_nD / share


@dataclass(frozen=True)
class PairTerm(Auxiliary):
    """A ratio of sums over pairs of rows of the global batch.

    Attributes:
        normalize: whether embeddings are compared as unit vectors.
        margin: a distance.
    """

    margin: float
    normalize: bool = True

    kind: ClassVar[Kind] = "pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, self.margin >= 0, "margin", "a number that is not negative")

    def sums(self, distance_bB: Tensor, same_bB: Tensor, different_bB: Tensor) -> Tensor:
        """[k] sums over this rank's rows, to be added over ranks.

        Args:
            distance_bB: Euclidean distance of this rank's rows to all rows.
            same_bB: whether the other row is valid and of the same class; False for the row itself.
            different_bB: whether it is valid and of another class.
        """
        raise NotImplementedError

    def value(self, sums: Tensor) -> Tensor:
        """The term, a scalar, from the sums [k] over all ranks."""
        raise NotImplementedError


@dataclass(frozen=True)
class ContrastiveLoss(PairTerm):
    """Mean of 1/2 d^2 over pairs of one class, plus mean of 1/2 [margin - d]_+^2 over pairs of two.

    Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, eq. 4; the two
    kinds of pairs are averaged apart, since in a batch there are far more of the second.
    """

    weight: float = 1.0
    margin: float = 1.0

    def sums(self, distance_bB: Tensor, same_bB: Tensor, different_bB: Tensor) -> Tensor:
        """[4]: of both kinds of pairs, what they cost and how many there are."""
        near = torch.where(same_bB, 0.5 * distance_bB.square(), 0.0).sum()
        far = torch.where(different_bB, 0.5 * (self.margin - distance_bB).clamp(min=0).square(), 0.0).sum()
        counts = torch.stack([same_bB.sum(), different_bB.sum()]).to(near.dtype)
        return torch.cat([torch.stack([near, far]), counts])

    def value(self, sums: Tensor) -> Tensor:
        """See `PairTerm.value`."""
        return (sums[:2] / sums[2:].clamp(min=1)).sum()


@dataclass(frozen=True)
class TripletLoss(PairTerm):
    """Batch-hard: mean over rows of [margin + farthest of the same class - nearest of another]_+.

    Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, eq. 5. Rows that have
    no other row of their class in the batch, or none of another, are left out.

    Attributes:
        soft: softplus in place of the hinge, and no margin: the paper's soft margin.
    """

    weight: float = 1.0
    margin: float = 0.3
    soft: bool = False

    def sums(self, distance_bB: Tensor, same_bB: Tensor, different_bB: Tensor) -> Tensor:
        """[2]: what the rows cost, and how many there are."""
        if distance_bB.shape[1] == 0:
            return distance_bB.new_zeros(2)
        farthest_b = torch.where(same_bB, distance_bB, -1.0).amax(1)
        nearest_b = torch.where(different_bB, distance_bB, torch.inf).amin(1)
        counts_b = same_bB.any(1) & different_bB.any(1)
        gap_b = torch.where(counts_b, farthest_b - nearest_b, 0.0)
        cost_b = torch.nn.functional.softplus(gap_b) if self.soft else (self.margin + gap_b).clamp(min=0)
        return torch.stack([torch.where(counts_b, cost_b, 0.0).sum(), counts_b.sum().to(cost_b.dtype)])

    def value(self, sums: Tensor) -> Tensor:
        """See `PairTerm.value`."""
        return sums[0] / sums[1].clamp(min=1)
