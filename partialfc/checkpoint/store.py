"""Checkpoints that are whole or not there.

A checkpoint is a directory `step-00000120/`. It is written as `tmp-...`, which nobody loads, and gets its name by one
rename after every file, and a manifest with the checksum of every file, is on disk. All ranks agree on the outcome of
each stage, so a failure anywhere leaves the earlier checkpoints as they were and raises everywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from partialfc.checkpoint.agreement import CheckpointError, agree
from partialfc.checkpoint.background import BackgroundSave
from partialfc.checkpoint.directory import CheckpointDirectory, remove
from partialfc.checkpoint.manifest import Manifest, json_copy
from partialfc.checkpoint.parts import FlatState, flatten
from partialfc.checkpoint.staging import Staging
from partialfc.checkpoint.storage import check_state, read_state, write_state
from partialfc.checkpoint.verifying import check_files
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.trail import TRAIL

__all__ = ["CheckpointStore"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class CheckpointStore:
    """The checkpoints of one run. Every method is collective: all ranks of the mesh call it together.

    Args:
        directory: where the checkpoints live, seen by all ranks under one path; made at the first save. One run at a
            time may write to it.
        mesh: the ranks that save and load together.
        keep_last: how many committed checkpoints to keep.
        keep_best: whether to keep the one with the best score besides.

    Raises:
        ValueError: if keep_last < 1.
    """

    def __init__(self, directory: str | Path, *, mesh: ShardMesh, keep_last: int = 3, keep_best: bool = False) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least 1 checkpoint must be kept")
        self.mesh = mesh
        self._directory = CheckpointDirectory(Path(directory), keep_last=keep_last, keep_best=keep_best)
        self._background, self._staging = BackgroundSave(mesh), Staging()

    @property
    def directory(self) -> Path:
        """Where the checkpoints live."""
        return self._directory.path

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        metadata: dict[str, Any],
        score: float | None = None,
        blocking: bool = True,
    ) -> Path:
        """Writes a checkpoint and, once it is committed, removes those that are not to be kept.

        A committed checkpoint of the same step is replaced, as happens after falling back from a damaged one.

        Args:
            step: the training step, at least 0.
            state: dictionaries, nested and with string keys, of tensors, DTensors and Python values. Values that are
                not DTensors must be equal on all ranks: one rank writes each.
            metadata: JSON values to find in the manifest, such as a hash of the configuration. The store adds "step",
                "score", "world_size" and "torch_version".
            score: how good the model is, more being better; equal on all ranks. One that is not finite is none.
            blocking: False copies the state to host memory and leaves the rest to a thread; `poll` and `wait` tell how
                it ended. A save that is still under way is waited for first. The mesh must be of all ranks of the job.

        Returns:
            The committed directory; if not blocking, where it will be.

        Raises:
            CheckpointError: if any rank failed. Nothing of the attempt is left, earlier checkpoints are whole, and a
                later save may succeed. Or if the save that was under way failed; then this one has not begun.
        """
        self.wait()
        what = f"saving step {step}"
        taken: list[tuple[FlatState, dict[str, Any]]] = []

        def take() -> None:
            _check_request(step, state)
            facts = {"step": step, "world_size": self.mesh.size, "torch_version": torch.__version__}
            facts["score"] = float(score) if score is not None and math.isfinite(score) else None
            flat = flatten(state)
            taken.append((flat if blocking else self._staging.copy(flat), json_copy({**metadata, **facts})))

        self._agree(what, take)
        flat, facts = taken[0]
        if blocking:
            TRAIL.note("writing a checkpoint")
            self._write(step, flat, facts, self.mesh)
        else:
            self._background.start(what, lambda mesh: self._write(step, flat, facts, mesh))
        return self._directory.path_of(step)

    def wait(self) -> None:
        """Waits for a save that is under way.

        Raises:
            CheckpointError: if it failed. It is told once.
        """
        TRAIL.note("waiting for a checkpoint")
        self._background.report()

    def poll(self) -> None:
        """As `wait` if the save has ended on all ranks, and nothing otherwise: to be called often."""
        if self._background.is_over():
            self._background.report()

    def join(self, *, timeout_seconds: float) -> None:
        """Waits for a save that is under way, but not for ever, and whatever becomes of it. Not collective."""
        self._background.join(timeout_seconds)

    def latest(self) -> Path | None:
        """The newest committed checkpoint whose files all match its manifest.

        A damaged one is reported with a warning that names the file, and the next older one is tried.

        Returns:
            Its directory, or None if nothing was ever committed.

        Raises:
            CheckpointError: if there are checkpoints but none is good. To start afresh, move the directory away.
        """
        self._background.join()
        steps = self._agree(f"listing {self.directory}", self._directory.steps)[0]
        good, reasons = self._first_good(reversed(steps))
        if good is None and reasons:
            raise CheckpointError(
                f"{self.directory} has {len(reasons)} checkpoints and none is good; restore one, or move the directory "
                "away to start afresh:\n  " + "\n  ".join(str(reason).replace("\n", "\n    ") for reason in reasons),
                passing=any(reason.passing for reason in reasons),  # one that can be read is enough
            )
        return good

    def best(self) -> Path | None:
        """The committed checkpoint of the best score whose files all match its manifest; the newer one of equals.

        Returns:
            Its directory, or None if no good one has a score.
        """
        self._background.join()
        scores = self._agree(f"listing {self.directory}", self._directory.scores)[0]
        return self._first_good(sorted(scores, key=lambda step: (scores[step], step), reverse=True))[0]

    def metadata(self, path: str | Path) -> dict[str, Any]:
        """What was saved beside the state of a committed checkpoint, without reading the state.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        return self._manifest(Path(path), f"reading {path}").metadata

    def load(self, path: str | Path, state: dict[str, Any], *, verified: bool = False) -> dict[str, Any]:
        """Verifies a checkpoint and loads it into `state`, whatever the number of ranks that wrote it.

        Args:
            path: a committed directory, such as `latest()` gives.
            state: laid out as when saved; DTensors may be sharded otherwise, or be whole tensors. Tensors are filled in
                place, other leaves are replaced. Top-level keys may be left out; below them everything must be there.
            verified: whether `latest()` or `best()` has just given this path, so that its bytes are not compared once
                more, which for a large one takes minutes. What was damaged since is then loaded, if it can be read.

        Returns:
            The metadata of the checkpoint.

        Raises:
            CheckpointError: if the checkpoint is damaged, or does not fit the `state` of any rank in names, shapes or
                dtypes; `state` is then untouched on all. Or if a file that was good a moment ago cannot be read any
                more; then `state` may be filled in part.
        """
        path = Path(path)
        self._background.join()
        self._agree(f"loading {path}", lambda: check_state(state))
        manifest = self._manifest(path, f"reading {path}") if verified else self._verify(path)
        self._agree(f"loading {path}", lambda: read_state(path, state, self.mesh.group))
        return manifest.metadata

    def put_back(self) -> None:
        """Restores what a save was replacing when it was killed. To be called by the run that may write here.

        Raises:
            CheckpointError: if it cannot be renamed.
        """
        self._agree(f"restoring {self.directory}", lambda: self._directory.put_back() if self.mesh.rank == 0 else None)

    def collect_garbage(self, step: int) -> None:
        """Removes what a restart from `step` does not need: what a save does at its end, if it gets that far.

        A run that is killed in a save leaves a part of one, which takes room; and there may be no later save. To be
        called before the first save, and only by the run that may write here.
        """
        if self.mesh.rank == 0:
            self._directory.collect_garbage(step)

    def _write(self, step: int, state: FlatState, metadata: dict[str, Any], mesh: ShardMesh) -> None:
        """From nothing to a committed checkpoint, over the ranks of `mesh`; also in the thread."""
        directory, first = self._directory, mesh.rank == 0
        temporary = agree(f"saving step {step}", lambda: directory.begin(step) if first else None, mesh)[0]
        assert temporary is not None
        try:
            parts = agree(f"writing {temporary}", lambda: write_state(temporary, state, mesh.group), mesh)
            manifest = Manifest({name: record for part in parts for name, record in part.items()}, metadata)
            what = f"committing {temporary}"
            agree(what, lambda: directory.commit(temporary, step, manifest) if first else None, mesh)
        except CheckpointError:
            if first:
                remove(temporary)
            raise
        if first:
            directory.collect_garbage(step)

    def _first_good(self, steps: Iterable[int]) -> tuple[Path | None, list[CheckpointError]]:
        """The first that can be verified, and what is wrong with those before it."""
        reasons: list[CheckpointError] = []
        for step in steps:
            path = self._directory.path_of(step)
            try:
                self._verify(path)
            except CheckpointError as error:
                self._directory.damaged.add(path.name)
                reasons.append(error)
                if self.mesh.rank == 0:
                    logger.warning("passing over a damaged checkpoint: %s", error)
            else:
                return path, reasons
        return None, reasons

    def _verify(self, path: Path) -> Manifest:
        """Compares all files with the manifest, the work divided over the ranks."""
        what = f"verifying {path}"
        manifest = self._manifest(path, what)
        self._agree(what, lambda: check_files(path, manifest.files, mesh=self.mesh))
        return manifest

    def _manifest(self, path: Path, what: str) -> Manifest:
        manifest = self._agree(what, lambda: Manifest.read(path) if self.mesh.rank == 0 else None)[0]
        assert manifest is not None
        return manifest

    def _agree(self, what: str, stage: Callable[[], Result]) -> list[Result]:
        TRAIL.note("agreeing on a checkpoint")
        return agree(what, stage, self.mesh)


def _check_request(step: int, state: dict[str, Any]) -> None:
    if step < 0:
        raise ValueError(f"step is {step}, but must be at least 0")
    check_state(state)
