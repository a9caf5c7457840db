"""Embedding networks: float images [b, 3, H, W] in [-1, 1] to embeddings [b, D]. They know nothing of heads.

Initial weights come from torch's global generator: seed it alike on all ranks before building. All but the
transformers have batch norm, which in training needs at least two images a rank.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import nn

from partialfc.backbones.iresnet import IResNet
from partialfc.backbones.mobilefacenet import MobileFaceNet
from partialfc.backbones.vit import VisionTransformer

__all__ = ["BACKBONES", "IResNet", "MobileFaceNet", "VisionTransformer", "build_backbone"]

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "iresnet10": partial(IResNet, (1, 1, 1, 1)),
    "iresnet18": partial(IResNet, (2, 2, 2, 2)),
    "iresnet34": partial(IResNet, (3, 4, 6, 3)),
    "iresnet50": partial(IResNet, (3, 4, 14, 3)),
    "iresnet100": partial(IResNet, (3, 13, 30, 3)),
    "iresnet200": partial(IResNet, (6, 26, 60, 6)),
    "mobilefacenet": MobileFaceNet,
    "vit_tiny": partial(VisionTransformer, 256, 12),
    "vit_small": partial(VisionTransformer, 512, 12),
    "vit_base": partial(VisionTransformer, 512, 24),
    "vit_large": partial(VisionTransformer, 768, 24),
}

_TIMM_PREFIX = "timm:"


def build_backbone(name: str, *, embedding_dim: int, image_size: int, **options: Any) -> nn.Module:
    """Builds an embedding network.

    Args:
        name: a key of `BACKBONES`, or "timm:NAME" for a model of the timm library.
        embedding_dim: D, dimension of the embedding.
        image_size: side of the square images in pixels.
        **options: further keyword arguments of that network (see its class); for timm, of `timm.create_model`.

    Returns:
        A module that maps float images [b, 3, image_size, image_size] in [-1, 1] to embeddings [b, embedding_dim].

    Raises:
        ValueError: if the name or an option is unknown, or a value out of its range; it says what is allowed.
        ImportError: if a timm model is asked for and timm is not installed.
    """
    if name.startswith(_TIMM_PREFIX):
        return _build_timm(name, embedding_dim=embedding_dim, image_size=image_size, options=options)
    if name not in BACKBONES:
        raise ValueError(
            f'unknown backbone "{name}"{_suggestion(name, BACKBONES)}; known are {", ".join(BACKBONES)},'
            f" and {_TIMM_PREFIX}NAME for a model of the timm library"
        )
    allowed = sorted(_option_names(BACKBONES[name]))
    for option in options:
        if option not in allowed:
            raise ValueError(
                f'{option} is no option of backbone "{name}"{_suggestion(option, allowed)};'
                f" allowed are {', '.join(allowed)}"
            )
    try:
        return BACKBONES[name](embedding_dim=embedding_dim, image_size=image_size, **options)
    except TypeError as error:
        raise _refusal(name, options, error) from error


def _option_names(builder: Callable[..., nn.Module]) -> set[str]:
    return set(inspect.signature(builder).parameters) - {"embedding_dim", "image_size"}


def _refusal(name: str, options: dict[str, Any], error: TypeError) -> ValueError:
    """For a network that has no check of its own for an option."""
    return ValueError(f'options {options} do not go with backbone "{name}": {error}')


def _suggestion(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def _build_timm(name: str, *, embedding_dim: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(
            f'backbone "{name}" needs the timm library, which cannot be imported ({error}):'
            ' install it with pip install "partialfc[timm]"'
        ) from error
    model_name = name.removeprefix(_TIMM_PREFIX)
    if not timm.is_model(model_name):
        raise ValueError(
            f'unknown timm model "{model_name}"{_suggestion(model_name, timm.list_models())};'
            " timm.list_models() lists the known ones"
        )
    try:
        model: Any = timm.create_model(model_name, num_classes=embedding_dim, **options)
    except TypeError as error:
        raise _refusal(name, options, error) from error
    # Models with position embeddings or windows are built for one size; convolutions take any.
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=image_size)
    return cast(nn.Module, model)
