"""From the logits of a tile to the terms of the softmax's sum, and their sums.

Shapes: V rows of the batch, c classes of a tile, P own classes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.kernels.dispatch import runs_in_triton

__all__ = ["exponentials_"]


def exponentials_(
    logits_Vc: Tensor,
    *,
    shift_V: Tensor,
    columns_VP: Tensor,
    log_weight_c: Tensor | None = None,
    factor_V: Tensor | None = None,
    out_Vc: Tensor | None = None,
) -> Tensor:
    """exp(logit + log_weight - shift) * factor for each class, and 0 for the row's own classes.

    Args:
        logits_Vc: [V, c] float32 or float64, contiguous. Overwritten: with the result, or with nothing of use if
            there is another place for that.
        shift_V: [V]; +inf makes all of a row 0, unless a logit is +inf or nan.
        columns_VP: [V, P] int64, where in the tile a row's own classes are, in any order and also twice; -1 is nowhere.
        log_weight_c: [c], nothing if None.
        factor_V: [V], 1 if None.
        out_Vc: [V, c], contiguous, in which the result goes instead, rounded to its dtype, for instance bfloat16.

    Returns:
        [V], the sums over the tile before they are rounded to the dtype of `out_Vc`, in the dtype of the logits.
    """
    V, c = logits_Vc.shape
    assert shift_V.shape == (V,), shift_V.shape
    assert columns_VP.dtype == torch.int64, columns_VP.dtype
    assert columns_VP.shape[:-1] == (V,), columns_VP.shape
    assert log_weight_c is None or log_weight_c.shape == (c,), log_weight_c.shape
    assert factor_V is None or factor_V.shape == (V,), factor_V.shape
    assert out_Vc is None or (out_Vc.shape == (V, c) and out_Vc.is_contiguous())
    assert logits_Vc.is_contiguous()
    if runs_in_triton(logits_Vc) and logits_Vc.dtype == torch.float32:
        from partialfc.kernels._triton_exponentials import exponentials_triton_

        function = exponentials_triton_
    else:
        function = exponentials_twin_
    return function(
        logits_Vc,
        shift_V=shift_V,
        columns_VP=columns_VP,
        log_weight_c=log_weight_c,
        factor_V=factor_V,
        out_Vc=out_Vc,
    )


def exponentials_twin_(
    logits_Vc: Tensor,
    *,
    shift_V: Tensor,
    columns_VP: Tensor,
    log_weight_c: Tensor | None = None,
    factor_V: Tensor | None = None,
    out_Vc: Tensor | None = None,
) -> Tensor:
    """As `exponentials_`, in plain torch."""
    if logits_Vc.shape[1] and columns_VP.shape[1]:
        # The minimum with +inf changes nothing, so -1 may point to a column that another entry also points to.
        limit_VP = torch.where(columns_VP >= 0, -torch.inf, torch.inf).to(logits_Vc.dtype)
        logits_Vc.scatter_reduce_(1, columns_VP.clamp(min=0), limit_VP, "amin")
    if log_weight_c is not None:
        logits_Vc.add_(log_weight_c)
    logits_Vc.sub_(shift_V[:, None]).exp_()
    if factor_V is not None:
        logits_Vc.mul_(factor_V[:, None])
    if out_Vc is not None:
        out_Vc.copy_(logits_Vc)
    return logits_Vc.sum(1)
