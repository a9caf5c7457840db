"""Functions of the angle behind a cosine, with the derivative kept finite at the ends.

The arc cosine has no derivative at +-1, and a product of unit vectors passes 1 by rounding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Tail", "angle", "margin_angle", "monotone_multiple_angle"]

Tail = Literal["linear", "none", "easy"]

_COSINE_LIMIT = 1.0 - 1e-7


def angle(cosine: Tensor) -> Tensor:
    """The angle in radians, elementwise. Cosines beyond +-(1 - 1e-7) have zero gradient."""
    return torch.acos(cosine.clamp(-_COSINE_LIMIT, _COSINE_LIMIT))


def margin_angle(cosine: Tensor, *, factor: float = 1.0, offset: float | Tensor, tail: Tail) -> Tensor:
    """cos(factor * theta + offset), with the chosen behaviour where that angle passes pi.

    Args:
        cosine: [B], of theta.
        factor: positive.
        offset: in radians; a number in [0, pi), or one for each row, [B], with gradient if it has one.
        tail: `"linear"` goes on as the cosine minus a constant, `offset * sin(offset)` or more where the function would
            jump up otherwise; `"none"` is the formula as it stands; `"easy"` has the margin only where theta < pi / 2.
    """
    theta = angle(cosine)
    shifted_angle = factor * theta + offset
    shifted = torch.cos(shifted_angle)
    if tail == "easy":
        return torch.where(cosine > 0, shifted, cosine)
    if tail == "none":
        return shifted
    offset = offset if isinstance(offset, Tensor) else torch.full_like(cosine, offset)
    cosine_at_pi = torch.cos((math.pi - offset) / factor)
    drop = torch.maximum(offset * torch.sin(offset), 1.0 + cosine_at_pi)
    return torch.where(shifted_angle < math.pi, shifted, cosine - drop)


def monotone_multiple_angle(cosine: Tensor, factor: float) -> Tensor:
    """The function psi of SphereFace: (-1)^k cos(m theta) - 2 k, where k = floor(m theta / pi); it falls with theta.

    For an integer m, cos(m theta) is the Chebyshev polynomial of the cosine, whose derivative is finite everywhere;
    for other numbers it goes through the arc cosine.

    Args:
        cosine: elementwise, of theta.
        factor: m >= 1.
    """
    with torch.no_grad():
        piece = torch.floor(factor * torch.acos(cosine.clamp(-1.0, 1.0)) / math.pi)
        # At theta = pi both pieces have the same value, but only the last one has a slope of the right sign.
        piece = piece.clamp(max=math.ceil(factor) - 1)
        sign = 1.0 - 2.0 * torch.remainder(piece, 2.0)
    if factor == int(factor):
        before, multiple = torch.ones_like(cosine), cosine
        for _ in range(int(factor) - 1):
            before, multiple = multiple, 2.0 * cosine * multiple - before
    else:
        multiple = torch.cos(factor * angle(cosine))
    return sign * multiple - 2.0 * piece
