"""What can be chosen about an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PRECISIONS", "EngineSettings"]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a backbone is run, whatever engine runs it.

    Attributes:
        precision: a key of `PRECISIONS`. Below fp32 the forward pass runs under autocast; weights, gradients and the
            state of the optimizer stay float32.
        max_gradient_norm: the gradient is scaled down to this norm; None leaves it.
        portions: in how many parts a batch of a rank goes through the backbone, one after the other.
        activation_checkpointing: whether the blocks of the backbone are computed again in backward.
        compile: whether the backbone goes through torch.compile.
        sync_batch_norm: whether batch statistics are taken over all ranks.
        ema_decay: of the moving average of the weights, in (0, 1); None for no average.
        zero_stage: 1, 2 or 3, for DeepSpeed.
        deepspeed_json: a file of further settings, for DeepSpeed.

    Raises:
        ValueError: if a value is out of its range.
    """

    precision: str = "fp32"
    max_gradient_norm: float | None = None
    portions: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    ema_decay: float | None = None
    zero_stage: int = 2
    deepspeed_json: Path | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f'precision is "{self.precision}", but must be one of {", ".join(PRECISIONS)}')
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm is {self.max_gradient_norm}, but must be above 0, or None for none")
        if self.portions < 1:
            raise ValueError(f"portions is {self.portions}, but must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must be in (0, 1), or None for no average")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}, but must be 1, 2 or 3")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The precision of the forward pass; None for that of the weights."""
        return PRECISIONS[self.precision]
