"""The margin loss over class centers that are spread over ranks: what `reference.py` defines, sharded.

Shapes: B rows of the global batch, V cases (a row and one of its labels; V = B where rows have one label), n classes
in play on this rank, K sub-centers, D embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.collectives import copy_to_shards, logsumexp_over_shards, sum_over_shards
from partialfc.distributed.mesh import ShardMesh
from partialfc.head.sampling import ClassesInPlay
from partialfc.margins.base import Aggregate, Margin, Parameters

__all__ = ["aggregate_negatives", "log_weights", "negative_logits", "own_classes", "similarities", "target_similarity"]


def similarities(embeddings_BD: Tensor, centers_nKD: Tensor, bias_n: Tensor | None, margin: Margin) -> Tensor:
    """[B, n], normalised as the margin asks for; of several sub-centers the nearest counts."""
    x_BD = F.normalize(embeddings_BD) if margin.normalize_embeddings else embeddings_BD
    w_nKD = F.normalize(centers_nKD, dim=-1) if margin.normalize_class_centers else centers_nKD
    similarity_Bn = x_BD @ w_nKD.flatten(0, 1).T
    if centers_nKD.shape[1] > 1:
        # max, unlike amax, sends the gradient to one sub-center even if several are equally near.
        similarity_Bn = similarity_Bn.unflatten(1, centers_nKD.shape[:2]).max(2).values
    return similarity_Bn if bias_n is None else similarity_Bn + bias_n


def target_similarity(similarity_Vn: Tensor, in_play: ClassesInPlay, mesh: ShardMesh) -> Tensor:
    """[V], the similarity to the own class, wherever it lives; 0 where it lives nowhere. One all-reduce."""
    if similarity_Vn.shape[1] == 0:
        return sum_over_shards(similarity_Vn.sum(1), mesh)
    local_V = similarity_Vn.gather(1, in_play.slot_V[:, None])[:, 0]
    return sum_over_shards(torch.where(in_play.owned_V, local_V, 0.0), mesh)


def own_classes(in_play: ClassesInPlay, num_in_play: int, labels_per_row: int) -> Tensor:
    """[V, n] bool: the classes that the row of a case has as labels, and so are not its negatives."""
    # What lives on another rank is noted in a column too many, which nobody sees.
    slot_BP = torch.where(in_play.owned_V, in_play.slot_V, num_in_play).unflatten(0, (-1, labels_per_row))
    own_Bn = torch.zeros((len(slot_BP), num_in_play + 1), dtype=torch.bool, device=slot_BP.device)
    own_Bn = own_Bn.scatter(1, slot_BP, True)[:, :num_in_play]
    return own_Bn if labels_per_row == 1 else own_Bn.repeat_interleave(labels_per_row, 0)


def log_weights(in_play: ClassesInPlay, num_in_play: int, dtype: torch.dtype) -> Tensor:
    """[n], minus the log of the probability with which a class is in play: 0 for the classes of the batch."""
    slot_V = torch.where(in_play.owned_V, in_play.slot_V, num_in_play)
    in_batch = torch.zeros(num_in_play + 1, dtype=torch.bool, device=slot_V.device).index_fill(0, slot_V, True)
    drawn_n = torch.full((num_in_play,), -math.log(in_play.drawn_probability), dtype=dtype, device=slot_V.device)
    return drawn_n.masked_fill(in_batch[:num_in_play], 0.0)


def negative_logits(similarity_Vn: Tensor, parameters: Parameters, *, margin: Margin, mesh: ShardMesh) -> Tensor:
    """[V, n], of all classes in play as if none were the own one.

    Per-row numbers that carry a gradient meet different classes on each rank, so their gradient is summed over ranks.
    """
    shared = {name: copy_to_shards(value, mesh) if value.requires_grad else value for name, value in parameters.items()}
    scale = margin.logit_scale(shared)
    return margin.negative(similarity_Vn, shared) * (scale[:, None] if isinstance(scale, Tensor) else scale)


def aggregate_negatives(
    aggregate: Aggregate,
    logits_Vn: Tensor,
    excluded_Vn: Tensor,
    log_weight_n: Tensor | None,
    *,
    mesh: ShardMesh,
    bounded: bool,
) -> Tensor:
    """[V], the sum over the classes of all ranks that `aggregate` names, with weights.

    Args:
        aggregate: which sum.
        logits_Vn: of this rank's classes in play.
        excluded_Vn: bool, those that do not count for a case.
        log_weight_n: the log of how often a class counts; None for once.
        mesh: the ranks.
        bounded: see `logsumexp_over_shards`; of no matter to a sum without exponentials.
    """
    return _AGGREGATES[aggregate](logits_Vn.masked_fill(excluded_Vn, -math.inf), log_weight_n, mesh, bounded)


def _logsumexp(logits_Vn: Tensor, log_weight_n: Tensor | None, mesh: ShardMesh, bounded: bool) -> Tensor:
    weighted_Vn = logits_Vn if log_weight_n is None else logits_Vn + log_weight_n
    return logsumexp_over_shards(weighted_Vn, mesh, bounded=bounded)


def _softplus_sum(logits_Vn: Tensor, log_weight_n: Tensor | None, mesh: ShardMesh, bounded: bool) -> Tensor:
    # The default threshold of 20 would cost 2e-9.
    terms_Vn = F.softplus(logits_Vn, threshold=50)
    local_V = terms_Vn.sum(1) if log_weight_n is None else terms_Vn @ log_weight_n.exp()
    return sum_over_shards(local_V, mesh)


_AGGREGATES: dict[Aggregate, Callable[[Tensor, Tensor | None, ShardMesh, bool], Tensor]] = {
    Aggregate.LOGSUMEXP: _logsumexp,
    Aggregate.SOFTPLUS_SUM: _softplus_sum,
}
