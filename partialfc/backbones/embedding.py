"""What the embedding networks share: the check of their input and the way from features to the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["check_count", "check_images", "check_probability", "check_sizes", "embedding_norm", "features_to_embedding"]


def check_count(name: str, value: object) -> None:
    """Raises ValueError unless the option `name` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")


def check_probability(name: str, value: object) -> None:
    """Raises ValueError unless the option `name` is a number in [0, 1)."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}, but must be a number in [0, 1)")


def check_sizes(*, embedding_dim: int, image_size: int, multiple_of: int) -> None:
    """Raises ValueError unless both sizes are positive and `image_size` is a multiple of `multiple_of`."""
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim is {embedding_dim}, but must be at least 1")
    if image_size < 1 or image_size % multiple_of:
        below = max(multiple_of, image_size // multiple_of * multiple_of)
        raise ValueError(
            f"image_size is {image_size}, but must be a positive multiple of {multiple_of}, such as {below}"
        )


def check_images(images: Tensor, image_size: int) -> None:
    """Raises ValueError unless `images` is [b, 3, image_size, image_size]."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"images have shape {list(images.shape)}, but this network was built for"
            f" [b, 3, {image_size}, {image_size}]: resize the images or build it with their image_size"
        )


def embedding_norm(embedding_dim: int) -> nn.BatchNorm1d:
    """The batch norm behind the last linear layer, its weight fixed to 1.

    A free weight could only stretch single dimensions of the embedding, and by weight decay shrink them; the angles
    that the losses look at are left to the linear layer. It ends the BN - dropout - FC - BN of Deng et al., "ArcFace"
    (CVPR 2019), section 3.1.
    """
    norm = nn.BatchNorm1d(embedding_dim)
    norm.weight.requires_grad_(False)
    return norm


def features_to_embedding(features: Tensor, linear: nn.Linear, norm: nn.Module) -> Tensor:
    """`norm(linear(features))` in the dtype of the parameters, whatever autocast says.

    The sum over all positions of a feature map is the longest of the network and its result is the embedding itself,
    so it is worth full precision; it costs about 1 % of the multiplications or less.

    Args:
        features: [b, in_features] in any float dtype.
        linear: from the features to the embedding.
        norm: on the embedding.

    Returns:
        [b, embedding_dim] in the dtype of `linear.weight`.
    """
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return features_to_embedding(features, linear, norm)
    embedding: Tensor = norm(linear(features.to(linear.weight.dtype)))
    return embedding
