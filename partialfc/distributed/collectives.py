"""Collectives, and the gradients that belong to them.

In the head, every rank computes the same [B] numbers from the gathered batch ("replicated"), and different [B, n]
numbers from its own class centers ("sharded"). A sum over ranks joins sharded to replicated; its gradient is the
identity, because each rank already holds the whole gradient of the replicated loss. Going from replicated to sharded
is the identity; its gradient is a sum over ranks. Shoeybi et al., "Megatron-LM" (2019), section 3, call the two g
and f. A process on its own takes the same path, with the collective left out.

Each notes itself in the trail before it begins, under the name of its kind and `what` it sends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.trail import TRAIL

__all__ = [
    "all_gather_equal",
    "average_over_ranks",
    "copy_to_shards",
    "gather_objects",
    "gather_rows",
    "logsumexp_over_shards",
    "max_over_ranks",
    "max_over_shards",
    "start_reduce_scatter",
    "sum_over_shards",
    "sum_over_shards_",
]

# torch 2.13 renamed these two.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_equal(local: Tensor, mesh: ShardMesh, *, what: str = "rows") -> Tensor:
    """[n, ...] on each rank, equal n -> [size * n, ...] on every rank, in rank order. No gradient."""
    if mesh.size == 1:
        return local
    gathered = local.new_empty((mesh.size * local.shape[0], *local.shape[1:]))
    TRAIL.note(f"all_gather {what}", local)
    _all_gather_single(gathered, local.contiguous(), group=mesh.group)
    return gathered


def start_reduce_scatter(partial: Tensor, mesh: ShardMesh, *, what: str = "rows") -> Callable[[], Tensor]:
    """Begins the sum of [size * n, ...] over ranks; what it returns waits for this rank's rows of it, [n, ...].

    No gradient.
    """
    if mesh.size == 1:
        return lambda: partial
    own = partial.new_empty((partial.shape[0] // mesh.size, *partial.shape[1:]))
    partial = partial.contiguous()
    TRAIL.note(f"reduce_scatter {what}", partial)
    work = _reduce_scatter_single(own, partial, group=mesh.group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return own

    return wait


def gather_rows(local: Tensor, mesh: ShardMesh, *, what: str = "rows") -> Tensor:
    """[n_r, ...] on each rank, n_r of any size, even 0 -> [sum of n_r, ...] on every rank, in rank order.

    No gradient. Two collectives: the sizes, then the rows, padded to the longest.
    """
    if mesh.size == 1:
        return local
    own_size = torch.tensor([local.shape[0]], device=local.device)
    sizes = all_gather_equal(own_size, mesh, what=f"number of {what}").tolist()
    padded = local.new_zeros((max(sizes), *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = all_gather_equal(padded, mesh, what=what).unflatten(0, (mesh.size, max(sizes)))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor], mesh: ShardMesh, *, what: str = "averages") -> None:
    """Replaces each of some floating-point tensors by its mean over ranks, with one collective for all of them."""
    if mesh.size == 1 or not tensors:
        return
    # Values that are equal already stay what they are: in their own precision a sum of three would be rounded.
    flat = torch.cat([tensor.flatten().double() for tensor in tensors])
    TRAIL.note(f"all_reduce {what}", flat)
    dist.all_reduce(flat, dist.ReduceOp.SUM, group=mesh.group)
    parts = (flat / mesh.size).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, parts, strict=True):
        tensor.copy_(mean.view_as(tensor))


def max_over_ranks(
    values: list[int], mesh: ShardMesh, device: torch.device | str = "cpu", *, what: str = "decisions"
) -> list[int]:
    """The elementwise maximum of each rank's integers: how ranks decide alike."""
    if mesh.size == 1:
        return values
    reduced = torch.tensor(values, dtype=torch.int64, device=device)
    TRAIL.note(f"all_reduce {what}", reduced)
    dist.all_reduce(reduced, dist.ReduceOp.MAX, group=mesh.group)
    return [int(value) for value in reduced.tolist()]


def gather_objects(value: Any, mesh: ShardMesh, *, what: str = "objects") -> list[Any]:
    """Each rank's value, in the order of the ranks, on every rank. Anything that can be pickled; slow."""
    if mesh.size == 1:
        return [value]
    gathered: list[Any] = [None] * mesh.size
    TRAIL.note(f"all_gather {what}")
    dist.all_gather_object(gathered, value, group=mesh.group)
    return gathered


def max_over_shards(value: Tensor, mesh: ShardMesh, *, what: str = "maximum") -> Tensor:
    """The elementwise maximum over ranks. One all-reduce; no gradient."""
    return _all_reduce_(value.contiguous().clone(), dist.ReduceOp.MAX, mesh, what)


def sum_over_shards_(value: Tensor, mesh: ShardMesh, *, what: str = "sum") -> Tensor:
    """The sum over ranks in place of `value`, which is contiguous. One all-reduce; no gradient."""
    return _all_reduce_(value, dist.ReduceOp.SUM, mesh, what)


def _all_reduce_(value: Tensor, operation: dist.ReduceOp.RedOpType, mesh: ShardMesh, what: str) -> Tensor:
    if mesh.size > 1:
        TRAIL.note(f"all_reduce {what}", value)
        dist.all_reduce(value, operation, group=mesh.group)
    return value


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, mesh: ShardMesh, what: str) -> Tensor:
        return sum_over_shards_(value.contiguous().clone(), mesh, what=what)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: ShardMesh, what: str) -> Tensor:
        ctx.mesh, ctx.what = mesh, what
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return sum_over_shards_(gradients[0].contiguous().clone(), ctx.mesh, what=ctx.what), None, None


class _LogSumExpOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Bn: Tensor, mesh: ShardMesh, bounded: bool) -> Tensor:
        if bounded:
            shift_B = logits_Bn.new_zeros(logits_Bn.shape[0])
        else:
            floor = logits_Bn.new_full((logits_Bn.shape[0], 1), float("-inf"))
            shift_B = max_over_shards(torch.cat([floor, logits_Bn], 1).amax(1), mesh, what="maximum of logits")
            shift_B = torch.where(shift_B == float("-inf"), 0.0, shift_B)
        local_B = (logits_Bn - shift_B[:, None]).exp().sum(1)
        sum_B = sum_over_shards_(local_B, mesh, what="sum over negatives")
        logsumexp_B = shift_B + sum_B.log()
        ctx.save_for_backward(logits_Bn, logsumexp_B)
        return logsumexp_B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_Bn, logsumexp_B = ctx.saved_tensors
        # A row without a single negative has logsumexp -inf and no gradient, instead of exp(-inf + inf).
        safe_B = torch.where(logsumexp_B == float("-inf"), 0.0, logsumexp_B)
        return gradients[0][:, None] * (logits_Bn - safe_B[:, None]).exp(), None, None


def sum_over_shards(value: Tensor, mesh: ShardMesh, *, what: str = "sum") -> Tensor:
    """Sharded to replicated: the sum over ranks. One all-reduce; its gradient is the identity."""
    result: Tensor = _SumOverShards.apply(value, mesh, what)
    return result


def copy_to_shards(value: Tensor, mesh: ShardMesh, *, what: str = "gradient") -> Tensor:
    """Replicated to sharded: the identity. Its gradient is the sum over ranks, one all-reduce."""
    result: Tensor = _CopyToShards.apply(value, mesh, what)
    return result


def logsumexp_over_shards(logits_Bn: Tensor, mesh: ShardMesh, *, bounded: bool) -> Tensor:
    """Log of the sum of exp over the classes of all ranks: [B, n_r] -> [B], the same on every rank.

    Args:
        logits_Bn: this rank's logits, -inf where a class does not count. n_r may differ over ranks, and be 0.
        mesh: the ranks.
        bounded: the caller knows that neither exp(logit) nor their sum can overflow or vanish. Then one all-reduce
            (SUM) is enough; else there are two (MAX and SUM).

    Returns:
        [B]; -inf for a row in which no class counts.
    """
    result: Tensor = _LogSumExpOverShards.apply(logits_Bn, mesh, bounded)
    return result
