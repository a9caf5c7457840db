"""The factor that keeps small gradients above the smallest float16 number."""

from __future__ import annotations

from typing import Any

__all__ = ["LossScale"]

_START = 2.0**16
_GOOD_STEPS_TO_DOUBLE = 2000


class LossScale:
    """A factor on the gradient of the embeddings, taken out again before the gradient of the backbone is looked at.

    It doubles after 2000 finite steps in a row, and halves after one that is not finite; so it goes as high as the
    range of float16 allows. It is a power of two, which changes no digit, and never below 1. All ranks must update it
    alike. The head never sees it.

    Attributes:
        value: the factor of the coming step.
        good_steps: finite steps since it last changed.
    """

    def __init__(self) -> None:
        self.value = _START
        self.good_steps = 0

    def update(self, *, finite: bool) -> None:
        """After a step whose gradient was finite on all ranks, or was not."""
        if not finite:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == _GOOD_STEPS_TO_DOUBLE:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the scale that `state` was taken from would."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
