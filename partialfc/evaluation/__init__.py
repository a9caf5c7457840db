"""From embeddings to verification figures and plots."""

from partialfc.evaluation.extract import extract_embeddings
from partialfc.evaluation.identification import nearest_neighbor_accuracy
from partialfc.evaluation.plots import plot_loss, plot_roc
from partialfc.evaluation.roc import ScoreCounts, count_scores
from partialfc.evaluation.verification import (
    Pairs,
    VerificationResult,
    make_pairs,
    roc_curve,
    tar_at_far,
    ten_fold_accuracy,
    verify,
)

__all__ = [
    "Pairs",
    "ScoreCounts",
    "VerificationResult",
    "count_scores",
    "extract_embeddings",
    "make_pairs",
    "nearest_neighbor_accuracy",
    "plot_loss",
    "plot_roc",
    "roc_curve",
    "tar_at_far",
    "ten_fold_accuracy",
    "verify",
]
