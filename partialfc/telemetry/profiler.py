"""Names for stretches of a step, so that a profile reads like the code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["profiled"]


@contextmanager
def profiled(name: str) -> Iterator[None]:
    """Marks the block as `name` in `torch.profiler`, and as an NVTX range in Nsight once CUDA is in use.

    Args:
        name: shown in the profile, such as "backbone forward".
    """
    use_nvtx = torch.cuda.is_initialized()
    if use_nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if use_nvtx:
            torch.cuda.nvtx.range_pop()
