"""From the product of embeddings and class centers to the logits of negatives, and the way back for gradients.

Two ways, of one interface. Most margins leave negatives as they are: their logit is a product with the scaled
embedding, and its gradient is no work at all. The others say what becomes of a similarity, and autograd goes back, a
tile at a time.

Shapes: see `tiles.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from partialfc.margins.base import Margin, Parameters

__all__ = ["Negatives", "ScaledNegatives", "TransformedNegatives", "negatives_of"]


class Negatives(Protocol):
    """The logits of negatives as a function of products.

    Attributes:
        operand_VD: what is multiplied with class centers.
        unit_logit: the product that a similarity of 1 has, [V] or a number.
        parameter_sums: gradients of per-row parameters that `pull_back` has added up, [V] each.
    """

    operand_VD: Tensor
    unit_logit: Tensor | float
    parameter_sums: dict[str, Tensor]

    def logits(self, product_Vc: Tensor) -> Tensor:
        """[V, c]; the argument may be given back, and the result may be changed."""
        ...

    def pull_back(self, gradient_Vc: Tensor) -> Tensor:
        """From a gradient by the logits that were given last, that by their products."""
        ...

    def parameter_gradients(self, factor_V: Tensor, pull_VD: Tensor) -> dict[str, Tensor]:
        """[V] each: gradients of the parameters by their names.

        Args:
            factor_V: of each row, on everything that was added up.
            pull_VD: sum over classes of gradient by product, times class center; with the factor.
        """
        ...


class ScaledNegatives:
    """Logits that are similarities times a scale.

    Args:
        unit_VD: embeddings.
        scale: a number or [V], which may have a graph to `leaves`.
        leaves: parameters that want a gradient.
    """

    def __init__(self, unit_VD: Tensor, scale: float | Tensor, leaves: Mapping[str, Tensor]) -> None:
        self._unit_VD, self._scale, self._leaves = unit_VD, scale, leaves
        self.unit_logit: Tensor | float = scale.detach() if isinstance(scale, Tensor) else scale
        factor = self.unit_logit[:, None] if isinstance(self.unit_logit, Tensor) else self.unit_logit
        self.operand_VD = unit_VD * factor
        self.parameter_sums: dict[str, Tensor] = {}

    def logits(self, product_Vc: Tensor) -> Tensor:
        """See `Negatives`."""
        return product_Vc

    def pull_back(self, gradient_Vc: Tensor) -> Tensor:
        """See `Negatives`."""
        return gradient_Vc

    def parameter_gradients(self, factor_V: Tensor, pull_VD: Tensor) -> dict[str, Tensor]:
        """See `Negatives`."""
        if not isinstance(self._scale, Tensor) or not self._scale.requires_grad:
            return {}
        scale_gradient_V = torch.linalg.vecdot(pull_VD, self._unit_VD)
        found = torch.autograd.grad(self._scale, list(self._leaves.values()), scale_gradient_V, allow_unused=True)
        return {name: value for name, value in zip(self._leaves, found, strict=True) if value is not None}


class TransformedNegatives:
    """Logits as a margin makes them of similarities.

    Args:
        unit_VD: embeddings.
        margin: of which `negative` and `logit_scale` count.
        parameters: of each row, detached.
        leaves: those of them that want a gradient.
    """

    def __init__(self, unit_VD: Tensor, margin: Margin, parameters: Parameters, leaves: Mapping[str, Tensor]) -> None:
        self.operand_VD = unit_VD
        self.unit_logit: Tensor | float = 1.0
        self._margin, self._parameters, self._leaves = margin, parameters, leaves
        self.parameter_sums = {name: torch.zeros_like(value) for name, value in leaves.items()}

    def logits(self, product_Vc: Tensor) -> Tensor:
        """See `Negatives`."""
        with torch.enable_grad():
            self._similarity_Vc = product_Vc.detach().requires_grad_()
            scale = self._margin.logit_scale(self._parameters)
            scale = scale[:, None] if isinstance(scale, Tensor) else scale
            self._logits_Vc = self._margin.negative(self._similarity_Vc, self._parameters) * scale
        return self._logits_Vc.detach().clone()

    def pull_back(self, gradient_Vc: Tensor) -> Tensor:
        """See `Negatives`."""
        wanted = [self._similarity_Vc, *self._leaves.values()]
        product_Vc, *others = torch.autograd.grad(self._logits_Vc, wanted, gradient_Vc, allow_unused=True)
        for name, gradient_V in zip(self._leaves, others, strict=True):
            if gradient_V is not None:
                self.parameter_sums[name] += gradient_V
        return product_Vc

    def parameter_gradients(self, factor_V: Tensor, pull_VD: Tensor) -> dict[str, Tensor]:
        """See `Negatives`."""
        return {name: factor_V * sum_V for name, sum_V in self.parameter_sums.items()}


def negatives_of(
    unit_VD: Tensor, margin: Margin, parameters: Parameters, leaves: Mapping[str, Tensor], *, has_bias: bool
) -> Negatives:
    """The way that suits the margin; `parameters` have the `leaves` among them, and nothing else with a gradient."""
    scale = margin.logit_scale(parameters)
    if margin.keeps_negatives and not (has_bias and isinstance(scale, Tensor)):
        return ScaledNegatives(unit_VD, scale, leaves)
    return TransformedNegatives(unit_VD, margin, parameters, leaves)
