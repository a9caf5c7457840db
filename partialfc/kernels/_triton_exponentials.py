"""`exponentials` in Triton: each logit is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["exponentials_triton_"]

MAX_BLOCK_COLUMNS = 1024


@triton.jit
def _exponentials_kernel(
    logits_ptr: tl.tensor,  # [V, c] float32
    out_ptr: tl.tensor,  # [V, c], may be the logits, OUT
    sums_ptr: tl.tensor,  # [V] float32, OUT
    shift_ptr: tl.tensor,  # [V]
    columns_ptr: tl.tensor,  # [V, P] int64
    log_weight_ptr: tl.tensor,  # [c], or anything
    factor_ptr: tl.tensor,  # [V], or anything
    c: int,
    P: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    shift = tl.load(shift_ptr + row).to(tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, c, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < c
        logits = tl.load(logits_ptr + row * c + columns, mask=inside, other=0.0)
        if WEIGHTED:
            logits += tl.load(log_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        terms = tl.exp(logits - shift)
        if SCALED:
            terms *= tl.load(factor_ptr + row).to(tl.float32)
        kept = inside
        for p in tl.static_range(P):
            kept = kept & (columns != tl.load(columns_ptr + row * P + p))
        terms = tl.where(kept, terms, 0.0)
        sums += terms
        tl.store(out_ptr + row * c + columns, terms.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + row, tl.sum(sums, axis=0))


def exponentials_triton_(
    logits_Vc: Tensor,
    *,
    shift_V: Tensor,
    columns_VP: Tensor,
    log_weight_c: Tensor | None = None,
    factor_V: Tensor | None = None,
    out_Vc: Tensor | None = None,
) -> Tensor:
    """As `exponentials.exponentials_`, for float32 logits."""
    V, c = logits_Vc.shape
    sums_V = torch.zeros(V, dtype=torch.float32, device=logits_Vc.device)
    if V == 0 or c == 0:
        return sums_V
    _exponentials_kernel[(V,)](
        logits_Vc,
        logits_Vc if out_Vc is None else out_Vc,
        sums_V,
        shift_V.contiguous(),
        columns_VP.contiguous(),
        sums_V if log_weight_c is None else log_weight_c.contiguous(),
        sums_V if factor_V is None else factor_V.contiguous(),
        c,
        P=columns_VP.shape[1],
        WEIGHTED=log_weight_c is not None,
        SCALED=factor_V is not None,
        BLOCK=min(MAX_BLOCK_COLUMNS, triton.next_power_of_2(c)),
    )
    return sums_V
