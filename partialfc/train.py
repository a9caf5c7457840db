"""Training, from top to bottom as the data flows."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partialfc.assembly import Run, assemble, checkpoint_facts, checkpoint_state, resume, task_loader
from partialfc.bad_samples import BadSamples
from partialfc.config import Config, write_config
from partialfc.data import Batch, normalize_images
from partialfc.distributed.launch import process_group
from partialfc.evaluate import Verification, verify_backbone
from partialfc.evaluation import plot_loss, plot_roc
from partialfc.keyed import hash64
from partialfc.optim import learning_rate_at
from partialfc.telemetry import METRICS_FILE, MetricsLog, ProgressBar, Throughput, profiled, read_metrics

__all__ = ["DivergedError", "Trained", "train"]

logger = logging.getLogger(__name__)

_DROPOUT_STREAM = 4  # keeps these hashes apart from those of other parts that use the same seed
_MOST_SKIPPED_STEPS = 20


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
        run = assemble(config, mesh, device)
        verifications: dict[str, Verification] = {}
        if config.evaluation.at_start:
            # Before the checkpoint is loaded, so that a resumed run has these figures too.
            _verify(run, nn.Flatten(), "pixels", verifications)
            _verify(run, run.engine.evaluation_backbone(), "untrained", verifications)
        resume(run)
        # Not before, so that a run which cannot begin or go on leaves everything as it was.
        write_config(config, first_rank=run.is_first_rank)
        with MetricsLog(run.directory, resume_step=run.step + 1, enabled=run.is_first_rank) as metrics:
            throughput = _train_steps(run, metrics)
        _verify(run, run.engine.evaluation_backbone(), "trained", verifications)
        summary = _summarize(run, throughput, verifications)
    return Trained(summary, verifications)


def _train_steps(run: Run, metrics: MetricsLog) -> Throughput:
    batch_size = run.global_batch_size
    throughput, record = Throughput(), _Record(run, metrics)
    with ProgressBar(
        run.total_steps * batch_size,
        description="train",
        unit="images",
        initial=run.step * batch_size,
        enabled=run.is_first_rank and run.step < run.total_steps,
    ) as progress:
        loaders = {name: iter(task_loader(run, task)) for name, task in run.tasks.items()}
        first_step = run.step
        while run.step < run.total_steps:
            started = time.perf_counter()
            batches = {name: next(loader) for name, loader in loaders.items()}
            waited = time.perf_counter() - started
            loss, gradient_norm, updated = _train_step(run, batches)
            if run.step > first_step:  # the first step warms up
                throughput.add(batch_size, seconds=time.perf_counter() - started, waiting_seconds=waited)
            run.step += 1
            for batch in batches.values():
                record.bad_samples.add(run.step, batch.failures)
            record.step(loss, gradient_norm, updated, throughput)
            progress.update(batch_size, loss=loss, lr=record.learning_rate)
            _when_due(run, metrics)
    record.finish()
    return throughput


class _Record:
    """What is written of each step, and the decision to give up."""

    def __init__(self, run: Run, metrics: MetricsLog) -> None:
        self._run, self._metrics = run, metrics
        self.bad_samples = BadSamples(
            run.directory,
            mesh=run.mesh,
            device=run.device,
            max_share=run.config.data.max_bad_share,
            resume_step=run.step + 1,
        )
        self._losses: list[float] = []
        self._skipped = 0
        self.learning_rate = 0.0

    def step(self, loss: float, gradient_norm: float, updated: bool, throughput: Throughput) -> None:
        """After step number `run.step`.

        Raises:
            DivergedError: if too many steps in a row were not finite.
            ValueError: if too many samples could not be used.
        """
        run = self._run
        self._skipped = 0 if updated and math.isfinite(loss) else self._skipped + 1
        if self._skipped == _MOST_SKIPPED_STEPS:
            self.finish()
        self._losses.append(loss)
        self.learning_rate = _learning_rate(run, run.config.optimizer.learning_rate, run.step - 1)
        if run.step % run.config.run.log_every_steps and run.step != run.total_steps:
            return
        self.bad_samples.settle(run.step * run.global_batch_size)
        self._metrics.write(
            run.step,
            {
                "loss": sum(self._losses) / len(self._losses),
                "learning_rate": self.learning_rate,
                "gradient_norm": gradient_norm,
                "images_per_second": throughput.images_per_second,
                "data_waiting_share": throughput.waiting_share,
                "bad_samples": self.bad_samples.counts.total(),
                **run.heads.diagnostics(),
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


def _learning_rate(run: Run, base: float, step: int) -> float:
    main = run.tasks["main"]
    steps_an_epoch = main.data.plan.num_samples / main.global_batch_size
    return learning_rate_at(
        step,
        base=base,
        total_steps=run.total_steps,
        warmup_steps=min(round(run.config.training.warmup_epochs * steps_an_epoch), run.total_steps),
        schedule=run.config.training.schedule,
    )


def _train_step(run: Run, batches: dict[str, Batch]) -> tuple[float, float, bool]:
    """(loss, gradient norm, whether the backbone was updated), the same on all ranks. A batch for each task."""
    # Dropout is a function of (seed, step, rank): there is no generator state to checkpoint.
    torch.manual_seed(hash64(run.config.run.seed, _DROPOUT_STREAM, run.step, run.mesh.rank))
    for name, task in run.tasks.items():
        run.heads[name].learning_rate = _learning_rate(run, task.head.center_optimizer.learning_rate, run.step)
    images = [batch.images.to(run.device, non_blocking=True) for batch in batches.values()]
    labels = {name: batch.labels.to(run.device, non_blocking=True) for name, batch in batches.items()}
    with profiled("backbone forward"):
        embeddings = run.engine.forward(normalize_images(images[0] if len(images) == 1 else torch.cat(images)))
    with profiled("head"):
        loss = run.heads(embeddings, labels)
    with profiled("backward"):
        run.engine.backward(loss)
    with profiled("update"):
        learning_rate = _learning_rate(run, run.config.optimizer.learning_rate, run.step)
        gradient_norm, updated = run.engine.step(learning_rate=learning_rate)
    return float(loss.detach()), gradient_norm, updated


def _when_due(run: Run, metrics: MetricsLog) -> None:
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
        run.store.save(run.step, checkpoint_state(run), metadata=checkpoint_facts(run))


def _verify(run: Run, backbone: nn.Module, name: str, verifications: dict[str, Verification]) -> None:
    if run.verification_index is not None:
        verifications[name] = verify_backbone(
            backbone, run.verification_index, run.config, mesh=run.mesh, device=run.device
        )


def _summarize(run: Run, throughput: Throughput, verifications: dict[str, Verification]) -> dict[str, Any]:
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
        "num_classes": run.heads["main"].partition.num_classes,
        "num_images": run.tasks["main"].index.num_samples,
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
