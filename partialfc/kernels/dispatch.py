"""Whether a hot operation runs as its Triton version or as its plain-torch twin."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

__all__ = ["runs_in_triton"]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_in_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor takes its Triton version: on a CUDA device, where triton is installed."""
    return tensor.is_cuda and _has_triton()
