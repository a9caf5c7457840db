"""The definition of the loss: one process, plain torch, nothing sharded. Documentation, and what tests compare with.

B rows, C classes, D embedding dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.margins.base import Margin, Row, State, target_similarity

__all__ = ["reference_loss"]


def reference_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    class_centers_CD: Tensor,
    margin: Margin,
    *,
    state: State | None = None,
    step: int = 0,
    noise_B: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The mean margin loss over a batch without masked rows, and the margin's state after it.

    For a sampled softmax, pass the rows of the centers in play and labels that index them.
    """
    x_BD = F.normalize(embeddings_BD) if margin.normalize_embeddings else embeddings_BD
    w_CD = F.normalize(class_centers_CD) if margin.normalize_class_centers else class_centers_CD
    cosine_BC = x_BD @ w_CD.T
    target_B = cosine_BC.gather(1, labels_B[:, None])[:, 0]
    valid_B = torch.ones_like(labels_B, dtype=torch.bool)
    row = Row(target_B.detach(), valid_B, step, embeddings_BD.norm(dim=1), noise_B)
    parameters, state = margin.prepare(row, margin.initial_state() if state is None else state)
    scale = torch.as_tensor(margin.logit_scale(row), dtype=x_BD.dtype).expand(len(labels_B))[:, None]
    with_margin_B1 = target_similarity(margin, target_B, parameters)[:, None]
    logits_BC = scale * margin.negative(cosine_BC, parameters).scatter(1, labels_B[:, None], with_margin_B1)
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    regularizer_B = margin.regularizer(row)
    return (loss_B if regularizer_B is None else loss_B + regularizer_B).mean(), state
