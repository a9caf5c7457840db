"""The trade between accepted identity pairs and accepted impostors, counted exactly.

Everything here follows from one table (`ScoreCounts`): how many pairs of one identity, and how many of two, score at
least as high as each threshold. A pair is accepted if its score is not below the threshold, so equal scores are
accepted or rejected together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FarRule", "ScoreCounts", "count_scores", "roc_curve", "tar_at_far"]

FarRule = Literal["at_most", "nearest"]

# 4096 images make 8.4 million pairs, whose exact sort takes about a second and 0.5 GB.
MAX_EXACT_IMAGES = 4096
HISTOGRAM_BINS = 2**20
PAIRS_PER_CHUNK = 2**22


@dataclass(frozen=True)
class ScoreCounts:
    """How many pairs are accepted at each threshold.

    Attributes:
        thresholds: float64 [K], strictly descending. The first is +inf (nothing is accepted), the last accepts all.
        same: int64 [K], pairs of one identity with score >= threshold.
        different: int64 [K], pairs of two identities with score >= threshold.
    """

    thresholds: Tensor
    same: Tensor
    different: Tensor

    @classmethod
    def from_scores(cls, same_scores: Tensor, different_scores: Tensor) -> ScoreCounts:
        """Counts given scores exactly: every distinct score is a threshold.

        Args:
            same_scores: [S], scores of pairs of one identity; higher means more alike.
            different_scores: [T], scores of pairs of two identities.

        Raises:
            ValueError: if either kind is empty or has a score that is not a number.
        """
        for name, scores in (("same_scores", same_scores), ("different_scores", different_scores)):
            if scores.numel() == 0:
                raise ValueError(f"{name} is empty: a rate over no pairs is undefined")
            if bool(scores.isnan().any()):
                raise ValueError(f"{name} has {int(scores.isnan().sum())} values that are not numbers")
        scores = torch.cat([same_scores.flatten(), different_scores.flatten()])
        ascending, inverse = torch.unique(scores, sorted=True, return_inverse=True)
        same = torch.bincount(inverse[: same_scores.numel()], minlength=ascending.numel())
        different = torch.bincount(inverse[same_scores.numel() :], minlength=ascending.numel())
        return cls._from_histogram(ascending.double(), same, different)

    @classmethod
    def _from_histogram(cls, lower_edges: Tensor, same: Tensor, different: Tensor) -> ScoreCounts:
        """From the number of pairs in [edge, next edge), edges ascending."""
        infinity = torch.full((1,), math.inf, dtype=torch.float64, device=lower_edges.device)
        zero = torch.zeros(1, dtype=torch.int64, device=lower_edges.device)
        return cls(
            thresholds=torch.cat([infinity, lower_edges.flip(0)]),
            same=torch.cat([zero, same.flip(0).cumsum(0)]),
            different=torch.cat([zero, different.flip(0).cumsum(0)]),
        )

    @property
    def num_same(self) -> int:
        """Pairs of one identity in all."""
        return int(self.same[-1])

    @property
    def num_different(self) -> int:
        """Pairs of two identities in all."""
        return int(self.different[-1])

    def far(self) -> Tensor:
        """False accept rate at each threshold, float64 [K], ascending from 0 to 1."""
        return self.different.double() / self.num_different

    def tar(self) -> Tensor:
        """True accept rate at each threshold, float64 [K], ascending from 0 to 1."""
        return self.same.double() / self.num_same

    def auc(self) -> float:
        """Area under the ROC: the chance that a same pair outscores a different one, a tie counting one half."""
        return float(torch.trapezoid(self.tar(), self.far()))

    def tar_at_far(self, far: float, *, rule: FarRule = "at_most") -> float:
        """True accept rate at a false accept rate; see `tar_at_far`."""
        if not 0.0 <= far <= 1.0:
            raise ValueError(f"far is {far}, but a false accept rate lies in [0, 1]")
        rates = self.far()
        if rule == "at_most":
            index = int((rates <= far).sum()) - 1
        elif rule == "nearest":
            distance = (rates - far).abs()
            index = int((distance == distance.min()).nonzero()[-1])
        else:
            raise ValueError(f"rule is {rule!r}, but must be 'at_most' or 'nearest'")
        return float(self.tar()[index])


def roc_curve(same_scores: Tensor, different_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The receiver operating characteristic of scored pairs.

    Args:
        same_scores: [S], scores of pairs of one identity; higher means more alike.
        different_scores: [T], scores of pairs of two identities.

    Returns:
        far, tar, thresholds, each float64 [K] with one point for every distinct score and a first one at +inf.

    Raises:
        ValueError: if either kind is empty or has a score that is not a number.
    """
    counts = ScoreCounts.from_scores(same_scores, different_scores)
    return counts.far(), counts.tar(), counts.thresholds


def tar_at_far(same_scores: Tensor, different_scores: Tensor, far: float, *, rule: FarRule = "at_most") -> float:
    """The share of same pairs accepted at a given false accept rate.

    Args:
        same_scores: [S], scores of pairs of one identity; higher means more alike.
        different_scores: [T], scores of pairs of two identities.
        far: the false accept rate, in [0, 1].
        rule: "at_most" takes the best threshold whose false accept rate does not exceed `far`, ties included.
            "nearest" takes the point of the ROC whose rate is nearest to `far` (of two equally near, the higher), the
            convention of published IJB-B and IJB-C evaluations; its rate may exceed `far`.

    Raises:
        ValueError: if either kind is empty or has a score that is not a number, or `far` or `rule` is out of range.
    """
    return ScoreCounts.from_scores(same_scores, different_scores).tar_at_far(far, rule=rule)


def count_scores(embeddings: Tensor, labels: Tensor) -> ScoreCounts:
    """Counts the cosines of all images against all others, each unordered pair once.

    Up to `MAX_EXACT_IMAGES` images the counts are exact at every distinct score. Beyond, thresholds lie on a grid of
    `HISTOGRAM_BINS` steps over [-1, 1]: the counts at each are still exact, memory does not grow with the pairs, and a
    true accept rate is low by at most what one step holds.

    Args:
        embeddings: [N, D], of any length; rows are normalised here.
        labels: int64 [N], identities; rows labelled -1 are left out.

    Raises:
        ValueError: if shapes disagree, an embedding is not finite, or there is no same or no different pair.
    """
    unit, labels = labelled_unit_rows(embeddings, labels)
    exact = unit.shape[0] <= MAX_EXACT_IMAGES
    same_scores, different_scores = [], []
    same = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=unit.device)
    different = torch.zeros_like(same)
    rows = max(1, PAIRS_PER_CHUNK // max(1, unit.shape[0]))
    for start in range(0, unit.shape[0], rows):
        stop = min(start + rows, unit.shape[0])
        scores = unit[start:stop] @ unit[start:].T
        upper = torch.ones_like(scores, dtype=torch.bool).triu_(diagonal=1)
        equal = labels[start:stop, None] == labels[None, start:]
        if exact:
            same_scores.append(scores[upper & equal])
            different_scores.append(scores[upper & ~equal])
        else:
            bins = ((scores + 1.0) * (HISTOGRAM_BINS / 2)).long().clamp_(0, HISTOGRAM_BINS - 1)
            same += torch.bincount(bins[upper & equal], minlength=HISTOGRAM_BINS)
            different += torch.bincount(bins[upper & ~equal], minlength=HISTOGRAM_BINS)
    num_same = sum(part.numel() for part in same_scores) if exact else int(same.sum())
    num_different = sum(part.numel() for part in different_scores) if exact else int(different.sum())
    if num_same == 0 or num_different == 0:
        raise ValueError(
            f"{unit.shape[0]} images of {labels.unique().numel()} identities make {num_same} pairs of one identity and "
            f"{num_different} of two; at least one of each kind is needed"
        )
    if exact:
        return ScoreCounts.from_scores(torch.cat(same_scores), torch.cat(different_scores))
    edges = torch.arange(HISTOGRAM_BINS, dtype=torch.float64, device=unit.device) * (2.0 / HISTOGRAM_BINS) - 1.0
    return ScoreCounts._from_histogram(edges, same, different)


def labelled_unit_rows(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length in float32 and their labels, without the rows labelled -1.

    Raises:
        ValueError: if shapes disagree or an embedding that counts is not finite.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)} and labels of shape {tuple(labels.shape)} do not "
            "belong together: expected [N, D] and [N]"
        )
    valid = labels != -1
    return unit_rows(embeddings[valid]), labels[valid]


def unit_rows(embeddings: Tensor) -> Tensor:
    """Rows scaled to unit length, float32 [N, D].

    Raises:
        ValueError: if an embedding is not finite.
    """
    finite = embeddings.isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"{int((~finite).sum())} of {len(finite)} embeddings are not finite, the first in row "
            f"{int((~finite).nonzero()[0])}; the backbone is broken or overflows in its evaluation precision"
        )
    return F.normalize(embeddings.float(), dim=1)
