"""Checkpoints that are whole or not there.

A checkpoint is a directory `step-00000120/`. It is written as `tmp-...`, which nobody loads, and gets its name by one
rename after every file, and a manifest with the checksum of every file, is on disk. All ranks agree on the outcome of
each stage, so a failure anywhere leaves the earlier checkpoints as they were and raises everywhere.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from partialfc.checkpoint.manifest import FileRecord, Manifest, find_damage, fsync_directory
from partialfc.checkpoint.storage import check_state, read_state, write_state
from partialfc.distributed.mesh import ShardMesh

__all__ = ["CheckpointError", "CheckpointStore"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_COMMITTED_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY_PREFIX = "tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, verified or loaded. Raised on all ranks alike; the message names the rank."""


class CheckpointStore:
    """The checkpoints of one run. Every method is collective: all ranks of the mesh call it together.

    Args:
        directory: where the checkpoints live, seen by all ranks under one path; made at the first save. One run at a
            time may write to it.
        mesh: the ranks that save and load together.
        keep_last: how many committed checkpoints to keep.

    Raises:
        ValueError: if keep_last < 1.
    """

    def __init__(self, directory: str | Path, *, mesh: ShardMesh, keep_last: int = 3) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least 1 checkpoint must be kept")
        self.directory = Path(directory)
        self.mesh = mesh
        self.keep_last = keep_last
        self._known_damaged: set[str] = set()

    def save(self, step: int, state: dict[str, Any], *, metadata: dict[str, Any]) -> Path:
        """Writes a checkpoint and, once it is committed, removes those beyond `keep_last`.

        A committed checkpoint of the same step is replaced, as happens after falling back from a damaged one.

        Args:
            step: the training step, at least 0.
            state: dictionaries, nested and with string keys, of tensors, DTensors and Python values. Values that are
                not DTensors must be equal on all ranks: one rank writes each.
            metadata: JSON values to find in the manifest, such as a hash of the configuration. The store adds "step",
                "world_size" and "torch_version".

        Returns:
            The committed directory.

        Raises:
            CheckpointError: if any rank failed. Nothing of the attempt is left, earlier checkpoints are whole, and a
                later save may succeed.
        """
        what = f"saving step {step}"
        self._agree(what, lambda: _check_request(step, state))
        temporary = self._agree(what, lambda: self._begin(step))[0]
        assert temporary is not None
        try:
            parts = self._agree(f"writing {temporary}", lambda: write_state(temporary, state, self.mesh.group))
            files = {name: record for part in parts for name, record in part.items()}
            facts = {"step": step, "world_size": self.mesh.size, "torch_version": torch.__version__}
            manifest = Manifest(files, {**metadata, **facts})
            self._agree(f"committing {temporary}", lambda: self._commit(temporary, step, manifest))
        except CheckpointError:
            if self.mesh.rank == 0:
                _remove(temporary)
            raise
        if self.mesh.rank == 0:
            self._collect_garbage(step)
        return self._path_of(step)

    def latest(self) -> Path | None:
        """The newest committed checkpoint whose files all match its manifest.

        A damaged one is reported with a warning that names the file, and the next older one is tried.

        Returns:
            Its directory, or None if nothing was ever committed.

        Raises:
            CheckpointError: if there are checkpoints but none is good. To start afresh, move the directory away.
        """
        steps = self._agree(f"listing {self.directory}", self._steps)[0]
        reasons = []
        for step in sorted(steps, reverse=True):
            path = self._path_of(step)
            try:
                self._verify(path)
            except CheckpointError as error:
                self._known_damaged.add(path.name)
                reasons.append(str(error))
                if self.mesh.rank == 0:
                    logger.warning("passing over a damaged checkpoint: %s", error)
            else:
                return path
        if reasons:
            raise CheckpointError(
                f"{self.directory} has {len(reasons)} checkpoints and none is good; restore one, or move the directory "
                "away to start afresh:\n  " + "\n  ".join(reasons)
            )
        return None

    def metadata(self, path: str | Path) -> dict[str, Any]:
        """What was saved beside the state of a committed checkpoint, without reading the state.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        return self._manifest(Path(path), f"reading {path}").metadata

    def load(self, path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
        """Verifies a checkpoint and loads it into `state`, whatever the number of ranks that wrote it.

        Args:
            path: a committed directory, such as `latest()` gives.
            state: laid out as when saved; DTensors may be sharded otherwise, or be whole tensors. Tensors are filled in
                place, other leaves are replaced. Top-level keys may be left out; below them everything must be there.

        Returns:
            The metadata of the checkpoint.

        Raises:
            CheckpointError: if the checkpoint is damaged (`state` is then untouched), or if it does not fit `state` in
                names, shapes or dtypes, or a read fails (`state` may then be filled in part).
        """
        path = Path(path)
        self._agree(f"loading {path}", lambda: check_state(state))
        manifest = self._verify(path)
        self._agree(f"loading {path}", lambda: read_state(path, state, self.mesh.group))
        return manifest.metadata

    def _begin(self, step: int) -> Path | None:
        """Rank 0 makes the directory to write into, and names it."""
        if self.mesh.rank != 0:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync_directory(self.directory.parent)
        # The name is drawn anew for each attempt, so a writer that outlives its run cannot touch a later one.
        temporary = self.directory / f"{_TEMPORARY_PREFIX}{step:08d}-{uuid.uuid4().hex}"
        temporary.mkdir()
        return temporary

    def _commit(self, temporary: Path, step: int, manifest: Manifest) -> None:
        if self.mesh.rank != 0:
            return
        manifest.write(temporary)
        fsync_directory(temporary)
        path = self._path_of(step)
        replaced = path.rename(self._trash_of(path)) if path.exists() else None
        try:
            temporary.rename(path)
            fsync_directory(self.directory)
        except OSError:
            if path.exists():
                path.rename(temporary)
            if replaced is not None:
                replaced.rename(path)
            raise
        self._known_damaged.discard(path.name)

    def _collect_garbage(self, step: int) -> None:
        """Removes what no restart needs: checkpoints older than the last `keep_last`, and what earlier runs left.

        Later steps are there only if they were damaged or the run was set back. They neither count, which could remove
        the last good checkpoint, nor are they removed, since they may be someone's evidence.
        """
        try:
            steps = sorted(number for number in self._steps() if number <= step)
            good = [number for number in steps if self._path_of(number).name not in self._known_damaged]
            for number in steps:
                if number < good[-self.keep_last :][0]:
                    path = self._path_of(number)
                    path.rename(self._trash_of(path))
            for leftover in self.directory.glob(f"{_TEMPORARY_PREFIX}*"):
                _remove(leftover)
        except OSError as error:
            # The new checkpoint is committed; old ones that stay cost only space, and are tried again at the next save.
            logger.warning("could not remove old checkpoints in %s: %s", self.directory, error)

    def _verify(self, path: Path) -> Manifest:
        """Compares all files with the manifest, the work divided over the ranks."""
        what = f"verifying {path}"
        manifest = self._manifest(path, what)
        self._agree(what, lambda: _check_files(path, _share(manifest.files, self.mesh)))
        return manifest

    def _manifest(self, path: Path, what: str) -> Manifest:
        manifest = self._agree(what, lambda: Manifest.read(path) if self.mesh.rank == 0 else None)[0]
        assert manifest is not None
        return manifest

    def _agree(self, what: str, stage: Callable[[], Result]) -> list[Result]:
        """Runs one stage on every rank.

        Returns:
            The results of all ranks, in rank order.

        Raises:
            CheckpointError: on every rank, if the stage failed on any.
        """
        outcome: tuple[Result | None, str | None]
        cause: BaseException | None = None
        try:
            outcome = stage(), None
        except CheckpointException as error:  # derives from BaseException, and would end the process
            cause = error
            failures = error.failures.items()
            outcome = None, "; ".join(f"rank {rank}: {_describe(failure)}" for rank, (failure, _) in failures)
        except Exception as error:
            cause = error
            outcome = None, f"rank {self.mesh.rank}: {_describe(error)}"
        outcomes = [outcome]
        if self.mesh.group is not None:
            outcomes = [outcome] * self.mesh.size
            dist.all_gather_object(outcomes, outcome, group=self.mesh.group)
        # What DCP found out it tells every rank, so the same report may come many times.
        reports = dict.fromkeys(report for _, report in outcomes if report is not None)
        if reports:
            raise CheckpointError(f"{what}: {'; '.join(reports)}") from cause
        return cast(list[Result], [result for result, _ in outcomes])

    def _steps(self) -> list[int]:
        if not self.directory.exists():
            return []
        matches = (_COMMITTED_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return [int(match[1]) for match in matches if match]

    def _path_of(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _trash_of(self, path: Path) -> Path:
        """A name that is not a checkpoint's, so that a removal cut short leaves no half of one."""
        return self.directory / f"{_TEMPORARY_PREFIX}removed-{path.name}-{uuid.uuid4().hex}"


def _check_request(step: int, state: dict[str, Any]) -> None:
    if step < 0:
        raise ValueError(f"step is {step}, but must be at least 0")
    check_state(state)


def _share(files: dict[str, FileRecord], mesh: ShardMesh) -> dict[str, FileRecord]:
    """This rank's files to verify: every `size`-th from the largest down."""
    by_size = sorted(files, key=lambda name: (-files[name].size_bytes, name))
    return {name: files[name] for name in by_size[mesh.rank :: mesh.size]}


def _check_files(path: Path, files: dict[str, FileRecord]) -> None:
    if damage := find_damage(path, files):
        raise ValueError(damage)


def _describe(error: BaseException) -> str:
    # A ValueError is written for the user; of others the type says as much as the text.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("could not remove %s: %s", directory, error)
