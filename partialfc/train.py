"""Training, from top to bottom as the data flows."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partialfc.backbones import build_backbone
from partialfc.checkpoint import CheckpointStore
from partialfc.config import Config, write_config
from partialfc.data import Batch, SamplePlan, ShardIndex, TorchLoader, normalize_images
from partialfc.distributed.launch import process_group
from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import BackboneEngine, DDPEngine
from partialfc.evaluate import Verification, autocast_dtype, open_verification, verify_backbone
from partialfc.evaluation import plot_loss, plot_roc
from partialfc.head import PartialFC
from partialfc.keyed import hash64
from partialfc.optim import build_optimizer, learning_rate_at
from partialfc.telemetry import METRICS_FILE, MetricsLog, ProgressBar, Throughput, profiled, read_metrics

__all__ = ["DivergedError", "Trained", "train"]

logger = logging.getLogger(__name__)

_DROPOUT_STREAM = 4  # keeps these hashes apart from those of other parts that use the same seed
_MOST_SKIPPED_STEPS = 20
_MOST_FAILED_SAMPLES, _MOST_FAILED_SHARE = 20, 0.05  # of a rank; more than both, and the run stops


class DivergedError(RuntimeError):
    """The loss or its gradient was not finite for many steps in a row. Raised on all ranks alike."""


@dataclass
class Trained:
    """What a run leaves behind, besides its files.

    Attributes:
        summary: the content of summary.json.
        verifications: by "pixels", "untrained" and "trained", those that the configuration asks for.
    """

    summary: dict[str, Any]
    verifications: dict[str, Verification]


@dataclass
class _Run:
    """The parts of a run, assembled."""

    config: Config
    mesh: ShardMesh
    device: torch.device
    index: ShardIndex
    verification_index: ShardIndex | None
    engine: BackboneEngine
    head: PartialFC
    store: CheckpointStore
    total_steps: int
    step: int = 0

    @property
    def directory(self) -> Path:
        return self.config.run.directory

    @property
    def is_first_rank(self) -> bool:
        return self.mesh.rank == 0


def train(config: Config) -> Trained:
    """Trains as the configuration says, on all launched ranks, and evaluates; goes on where an earlier start stopped.

    Leaves in `run.directory`: config.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/, loss.png, roc.png and
    summary.json.

    Raises:
        ValueError, OSError: if the configuration, the data or the run directory cannot be used; it says why.
        CheckpointError: if the run has checkpoints but none of them is good, or one cannot be written.
        DivergedError: if the run has diverged.
    """
    with process_group(config.run.device) as (mesh, device):
        run = _assemble(config, mesh, device)
        verifications: dict[str, Verification] = {}
        if config.evaluation.at_start:
            # Before the checkpoint is loaded, so that a resumed run has these figures too.
            _verify(run, nn.Flatten(), "pixels", verifications)
            _verify(run, run.engine.evaluation_backbone(), "untrained", verifications)
        _resume(run)
        # Not before, so that a run which cannot begin or go on leaves everything as it was.
        write_config(config, first_rank=run.is_first_rank)
        with MetricsLog(run.directory, resume_step=run.step + 1, enabled=run.is_first_rank) as metrics:
            throughput = _train_steps(run, metrics)
        _verify(run, run.engine.evaluation_backbone(), "trained", verifications)
        summary = _summarize(run, throughput, verifications)
    return Trained(summary, verifications)


def _assemble(config: Config, mesh: ShardMesh, device: torch.device) -> _Run:
    index = ShardIndex.open(config.data.directory / "train")
    verification_index = open_verification(config) if config.evaluation.enabled else None
    num_classes = _num_classes(config, index)
    if config.training.global_batch_size < 2 * mesh.size:
        raise ValueError(
            f"training.global_batch_size is {config.training.global_batch_size}, but must be at least 2 for each of "
            f"the {mesh.size} ranks: batch norm needs two images"
        )

    torch.manual_seed(config.run.seed)
    backbone = build_backbone(
        config.backbone.name,
        embedding_dim=config.backbone.embedding_dim,
        image_size=config.data.image_size,
        **config.backbone.options,
    ).to(device)
    head = PartialFC(
        num_classes,
        config.backbone.embedding_dim,
        margin=config.head.margin,
        sample_rate=config.head.sample_rate,
        optimizer=config.center_optimizer,
        init_std=config.head.init_std,
        device=device,
        seed=config.run.seed,
        process_group=mesh.group,
    )
    total_steps = math.ceil(config.training.epochs * index.num_samples / config.training.global_batch_size)
    store = CheckpointStore(config.run.directory / "checkpoints", mesh=mesh, keep_last=config.checkpoint.keep_last)
    engine = _build_engine(config, backbone, mesh)
    return _Run(config, mesh, device, index, verification_index, engine, head, store, total_steps)


def _num_classes(config: Config, index: ShardIndex) -> int:
    if config.head.num_classes is None:
        return index.num_classes
    if config.head.num_classes < index.num_classes:
        raise ValueError(
            f"head.num_classes is {config.head.num_classes}, but {index.directory} has labels up to "
            f"{index.num_classes - 1}; set it to at least {index.num_classes}, or to null to take it from the data"
        )
    return config.head.num_classes


def _build_engine(config: Config, backbone: nn.Module, mesh: ShardMesh) -> BackboneEngine:
    settings = config.optimizer
    optimizer = build_optimizer(
        backbone,
        name=settings.name,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        decay_norms=settings.decay_norms,
    )
    return DDPEngine(
        backbone,
        optimizer,
        mesh=mesh,
        autocast_dtype=autocast_dtype(config),
        max_gradient_norm=settings.max_gradient_norm,
    )


def _facts(run: _Run) -> dict[str, Any]:
    """What must be the same when a run goes on: with another value the checkpoint means something else."""
    return {
        "seed": run.config.run.seed,
        "global_batch_size": run.config.training.global_batch_size,
        "num_classes": run.head.partition.num_classes,
        "data_fingerprint": run.index.fingerprint,
    }


def _state(run: _Run) -> dict[str, Any]:
    return {**run.engine.state_dict(), "head": run.head.state_dict(), "progress": {"step": run.step}}


def _resume(run: _Run) -> None:
    path = run.store.latest()
    if path is None:
        return
    state = _state(run)
    metadata = run.store.load(path, state)
    for name, value in _facts(run).items():
        if metadata[name] != value:
            raise ValueError(
                f"{path} was saved with {name} {metadata[name]!r}, but this run has {value!r}; "
                "give the run the old value, or another run.directory"
            )
    step = int(state["progress"]["step"])
    if step > run.total_steps:
        raise ValueError(
            f"{path} is at step {step}, but training.epochs={run.config.training.epochs:g} ends at step "
            f"{run.total_steps}; train for longer, or choose another run.directory"
        )
    run.engine.load_state_dict(state)
    run.head.load_state_dict(state["head"])
    run.step = step
    if run.is_first_rank:
        logger.info("going on from %s, step %d of %d", path, run.step, run.total_steps)


def _train_steps(run: _Run, metrics: MetricsLog) -> Throughput:
    batch_size = run.config.training.global_batch_size
    throughput, record = Throughput(), _Record(run, metrics)
    with ProgressBar(
        run.total_steps * batch_size,
        description="train",
        unit="images",
        initial=run.step * batch_size,
        enabled=run.is_first_rank and run.step < run.total_steps,
    ) as progress:
        batches, first_step = iter(_loader(run)), run.step
        while run.step < run.total_steps:
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            loss, gradient_norm, updated = _train_step(run, batch)
            if run.step > first_step:  # the first step warms up
                throughput.add(batch_size, seconds=time.perf_counter() - started, waiting_seconds=waited)
            run.step += 1
            record.step(loss, gradient_norm, updated, batch.failures, throughput)
            progress.update(batch_size, loss=loss, lr=record.learning_rate)
            _when_due(run, metrics)
    record.finish()
    return throughput


class _Record:
    """What is written of each step, and the decision to give up."""

    def __init__(self, run: _Run, metrics: MetricsLog) -> None:
        self._run, self._metrics = run, metrics
        self._losses: list[float] = []
        self._skipped = self._failed_samples = 0
        self.learning_rate = 0.0

    def step(
        self, loss: float, gradient_norm: float, updated: bool, failures: tuple[str, ...], throughput: Throughput
    ) -> None:
        """After step number `run.step`.

        Raises:
            DivergedError: if too many steps in a row were not finite.
            ValueError: if too many samples could not be read.
        """
        run = self._run
        for failure in failures:
            logger.warning("step %d: sample masked: %s", run.step, failure)
        self._failed_samples += len(failures)
        seen = throughput.images // run.mesh.size
        if self._failed_samples > max(_MOST_FAILED_SAMPLES, _MOST_FAILED_SHARE * seen):
            raise ValueError(
                f"{self._failed_samples} of about {seen} samples could not be read on rank {run.mesh.rank} up to step "
                f"{run.step}, the last: {failures[-1] if failures else 'see the warnings'}; repair the data"
            )
        self._skipped = 0 if updated and math.isfinite(loss) else self._skipped + 1
        if self._skipped == _MOST_SKIPPED_STEPS:
            self.finish()
        self._losses.append(loss)
        self.learning_rate = _learning_rate(run, run.config.optimizer.learning_rate, run.step - 1)
        if run.step % run.config.run.log_every_steps and run.step != run.total_steps:
            return
        self._metrics.write(
            run.step,
            {
                "loss": sum(self._losses) / len(self._losses),
                "learning_rate": self.learning_rate,
                "gradient_norm": gradient_norm,
                "images_per_second": throughput.images_per_second,
                "data_waiting_share": throughput.waiting_share,
                "failed_samples_of_rank_0": self._failed_samples,
            },
        )
        self._losses.clear()

    def finish(self) -> None:
        """At the end, or when it is no use going on.

        Raises:
            DivergedError: if the last steps were not finite.
        """
        if self._skipped:
            raise DivergedError(
                f"loss or gradient was not finite for {self._skipped} steps up to step {self._run.step}; "
                "lower the learning rates, lengthen training.warmup_epochs, or lower the margin's scale"
            )


def _loader(run: _Run) -> TorchLoader:
    config = run.config
    return TorchLoader(
        index=run.index,
        plan=SamplePlan(run.index.shard_sizes, seed=config.run.seed),
        global_batch=config.training.global_batch_size,
        rank=run.mesh.rank,
        world_size=run.mesh.size,
        consumed=run.step * config.training.global_batch_size,
        num_batches=run.total_steps - run.step,
        image_size=config.data.image_size,
        horizontal_flip=config.data.horizontal_flip,
        num_workers=config.data.num_workers,
        seed=config.run.seed,
    )


def _learning_rate(run: _Run, base: float, step: int) -> float:
    steps_an_epoch = run.index.num_samples / run.config.training.global_batch_size
    return learning_rate_at(
        step,
        base=base,
        total_steps=run.total_steps,
        warmup_steps=min(round(run.config.training.warmup_epochs * steps_an_epoch), run.total_steps),
        schedule=run.config.training.schedule,
    )


def _train_step(run: _Run, batch: Batch) -> tuple[float, float, bool]:
    """(loss, gradient norm, whether the backbone was updated), the same on all ranks."""
    # Dropout is a function of (seed, step, rank): there is no generator state to checkpoint.
    torch.manual_seed(hash64(run.config.run.seed, _DROPOUT_STREAM, run.step, run.mesh.rank))
    run.head.learning_rate = _learning_rate(run, run.config.center_optimizer.learning_rate, run.step)
    images = normalize_images(batch.images.to(run.device, non_blocking=True))
    labels = batch.labels.to(run.device, non_blocking=True)
    with profiled("backbone forward"):
        embeddings = run.engine.forward(images)
    with profiled("head"):
        loss = run.head(embeddings, labels)
    with profiled("backward"):
        run.engine.backward(loss)
    with profiled("update"):
        learning_rate = _learning_rate(run, run.config.optimizer.learning_rate, run.step)
        gradient_norm, updated = run.engine.step(learning_rate=learning_rate)
    return float(loss.detach()), gradient_norm, updated


def _when_due(run: _Run, metrics: MetricsLog) -> None:
    """Evaluation and checkpoint at their intervals; the last checkpoint comes with the last step."""
    config, last = run.config, run.step == run.total_steps
    every = config.evaluation.every_steps
    if run.verification_index is not None and every and run.step % every == 0 and not last:
        verification = verify_backbone(
            run.engine.evaluation_backbone(), run.verification_index, config, mesh=run.mesh, device=run.device
        )
        metrics.write(
            run.step,
            {
                "verification_accuracy": verification.result.accuracy,
                "verification_tar_at_far": verification.result.tar_at_far[verification.far],
            },
        )
    every = config.checkpoint.every_steps
    if last or (every and run.step % every == 0):
        run.store.save(run.step, _state(run), metadata=_facts(run))


def _verify(run: _Run, backbone: nn.Module, name: str, verifications: dict[str, Verification]) -> None:
    if run.verification_index is not None:
        verifications[name] = verify_backbone(
            backbone, run.verification_index, run.config, mesh=run.mesh, device=run.device
        )


def _summarize(run: _Run, throughput: Throughput, verifications: dict[str, Verification]) -> dict[str, Any]:
    """Writes summary.json and the plots on the first rank. A finished run that is started again keeps its speed."""
    path = run.directory / "summary.json"
    images_per_second = throughput.images_per_second
    if throughput.images == 0 and path.is_file():
        with suppress(ValueError, KeyError):
            images_per_second = json.loads(path.read_text(encoding="utf-8"))["images_per_second"]
    summary = {
        **{name: verification.to_dict() for name, verification in verifications.items()},
        "images_per_second": images_per_second,
        "steps": run.step,
        "world_size": run.mesh.size,
        "num_classes": run.head.partition.num_classes,
        "num_images": run.index.num_samples,
        "torch_version": torch.__version__,
    }
    if run.is_first_rank:
        metrics = [line for line in read_metrics(run.directory / METRICS_FILE) if "loss" in line]
        if metrics:
            steps, losses = [int(line["step"]) for line in metrics], [line["loss"] for line in metrics]
            plot_loss(steps, losses, run.directory / "loss.png")
        if verifications:
            plot_roc({name: found.roc for name, found in verifications.items()}, run.directory / "roc.png")
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return summary
