"""The optimizer of the backbone, from torch alone, and the one way its learning rate is set."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

__all__ = ["OPTIMIZERS", "build_optimizer", "fill_state", "set_learning_rate"]

OPTIMIZERS = ("sgd", "adamw")


def build_optimizer(
    module: nn.Module,
    *,
    name: str,
    learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    decay_norms: bool = True,
) -> Optimizer:
    """An optimizer of the trainable parameters of `module`.

    Args:
        module: the backbone.
        name: "sgd" (weight decay is part of the gradient) or "adamw" (weight decay is apart from it).
        learning_rate: the rate of all parameters, until `set_learning_rate`.
        momentum: for "sgd" only.
        weight_decay: of all parameters, or of some: see `decay_norms`.
        betas: for "adamw" only.
        decay_norms: whether weight decay acts on parameters of one dimension too: scale and shift of norms, biases,
            slopes of PReLU. True is what the published recipes of face recognition train with; False is the practice
            for transformers.

    Raises:
        ValueError: if the name is unknown or nothing in `module` is trainable.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"build_optimizer: {type(module).__name__} has no trainable parameter")
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not decay_norms:
        groups = [
            {"params": [parameter for parameter in parameters if parameter.dim() > 1]},
            {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if name == "adamw":
        return AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    raise ValueError(f'unknown optimizer "{name}"; known are {", ".join(OPTIMIZERS)}')


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def fill_state(optimizer: Optimizer) -> None:
    """Creates the state that an optimizer otherwise creates in its first step, with the values that it starts from.

    So it can be saved, or loaded into, at any time. For the optimizers of `build_optimizer`, all of which start from
    zeros. Parameters stay as they are.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
