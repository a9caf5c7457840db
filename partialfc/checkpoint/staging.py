"""Copies of a state in host memory, which a thread can write while training goes on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from partialfc.checkpoint.parts import FlatState, Part, rows_of

__all__ = ["Staging"]


class Staging:
    """Host memory that is used again by the next copy: pinned for what comes from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: FlatState) -> FlatState:
        """The state as it is now, whatever becomes of the tensors; it lasts until the next call."""
        buffers: dict[str, Tensor] = {}
        values: dict[str, Part | bytes] = {}
        from_device = False
        for name, value in state.values.items():
            if isinstance(value, Part):
                source = value.read(0, value.num_rows)
                buffers[name] = self._buffer(name, value, source)
                buffers[name].copy_(source, non_blocking=True)
                from_device |= source.is_cuda
                value = replace(value, read=rows_of(buffers[name]))
            values[name] = value
        if from_device:
            torch.cuda.current_stream().synchronize()
        self._buffers = buffers  # what is no longer part of the state is let go
        return FlatState(values, state.paths)

    def _buffer(self, name: str, part: Part, source: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is not None and known.shape == part.sizes and known.dtype == part.dtype:
            return known
        return torch.empty(part.sizes, dtype=part.dtype, device="cpu", pin_memory=source.is_cuda)
