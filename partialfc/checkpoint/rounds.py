"""Ranks that wait, for as long as it takes, for those that work."""

from __future__ import annotations

import time

from partialfc.distributed.collectives import max_over_ranks
from partialfc.distributed.mesh import ShardMesh

__all__ = ["Rounds"]

_ROUND_SECONDS = 1.0  # small against any timeout of collectives


class Rounds:
    """Ranks that work, and those that have ended, meet every second until all have ended. Collective.

    So those that have ended hear from the others before a collective would time out.

    Args:
        mesh: the ranks.
        what: is gathered, for reports of hangs, such as "who still verifies".
    """

    def __init__(self, mesh: ShardMesh, *, what: str) -> None:
        self._mesh, self._what = mesh, what
        self._next = time.monotonic() + _ROUND_SECONDS

    def working(self) -> None:
        """To be called often."""
        if time.monotonic() >= self._next:
            self._meet(1)
            self._next = time.monotonic() + _ROUND_SECONDS

    def finish(self) -> None:
        """This rank has ended. Returns when all have."""
        while self._meet(0):
            pass

    def _meet(self, working: int) -> int:
        return max_over_ranks([working], self._mesh, what=self._what)[0]
