"""What a run writes of its steps, and when it gives up."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from partialfc.assembly import Run
from partialfc.bad_samples import BAD_SAMPLES_FILE, BadSamples
from partialfc.data import Batch
from partialfc.engine import StepOutcome
from partialfc.telemetry import METRICS_FILE, TENSORBOARD_DIRECTORY, MetricsLog, Throughput, read_lines

__all__ = ["DivergedError", "Record", "check_files"]

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss or its gradient was not finite for many steps in a row. Raised on all ranks alike.

    Attributes:
        agreed: every rank raises it with the same message, so that one of them need say it.
    """

    agreed = True


def check_files(directory: Path) -> None:
    """Makes sure that what an earlier start of a run has written can be gone on with, before anything is changed.

    Raises:
        ValueError, OSError: if it cannot; it says which file.
    """
    for name in (METRICS_FILE, BAD_SAMPLES_FILE):
        if (directory / name).exists():
            read_lines(directory / name)
    tensorboard = directory / TENSORBOARD_DIRECTORY
    if tensorboard.exists() and not tensorboard.is_dir():
        raise NotADirectoryError(f"{tensorboard} must be a folder, but is a file; move it away")


class Record:
    """The losses and bad samples of a run, written down at intervals, and the decision to give up.

    Args:
        run: the run, at the step from which it goes on.
        metrics: where its numbers go.
    """

    def __init__(self, run: Run, metrics: MetricsLog) -> None:
        self._run, self._metrics = run, metrics
        self._bad_samples = BadSamples(
            run.directory,
            mesh=run.mesh,
            device=run.device,
            max_share=run.config.data.max_bad_share,
            resume_step=run.step + 1,
        )
        self.learning_rate = 0.0

    def step(self, batches: dict[str, Batch], loss: float, outcome: StepOutcome, throughput: Throughput) -> None:
        """After step number `run.step`.

        Raises:
            DivergedError: if too many steps in a row were not finite.
            ValueError: if too many samples could not be used.
        """
        run, progress = self._run, self._run.progress
        for batch in batches.values():
            self._bad_samples.add(run.step, batch.failures)
        # In fp16 an overflow is ordinary, as long as the loss scale can still fall.
        good = math.isfinite(loss) and (outcome.updated or outcome.loss_scale > 1.0)
        progress.skipped_steps = 0 if good else progress.skipped_steps + 1
        if not good:
            self._say_skipped(loss, outcome)
        if progress.skipped_steps >= run.config.supervision.max_skipped_steps:
            self.finish()
        progress.unwritten_losses.append(loss)
        self.learning_rate = run.learning_rate(run.config.optimizer.learning_rate, run.step - 1)
        if run.step % run.config.run.log_every_steps and run.step != run.total_steps:
            return
        self.settle()
        self._metrics.write(
            run.step,
            {
                "loss": sum(progress.unwritten_losses) / len(progress.unwritten_losses),
                "learning_rate": self.learning_rate,
                "gradient_norm": outcome.gradient_norm,
                "images_per_second": throughput.images_per_second,
                "data_waiting_share": throughput.waiting_share,
                "bad_samples": self._bad_samples.counts.total(),
                **({"loss_scale": outcome.loss_scale} if run.config.training.precision == "fp16" else {}),
                **run.heads.diagnostics(),
            },
        )
        progress.unwritten_losses.clear()

    def _say_skipped(self, loss: float, outcome: StepOutcome) -> None:
        run = self._run
        if run.mesh.rank == 0:
            logger.warning(
                "the backbone did not move in step %d, as not all is finite: loss %g, gradient norm %g; %d in a row, "
                "and at supervision.max_skipped_steps=%d the run stops",
                *(run.step, loss, outcome.gradient_norm),
                *(run.progress.skipped_steps, run.config.supervision.max_skipped_steps),
            )

    def settle(self) -> None:
        """Writes down the bad samples up to now: before a save, which is where the run would go on. Collective.

        Raises:
            ValueError: if too many samples could not be used.
        """
        self._bad_samples.settle(self._run.step * self._run.global_batch_size)

    def finish(self) -> None:
        """At the end, or when it is no use going on.

        Raises:
            DivergedError: if the last steps were not finite.
        """
        run = self._run
        if run.progress.skipped_steps:
            raise DivergedError(
                f"loss or gradient was not finite for {run.progress.skipped_steps} steps up to step {run.step}; the "
                f"backbone did not move in them, and the checkpoints in {run.store.directory} are good. Lower the "
                "learning rates, lengthen training.warmup_epochs, or lower the margin's scale"
            )
