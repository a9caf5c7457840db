"""DeepSpeed's settings, made from those of an engine, with a user's file merged in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from partialfc.engine.settings import EngineSettings

__all__ = ["refusals_of_deepspeed", "zero_config"]

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

_OWN_OPTIMIZER = "needs DeepSpeed's own optimizers"
_MICS = "shards as MiCS does, and this engine cannot"
_NOT_SUPPORTED = {
    "zero_optimization.offload_optimizer": _OWN_OPTIMIZER,
    "zero_optimization.offload_param": _OWN_OPTIMIZER,
    # Old names of the same.
    "zero_optimization.cpu_offload": _OWN_OPTIMIZER,
    "zero_optimization.cpu_offload_param": _OWN_OPTIMIZER,
    "zero_optimization.cpu_offload_use_pin_memory": _OWN_OPTIMIZER,
    "zero_optimization.zenflow": _OWN_OPTIMIZER,
    "zero_optimization.mics_shard_size": _MICS,
    "zero_optimization.mics_hierarchical_params_gather": _MICS,
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has",
}
_NEEDS_CUDA = ("zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights")


_UNUSED = (False, None, -1)  # of what is not supported


def _is_whole(value: Any) -> bool:
    # Such as 1e5, which many files have.
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


# What a value must be, in words, and whether it is.
_Kind = tuple[str, Callable[[Any], bool]]
_OBJECT: _Kind = ("an object", lambda value: isinstance(value, dict))
_BOOLEAN: _Kind = ("true or false", lambda value: isinstance(value, bool))
_WHOLE: _Kind = ("an integer", _is_whole)
_POSITIVE: _Kind = ("a positive integer", lambda value: _is_whole(value) and value > 0)

# DeepSpeed takes much more, in part for what is not used here, and in part without a word for what it does not know.
# Of these it looks at the type where it needs the value, which may be in the middle of a step. `zero_optimization` it
# checks by itself: see `refusals_of_deepspeed`.
_ALLOWED: dict[str, _Kind] = {
    "comms_logger": _OBJECT,
    "communication_data_type": ("fp16, bf16, fp32 or null", lambda value: value in ("fp16", "bf16", "fp32", None)),
    "dump_state": _BOOLEAN,
    "flops_profiler": _OBJECT,
    "memory_breakdown": _BOOLEAN,
    "steps_per_print": _POSITIVE,
    "wall_clock_breakdown": _BOOLEAN,
    "zero_optimization": _OBJECT,
}
_ALLOWED_INSIDE: dict[str, dict[str, _Kind]] = {
    "comms_logger": {
        "debug": _BOOLEAN,
        "enabled": _BOOLEAN,
        "prof_all": _BOOLEAN,
        "prof_ops": ("a list", lambda value: isinstance(value, list)),
        "verbose": _BOOLEAN,
    },
    "flops_profiler": {
        "detailed": _BOOLEAN,
        "enabled": _BOOLEAN,
        "module_depth": _WHOLE,
        "output_file": ("a path or null", lambda value: value is None or isinstance(value, str)),
        "profile_step": _POSITIVE,
        "recompute_fwd_factor": ("a number", lambda value: _is_whole(value) or isinstance(value, float)),
        "top_modules": _POSITIVE,
    },
}


def zero_config(settings: EngineSettings, *, num_parameters: int, device_type: str) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        settings: of the engine.
        num_parameters: of the backbone; no bucket needs to be larger.
        device_type: where the backbone is.

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
        _check_device(given.get("zero_optimization", {}), device_type, settings.deepspeed_json)
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


def _check(given: dict[str, Any], own: dict[str, Any], path: Path) -> None:
    _check_owners(given, own, path)
    _check_kinds(given, _ALLOWED, path)
    for section, kinds in _ALLOWED_INSIDE.items():
        _check_kinds(given.get(section, {}), kinds, path, f"{section}.")
    zero = given.get("zero_optimization", {})
    _check_owners(zero, own["zero_optimization"], path, "zero_optimization.")
    # The one that DeepSpeed answers with a TypeError.
    _check_kind(zero, "leaf_module", _OBJECT, path, "zero_optimization.")


def _check_owners(given: dict[str, Any], own: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key, value in given.items():
        name = prefix + key
        if name in _OWN and (key not in own or value != own[key]):
            raise ValueError(
                f"deepspeed_json {path} sets {name} to {json.dumps(value)}, but that is for {_OWN[name]} to say; take "
                "it out of the file"
            )
        if name in _NOT_SUPPORTED and value not in _UNUSED:
            raise ValueError(
                f"deepspeed_json {path} sets {name}, which {_NOT_SUPPORTED[name]}; take it out of the file"
            )


def _check_kinds(given: dict[str, Any], kinds: dict[str, _Kind], path: Path, prefix: str = "") -> None:
    for key in given:
        if key in kinds:
            _check_kind(given, key, kinds[key], path, prefix)
        elif prefix + key not in _OWN:
            raise ValueError(f"deepspeed_json {path} sets {prefix}{key}, but allowed are {', '.join(sorted(kinds))}")


def _check_kind(given: dict[str, Any], key: str, kind: _Kind, path: Path, prefix: str) -> None:
    what, is_right = kind
    if key in given and not is_right(given[key]):
        raise ValueError(f"deepspeed_json {path} sets {prefix}{key} to {json.dumps(given[key])}, but must be {what}")


def _check_device(zero: dict[str, Any], device_type: str, path: Path) -> None:
    # On a CPU it would say so in the first step.
    for key in _NEEDS_CUDA:
        if zero.get(key) and device_type != "cuda":
            raise ValueError(
                f"deepspeed_json {path} sets zero_optimization.{key}, which needs CUDA, but the backbone is on "
                f"{device_type}; take it out of the file"
            )


@contextmanager
def refusals_of_deepspeed(path: Path | None) -> Iterator[None]:
    """In here, what DeepSpeed has to say against its settings becomes a ValueError that names the file.

    Args:
        path: the user's file; None without one, when every error is one of ours.

    Raises:
        ValueError: instead of an error of DeepSpeed.
    """
    try:
        yield
    except ValidationError as error:
        if path is None:
            raise
        # Of what `_check` lets through, DeepSpeed has a model for this section alone.
        said = "; ".join(_explain(problem) for problem in error.errors())
        raise ValueError(f"deepspeed_json {path} sets {said}") from error
    except Exception as error:
        # DeepSpeedConfigError is no ValueError, and cannot be named here, where DeepSpeed may not be installed.
        if path is None or not (isinstance(error, ValueError) or type(error).__name__ == "DeepSpeedConfigError"):
            raise
        raise ValueError(f"deepspeed_json {path} is given, and DeepSpeed cannot be set up: {error}") from error


def _explain(problem: Any) -> str:
    """One problem that pydantic has found, as: key, what was given, what is allowed."""
    name = ".".join(("zero_optimization", *(str(part) for part in problem["loc"])))
    if problem["type"] == "extra_forbidden":
        return f"{name}, but DeepSpeed knows no such key; take it out of the file"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{name} to {json.dumps(problem['input'], default=str)}, but {message}"


def _merged(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(own)
    for key, value in given.items():
        merged[key] = _merged(own[key], value) if isinstance(own.get(key), dict) else value
    return merged
