"""Verification: do two images show the same identity?

Two views of one set of embeddings. The ten-fold protocol of Labeled Faces in the Wild (Huang et al., 2007) gives the
accuracy at a threshold chosen on other pairs; all images against all others give the true accept rate at low false
accept rates. A score is the cosine of two embeddings, and a pair is accepted if its score reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from partialfc.evaluation.roc import ScoreCounts, count_scores, roc_curve, tar_at_far, unit_rows
from partialfc.keyed import KeyedPermutation, hash64

__all__ = [
    "Pairs",
    "VerificationResult",
    "make_pairs",
    "roc_curve",
    "tar_at_far",
    "ten_fold_accuracy",
    "verify",
]

_SAME, _DIFFERENT = 0, 1
_PAIRS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Pairs:
    """Pairs of images to verify, fold after fold.

    Attributes:
        first: int64 [P], row of one image.
        second: int64 [P], row of the other.
        same: bool [P], whether both show one identity.
    """

    first: Tensor
    second: Tensor
    same: Tensor

    def __len__(self) -> int:
        return self.first.numel()


@dataclass(frozen=True)
class VerificationResult:
    """What `verify` found.

    Attributes:
        accuracy: mean ten-fold accuracy, in [0, 1].
        accuracy_std: standard deviation of the accuracy over the folds.
        tar_at_far: true accept rate, all images against all, for each false accept rate asked for (at most that).
        auc: area under the ROC of all images against all.
        num_images: images that took part.
        num_left_out: rows labelled -1.
        num_different_pairs: pairs of two identities in all; no false accept rate below its inverse can be told from 0.
        counts: the scores of all images against all, from which curves are drawn; not among the plain values.
    """

    accuracy: float
    accuracy_std: float
    tar_at_far: dict[float, float]
    auc: float
    num_images: int
    num_left_out: int
    num_different_pairs: int
    counts: ScoreCounts = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that JSON can hold; false accept rates become strings such as "0.001"."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "counts"}
        values["tar_at_far"] = {f"{far:g}": tar for far, tar in self.tar_at_far.items()}
        return values


def verify(
    embeddings: Tensor, labels: Tensor, *, num_pairs: int, seed: int, fars: Sequence[float]
) -> VerificationResult:
    """Verifies a labelled set of embeddings both ways.

    Args:
        embeddings: [N, D], of any length (see `extract_embeddings`).
        labels: int64 [N], identities; rows labelled -1 are left out and counted.
        num_pairs: pairs of the ten-fold protocol, a multiple of 20.
        seed: chooses those pairs.
        fars: false accept rates, each in [0, 1].

    Raises:
        ValueError: as `make_pairs`, `ten_fold_accuracy` and `count_scores`.
    """
    pairs = make_pairs(labels, num_pairs=num_pairs, seed=seed)
    accuracy, accuracy_std = ten_fold_accuracy(embeddings, pairs)
    counts = count_scores(embeddings, labels)
    num_left_out = int((labels == -1).sum())
    return VerificationResult(
        accuracy=accuracy,
        accuracy_std=accuracy_std,
        tar_at_far={far: counts.tar_at_far(far) for far in fars},
        auc=counts.auc(),
        num_images=labels.numel() - num_left_out,
        num_left_out=num_left_out,
        num_different_pairs=counts.num_different,
        counts=counts,
    )


def make_pairs(labels: Tensor, *, num_pairs: int, folds: int = 10, seed: int) -> Pairs:
    """Draws a verification protocol: in each fold as many pairs of one identity as of two.

    Every unordered pair of a kind is as likely as any other, and none is drawn twice. The draw depends on the seed and
    the labels alone.

    Args:
        labels: int64 [N], identities; rows labelled -1 are left out.
        num_pairs: pairs over all folds, a multiple of 2 * folds.
        folds: number of folds; they follow each other, each with its same pairs first.
        seed: any integer.

    Raises:
        ValueError: if `num_pairs` does not divide, or the images make too few pairs of either kind.
    """
    if num_pairs < 1 or num_pairs % (2 * folds):
        raise ValueError(
            f"num_pairs is {num_pairs}, but {folds} folds of half same and half different pairs need a positive "
            f"multiple of {2 * folds}; the nearest is {max(1, round(num_pairs / (2 * folds))) * 2 * folds}"
        )
    rows = (labels != -1).nonzero().flatten()
    rows = rows[torch.argsort(labels[rows], stable=True)]
    identities, counts = torch.unique_consecutive(labels[rows], return_counts=True)
    position = torch.arange(rows.numel(), device=labels.device)
    identity_end = counts.cumsum(0).repeat_interleave(counts)

    # With rows in order of identity, row i has its same partners in [i + 1, identity_end[i]) and its different ones
    # from there to the end, so the pairs of a kind can be numbered, and distinct numbers drawn.
    same_count, different_count = identity_end - 1 - position, rows.numel() - identity_end
    for kind, available in (("one identity", same_count), ("two identities", different_count)):
        if int(available.sum()) < num_pairs // 2:
            raise ValueError(
                f"{num_pairs} pairs need {num_pairs // 2} pairs of {kind}, but {rows.numel()} images of "
                f"{identities.numel()} identities make only {int(available.sum())}; lower the number of pairs "
                "(evaluation.num_pairs), or add identities and images"
            )
    first_same, offset_same = _draw(same_count, num_pairs // 2, hash64(seed, _SAME))
    first_different, offset_different = _draw(different_count, num_pairs // 2, hash64(seed, _DIFFERENT))
    second_same = first_same + 1 + offset_same
    second_different = identity_end[first_different] + offset_different

    def by_fold(same: Tensor, different: Tensor) -> Tensor:
        return torch.cat([same.view(folds, -1), different.view(folds, -1)], dim=1).flatten()

    return Pairs(
        first=rows[by_fold(first_same, first_different)],
        second=rows[by_fold(second_same, second_different)],
        same=by_fold(torch.ones_like(first_same), torch.zeros_like(first_different)).bool(),
    )


def _draw(partners: Tensor, number: int, key: int) -> tuple[Tensor, Tensor]:
    """Distinct (row, partner of that row) out of `partners` [N] of them for each row."""
    last = partners.cumsum(0)
    drawn = KeyedPermutation(int(last[-1]))(torch.arange(number, device=partners.device), key)
    row = torch.searchsorted(last, drawn, right=True)
    return row, drawn - (last[row] - partners[row])


def ten_fold_accuracy(embeddings: Tensor, pairs: Pairs, folds: int = 10) -> tuple[float, float]:
    """Accuracy on each fold at the threshold that is best on the others.

    Candidate thresholds separate the training scores in every possible way: they lie half-way between neighbouring
    distinct scores, below all and above all. Of equally good ones the lowest is taken.

    Args:
        embeddings: [N, D], of any length; rows are normalised here.
        pairs: P of them, fold after fold, with folds of equal size.
        folds: number of folds, at least 2.

    Returns:
        Mean and (population) standard deviation of the accuracy over the folds.

    Raises:
        ValueError: if the pairs do not divide into folds, or an embedding in them is not finite.
    """
    if folds < 2 or len(pairs) == 0 or len(pairs) % folds:
        raise ValueError(f"{len(pairs)} pairs cannot be divided into {folds} equal folds (at least 2)")
    scores_FP = _pair_scores(embeddings, pairs).view(folds, -1)
    same_FP = pairs.same.view(folds, -1)
    accuracies = torch.empty(folds, dtype=torch.float64)
    for fold in range(folds):
        training = torch.arange(folds, device=same_FP.device) != fold
        threshold = _best_threshold(scores_FP[training].flatten(), same_FP[training].flatten())
        accuracies[fold] = ((scores_FP[fold] >= threshold) == same_FP[fold]).double().mean()
    return float(accuracies.mean()), float(accuracies.std(correction=0))


def _pair_scores(embeddings: Tensor, pairs: Pairs) -> Tensor:
    """Cosine of each pair, float64 [P]."""
    parts = [
        (unit_rows(embeddings[first]).double() * unit_rows(embeddings[second]).double()).sum(dim=1)
        for first, second in zip(pairs.first.split(_PAIRS_PER_CHUNK), pairs.second.split(_PAIRS_PER_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _best_threshold(scores: Tensor, same: Tensor) -> float:
    """The lowest threshold at which `scores >= threshold` agrees most often with `same`."""
    scores, order = scores.sort()
    same = same[order].long()
    # correct[k]: the k lowest are rejected, the others accepted.
    rejected_right = torch.cat([same.new_zeros(1), (1 - same).cumsum(0)])
    accepted_right = same.sum() - torch.cat([same.new_zeros(1), same.cumsum(0)])
    correct = rejected_right + accepted_right
    correct[1:-1][scores[1:] == scores[:-1]] = -1
    split = int(correct.argmax())
    if split in (0, len(scores)):
        return float("-inf") if split == 0 else float("inf")
    lower, upper = float(scores[split - 1]), float(scores[split])
    middle = (lower + upper) / 2
    return middle if middle > lower else upper
