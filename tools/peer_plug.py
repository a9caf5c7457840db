"""`PartialFC` as a plug of the side-by-side benchmark, which drives heads through `module:factory`.

    --ours peer_plug:factory

with this folder on the Python path. It trains what insightface's head trains: the same margin with the gradient held at
1 ("detached"), the same optimizer, and the gradient of the embeddings times the number of ranks. The environment
variable PARTIALFC_PLUG, a JSON object, changes how:

    {"fused": false, "matmul_dtype": "bfloat16", "gradient": "exact"}
    {"decay": "dense", "dtype": "float16", "momentum_dtype": "int8"}
    {"optimizer": "adagrad", "learning_rate": 0.01}

Weight decay and momentum are lazy by default. That is another law than the peer's where classes are sampled, "dense" is
the same; at sample rate 1 they do not differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from bench_contestants import Clock
from torch import Tensor

from partialfc import PartialFC
from partialfc.head.optimizers import CenterAdagrad, CenterAdamW, CenterOptimizer, CenterSGD
from partialfc.margins import ArcFace, CosFace, Margin

__all__ = ["Plug", "factory"]

VARIABLE = "PARTIALFC_PLUG"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPERANDS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
OPTIMIZERS = ("sgd", "adamw", "adagrad")
_SGD_OPTIONS = ("decay", "momentum_dtype")
_OPTIONS = ("fused", "dtype", "matmul_dtype", "optimizer", "learning_rate", "gradient", *_SGD_OPTIONS)


class HeadConfig(Protocol):
    """What the benchmark gives to a factory, as far as it is needed here; `margin` is (m1, m2, m3)."""

    num_classes: int
    embedding_size: int
    sample_rate: float
    world_size: int
    device: torch.device
    margin: tuple[float, ...]
    scale: float
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    dtype: str
    seed: int

    @property
    def num_local(self) -> int: ...

    @property
    def class_start(self) -> int: ...


class Plug:
    """What the benchmark drives.

    Args:
        config: of the head.
        overrides: as in PARTIALFC_PLUG.

    Raises:
        ValueError: if an override is unknown or does not go with the others, or the peer has no such margin.
    """

    def __init__(self, config: HeadConfig, overrides: Mapping[str, Any]) -> None:
        _check(overrides)
        self.config, self.clock = config, Clock(config.device)
        options: dict[str, Any] = {}
        if "fused" in overrides:
            options["fused"] = overrides["fused"]
        if "dtype" in overrides:
            options["dtype"] = DTYPES[overrides["dtype"]]
        operands = DTYPES[overrides["matmul_dtype"]] if "matmul_dtype" in overrides else OPERANDS[config.dtype]
        if operands not in (None, torch.float32):
            options["matmul_dtype"] = operands
        self.head = PartialFC(
            config.num_classes,
            config.embedding_size,
            margin=_margin(config, overrides.get("gradient", "detached")),
            sample_rate=config.sample_rate,
            optimizer=_optimizer(config, overrides),
            device=config.device,
            seed=config.seed,
            **options,
        )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, local [b, D] and [b]; its gradient times the number of ranks is in `embeddings.grad`."""
        self.clock.start()
        loss: Tensor = self.head(embeddings, labels)
        self.clock.lap("forward")
        (self.config.world_size * loss).backward()
        self.clock.lap("backward")
        return loss.detach()

    def phases(self) -> dict[str, float]:
        """Seconds of the last step: forward, and backward with the update."""
        return self.clock.phases()

    def load_full_weight(self, full: Tensor) -> None:
        """Takes the class centers [C, D] of all ranks."""
        self.head.set_class_centers(full.to(self.config.device))

    def local_weight(self) -> Tensor:
        """The class centers [num_local, D] that the peer has on this rank; here it may be another that has them.

        Collective.
        """
        start = self.config.class_start
        return self.head.gather_class_centers()[start : start + self.config.num_local]

    def state_bytes(self) -> int:
        """Of all that stays between steps on this rank: class centers, what their optimizer remembers."""
        tensors = [*self.head.buffers(), *self.head.parameters()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def factory(config: HeadConfig) -> Plug:
    """What the benchmark calls.

    Raises:
        ValueError: see `Plug`; or PARTIALFC_PLUG is no JSON object.
    """
    text = os.environ.get(VARIABLE, "") or "{}"
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE} is {text!r}, but must be a JSON object: {error}") from error
    if not isinstance(overrides, dict):
        raise ValueError(f'{VARIABLE} is {text!r}, but must be a JSON object such as {{"decay": "dense"}}')
    return Plug(config, overrides)


def _check(overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        if name not in _OPTIONS:
            raise ValueError(f"{VARIABLE} has {name!r}, but may have {', '.join(_OPTIONS)}")
        if name in ("dtype", "matmul_dtype") and value not in DTYPES:
            raise ValueError(f"{VARIABLE}: {name} is {value!r}, but must be one of {', '.join(DTYPES)}")


def _margin(config: HeadConfig, gradient: Any) -> Margin:
    """The margin that the peer makes of (m1, m2, m3): with m3 it takes no notice of the others."""
    m1, m2, m3 = config.margin
    if m3 > 0:
        return CosFace(scale=config.scale, margin=m3, gradient=gradient)
    if m1 == 1 and m3 == 0:
        return ArcFace(scale=config.scale, margin=m2, tail="none", gradient=gradient)
    raise ValueError(
        f"margin is {tuple(config.margin)}, but must be (1, m2, 0) or have m3 > 0: the peer knows no other"
    )


def _optimizer(config: HeadConfig, overrides: Mapping[str, Any]) -> CenterOptimizer:
    name = overrides.get("optimizer", config.optimizer)
    common: dict[str, Any] = {
        "learning_rate": overrides.get("learning_rate", config.lr),
        "weight_decay": config.weight_decay,
    }
    options = {option: overrides[option] for option in _SGD_OPTIONS if option in overrides}
    if name == "sgd":
        return CenterSGD(momentum=config.momentum, **common, **options)
    if options:
        raise ValueError(f"{VARIABLE} has {', '.join(options)}, but that goes with the optimizer sgd, not {name}")
    if name == "adamw":
        return CenterAdamW(**common)
    if name == "adagrad":
        return CenterAdagrad(**common)
    raise ValueError(f"optimizer is {name!r}, but must be one of {', '.join(OPTIMIZERS)}")
