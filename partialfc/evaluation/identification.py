"""Whether the image most like a given one shows the same identity."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.evaluation.roc import labelled_unit_rows

__all__ = ["nearest_neighbor_accuracy"]

_SCORES_PER_CHUNK = 2**22


def nearest_neighbor_accuracy(embeddings: Tensor, labels: Tensor) -> float:
    """Rank-1 accuracy, each image against all others by cosine; of equal scores the first row counts.

    Args:
        embeddings: [N, D], of any length.
        labels: int64 [N], identities; rows labelled -1 are left out.

    Returns:
        The share of images whose nearest other image has the same label. An image that is alone in its identity can
        only be missed.

    Raises:
        ValueError: if shapes disagree, an embedding is not finite, or there are fewer than two images.
    """
    unit, labels = labelled_unit_rows(embeddings, labels)
    count = len(unit)
    if count < 2:
        raise ValueError(f"{count} labelled images have no nearest neighbours; at least 2 are needed")
    rows = max(1, _SCORES_PER_CHUNK // count)
    hits = 0
    for start in range(0, count, rows):
        scores = unit[start : start + rows] @ unit.T
        own = torch.arange(start, min(start + rows, count), device=unit.device)
        scores[own - start, own] = -torch.inf
        hits += int((labels[scores.argmax(1)] == labels[own]).sum())
    return hits / count
