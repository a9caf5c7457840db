"""Norm and clipping of a gradient, wherever its parts are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from partialfc.distributed.collectives import sum_over_shards_
from partialfc.distributed.mesh import ShardMesh

__all__ = ["clip_gradients", "global_norm"]


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor], mesh: ShardMesh, *, sharded: bool) -> Tensor:
    """The norm of the whole gradient, a scalar of its dtype, equal on all ranks. One all-reduce.

    Args:
        gradients: what this rank holds: its shards, or all of it, as every other rank does.
        mesh: the ranks.
        sharded: which of the two.

    Returns:
        Not finite on any rank if a part on one of them is not: so all ranks decide alike.
    """
    assert gradients
    # In float64, so that a square neither overflows nor loses digits.
    square = nn.utils.get_total_norm(gradients).double().square()
    square = sum_over_shards_(square, mesh, what="norm of the gradient")
    return (square if sharded else square / mesh.size).sqrt().to(gradients[0].dtype)


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales a gradient down to `max_norm`, in place, as `nn.utils.clip_grad_norm_` does."""
    torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
