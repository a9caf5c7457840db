"""Batch statistics, which a forward pass moves whether or not its step is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["SavedBuffers", "kept_buffers"]


class SavedBuffers:
    """The buffers of a module as they were at one time."""

    def __init__(self, module: nn.Module) -> None:
        self._live = list(module.buffers())
        self._saved = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def save(self) -> None:
        """Makes it the present time."""
        if self._live:
            torch._foreach_copy_(self._saved, self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Sets the module back."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Leaves the buffers of `module` as they were: for what is computed a second time."""
    saved = SavedBuffers(module)
    try:
        yield
    finally:
        saved.restore()
