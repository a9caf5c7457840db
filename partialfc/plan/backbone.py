"""What the backbone costs: counted on a copy that has shapes and no values.

Shapes: b images of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from partialfc.assembly import build_backbone_optimizer, configured_backbone
from partialfc.config import Config
from partialfc.engine import PRECISIONS

__all__ = ["BackboneCost", "count_backbone", "valueless_backbone"]


@dataclass(frozen=True)
class BackboneCost:
    """Of one rank.

    Attributes:
        num_parameters: that are trained.
        parameter_bytes: with buffers.
        gradient_bytes: of all trained parameters.
        optimizer_bytes: what the optimizer keeps.
        fixed_activation_bytes: kept for the backward pass whatever the batch, such as 16-bit copies of parameters.
        image_activation_bytes: kept for the backward pass, of each image.
        forward_flop: of one image, two for each multiplication with its addition.
    """

    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    fixed_activation_bytes: int
    image_activation_bytes: int
    forward_flop: int

    def activation_bytes(self, num_images: int) -> int:
        """Kept between forward and backward pass of a batch."""
        return self.fixed_activation_bytes + num_images * self.image_activation_bytes


def count_backbone(config: Config) -> BackboneCost:
    """Counts by running a forward pass and a step of the optimizer on tensors that have no memory.

    Raises:
        ValueError: if the backbone cannot be built as configured.
    """
    backbone = valueless_backbone(config)
    # Not "meta" throughout: it knows no autocast.
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone.to_empty(device="cpu")
        # Batch norm needs two images, and the difference of two batches leaves out what does not depend on the batch.
        two_bytes, two_flop = _forward(backbone, 2, config)
        four_bytes, _ = _forward(backbone, 4, config)
        optimizer_bytes = _optimizer_bytes(backbone, config)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    image_bytes = (four_bytes - two_bytes) // 2
    return BackboneCost(
        num_parameters=sum(parameter.numel() for parameter in trained),
        parameter_bytes=sum(tensor.nbytes for tensor in _standing(backbone)),
        gradient_bytes=sum(parameter.nbytes for parameter in trained),
        optimizer_bytes=optimizer_bytes,
        fixed_activation_bytes=max(0, two_bytes - 2 * image_bytes),
        image_activation_bytes=image_bytes,
        forward_flop=two_flop // 2,
    )


def valueless_backbone(config: Config) -> nn.Module:
    """The network of the configuration on a device that has no memory.

    Raises:
        ValueError: if it cannot be built as configured.
    """
    # Without values there is nothing to initialise: that takes a while, and transformers draw again by looking at them.
    with torch.device("meta"):
        return configured_backbone(config)


def _standing(backbone: nn.Module) -> list[Tensor]:
    return [*backbone.parameters(), *backbone.buffers()]


def _forward(backbone: nn.Module, num_images: int, config: Config) -> tuple[int, int]:
    """(bytes of what a forward pass keeps for the backward pass, FLOPs)."""
    standing = {id(tensor.untyped_storage()) for tensor in _standing(backbone)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in standing:
            kept[id(storage)] = storage
        return tensor

    size, precision = config.data.image_size, PRECISIONS[config.training.precision]
    images = torch.empty(num_images, 3, size, size)
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
    with (
        FlopCounterMode(display=False, custom_mapping=attention) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=precision, enabled=precision is not None),
    ):
        backbone(images)
    return sum(storage.nbytes() for storage in kept.values()), int(counter.get_total_flops())


def _attention_flop(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Two products of [tokens, d] with [d, tokens] and back, for each image and head; torch leaves this kernel out."""
    batch, heads, tokens, dim = query
    return 4 * int(batch * heads * tokens * key[2] * dim)


def _optimizer_bytes(backbone: nn.Module, config: Config) -> int:
    optimizer = build_backbone_optimizer(config, backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
