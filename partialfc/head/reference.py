"""The definition of the loss: one process, plain torch, nothing sharded. Documentation, and what tests compare with.

B rows, C classes, K sub-centers, P labels of a row, D embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.margins.base import Aggregate, Margin, Need, Row, State, target_similarity

__all__ = ["reference_loss"]


def reference_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    class_centers_CKD: Tensor,
    margin: Margin,
    *,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
    step: int = 0,
    noise_B: Tensor | None = None,
    bias_C: Tensor | None = None,
    weight_C: Tensor | None = None,
    interclass_filtering_threshold: float | None = None,
) -> tuple[Tensor, State]:
    """The mean margin loss over a batch without masked rows, and the margin's state after it.

    For a sampled softmax, pass the rows of the centers in play and labels that index them.

    Args:
        embeddings_BD: [B, D].
        labels_B: [B] int64, or [B, P] padded with -1 if rows have several; then noise is [B * P].
        class_centers_CKD: [C, K, D], or [C, D].
        margin: the loss.
        state: of the margin before the step; None for the first one.
        learned: the learnable numbers of the margin; None for their first values.
        step: steps done so far.
        noise_B: standard normal numbers, for margins that need them.
        bias_C: of each class, if the margin has them.
        weight_C: how often a class counts as a negative; None for once.
        interclass_filtering_threshold: negatives above it do not count.
    """
    num_classes = len(class_centers_CKD)
    cosine_BC = _similarities(embeddings_BD, class_centers_CKD, margin) + (0.0 if bias_C is None else bias_C)
    # From here on a row is one label of a row: with several, rows are repeated, and none is a negative of another.
    labels_BP = labels_B[:, None] if labels_B.ndim == 1 else labels_B
    own_BC = (labels_BP[:, :, None] == torch.arange(num_classes, device=labels_BP.device)).any(1)
    row_B, column_B = (labels_BP >= 0).nonzero(as_tuple=True)
    labels_B, own_BC, cosine_BC = labels_BP[row_B, column_B], own_BC[row_B], cosine_BC[row_B]
    excluded_BC = own_BC
    if interclass_filtering_threshold is not None:
        excluded_BC = own_BC | (cosine_BC > interclass_filtering_threshold)
    log_weight_C = cosine_BC.new_zeros(num_classes) if weight_C is None else weight_C.log()

    target_B = cosine_BC.gather(1, labels_B[:, None])[:, 0]
    state = state or margin.initial_state(num_classes)
    learned = learned or {k: cosine_BC.new_tensor(v) for k, v in margin.initial_learned(num_classes).items()}
    logsumexp_B = _statistic(margin, state, cosine_BC.detach(), log_weight_C, excluded_BC)
    norm_B = embeddings_BD.norm(dim=1)[row_B]
    noise_B = None if noise_B is None else noise_B.view_as(labels_BP)[row_B, column_B]
    row = Row(target_B.detach(), labels_B >= 0, step, norm_B, noise_B, logsumexp_B, learned)
    parameters, state = margin.prepare(row, state)

    scale_B = torch.as_tensor(margin.logit_scale(parameters), dtype=target_B.dtype).expand_as(target_B)
    own_logit_B = scale_B * target_similarity(margin, target_B, parameters)
    logits_BC = (scale_B[:, None] * margin.negative(cosine_BC, parameters)).masked_fill(excluded_BC, -math.inf)
    loss_B = _AGGREGATES[margin.aggregate](margin, logits_BC, log_weight_C, labels_B, own_logit_B)
    regularizer_B = margin.regularizer(row)
    loss_B = loss_B if regularizer_B is None else loss_B + regularizer_B
    return loss_B.sum() / (labels_BP >= 0).any(1).sum(), state


def _similarities(embeddings_BD: Tensor, class_centers_CKD: Tensor, margin: Margin) -> Tensor:
    """[B, C], to the nearest sub-center of each class."""
    x_BD = F.normalize(embeddings_BD) if margin.normalize_embeddings else embeddings_BD
    w_CKD = class_centers_CKD.view(len(class_centers_CKD), -1, class_centers_CKD.shape[-1])
    w_CKD = F.normalize(w_CKD, dim=-1) if margin.normalize_class_centers else w_CKD
    return torch.einsum("bd,ckd->bck", x_BD, w_CKD).max(2).values


def _statistic(
    margin: Margin, state: State, cosine_BC: Tensor, log_weight_C: Tensor, excluded_BC: Tensor
) -> Tensor | None:
    """[B], of the negatives at the scale of the step before, if the margin needs it."""
    if Need.NEGATIVE_LOGSUMEXP not in margin.needs:
        return None
    logits_BC = margin.statistic_scale(state) * cosine_BC + log_weight_C
    return logits_BC.masked_fill(excluded_BC, -math.inf).logsumexp(1)


def _softmax(margin: Margin, logits_BC: Tensor, log_weight_C: Tensor, labels_B: Tensor, own_B: Tensor) -> Tensor:
    """[B], cross entropy with the logit of the own class put back into its place."""
    return F.cross_entropy(
        (logits_BC + log_weight_C).scatter(1, labels_B[:, None], own_B[:, None]), labels_B, reduction="none"
    )


def _binary(margin: Margin, logits_BC: Tensor, log_weight_C: Tensor, labels_B: Tensor, own_B: Tensor) -> Tensor:
    """[B], the loss of the margin over the sum of what each class costs."""
    return margin.row_loss(own_B, (F.softplus(logits_BC, threshold=50) * log_weight_C.exp()).sum(1))


_AGGREGATES = {Aggregate.LOGSUMEXP: _softmax, Aggregate.SOFTPLUS_SUM: _binary}
