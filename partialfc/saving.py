"""What of a run is saved, when, what becomes of saves that fail, and how a run goes on from a checkpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from partialfc.assembly import Progress, Run
from partialfc.checkpoint import CheckpointError
from partialfc.config import flat_settings
from partialfc.telemetry import METRICS_FILE

__all__ = ["SaveError", "Saver", "resume"]

logger = logging.getLogger(__name__)

# A run may be given these, or do without, when it goes on.
_OPTIONAL_SECTIONS = ("ema", "loss_scale")

# Settings of these decide of which tensors a state is made.
_SECTIONS_OF_STATE = ("backbone", "head", "tasks", "optimizer", "engine")


class SaveError(CheckpointError):
    """Too many saves have failed. Earlier checkpoints are good; when the storage is well again, the run can go on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, passing=True)


def _facts(run: Run) -> dict[str, Any]:
    """What must be the same when a run goes on: with another value the checkpoint means something else."""
    facts: dict[str, Any] = {
        "seed": run.config.run.seed,
        "tasks": list(run.tasks),
        "backbone_optimizer": run.config.optimizer.name,
    }
    for name, task in run.tasks.items():
        prefix, head = "" if name == "main" else f"{name}/", run.heads[name]
        task_facts = {
            "global_batch_size": task.global_batch_size,
            "num_classes": head.partition.num_classes,
            "data_fingerprint": task.index.fingerprint,
            "data_order": task.data.order,
            # A margin that remembers nothing may be exchanged for another one of that kind.
            "margin_with_memory": type(head.margin).__name__ if head.margin_remembers else None,
            "num_subcenters": task.head.num_subcenters,
            "auxiliaries": [type(term).__name__ for term in task.head.auxiliaries],
            "variational": task.head.variational is not None,
            "center_optimizer": type(task.head.center_optimizer).__name__,
            "center_storage": head.class_centers.storage,
        }
        facts |= {f"{prefix}{key}": value for key, value in task_facts.items()}
    return facts


def _state(run: Run) -> dict[str, Any]:
    """Everything that changes in a run. Collective."""
    # Text, since the number of losses that are not written yet differs from save to save.
    progress = json.dumps(asdict(run.progress))
    return {**run.engine.state_dict(), "head": run.heads.state_dict(), "progress": {"state": progress}}


def resume(run: Run) -> int | None:
    """Goes on from the newest good checkpoint, if there is one. Collective.

    Returns:
        The step of that checkpoint.

    Raises:
        ValueError: if the checkpoint is that of another run, or past the end of this one.
        CheckpointError: if there are checkpoints, but none that can be loaded.
    """
    run.store.put_back()
    path = run.store.latest()
    if path is not None:
        _go_on_from(path, run)
    elif run.is_first_rank and (run.directory / METRICS_FILE).exists():
        logger.warning(
            "%s has metrics, but %s no checkpoint: the run begins anew and writes over them",
            run.directory,
            run.store.directory,
        )
    run.store.collect_garbage(run.step)
    return None if path is None else run.step


def _go_on_from(path: Path, run: Run) -> None:
    metadata = run.store.metadata(path)
    _check_facts(run, path, metadata)
    state = _state(run)
    for name in _OPTIONAL_SECTIONS:
        if name not in metadata["sections"]:
            state.pop(name, None)
    try:
        run.store.load(path, state, verified=True)
    except CheckpointError as error:
        suspects = _changes_of_state(run, metadata)
        if error.passing or not suspects:
            raise
        text = (
            f"{error}\nsince it was saved, {', '.join(suspects)}; give the run the old value, or another run.directory"
        )
        raise CheckpointError(text) from error
    progress = Progress(**json.loads(state["progress"]["state"]))
    if progress.step > run.total_steps:
        raise ValueError(
            f"{path} is at step {progress.step}, but training.epochs={run.config.training.epochs:g} ends at step "
            f"{run.total_steps}; train for longer, or choose another run.directory"
        )
    run.engine.load_state_dict(state)
    run.heads.load_state_dict(state["head"])
    run.progress = progress
    if run.is_first_rank:
        finished = ": the run is finished" if run.step == run.total_steps else ""
        logger.info("going on from %s, step %d of %d%s", path, run.step, run.total_steps, finished)
        for name, (old, new) in _changed_settings(run, metadata).items():
            logger.warning("%s was %s when the run was saved, and is %s from here on", name, old, new)


def _changes_of_state(run: Run, metadata: dict[str, Any]) -> list[str]:
    """The changed settings of which one may be why a checkpoint does not fit, in words."""
    return [
        f"{name} was {old} and is {new}"
        for name, (old, new) in _changed_settings(run, metadata).items()
        if name.partition(".")[0] in _SECTIONS_OF_STATE or name == "data.image_size"
    ]


def _check_facts(run: Run, path: Path, metadata: dict[str, Any]) -> None:
    for name, value in _facts(run).items():
        if metadata.get(name) != value:
            raise ValueError(
                f"{path} was saved with {name} {metadata.get(name)!r}, but this run has {value!r}; "
                "give the run the old value, or another run.directory"
            )


def _changed_settings(run: Run, metadata: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By dotted path, (when saved, now): a run may go on with other settings, but not without a word."""
    old, new = metadata["settings"], json.loads(json.dumps(flat_settings(run.config)))
    old["run.directory"] = new["run.directory"]  # a run may be moved
    return {
        name: (old.get(name, "not set"), new.get(name, "not set"))
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name, "not set") != new.get(name, "not set")
    }


class Saver:
    """Saves a run at its intervals. Collective, as is the store beneath.

    A save that fails leaves earlier checkpoints as they were, and the run goes on without it. Only the last save, and
    too many failures in a row end the run.

    Args:
        run: the run.
        saved_step: of the checkpoint from which it goes on; None if it begins.
    """

    def __init__(self, run: Run, *, saved_step: int | None) -> None:
        self._run = run
        self._saved_step, self._step_under_way = saved_step, saved_step
        self._failures = 0

    def is_due(self, *, evaluated: bool) -> bool:
        """Whether the run is to be saved after the present step, in which it was evaluated or not."""
        settings, step = self._run.config.checkpoint, self._run.step
        at_interval = settings.every_steps is not None and step % settings.every_steps == 0
        return at_interval or step == self._run.total_steps or (settings.keep_best and evaluated)

    def save(self, *, score: float | None = None) -> None:
        """Saves the run as it is now; training may go on while the copy is written.

        Args:
            score: how good it is; among checkpoints that have one the best is kept.

        Raises:
            SaveError: if too many saves in a row have failed.
        """
        self.wait()
        try:
            self._begin(score, blocking=not self._run.config.checkpoint.asynchronous)
        except CheckpointError as error:
            self._note_failure(error)

    def save_last(self, *, score: float | None = None) -> None:
        """Makes sure that the run is saved as it is now.

        Raises:
            SaveError: if it cannot be.
        """
        self.wait()
        # A second save of the same step would put one without a score in the place of one that has it.
        if self._saved_step == self._run.step:
            return
        try:
            self._begin(score, blocking=True)
        except CheckpointError as error:
            raise SaveError(str(error)) from error

    def wait(self) -> None:
        """Until no save is under way.

        Raises:
            SaveError: if too many saves in a row have failed.
        """
        try:
            self._run.store.wait()
        except CheckpointError as error:
            self._note_failure(error)
        else:
            self._note_success()

    def poll(self) -> None:
        """Once a step: takes notice of a save that has failed meanwhile.

        Raises:
            SaveError: if too many saves in a row have failed.
        """
        try:
            self._run.store.poll()
        except CheckpointError as error:
            self._note_failure(error)

    def _begin(self, score: float | None, *, blocking: bool) -> None:
        run = self._run
        state = _state(run)
        metadata = {**_facts(run), "sections": list(state), "settings": flat_settings(run.config)}
        run.store.save(run.step, state, metadata=metadata, score=score, blocking=blocking)
        self._step_under_way = run.step
        if blocking:
            self._note_success()

    def _note_success(self) -> None:
        if self._saved_step != self._step_under_way:
            self._saved_step, self._failures = self._step_under_way, 0

    def _note_failure(self, error: CheckpointError) -> None:
        self._step_under_way = self._saved_step
        self._failures += 1
        allowed = self._run.config.checkpoint.max_failures
        if self._failures >= allowed:
            raise SaveError(f"{self._failures} saves in a row have failed, the last of them: {error}") from error
        if self._run.is_first_rank:
            logger.warning(
                "save %d in a row has failed; at checkpoint.max_failures=%d the run stops: %s",
                self._failures,
                allowed,
                error,
            )
