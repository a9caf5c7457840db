"""What all engines have in common: the way of a batch, the loss scale, the average of weights, evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partialfc.distributed.collectives import average_over_ranks
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.trail import TRAIL
from partialfc.engine.average import WeightAverage
from partialfc.engine.base import StepOutcome
from partialfc.engine.buffers import SavedBuffers
from partialfc.engine.loss_scale import LossScale
from partialfc.engine.portions import PortionedPass
from partialfc.engine.prepare import Skeleton, prepare
from partialfc.engine.settings import EngineSettings

__all__ = ["PortionedEngine"]


class PortionedEngine(ABC):
    """See `BackboneEngine`. An engine sets `_network` and calls `_start_average` at the end of its construction.

    Args:
        backbone: on its device already, equal on all ranks. Belongs to the engine from then on.
        mesh: the ranks that share the batch.
        settings: see there.
        compile_blocks: whether `settings.compile` acts on the blocks of the backbone instead of the whole.

    Raises:
        ValueError: if the backbone does not go with the settings.
    """

    _network: nn.Module
    # Whether wrapper and backbone can be used side by side: else evaluation needs a copy.
    _backbone_stays_bare = True

    def __init__(
        self, backbone: nn.Module, *, mesh: ShardMesh, settings: EngineSettings, compile_blocks: bool = False
    ) -> None:
        self._mesh, self._settings = mesh, settings
        self._skeleton = Skeleton(backbone)
        self._backbone = prepare(backbone, settings, group=mesh.group, compile_blocks=compile_blocks)
        self._buffers = SavedBuffers(self._backbone)
        self._loss_scale = LossScale() if settings.precision == "fp16" else None
        self._average: WeightAverage | None = None
        self._pass: PortionedPass | None = None

    def forward(self, images: Tensor) -> Tensor:
        """See `BackboneEngine.forward`.

        Raises:
            ValueError: if there are fewer images than portions.
        """
        TRAIL.note("forward of the backbone")
        self._buffers.save()
        self._pass = PortionedPass(self._network, images, self._settings.portions, before=self._before_portion)
        return self._pass.embeddings

    def backward(self, loss: Tensor) -> None:
        """See `BackboneEngine.backward`. If the loss is not finite, the gradient is NaN, so that `step` skips."""
        passing, self._pass = self._pass, None
        assert passing is not None, "backward without a forward before it"
        loss.backward()
        gradient = passing.embeddings.grad
        assert gradient is not None, "the loss does not depend on the embeddings"
        gradient = torch.where(loss.detach().isfinite(), gradient, torch.nan) * self._gradient_factor()
        TRAIL.note("backward of the backbone")
        passing.backward(gradient, self._propagate)

    @abstractmethod
    def step(self, *, learning_rate: float) -> StepOutcome:
        """See `BackboneEngine.step`."""

    def evaluation_backbone(self) -> nn.Module:
        """See `BackboneEngine.evaluation_backbone`. The batch statistics become their mean over ranks.

        As moving averages are linear, it does not matter how often that is done.
        """
        self._average_buffers()
        if self._backbone_stays_bare and self._average is None:
            return self._backbone
        weights = self._backbone_state()
        if self._average is not None:
            weights |= self._to_saved(self._average.values)
        return self._skeleton.with_weights({name: whole(value) for name, value in weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """See `BackboneEngine.state_dict`."""
        self._average_buffers()
        state: dict[str, Any] = {"backbone": self._backbone_state(), "optimizer": self._optimizer_state()}
        if self._average is not None:
            state["ema"] = self._to_saved(self._average.values)
        if self._loss_scale is not None:
            state["loss_scale"] = self._loss_scale.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BackboneEngine.load_state_dict`.

        Weight decay, momentum and the like stay those of this run. An average that is not in `state` starts at its
        weights, a loss scale anew.
        """
        self._load_backbone_state(state["backbone"])
        self._load_optimizer_state(state["optimizer"])
        if self._average is not None:
            self._average.restart(self._from_saved(state["ema"]) if "ema" in state else self._tracked())
        if self._loss_scale is not None and "loss_scale" in state:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def _before_portion(self, last: bool) -> AbstractContextManager[None]:
        """See `PortionedPass`."""
        return nullcontext()

    def _gradient_factor(self) -> float:
        """On the gradient of the embeddings."""
        return 1.0 if self._loss_scale is None else self._loss_scale.value

    def _propagate(self, output: Tensor, gradient: Tensor) -> None:
        output.backward(gradient)

    def _settle(self, outcome: StepOutcome) -> StepOutcome:
        """After a step: what follows from its outcome."""
        if self._loss_scale is not None:
            outcome = outcome._replace(loss_scale=self._loss_scale.value)
            self._loss_scale.update(finite=outcome.updated)
        if not outcome.updated:
            # An image with a NaN must not stay in the batch statistics for good.
            self._buffers.restore()
        elif self._average is not None:
            self._average.update(self._tracked())
        return outcome

    def _start_average(self) -> None:
        if self._settings.ema_decay is not None:
            self._average = WeightAverage(self._tracked(), decay=self._settings.ema_decay)

    def _average_buffers(self) -> None:
        buffers = {name: buffer for name, buffer in self._backbone.named_buffers() if buffer.is_floating_point()}
        averages = {} if self._average is None else self._average.values
        averaged = [averages[name] for name in buffers if name in averages]
        average_over_ranks([*buffers.values(), *averaged], self._mesh, what="batch statistics")

    @abstractmethod
    def _tracked(self) -> dict[str, Tensor]:
        """What this rank holds of floating-point weights and batch statistics, by name."""

    @abstractmethod
    def _to_saved(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """From what this rank holds of each to the layout of the state dict. Collective."""

    @abstractmethod
    def _from_saved(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The way back, from the layout of any engine. Collective."""

    @abstractmethod
    def _backbone_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by plain name. Collective."""

    @abstractmethod
    def _load_backbone_state(self, state: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Tensor]:
        """The state of the optimizer as `state.PARAMETER.KEY`. Collective."""

    @abstractmethod
    def _load_optimizer_state(self, state: dict[str, Tensor]) -> None: ...


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be a DTensor. Collective if it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
