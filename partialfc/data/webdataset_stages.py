"""Which webdataset stages an exact plan can be sent through: those that hand on each sample once, in order."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import webdataset as wds
from torch.utils.data import IterableDataset

__all__ = ["STREAMING_HINT", "Stage", "check_stage", "describe_error", "load_stages", "stage_name"]

Stage = Callable[[Iterable[Any]], Iterable[Any]]
"""A stage of a webdataset pipeline: `wds.map(f)`, `wds.decode("rgb8")`, or any function from samples to samples."""

_TUPLES = "turns samples into tuples or batches, but batches are made by the loader"
_REFUSED_FILTERS: dict[Any, str] = {
    wds.select.f: "drops samples",
    wds.rsample.f: "drops samples",
    islice: "drops samples",  # wds.slice
    wds.shuffle.f: "reorders samples",
    wds.to_tuple.f: _TUPLES,
    wds.map_tuple.f: _TUPLES,
    wds.extract_keys.f: _TUPLES,
    wds.batched.f: _TUPLES,
    wds.unbatched.f: _TUPLES,
    wds.filters.unlisted.f: _TUPLES,
    wds.resampled.f: "is a source of data shards, but samples come from the plan",
}
_REFUSED_CLASSES: dict[type, str] = {
    wds.detshuffle: "reorders samples",
    wds.Cached: "repeats the samples of its first batch",
    wds.LMDBCached: "repeats the samples of its first batch",
}
STREAMING_HINT = "streaming (data.exact=false) does not promise each sample once"


def load_stages(path: str) -> list[Stage]:
    """Calls the function that a configuration names, which gives webdataset stages.

    Args:
        path: as in `my_package.my_module:my_function`; the module must be importable, the function take no argument.

    Raises:
        ValueError: if there is no such function, or it fails, or gives something else than a list of stages.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"stages: {path!r} must name a function as in my_package.my_module:my_function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # A module of the user may raise anything.
        raise ValueError(
            f"stages: the module {module_name} of {path!r} cannot be imported: {describe_error(error)}; is its folder "
            "installed, or on PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"stages: {module_name} has no function {name!r}; it has {functions}")
    try:
        stages = function()
    except Exception as error:
        raise ValueError(f"stages: {path}() failed: {describe_error(error)}") from error
    if not isinstance(stages, list | tuple):
        raise ValueError(f"stages: {path}() gave a {type(stages).__name__}, but must give a list of webdataset stages")
    return list(stages)


def check_stage(stage: Any, name: str) -> None:
    """Refuses what is no stage, and what cannot be part of an exact epoch.

    Args:
        stage: to be checked.
        name: what to call it in messages.

    Raises:
        ValueError: naming the stage and the reason.
    """
    if isinstance(stage, wds.filters.RestCurried | type):
        raise ValueError(f"{name} is not complete: call it, as in wds.map(function)")
    if isinstance(stage, list | tuple) or not (callable(stage) or isinstance(stage, wds.utils.PipelineStage)):
        raise ValueError(f"{name} is no webdataset stage: {stage!r}")
    reason = None
    if isinstance(stage, wds.filters.FilterFunction):
        reason = _REFUSED_FILTERS.get(stage.f) or _dropping_handler(stage)
    elif isinstance(stage, IterableDataset):
        reason = "is a source of samples, but they come from the plan"
    else:
        reason = next((why for kind, why in _REFUSED_CLASSES.items() if isinstance(stage, kind)), None)
    if reason is not None:
        raise ValueError(f"{name} {reason}; exact epochs need each sample once and in order; {STREAMING_HINT}")


def stage_name(stage: Any) -> str:
    """What to call a stage: as in `map shrink`."""
    if isinstance(stage, wds.filters.FilterFunction | wds.filters.RestCurried):
        name = "slice" if stage.f is islice else stage.f.__name__.strip("_")
        functions = [*getattr(stage, "args", ()), *getattr(stage, "kw", {}).values()]
        return " ".join([name, *(function.__name__ for function in functions[:1] if hasattr(function, "__name__"))])
    return str(getattr(stage, "__name__", type(stage).__name__))


def describe_error(error: BaseException) -> str:
    """An error and where it arose: what crosses to another process without its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _dropping_handler(stage: wds.filters.FilterFunction) -> str | None:
    """Why a stage cannot be used because of its error handler."""
    # It may be given by place or by name; a function of the user's own is known as one by its name alone.
    given = [argument for argument in stage.args if getattr(argument, "__module__", "") == wds.handlers.__name__]
    if "handler" in stage.kw:
        given.append(stage.kw["handler"])
    names = [getattr(handler, "__name__", repr(handler)) for handler in given]
    dropping = [name for name in names if name != wds.reraise_exception.__name__]
    return f"drops samples that fail (handler={dropping[0]})" if dropping else None
