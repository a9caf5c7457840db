"""DeepSpeed's settings, made from those of an engine, with a user's file merged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partialfc.engine.settings import EngineSettings

__all__ = ["zero_config"]

_LARGEST_BUCKET = 50_000_000

# What a file may not say otherwise, and where it is said instead.
_BATCH = "the batch of the run and its portions"
_PRECISION = "the precision of the run"
_OWN = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "elasticity": _BATCH,
    "gradient_clipping": "max_gradient_norm",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "optimizer": "the optimizer of the run",
    "scheduler": "the schedule of the run",
    "gradient_allreduce_op": "this engine, which needs the average",
    "prescale_gradients": "this engine, which needs the average",
    "gradient_predivide_factor": "this engine, which needs the average",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.compute_grad_norm": "this engine, which needs the norm",
}

# DeepSpeed takes much more, in part for what is not used here, and in part without a word for what it does not know.
_ALLOWED = {
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization",
}
_NOT_SUPPORTED = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")


def zero_config(settings: EngineSettings, *, num_parameters: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        settings: of the engine.
        num_parameters: of the backbone; no bucket needs to be larger.

    Raises:
        ValueError: if the file cannot be read, is no JSON object, or contradicts the settings; it says how.
    """
    bucket = min(_LARGEST_BUCKET, num_parameters)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.portions,
        # Written even without clipping: left out, DeepSpeed clips at 1.
        "gradient_clipping": settings.max_gradient_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if settings.deepspeed_json is not None:
        given = _read(settings.deepspeed_json)
        _check(given, config, settings.deepspeed_json)
        config = _merged(config, given)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_repetitions
        )
    except OSError as error:
        raise ValueError(f"deepspeed_json {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"deepspeed_json {path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"deepspeed_json {path} has a {type(given).__name__}, but must be an object, {{...}}")
    return given


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return values


def _check(given: dict[str, Any], own: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key, value in given.items():
        name = prefix + key
        if name in _OWN and (key not in own or value != own[key]):
            raise ValueError(
                f"deepspeed_json {path} sets {name} to {json.dumps(value)}, but that is for {_OWN[name]} to say; take "
                "it out of the file"
            )
        if name in _NOT_SUPPORTED:
            raise ValueError(
                f"deepspeed_json {path} sets {name}, which needs DeepSpeed's own optimizers; take it out of the file"
            )
        if not prefix and key not in _ALLOWED and key not in _OWN:
            raise ValueError(f"deepspeed_json {path} sets {key}, but allowed are {', '.join(sorted(_ALLOWED))}")
        if isinstance(own.get(key), dict):
            if not isinstance(value, dict):
                raise ValueError(f"deepspeed_json {path} sets {name} to {json.dumps(value)}, but must be an object")
            _check(value, own[key], path, f"{name}.")


def _merged(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(own)
    for key, value in given.items():
        merged[key] = _merged(own[key], value) if isinstance(own.get(key), dict) else value
    return merged
