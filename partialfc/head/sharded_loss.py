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

__all__ = [
    "aggregate_negatives",
    "exclude_own_classes",
    "log_weights",
    "negative_logits",
    "similarities",
    "target_cosine",
]


def similarities(embeddings_BD: Tensor, centers_nKD: Tensor, bias_n: Tensor | None, margin: Margin) -> Tensor:
    """[B, n], normalised as the margin asks for; of several sub-centers the nearest counts."""
    x_BD = F.normalize(embeddings_BD) if margin.normalize_embeddings else embeddings_BD
    w_nKD = F.normalize(centers_nKD, dim=-1) if margin.normalize_class_centers else centers_nKD
    similarity_Bn = x_BD @ w_nKD.flatten(0, 1).T
    if centers_nKD.shape[1] > 1:
        # max, unlike amax, sends the gradient to one sub-center even if several are equally near.
        similarity_Bn = similarity_Bn.unflatten(1, centers_nKD.shape[:2]).max(2).values
    return similarity_Bn if bias_n is None else similarity_Bn + bias_n


def target_cosine(similarity_Vn: Tensor, in_play: ClassesInPlay, mesh: ShardMesh) -> Tensor:
    """[V], the similarity to the own class, wherever it lives; 0 where it lives nowhere. One all-reduce."""
    if similarity_Vn.shape[1] == 0:
        return sum_over_shards(similarity_Vn.sum(1), mesh, what="similarity to the own class")
    local_V = similarity_Vn.gather(1, in_play.slot_V[:, None])[:, 0]
    return sum_over_shards(torch.where(in_play.owned_V, local_V, 0.0), mesh, what="similarity to the own class")


def exclude_own_classes(logits_Vn: Tensor, in_play: ClassesInPlay, labels_per_row: int) -> Tensor:
    """Puts -inf where a class is a label of the row of a case, and so not a negative of it. In place.

    By adding -inf there and 0 at one place of each other row, since autograd needs no copy of the logits for that.
    """
    if logits_Vn.shape[1] == 0:
        return logits_Vn
    slot_BP = in_play.slot_V.unflatten(0, (-1, labels_per_row))
    added_BP = torch.zeros_like(slot_BP, dtype=logits_Vn.dtype)
    added_BP = added_BP.masked_fill(in_play.owned_V.unflatten(0, (-1, labels_per_row)), -math.inf)
    return logits_Vn.scatter_add_(
        1, slot_BP.repeat_interleave(labels_per_row, 0), added_BP.repeat_interleave(labels_per_row, 0)
    )


def log_weights(column_V: Tensor, num_classes: int, in_play: ClassesInPlay, dtype: torch.dtype) -> Tensor | None:
    """[c], minus the log of the probability with which a class is in play: 0 for the classes of the batch.

    None if every class is in play.

    Args:
        column_V: which of the c classes is that of each case; -1 for none.
        num_classes: c.
        in_play: says how probable it is that a class is in play.
        dtype: of the result.
    """
    if in_play.drawn_probability == 1:
        return None
    padded = torch.full((num_classes + 1,), -math.log(in_play.drawn_probability), dtype=dtype, device=column_V.device)
    return padded.index_fill_(0, torch.where(column_V < 0, num_classes, column_V), 0.0)[:num_classes]


def negative_logits(similarity_Vn: Tensor, parameters: Parameters, *, margin: Margin, mesh: ShardMesh) -> Tensor:
    """[V, n], of all classes in play as if none were the own one.

    Per-row numbers that carry a gradient meet different classes on each rank, so their gradient is summed over ranks.
    """
    what = "gradient of parameters of rows"
    shared = {
        name: copy_to_shards(value, mesh, what=what) if value.requires_grad else value
        for name, value in parameters.items()
    }
    scale = margin.logit_scale(shared)
    return margin.negative(similarity_Vn, shared) * (scale[:, None] if isinstance(scale, Tensor) else scale)


def aggregate_negatives(
    aggregate: Aggregate, logits_Vn: Tensor, log_weight_n: Tensor | None, *, mesh: ShardMesh, bounded: bool
) -> Tensor:
    """[V], the sum over the classes of all ranks that `aggregate` names, with weights.

    Args:
        aggregate: which sum.
        logits_Vn: of this rank's classes in play, -inf where one does not count.
        log_weight_n: the log of how often a class counts; None for once.
        mesh: the ranks.
        bounded: see `logsumexp_over_shards`; of no matter to a sum without exponentials.
    """
    return _AGGREGATES[aggregate](logits_Vn, log_weight_n, mesh, bounded)


def _logsumexp(logits_Vn: Tensor, log_weight_n: Tensor | None, mesh: ShardMesh, bounded: bool) -> Tensor:
    weighted_Vn = logits_Vn if log_weight_n is None else logits_Vn + log_weight_n
    return logsumexp_over_shards(weighted_Vn, mesh, bounded=bounded)


def _softplus_sum(logits_Vn: Tensor, log_weight_n: Tensor | None, mesh: ShardMesh, bounded: bool) -> Tensor:
    # The default threshold of 20 would cost 2e-9.
    terms_Vn = F.softplus(logits_Vn, threshold=50)
    local_V = terms_Vn.sum(1) if log_weight_n is None else terms_Vn @ log_weight_n.exp()
    return sum_over_shards(local_V, mesh, what="sum over negatives")


_AGGREGATES: dict[Aggregate, Callable[[Tensor, Tensor | None, ShardMesh, bool], Tensor]] = {
    Aggregate.LOGSUMEXP: _logsumexp,
    Aggregate.SOFTPLUS_SUM: _softplus_sum,
}
