"""Learning rates as pure functions of the step: nothing to checkpoint, and a resumed run cannot be off by one.

A run has steps 0 ... total_steps - 1. During the warm-up the rate rises in a line,

    rate(step) = base * (step + 1) / warmup_steps            for step < warmup_steps,

so that no step has rate 0 and the first is not at full rate; after it the schedule multiplies the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

__all__ = ["SCHEDULES", "Cosine", "MultiStep", "Polynomial", "Schedule", "learning_rate_at"]


class Schedule(Protocol):
    """How the learning rate falls after the warm-up."""

    def factor(self, step: int, *, warmup_steps: int, total_steps: int) -> float:
        """The multiple of the base rate, in [0, 1], at a step from `warmup_steps` on; past the end, the last one."""


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """(1 - progress) ** power, progress being the share done of the steps after the warm-up.

    Attributes:
        power: 1 falls in a line; 2, the default, spends more steps at small rates. Above 0.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.power < math.inf:
            raise ValueError(f"power of the polynomial schedule is {self.power}, but must be above 0")

    def factor(self, step: int, *, warmup_steps: int, total_steps: int) -> float:
        """See `Schedule.factor`."""
        return float((1.0 - _progress(step, warmup_steps, total_steps)) ** self.power)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from 1 to `minimum` (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts).

    Attributes:
        minimum: the last rate as a multiple of the base rate, in [0, 1].
    """

    minimum: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.minimum <= 1.0:
            raise ValueError(
                f"minimum of the cosine schedule is {self.minimum}, but must be in [0, 1], a multiple of the base rate"
            )

    def factor(self, step: int, *, warmup_steps: int, total_steps: int) -> float:
        """See `Schedule.factor`."""
        wave = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))
        return self.minimum + (1.0 - self.minimum) * wave


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Multiplied by `decay` at each milestone; without milestones, constant.

    Attributes:
        milestones: rising shares of the whole run, warm-up included, each in (0, 1): "epochs 10 and 16 of 20" is
            (0.5, 0.8), for any batch size.
        decay: the multiple at each milestone, in (0, 1].
    """

    milestones: tuple[float, ...] = ()
    decay: float = 0.1

    def __post_init__(self) -> None:
        inside = all(0.0 < milestone < 1.0 for milestone in self.milestones)
        if not inside or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"milestones of the multistep schedule are {list(self.milestones)}, but must be rising shares of the"
                " run in (0, 1): divide steps or epochs by their total"
            )
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay of the multistep schedule is {self.decay}, but must be in (0, 1]")

    def factor(self, step: int, *, warmup_steps: int, total_steps: int) -> float:
        """See `Schedule.factor`."""
        # Rounded, as 0.55 * 100 is a little above 55.
        return self.decay ** sum(step >= round(milestone * total_steps) for milestone in self.milestones)


SCHEDULES: dict[str, type[Polynomial] | type[Cosine] | type[MultiStep]] = {
    "polynomial": Polynomial,
    "cosine": Cosine,
    "multistep": MultiStep,
}


def learning_rate_at(step: int, *, base: float, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The learning rate of one step.

    Args:
        step: from 0; at and after `total_steps` the rate stays where the schedule ends.
        base: the full rate.
        total_steps: steps of the run, warm-up included.
        warmup_steps: steps of the warm-up, in [0, total_steps]; the last of them is at full rate.
        schedule: what follows the warm-up.

    Raises:
        ValueError: if the step is negative or the warm-up longer than the run.
    """
    if step < 0:
        raise ValueError(f"step is {step}, but steps count from 0")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, but must be in [0, total_steps], and total_steps is {total_steps}"
        )
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    return base * schedule.factor(step, warmup_steps=warmup_steps, total_steps=total_steps)


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    return (step - warmup_steps) / (total_steps - warmup_steps) if step < total_steps else 1.0
