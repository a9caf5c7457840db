"""What this process has communicated: how much, and what it was doing last.

Every collective of the package is noted here before it begins. So a step's traffic can be counted in a test, and a rank
that hangs can say in what.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

__all__ = ["TRAIL", "Trail"]


class Trail:
    """The collectives of one process.

    Attributes:
        calls: by name, how often.
        bytes: by name, of the tensors that this rank handed in.
        last: the name of the newest; "" before the first.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.last = ""

    def note(self, name: str, tensor: Tensor | None = None) -> None:
        """One collective is about to begin."""
        self.last = name
        self.calls[name] += 1
        if tensor is not None:
            self.bytes[name] += tensor.numel() * tensor.element_size()

    def clear(self) -> None:
        """Counts from zero on."""
        self.calls.clear()
        self.bytes.clear()


TRAIL = Trail()
