"""How fast training goes, and how much of it is waiting for data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Throughput"]


@dataclass
class Throughput:
    """Images a second of training steps alone; the caller leaves out evaluation, checkpoints and warm-up.

    Attributes:
        images: counted so far.
        seconds: that they took.
        waiting_seconds: of these, those spent waiting for data.
    """

    images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0

    def add(self, images: int, *, seconds: float, waiting_seconds: float) -> None:
        """Counts one step."""
        self.images += images
        self.seconds += seconds
        self.waiting_seconds += waiting_seconds

    @property
    def images_per_second(self) -> float:
        """0 before the first step."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """The share of time spent waiting for data; 0 before the first step."""
        return self.waiting_seconds / self.seconds if self.seconds else 0.0
