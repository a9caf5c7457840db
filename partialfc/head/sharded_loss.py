"""The margin softmax over class centers that are spread over ranks: what `reference.py` defines, sharded.

Shapes: B rows of the global batch, n class centers in play on this rank, D embedding dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.collectives import copy_to_shards, logsumexp_over_shards, sum_over_shards
from partialfc.distributed.mesh import ShardMesh
from partialfc.head.sampling import ClassesInPlay
from partialfc.margins.base import Margin, Parameters, Row, target_similarity

__all__ = ["cosines", "negative_logsumexp", "rows_loss", "target_cosine"]


def cosines(embeddings_BD: Tensor, class_centers_nD: Tensor, margin: Margin) -> Tensor:
    """[B, n] similarities, normalised as the margin asks for."""
    x_BD = F.normalize(embeddings_BD) if margin.normalize_embeddings else embeddings_BD
    w_nD = F.normalize(class_centers_nD) if margin.normalize_class_centers else class_centers_nD
    return x_BD @ w_nD.T


def target_cosine(cosine_Bn: Tensor, in_play: ClassesInPlay, mesh: ShardMesh) -> Tensor:
    """[B], the similarity to the own class center, wherever it lives; 0 where it lives nowhere. One all-reduce."""
    if cosine_Bn.shape[1] == 0:
        return sum_over_shards(cosine_Bn.sum(1), mesh)
    local_B = cosine_Bn.gather(1, in_play.slot_B[:, None])[:, 0]
    return sum_over_shards(torch.where(in_play.owned_B, local_B, 0.0), mesh)


def negative_logsumexp(
    cosine_Bn: Tensor,
    in_play: ClassesInPlay,
    parameters: Parameters,
    row: Row,
    *,
    margin: Margin,
    mesh: ShardMesh,
    bounded: bool,
) -> Tensor:
    """[B], the log-sum-exp of the logits of all classes in play but the own one. One all-reduce if bounded, else two.

    Per-row numbers that carry a gradient meet different classes on each rank, so their gradient is summed over ranks.
    """
    shared = {name: _to_shards(value, mesh) for name, value in parameters.items()}
    scale = margin.logit_scale(row)
    logits_Bn = margin.negative(cosine_Bn, shared)
    logits_Bn = logits_Bn * (_to_shards(scale, mesh)[:, None] if isinstance(scale, Tensor) else scale)
    if logits_Bn.shape[1]:
        slot_B1 = in_play.slot_B[:, None]
        without_own_B1 = torch.where(in_play.owned_B[:, None], float("-inf"), logits_Bn.gather(1, slot_B1))
        logits_Bn = logits_Bn.scatter(1, slot_B1, without_own_B1)
    return logsumexp_over_shards(logits_Bn, mesh, bounded=bounded)


def rows_loss(target_B: Tensor, logsumexp_B: Tensor, parameters: Parameters, row: Row, *, margin: Margin) -> Tensor:
    """[B], the loss of each row; the same on every rank.

    softplus(logsumexp of the negatives - own logit) is cross entropy with the own class taken out of the sum: nothing
    is clamped, and nothing cancels when the own logit dominates.
    """
    own_B = margin.logit_scale(row) * target_similarity(margin, target_B, parameters)
    # The default threshold of 20 would cost 2e-9.
    loss_B = F.softplus(logsumexp_B - own_B, threshold=50)
    regularizer_B = margin.regularizer(row)
    return loss_B if regularizer_B is None else loss_B + regularizer_B


def _to_shards(value: Tensor, mesh: ShardMesh) -> Tensor:
    return copy_to_shards(value, mesh) if value.requires_grad else value
