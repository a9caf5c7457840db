"""Verification of a backbone on identities that training never sees: in a run, and of a finished one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.assembly import configured_backbone
from partialfc.checkpoint import CheckpointError, CheckpointStore
from partialfc.checkpoint.directory import step_of
from partialfc.config import Config, flat_settings, load_config
from partialfc.data import Batch, SequentialLoader, ShardIndex, normalize_images
from partialfc.distributed.launch import process_group
from partialfc.distributed.meeting import getting_ready
from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import PRECISIONS
from partialfc.evaluation import VerificationResult, extract_embeddings, nearest_neighbor_accuracy, verify
from partialfc.feeding import open_verification

__all__ = [
    "Verification",
    "evaluate_run",
    "load_backbone",
    "result_table",
    "verify_backbone",
]

logger = logging.getLogger(__name__)

# What the checkpoints of a run are, and where: no override may change it.
_FIXED = ("backbone.", "data.image_size", "run.directory")
_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Verification:
    """What a verification found, at the false accept rate of the configuration."""

    result: VerificationResult
    far: float
    nearest_neighbor_accuracy: float

    @property
    def roc(self) -> tuple[Tensor, Tensor]:
        """False and true accept rates, ascending, [K] each."""
        return self.result.counts.far(), self.result.counts.tar()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `tar_at_far` is one number, at `far`."""
        return {
            **self.result.to_dict(),
            "tar_at_far": self.result.tar_at_far[self.far],
            "far": self.far,
            "nearest_neighbor_accuracy": self.nearest_neighbor_accuracy,
        }


def verify_backbone(
    backbone: nn.Module, index: ShardIndex, config: Config, *, mesh: ShardMesh, device: torch.device
) -> Verification:
    """Embeds the verification images on all ranks and verifies them; the same result on every rank."""
    loader = SequentialLoader(
        index=index,
        batch_size=config.evaluation.batch_size,
        rank=mesh.rank,
        world_size=mesh.size,
        image_size=config.data.image_size,
        num_workers=config.data.num_workers,
    )
    embeddings, labels = extract_embeddings(
        backbone,
        _with_warnings(loader),
        device=device,
        mesh=mesh,
        normalize_images=normalize_images,
        autocast_dtype=PRECISIONS[config.training.precision],
    )
    far = config.evaluation.far
    result = verify(embeddings, labels, num_pairs=config.evaluation.num_pairs, seed=config.run.seed, fars=[far])
    return Verification(result, far, nearest_neighbor_accuracy(embeddings, labels))


def _with_warnings(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for failure in batch.failures:
            logger.warning("verification: sample left out: %s", failure.message)
        yield batch


def load_backbone(run_directory: str | Path) -> tuple[nn.Module, Config]:
    """The trained backbone of a run, on the CPU and in evaluation mode, and the run's configuration.

    Its weights are the averaged ones if the run has those (engine.ema_decay).

    It maps float images [b, 3, H, W] in [-1, 1], RGB (see `partialfc.data.normalize_images`), to embeddings [b, D].

    Raises:
        FileNotFoundError: if the directory holds no run or no checkpoint.
    """
    config = _run_config(run_directory)
    backbone, _ = _newest(run_directory, config, mesh=ShardMesh.single())
    return backbone, config


def _newest(run_directory: str | Path, config: Config, *, mesh: ShardMesh) -> tuple[nn.Module, Path]:
    """The backbone of the newest good checkpoint, the same on all ranks of the mesh, and which checkpoint that is."""
    store = CheckpointStore(Path(run_directory) / "checkpoints", mesh=mesh)
    path = store.latest()
    if path is None:
        raise FileNotFoundError(f"{run_directory} has no checkpoint yet; train it first")
    backbone = configured_backbone(config)
    state = {"backbone": backbone.state_dict()}
    if "ema" in store.metadata(path)["sections"]:
        floating = {name: value for name, value in backbone.state_dict().items() if value.is_floating_point()}
        state["ema"] = {name: torch.empty_like(value) for name, value in floating.items()}
    store.load(path, state, verified=True)
    backbone.load_state_dict({**state["backbone"], **state.get("ema", {})})
    return backbone.eval(), path


def _newest_that_stays(run_directory: str | Path, config: Config, mesh: ShardMesh) -> tuple[nn.Module, Path]:
    try:
        return _newest(run_directory, config, mesh=mesh)
    except CheckpointError:
        # Perhaps the run goes on, and has removed what was just being read: then there is a newer one.
        time.sleep(_AGAIN_SECONDS)
        return _newest(run_directory, config, mesh=mesh)


def evaluate_run(run_directory: str | Path, overrides: Sequence[str] = ()) -> tuple[int, Verification]:
    """Verifies the newest checkpoint of a run, on all launched ranks.

    Args:
        run_directory: the `run.directory` of a training, which may still be under way.
        overrides: "key.sub=value" strings for the configuration of the run, such as "data.directory=data/other".

    Returns:
        The step of the checkpoint, and what was found; the same on all ranks.

    Raises:
        FileNotFoundError: if the run, its checkpoint or its verification data is missing.
        ValueError: if an override is wrong, or would change the backbone, its images or the run.
        CheckpointError: if the run has checkpoints but none of them is good.
        RendezvousError: on all launched ranks, instead of what only some meet before they are a group; see
            `partialfc.distributed.meeting`.
    """
    with getting_ready():
        config = _run_config(run_directory, overrides)
        index = open_verification(config)
    timeout_seconds = config.supervision.collective_timeout_seconds
    with process_group(config.run.device, timeout_seconds=timeout_seconds) as (mesh, device):
        backbone, path = _newest_that_stays(run_directory, config, mesh)
        step = step_of(path)
        assert step is not None
        if mesh.rank == 0:
            logger.info("verifying %s on %s", path, index.directory)
        return step, verify_backbone(backbone.to(device), index, config, mesh=mesh, device=device)


def result_table(verifications: dict[str, Verification]) -> str:
    """A small table for people: a row for each named verification."""
    far = next(iter(verifications.values())).far
    header = ("", "accuracy (10-fold)", f"TAR@FAR={far:g}", "AUC", "nearest neighbour")
    lines = ["{:<12}{:>20}{:>14}{:>9}{:>20}".format(*header)]
    for name, verification in verifications.items():
        result = verification.result
        accuracy = f"{result.accuracy:.4f} +- {result.accuracy_std:.4f}"
        line = f"{name:<12}{accuracy:>20}{result.tar_at_far[far]:>14.4f}{result.auc:>9.4f}"
        lines.append(f"{line}{verification.nearest_neighbor_accuracy:>20.4f}")
    return "\n".join(lines)


def _run_config(run_directory: str | Path, overrides: Sequence[str] = ()) -> Config:
    path = Path(run_directory) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{run_directory} is not the directory of a run: it has no config.yaml")
    config = load_config(path, overrides)
    old = flat_settings(load_config(path))
    for name, value in flat_settings(config).items():
        if name.startswith(_FIXED) and value != old.get(name, "not set"):
            raise ValueError(
                f"{name}: {value!r} given, but the checkpoints of {run_directory} are of a run with "
                f"{old.get(name, 'not set')!r}; leave this override out"
            )
    return config
