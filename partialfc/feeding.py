"""The data of a run: sets, plan and loader, put together from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from partialfc.config import Config, DataConfig
from partialfc.data import (
    DaliLoader,
    DaliStream,
    JoinedIndex,
    Loader,
    MixedPlan,
    Plan,
    RankSteps,
    ShardIndex,
    StreamingLoader,
    TorchLoader,
    WebDatasetLoader,
    load_stages,
)
from partialfc.evaluation import make_pairs
from partialfc.keyed import hash64

__all__ = ["TrainingData", "check_stages", "make_loader", "open_training_data", "open_verification"]

_SOURCE_STREAM = 6  # keeps these hashes apart from those of other parts of the same seed


@dataclass(frozen=True)
class TrainingData:
    """The samples that one head is trained on.

    Attributes:
        index: of its training split, or of several as one.
        plan: the order in which its samples are seen.
        seed: of order and augmentation.
        order: what the plan was made from, besides index and seed: a run that goes on must have the same.
    """

    index: ShardIndex | JoinedIndex
    plan: Plan
    seed: int
    order: str


def open_training_data(config: DataConfig, directory: Path, *, seed: int, global_batch: int, path: str) -> TrainingData:
    """Opens the training split of a data set, with what is mixed into it, and makes the plan.

    Args:
        config: the settings, of which `directory` is not looked at.
        directory: the data set.
        seed: of order and augmentation.
        global_batch: samples of a step over all ranks.
        path: of the setting that names the directory, for messages.

    Raises:
        OSError, ValueError: if the data cannot be used, with the path of the setting.
    """
    parts = [_open(directory, config, path)]
    if path == "data.directory":
        for number, part in enumerate(config.mix):
            parts.append(_open(part.directory, config, f"data.mix.{number}.directory"))
    index = parts[0] if len(parts) == 1 else JoinedIndex(parts)
    try:
        plan = _make_plan(config, parts, index, seed=seed, global_batch=global_batch)
    except ValueError as error:
        raise ValueError(f"data.sampling, for {directory}: {error}") from error
    order = f"{config.sampling}, shares {[part.share for part in config.mix]}, exact={config.exact}"
    return TrainingData(index, plan, seed, order)


def _open(directory: Path, config: DataConfig, path: str) -> ShardIndex:
    try:
        return ShardIndex.open(directory / "train", cache=config.remote, check_shards=config.exact)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _make_plan(
    config: DataConfig, parts: list[ShardIndex], index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int
) -> Plan:
    shares = [part.share for part in config.mix]
    if len(parts) == 1 or all(share is None for share in shares):
        return config.sampling.plan(index, seed=seed, global_batch=global_batch)
    assert isinstance(index, JoinedIndex)
    plans = [
        config.sampling.plan(part, seed=hash64(seed, _SOURCE_STREAM, number), global_batch=global_batch)
        for number, part in enumerate(parts)
    ]
    given = [float(share) for share in shares if share is not None]
    return MixedPlan(plans, [1.0 - sum(given), *given], seed=seed, first_ids=index.first_ids)


def open_verification(config: Config) -> ShardIndex:
    """The verification split of the run's data, able to make the pairs that the configuration asks for.

    Raises:
        FileNotFoundError: if the data has none; it says what to do.
        ValueError: if it has too few images for `evaluation.num_pairs`.
    """
    directory = config.data.directory / "verification"
    if config.data.directory.is_dir() and not directory.is_dir():
        raise FileNotFoundError(
            f"{config.data.directory} has no verification split: pack it with --verification-share, or train "
            "with evaluation.enabled=false"
        )
    index = ShardIndex.open(directory, cache=config.data.remote)
    # Drawn here too, so that a run which cannot be evaluated does not begin.
    make_pairs(torch.from_numpy(index.labels.copy()), num_pairs=config.evaluation.num_pairs, seed=config.run.seed)
    return index


def make_loader(config: DataConfig, data: TrainingData, steps: RankSteps, *, device: torch.device) -> Loader:
    """The batches of one rank, from the loader that the configuration names.

    Raises:
        ValueError, ImportError: if it cannot be used.
    """
    common: dict[str, Any] = {
        "index": data.index,
        "steps": steps,
        "image_size": config.image_size,
        "augmentation": config.augmentation,
        "seed": data.seed,
    }
    workers: dict[str, Any] = {"num_workers": config.num_workers, "timeout_seconds": config.timeout_seconds}
    dali: dict[str, Any] = {
        "threads": config.dali.threads,
        "prefetch": config.dali.prefetch_batches,
        "device_id": _gpu(device) if config.dali.device == "gpu" else None,
    }
    if config.exact:
        workers["read_ahead"] = config.read_ahead
        if config.loader == "dali":
            return DaliLoader(**common, **workers, **dali)
        if config.loader == "webdataset":
            stages = load_stages(config.stages) if config.stages else ()
            return WebDatasetLoader(**common, **workers, stages=stages)
        return TorchLoader(**common, **workers)
    if config.loader == "dali":
        return DaliStream(**common, **dali)
    return StreamingLoader(
        directory=data.index.directory,
        global_batch=steps.global_batch,
        rank=steps.rank,
        world_size=steps.world_size,
        consumed=steps.consumed,
        num_batches=len(steps),
        image_size=config.image_size,
        augmentation=config.augmentation,
        seed=data.seed,
        cache=config.remote,
        **workers,
    )


def check_stages(config: DataConfig) -> None:
    """Makes sure that the webdataset stages of the configuration can be had, before anything is written.

    Raises:
        ValueError: if they cannot.
    """
    if config.stages is not None:
        load_stages(config.stages)


def _gpu(device: torch.device) -> int:
    if device.type != "cuda":
        raise ValueError(f"data.dali.device is gpu, but this run is on the {device.type}; set it to cpu")
    return device.index or 0
