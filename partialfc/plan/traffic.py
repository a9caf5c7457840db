"""What the heads of a run send between ranks in a step, counted from shapes.

Shapes: B rows of the global batch, n classes in play on a rank, K sub-centers, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partialfc.plan.head import HeadCost

__all__ = ["Collective", "head_collectives", "network_bytes"]

_LABEL_BYTES = 8


@dataclass(frozen=True)
class Collective:
    """One of a step, in rings of ranks.

    Attributes:
        name: for people.
        size_bytes: of the whole tensor.
        share: of it that a rank sends.
        over_nodes: whether its rings have one rank of each node; else each goes through all ranks of a node in turn.
    """

    name: str
    size_bytes: int
    share: float
    over_nodes: bool = False

    @property
    def sent_bytes(self) -> float:
        """By a rank."""
        return self.share * self.size_bytes


def head_collectives(head: HeadCost, *, num_ranks: int, rows_in_play: int) -> list[Collective]:
    """Those of one head; none on one rank.

    Args:
        head: its cost.
        num_ranks: of the run.
        rows_in_play: n.
    """
    replicas = head.num_replicas
    shards, batch = num_ranks // replicas, head.batch_rows
    gather, across = (shards - 1) / shards, (replicas - 1) / replicas
    embeddings = batch * head.embedding_dim * head.sent_bytes
    numbers, count = head.num_reductions * batch * head.element_bytes, head.num_reductions
    collectives = [
        Collective("all-gather of embeddings [B, D]", embeddings, gather),
        Collective("all-gather of labels [B]", _LABEL_BYTES * (batch + shards), gather),
        Collective(f"{count} all-reduces of [B]", numbers, 2 * gather),
        Collective("reduce-scatter of gradient [B, D]", embeddings, gather),
    ]
    if replicas > 1:
        labels = _LABEL_BYTES * (head.global_batch_size + num_ranks)
        centers = rows_in_play * head.settings.num_subcenters * head.embedding_dim * head.element_bytes
        collectives += [
            Collective("over nodes: all-gather of labels [B]", labels, across, over_nodes=True),
            Collective("over nodes: all-reduce of gradient of centers [n, D]", centers, 2 * across, over_nodes=True),
        ]
    return [collective for collective in collectives if collective.share]


def network_bytes(collectives: Iterable[Collective], *, ranks_per_node: int, replicated: bool) -> float:
    """What a node sends to other nodes in a step.

    Args:
        collectives: of a head.
        ranks_per_node: of a node.
        replicated: whether each node has all class centers, so that only what goes over nodes leaves one.
    """
    if replicated:
        return sum(ranks_per_node * each.sent_bytes for each in collectives if each.over_nodes)
    # A ring over all ranks leaves a node at one of them.
    return sum(each.sent_bytes for each in collectives)
