"""What the engines have in common whose optimizer is torch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from partialfc.engine.base import StepOutcome
from partialfc.engine.gradients import clip_gradients, global_norm
from partialfc.engine.portioned import PortionedEngine, whole
from partialfc.optim import fill_state, set_learning_rate

__all__ = ["TorchEngine"]


class TorchEngine(PortionedEngine):
    """A backbone whose parameters, plain or DTensors, are updated by an optimizer that knows nothing of ranks."""

    _optimizer: Optimizer
    # Whether a rank holds a part of each gradient, or all of it.
    _sharded = False

    def _make_optimizer(self, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        self._optimizer = make_optimizer(self._backbone)
        fill_state(self._optimizer)
        self._start_average()

    def step(self, *, learning_rate: float) -> StepOutcome:
        """See `BackboneEngine.step`."""
        gradients = [_local(p.grad) for p in self._backbone.parameters() if p.grad is not None]
        if self._loss_scale is not None:
            torch._foreach_mul_(gradients, 1.0 / self._loss_scale.value)
        norm = global_norm(gradients, self._mesh, sharded=self._sharded)
        outcome = StepOutcome(float(norm), bool(norm.isfinite()))
        if outcome.updated:
            if self._settings.max_gradient_norm is not None:
                clip_gradients(gradients, norm, self._settings.max_gradient_norm)
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._settle(outcome)

    def _tracked(self) -> dict[str, Tensor]:
        state = self._backbone.state_dict()
        return {name: _local(value) for name, value in state.items() if value.is_floating_point()}

    def _to_saved(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self._backbone.state_dict()
        return {name: _global(value, own[name]) for name, value in values.items()}

    def _from_saved(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self._backbone.state_dict()
        return {name: _local(_laid_out_like(own[name], value)) for name, value in values.items()}

    def _backbone_state(self) -> dict[str, Tensor]:
        return dict(self._backbone.state_dict())

    @torch.no_grad()
    def _load_backbone_state(self, state: dict[str, Tensor]) -> None:
        own = self._backbone.state_dict()
        assert own.keys() == state.keys()
        for name, target in own.items():
            _local(target).copy_(_local(_laid_out_like(target, state[name])))

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"state.{name}.{key}": value
            for name, parameter in self._backbone.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    @torch.no_grad()
    def _load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        own = self._optimizer_state()
        assert own.keys() == state.keys()
        for name, target in own.items():
            _local(target).copy_(_local(_laid_out_like(target, state[name])))


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _global(local: Tensor, like: Tensor) -> Tensor:
    """The way back from `_local`."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _laid_out_like(target: Tensor, value: Tensor) -> Tensor:
    """`value`, laid out over the ranks as `target` is."""
    if not isinstance(target, DTensor):
        return whole(value)
    if isinstance(value, DTensor) and value.device_mesh == target.device_mesh:
        return value
    # Every rank has the same, so nothing needs to be sent.
    return distribute_tensor(whole(value).to(target.device), target.device_mesh, target.placements, src_data_rank=None)
