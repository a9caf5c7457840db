"""Training, from top to bottom as the data flows."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from partialfc.assembly import Run, assemble, open_inputs, task_loader
from partialfc.checkpoint import RunLock
from partialfc.config import Config, flat_settings, write_config
from partialfc.data import Batch, normalize_images
from partialfc.distributed.launch import process_group
from partialfc.engine import StepOutcome
from partialfc.evaluate import Verification, verify_backbone
from partialfc.evaluation import plot_loss, plot_roc
from partialfc.keyed import hash64
from partialfc.recording import DivergedError, Record, check_files
from partialfc.saving import SaveError, Saver, resume
from partialfc.supervision.signals import StopSignals
from partialfc.supervision.supervisor import Supervisor
from partialfc.telemetry import METRICS_FILE, MetricsLog, ProgressBar, Throughput, profiled, read_metrics

__all__ = ["DivergedError", "Trained", "train"]

logger = logging.getLogger(__name__)

_LAST_SAVE_SECONDS = 60.0
_DROPOUT_STREAM = 4  # keeps these hashes apart from those of other parts that use the same seed


@dataclass
class Trained:
    """What a run leaves behind, besides its files.

    Attributes:
        summary: the content of summary.json.
        verifications: by "pixels", "untrained" and "trained", those that the configuration asks for.
    """

    summary: dict[str, Any]
    verifications: dict[str, Verification]


def train(config: Config, *, signals: StopSignals | None = None) -> Trained:
    """Trains as the configuration says, on all launched ranks, and evaluates; goes on where an earlier start stopped.

    Leaves in `run.directory`: config.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/, loss.png, roc.png and
    summary.json; bad_samples.jsonl and faults/ if there were such.

    Args:
        config: the whole configuration.
        signals: those that tell the run to save and stop; None if nobody listens to them.

    Raises:
        ValueError, OSError: if the configuration, the data or the run directory cannot be used; it says why.
        CheckpointError: if the run has checkpoints but none of them is good, or too many could not be written.
        DivergedError: if the run has diverged.
        SupervisionError: on all ranks, if one has failed, or a signal has told the run to stop.
        RendezvousError: on all ranks, if they do not meet; see `partialfc.distributed.meeting`.
    """
    settings = config.supervision
    signals = signals or StopSignals()  # those who ask it need not know whether anybody listens
    signals.grace_seconds = settings.grace_seconds
    with (
        process_group(
            config.run.device,
            timeout_seconds=settings.collective_timeout_seconds,
            on_refusal=signals.defer,
        ) as (mesh, device),
        Supervisor(
            mesh,
            directory=config.run.directory,
            hang_timeout_seconds=settings.hang_timeout_seconds,
            signals=signals,
        ) as supervisor,
    ):
        inputs = supervisor.together(lambda: open_inputs(config, num_ranks=mesh.size))
        if settings.preflight:
            data = {f"data of {name}": task.index.fingerprint for name, task in inputs.tasks.items()}
            supervisor.preflight(device, facts={**flat_settings(config), **data})
        run = assemble(config, inputs, mesh, device)
        with RunLock(run.directory, mesh=mesh):
            return _train(run, supervisor)


def _train(run: Run, supervisor: Supervisor) -> Trained:
    verifications: dict[str, Verification] = {}
    if run.config.evaluation.at_start and run.verification_index is not None:
        # Before the checkpoint is loaded, so that a resumed run has these figures too.
        with supervisor.phase("evaluation"):
            verifications["pixels"] = _verify(run, nn.Flatten())
            verifications["untrained"] = _verify(run, run.engine.evaluation_backbone())
    supervisor.together(lambda: check_files(run.directory) if run.is_first_rank else None)
    saved_step = resume(run)
    # Not before, so that a run which cannot begin or go on leaves everything as it was.
    write_config(run.config, first_rank=run.is_first_rank)
    saver = Saver(run, saved_step=saved_step)
    with MetricsLog(run.directory, resume_step=run.step + 1, enabled=run.is_first_rank) as metrics:
        try:
            throughput, found = _train_steps(run, metrics, saver, supervisor)
        except Exception:
            # Most errors end all ranks alike, so a save that is under way can be finished. Not all, hence the limit.
            with supervisor.phase("save"):
                run.store.join(timeout_seconds=_LAST_SAVE_SECONDS)
            raise
    if run.verification_index is not None:
        with supervisor.phase("evaluation"):
            verifications["trained"] = found or _verify(run, run.engine.evaluation_backbone())
    return Trained(_summarize(run, throughput, verifications), verifications)


def _train_steps(
    run: Run, metrics: MetricsLog, saver: Saver, supervisor: Supervisor
) -> tuple[Throughput, Verification | None]:
    """(throughput, what a verification after the last step found, if there was one)."""
    batch_size, found = run.global_batch_size, None
    throughput, record = Throughput(), Record(run, metrics)
    with (
        ProgressBar(
            run.total_steps * batch_size,
            description="train",
            unit="images",
            initial=run.step * batch_size,
            enabled=run.is_first_rank and run.step < run.total_steps,
        ) as progress,
        supervisor.steps(),
    ):
        loaders = {name: iter(task_loader(run, task)) for name, task in run.tasks.items()}
        first_step = run.step
        while run.step < run.total_steps:
            supervisor.beat(run.step)
            started = time.perf_counter()
            batches = supervisor.together(lambda: {name: next(loader) for name, loader in loaders.items()})
            waited = time.perf_counter() - started
            if supervisor.stopping:
                _stop(run, record, saver, supervisor)
            loss, outcome = _train_step(run, batches)
            if run.step > first_step:  # the first step warms up
                throughput.add(batch_size, seconds=time.perf_counter() - started, waiting_seconds=waited)
            run.progress.step += 1
            record.step(batches, loss, outcome, throughput)
            progress.update(batch_size, loss=loss, lr=record.learning_rate)
            found = _when_due(run, metrics, record, saver, supervisor)
        record.finish()
    return throughput, found


def _train_step(run: Run, batches: dict[str, Batch]) -> tuple[float, StepOutcome]:
    """(loss, what came of the step), the same on all ranks. A batch for each task."""
    # Dropout is a function of (seed, step, rank): there is no generator state to checkpoint.
    torch.manual_seed(hash64(run.config.run.seed, _DROPOUT_STREAM, run.step, run.mesh.rank))
    for name, task in run.tasks.items():
        run.heads[name].learning_rate = run.learning_rate(task.head.center_optimizer.learning_rate, run.step)
    images = [batch.images.to(run.device, non_blocking=True) for batch in batches.values()]
    labels = {name: batch.labels.to(run.device, non_blocking=True) for name, batch in batches.items()}
    with profiled("backbone forward"):
        embeddings = run.engine.forward(normalize_images(images[0] if len(images) == 1 else torch.cat(images)))
    with profiled("head"):
        loss = run.heads(embeddings, labels)
    with profiled("backward"):
        run.engine.backward(loss)
    with profiled("update"):
        outcome = run.engine.step(learning_rate=run.learning_rate(run.config.optimizer.learning_rate, run.step))
        if run.heads.defers_updates:
            run.heads.finish_update(outcome.updated)
    return float(loss.detach()), outcome


def _when_due(
    run: Run, metrics: MetricsLog, record: Record, saver: Saver, supervisor: Supervisor
) -> Verification | None:
    """Evaluation, whose result it returns, and checkpoint at their intervals; the last step always has a checkpoint."""
    every, found = run.config.evaluation.every_steps, None
    last = run.step == run.total_steps
    wanted = every and (run.step % every == 0 or last) and (not last or run.config.checkpoint.keep_best)
    if run.verification_index is not None and wanted:
        with supervisor.phase("evaluation"):
            found = _verify_and_write(run, metrics)
    if saver.is_due(evaluated=found is not None):
        score = None if found is None else found.result.accuracy
        with supervisor.phase("save"):
            record.settle()
            saver.save_last(score=score) if last else saver.save(score=score)
    else:
        saver.poll()
    return found


def _verify_and_write(run: Run, metrics: MetricsLog) -> Verification:
    verification = _verify(run, run.engine.evaluation_backbone())
    accuracy = verification.result.accuracy
    at_far = verification.result.tar_at_far[verification.far]
    metrics.write(run.step, {"verification_accuracy": accuracy, "verification_tar_at_far": at_far})
    return verification


def _stop(run: Run, record: Record, saver: Saver, supervisor: Supervisor) -> NoReturn:
    """All ranks have agreed to: what is done up to here is saved."""
    with supervisor.phase("save"):
        record.settle()
        try:
            saver.save_last()
        except SaveError as error:
            logger.error("stopping without a checkpoint of step %d: %s", run.step, error)
            raise supervisor.stopped(run.step, saved=False) from error
    raise supervisor.stopped(run.step, saved=True)


def _verify(run: Run, backbone: nn.Module) -> Verification:
    assert run.verification_index is not None
    return verify_backbone(backbone, run.verification_index, run.config, mesh=run.mesh, device=run.device)


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
