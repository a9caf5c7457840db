"""Bringing rows up to date that were idle while others moved: dense semantics at the price of the rows in play.

A step without gradient is linear in (center, momentum), with the same four coefficients for all rows. So any number of
them is one 2 x 2 matrix, and a row that was idle for a while is caught up with in one go when it is next needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["IdleSteps"]

_MOST_STEPS = 4096


class IdleSteps:
    """What the last steps did to a row that was in none of them.

    Attributes:
        count: steps noted so far.
        is_full: whether all rows must be brought up to date, and `clear` called, before more steps are noted.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all steps: every row is up to date."""
        self.count = 0
        # Number k is the product of the last k steps.
        self._products = torch.eye(2, dtype=torch.float64)[None]

    @property
    def is_full(self) -> bool:
        """See the class."""
        return self.count >= _MOST_STEPS

    def add(self, step: Tensor) -> None:
        """Notes a step, [2, 2]."""
        assert not self.is_full
        self._products = torch.cat([self._products[:1], step @ self._products])
        self.count += 1

    def catch_up_(self, centers_nKD: Tensor, momentum_nKD: Tensor | None, ages_n: Tensor) -> None:
        """Does to rows what happened in the last `ages_n` steps, in place."""
        products = self._products.to(ages_n.device)[ages_n].to(centers_nKD.dtype)[:, :, :, None, None]
        if momentum_nKD is None:
            centers_nKD.mul_(products[:, 0, 0])
            return
        centers = products[:, 0, 0] * centers_nKD + products[:, 0, 1] * momentum_nKD
        momentum_nKD.mul_(products[:, 1, 1]).addcmul_(products[:, 1, 0], centers_nKD)
        centers_nKD.copy_(centers)
