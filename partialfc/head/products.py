"""Matrix products of a step, with operands in 16 bits where that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.workspace import Workspace

__all__ = ["Products"]


@dataclass(frozen=True)
class Products:
    """Products in a working dtype.

    A product is rounded to its dtype at the end. For logits 16 bits are not enough (bfloat16 is wrong by up to 0.13
    just below 64), so they are products of 16-bit operands only where the library can give the sum in
    32 bits: on a GPU. Gradients, whose rounding errors are as those of their operands, may be sums in 16 bits.

    Attributes:
        operand_dtype: bfloat16, or None for the working dtype.
        workspace: for results and operands.
    """

    operand_dtype: torch.dtype | None
    workspace: Workspace

    def operand(self, values_mD: Tensor, name: str) -> Tensor:
        """`values_mD` as an operand; the same if there is nothing to convert."""
        if self.operand_dtype is None:
            return values_mD
        return self.workspace.get(name, values_mD.shape, self.operand_dtype, values_mD.device).copy_(values_mD)

    def logits(self, left_VD: Tensor, right_mD: Tensor, name: str) -> Tensor:
        """[V, m], in the dtype of the arguments, from left @ right.T; `name` is that of the buffer."""
        shape = (len(left_VD), len(right_mD))
        if self.operand_dtype is not None and left_VD.is_cuda:
            left, right = left_VD.to(self.operand_dtype), right_mD.to(self.operand_dtype)
            return torch.mm(left, right.T, out_dtype=left_VD.dtype)
        out = self.workspace.get(name, shape, left_VD.dtype, left_VD.device)
        return torch.mm(left_VD, right_mD.T, out=out)

    def add_(self, sum_ab: Tensor, left_am: Tensor, right_mb: Tensor) -> None:
        """Adds left @ right to `sum_ab`; right is an operand."""
        if self.operand_dtype is None:
            sum_ab.addmm_(left_am, right_mb)
            return
        left = self.operand(left_am, "left operand")
        sum_ab.add_(self._multiply(left, right_mb, "left product"))

    def transposed(self, left_Vm: Tensor, right_VD: Tensor, name: str) -> Tensor:
        """[m, D], in the dtype of `left_Vm`, from left.T @ right; right is an operand. `name` is that of the buffer."""
        shape = (left_Vm.shape[1], right_VD.shape[1])
        out = self.workspace.get(name, shape, left_Vm.dtype, left_Vm.device)
        if self.operand_dtype is None:
            return torch.mm(left_Vm.T, right_VD, out=out)
        left = self.operand(left_Vm, "left operand")
        return out.copy_(self._multiply(left.T, right_VD, "transposed product"))

    def _multiply(self, left: Tensor, right: Tensor, name: str) -> Tensor:
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        out = self.workspace.get(name, (left.shape[0], right.shape[1]), left.dtype, left.device)
        return torch.mm(left, right, out=out)
