"""What is done to a backbone before an engine takes it. The names of its parameters stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partialfc.engine.buffers import kept_buffers
from partialfc.engine.settings import EngineSettings

__all__ = ["InPrecision", "Skeleton", "blocks_of", "prepare"]

_CONTAINERS = (nn.Sequential, nn.ModuleList)


class InPrecision(nn.Module):
    """A backbone that runs under autocast and hands out float32 (float64 if it computes in that)."""

    def __init__(self, backbone: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.backbone = backbone
        self._autocast_dtype = autocast_dtype

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] -> [b, D]."""
        dtype = self._autocast_dtype
        # Convolutions are 15 to 50 % faster so, on the CPU too.
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            embeddings: Tensor = self.backbone(images)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


class Skeleton:
    """Everything of a backbone but its weights: how it is built anew after an engine has taken it apart."""

    def __init__(self, backbone: nn.Module) -> None:
        weights = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            for parameter in backbone.parameters()
        }
        self._module = copy.deepcopy(backbone, memo=dict(weights))

    def with_weights(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A backbone of its own with the parameters and buffers of a state dict, whose memory it shares."""
        module = copy.deepcopy(self._module)
        module.load_state_dict(state, assign=True)
        return module


def prepare(backbone: nn.Module, settings: EngineSettings, *, group: Any, compile_blocks: bool) -> nn.Module:
    """Applies `sync_batch_norm`, `activation_checkpointing` and, to single blocks, `compile`; in place if possible.

    Args:
        backbone: on its device.
        settings: of the engine.
        group: the ranks that share batch statistics; None for a process on its own.
        compile_blocks: whether the engine has no whole to compile.

    Raises:
        ValueError: if the backbone cannot have what is asked for.
    """
    if settings.sync_batch_norm:
        device = next(backbone.parameters()).device
        if device.type != "cuda":
            raise ValueError(
                f"sync_batch_norm needs CUDA, as torch has it for nothing else, but the backbone is on {device}; "
                "set it to false"
            )
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone, group)
    if not settings.activation_checkpointing and not compile_blocks:
        return backbone
    blocks = list(blocks_of(backbone))
    if not blocks:
        what = "activation_checkpointing" if settings.activation_checkpointing else "compile with this engine"
        raise ValueError(
            f"{what} works on repeated blocks, and {type(backbone).__name__} has none: no nn.Sequential or "
            "nn.ModuleList of modules that are made of layers; set it to false"
        )
    if compile_blocks:
        # Blocks share their code, and each is compiled with and without a graph.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
    for block in blocks:
        # On the instance, since a module around it would rename parameters.
        if compile_blocks:
            block.forward = torch.compile(block.forward)
        if settings.activation_checkpointing:
            block.forward = partial(_checkpointed, block, block.forward)
    return backbone


def blocks_of(backbone: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a network: residual blocks, bottlenecks, transformer blocks.

    A block is a member of an `nn.Sequential` or `nn.ModuleList` that is made of layers, but is not itself such a
    container and has no block inside. That finds those of the backbones of this package and of most in timm.
    """
    for module in backbone.modules():
        if isinstance(module, _CONTAINERS):
            yield from (member for member in module if _is_composite(member) and not any(blocks_of(member)))


def _is_composite(module: nn.Module) -> bool:
    return not isinstance(module, _CONTAINERS) and any(True for _ in module.children())


def _checkpointed(block: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The first pass has moved the batch statistics already.
        return nullcontext(), kept_buffers(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)
