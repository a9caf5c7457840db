"""State of the optimizer (stage 1), gradients (2) and weights (3) sharded over the ranks by DeepSpeed's ZeRO."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from partialfc.distributed.collectives import all_gather_equal
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.trail import TRAIL
from partialfc.engine.base import StepOutcome
from partialfc.engine.groups import group_of
from partialfc.engine.portioned import PortionedEngine, whole
from partialfc.engine.prepare import InPrecision
from partialfc.engine.settings import EngineSettings
from partialfc.engine.zero_config import refusals_of_deepspeed, zero_config
from partialfc.optim import fill_state, set_learning_rate

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine(PortionedEngine):
    """See `BackboneEngine`.

    DeepSpeed is told that everything is float32. Precision is that of autocast, as in the other engines: DeepSpeed's
    own 16 bits would round the weights, and the last layer too, which the backbones keep in float32. Loss scale, norm
    and clipping are applied by DeepSpeed, and it decides on all ranks alike to skip a step.

    Args:
        backbone: on its device already, equal on all ranks. Belongs to the engine from then on.
        make_optimizer: makes the optimizer of its parameters.
        mesh: the ranks that share the batch: all there are.
        settings: see there.

    Raises:
        ValueError: if the backbone does not go with the settings, or the file of further settings contradicts them.
        ImportError: if DeepSpeed cannot be imported.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        make_optimizer: Callable[[nn.Module], Optimizer],
        mesh: ShardMesh,
        settings: EngineSettings,
    ) -> None:
        if settings.compile and settings.zero_stage == 3:
            raise ValueError(
                "compile does not go with zero_stage 3, which gathers weights layer by layer; set zero_stage to 2, or "
                "use the engine fsdp2"
            )
        parameters = list(backbone.parameters())
        num_parameters, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
        config = zero_config(settings, num_parameters=num_parameters, device_type=device.type)
        self._deepspeed = _import_deepspeed(device)
        group_of(mesh, device.type)
        blocks = settings.compile and settings.activation_checkpointing
        super().__init__(backbone, mesh=mesh, settings=settings, compile_blocks=blocks)
        self._gathers_weights = settings.zero_stage == 3
        self._backbone_stays_bare = not self._gathers_weights
        network = InPrecision(self._backbone, settings.autocast_dtype)
        if settings.compile and not blocks:
            network.forward = torch.compile(network.forward)  # type: ignore[method-assign]
        optimizer = make_optimizer(self._backbone)
        self._engine: Any
        with refusals_of_deepspeed(settings.deepspeed_json):
            self._engine, self._zero, *_ = self._deepspeed.initialize(
                model=network, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._network = self._engine
        self._optimizer: Optimizer = self._zero.optimizer
        self._groups = _Groups(self._zero)
        self._groups.fill_state(self._optimizer)
        self._start_average()

    def step(self, *, learning_rate: float) -> StepOutcome:
        """See `BackboneEngine.step`."""
        set_learning_rate(self._optimizer, learning_rate)
        TRAIL.note("step of the backbone")
        self._engine.step()
        return self._settle(StepOutcome(float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()))

    def _before_portion(self, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _gradient_factor(self) -> float:
        # DeepSpeed averages over ranks. It applies the loss scale by itself: see _propagate.
        return float(self._mesh.size)

    def _propagate(self, output: Tensor, gradient: Tensor) -> None:
        if self._loss_scale is not None:
            self._zero.override_loss_scale(self._loss_scale.value)
        # A scalar with that gradient: DeepSpeed is meant to start from a loss.
        self._engine.backward((output * gradient).sum(), scale_wrt_gas=False)

    def _tracked(self) -> dict[str, Tensor]:
        saved = self._backbone.state_dict().keys()  # not all buffers are
        buffers = {
            name: buffer
            for name, buffer in self._backbone.named_buffers()
            if buffer.is_floating_point() and name in saved
        }
        parameters: dict[str, Any] = dict(self._backbone.named_parameters())
        return {name: p.ds_tensor if self._gathers_weights else p for name, p in parameters.items()} | buffers

    def _to_saved(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._gathers_weights:
            return values
        parameters = dict(self._backbone.named_parameters())
        return {
            name: self._joined(value, parameters[name]) if name in parameters else value
            for name, value in values.items()
        }

    def _from_saved(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._gathers_weights:
            return {name: whole(value) for name, value in values.items()}
        parameters = dict(self._backbone.named_parameters())
        return {
            name: self._part(whole(value), parameters[name]) if name in parameters else whole(value)
            for name, value in values.items()
        }

    def _joined(self, part: Tensor, parameter: Any) -> Tensor:
        joined = all_gather_equal(part.to(parameter.device), self._mesh, what="averaged weights")
        return joined[: parameter.ds_numel].view(parameter.ds_shape)

    def _part(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a whole tensor, as stage 3 divides it: flat, with zeros at the end."""
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self._mesh.size - value.numel()))
        return padded[self._mesh.rank * size :][:size]

    def _gathered(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """In here the parameters of the backbone are whole."""
        if not self._gathers_weights:
            return nullcontext()
        parameters = list(self._backbone.parameters())
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if changed else None
        )
        return context

    def _backbone_state(self) -> dict[str, Tensor]:
        with self._gathered():
            state = self._backbone.state_dict()
            return {name: value.clone() for name, value in state.items()} if self._gathers_weights else dict(state)

    @torch.no_grad()
    def _load_backbone_state(self, state: dict[str, Tensor]) -> None:
        values = {name: whole(value) for name, value in state.items()}
        with self._gathered(changed=True):
            own = self._backbone.state_dict()
            assert own.keys() == values.keys()
            for name, target in own.items():
                target.copy_(values[name])
        # What the optimizer moves is a copy.
        self._zero.refresh_fp32_params()

    def _optimizer_state(self) -> dict[str, Tensor]:
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        state = {}
        for name, parameter in self._trained():
            for key, value in self._groups.state_of(parameter, self._optimizer).items():
                state[f"state.{name}.{key}"] = value if value.ndim == 0 else get(parameter, key)
        return state

    @torch.no_grad()
    def _load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        utils = self._deepspeed.utils
        for name, parameter in self._trained():
            for key, target in self._groups.state_of(parameter, self._optimizer).items():
                value = whole(state[f"state.{name}.{key}"]).to(target.device)
                if target.ndim == 0:
                    target.copy_(value)
                elif self._gathers_weights:
                    # safe_set_full_optimizer_state fails where the last part has zeros at the end.
                    utils.safe_set_local_optimizer_state(parameter, self._part(value, parameter), key)
                else:
                    utils.safe_set_full_optimizer_state(parameter, value, key)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._backbone.named_parameters() if p.requires_grad]


class _Groups:
    """Which flat tensor of the optimizer a parameter is in. The names are DeepSpeed's internal ones."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        self._flats: Sequence[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage3 else zero.single_partition_of_fp32_groups
        )
        members = zero.fp16_groups if self._stage3 else zero.bit16_groups
        self._flat_of = {
            parameter: flat for flat, group in zip(self._flats, members, strict=True) for parameter in group
        }

    def state_of(self, parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Tensor]:
        """This rank's state of the group that a parameter is in, by key; flat, or scalars."""
        state: dict[str, Tensor] = optimizer.state[self._flat_of[parameter]]
        return state

    def fill_state(self, optimizer: Optimizer) -> None:
        """See `partialfc.optim.fill_state`."""
        if not self._stage3:
            fill_state(optimizer)
            self._zero._lazy_init_hp_params_optimizer_state()
            return
        # Stage 3 gives the optimizer its parameters one after the other, and takes them away again.
        for number, flat in enumerate(self._flats):
            optimizer.param_groups[self._zero.sub_group_to_group_id[number]]["params"].append(flat)
        fill_state(optimizer)
        for group in optimizer.param_groups:
            group["params"] = []


def _import_deepspeed(device: torch.device) -> Any:
    # Without these two, DeepSpeed takes any GPU that it sees, and insists on a launcher.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            f"the engine deepspeed needs the library DeepSpeed, which cannot be imported ({error}): "
            'install it with pip install "partialfc[deepspeed]"'
        ) from error
    # On a CPU it would compile an all-reduce of its own at every first start, for inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
