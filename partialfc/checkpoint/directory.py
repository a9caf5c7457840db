"""The names in the directory of a run's checkpoints: what is committed, under way, or to be removed."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import uuid
from pathlib import Path

from partialfc.checkpoint.file_system import check_room, explained
from partialfc.checkpoint.manifest import Manifest, ManifestError, fsync_directory

__all__ = ["CheckpointDirectory", "step_of"]

logger = logging.getLogger(__name__)

_COMMITTED_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY_PREFIX = "tmp-"
_REPLACED_PREFIX = "tmp-replaced-"
_LEFTOVER_NAME = re.compile(r"tmp-(\d{8,}-[0-9a-f]{32}|removed-step-\d{8,}-[0-9a-f]{32}|replaced-step-\d{8,})")


def step_of(path: Path) -> int | None:
    """The step of a committed checkpoint, by its name; None if it has not the name of one."""
    match = _COMMITTED_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


class CheckpointDirectory:
    """Committed checkpoints are `step-00000120/`; what is called `tmp-...` nobody loads. One process writes here.

    Args:
        path: made at the first save.
        keep_last: how many committed checkpoints to keep.
        keep_best: whether to keep the one with the best score besides.

    Attributes:
        damaged: names of checkpoints that were found to be.
    """

    def __init__(self, path: Path, *, keep_last: int, keep_best: bool) -> None:
        self.path, self.keep_last, self.keep_best = path, keep_last, keep_best
        self.damaged: set[str] = set()

    def steps(self) -> list[int]:
        """Of the committed checkpoints, ascending.

        Raises:
            OSError: if the directory cannot be listed.
        """
        return sorted(step for step in map(step_of, self._entries()) if step is not None)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.path / f"step-{step:08d}"

    def scores(self) -> dict[int, float]:
        """By step, of those committed checkpoints that have one.

        Raises:
            OSError: if the directory cannot be listed.
        """
        found = {}
        for step in self.steps():
            manifest = self._manifest_of(step)
            score = None if manifest is None else manifest.metadata.get("score")
            if isinstance(score, int | float) and math.isfinite(score):
                found[step] = float(score)
        return found

    def begin(self, step: int) -> Path:
        """Makes a directory to write into.

        Raises:
            OSError: if it cannot be made, or the file system has less room than the newest checkpoint takes.
        """
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            fsync_directory(self.path.parent)
            # The name is drawn anew for each attempt, so a writer that outlives its run cannot touch a later one.
            temporary = self.path / f"{_TEMPORARY_PREFIX}{step:08d}-{uuid.uuid4().hex}"
            temporary.mkdir()
        try:
            steps = self.steps()
            newest = self._manifest_of(steps[-1]) if steps else None
            if newest is not None:
                check_room(self.path, newest.total_bytes)
        except OSError:
            remove(temporary)
            raise
        return temporary

    def commit(self, temporary: Path, step: int, manifest: Manifest) -> None:
        """Gives what was written its name, by one rename once everything is on disk.

        A committed checkpoint of the same step is replaced.
        """
        with explained(self.path):
            manifest.write(temporary)
            fsync_directory(temporary)
            path = self.path_of(step)
            replaced = path.rename(self.path / f"{_REPLACED_PREFIX}{path.name}") if os.path.lexists(path) else None
            try:
                temporary.rename(path)
                fsync_directory(self.path)
            except OSError:
                if os.path.lexists(path):
                    path.rename(temporary)
                if replaced is not None:
                    replaced.rename(path)
                raise
        self.damaged.discard(path.name)

    def collect_garbage(self, step: int) -> None:
        """Removes what no restart needs: all but the last `keep_last` and the best, and what earlier runs left.

        Later steps are there only if they were damaged or the run was set back. They neither count, which could remove
        the last good checkpoint, nor are they removed, since they may be someone's evidence.
        """
        try:
            steps = [number for number in self.steps() if number <= step]
            good = [number for number in steps if self.path_of(number).name not in self.damaged]
            kept = set(good[-self.keep_last :])
            best = self._best_of(good) if self.keep_best else None
            for number in steps:
                if kept and number < min(kept) and number != best:
                    path = self.path_of(number)
                    path.rename(self._trash_of(path))
            for leftover in filter(_is_leftover, self._entries()):
                remove(leftover)
        except OSError as error:
            # The new checkpoint is committed; old ones that stay cost only space, and are tried again at the next save.
            logger.warning("could not remove old checkpoints in %s: %s", self.path, error)

    def put_back(self) -> None:
        """Gives a checkpoint its name again that was to be replaced by a process that was killed just then.

        Raises:
            OSError: if the directory cannot be listed, or the name not be given.
        """
        for replaced in filter(_is_leftover, self._entries()):
            path = self.path / replaced.name.removeprefix(_REPLACED_PREFIX)
            if path.name != replaced.name and not os.path.lexists(path):
                replaced.rename(path)

    def _entries(self) -> list[Path]:
        """All that is here; nothing before the first save.

        Raises:
            OSError: if it cannot be listed, or is a link to what is not there: a file system that is not mounted, say.
        """
        try:
            # `exists` and `glob` take a server that does not answer for that, depending on the version of Python.
            return list(self.path.iterdir())
        except FileNotFoundError as error:
            if self.path.is_symlink():
                text = (
                    f"{self.path} is a link to {self.path.readlink()}, which is not there: mount it, or mend the link"
                )
                raise FileNotFoundError(error.errno, text) from error
            return []

    def _best_of(self, steps: list[int]) -> int | None:
        scores = {step: score for step, score in self.scores().items() if step in steps}
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def _manifest_of(self, step: int) -> Manifest | None:
        try:
            return Manifest.read(self.path_of(step))
        except ManifestError:
            return None

    def _trash_of(self, path: Path) -> Path:
        """A name that is not a checkpoint's, so that a removal cut short leaves no half of one."""
        return self.path / f"{_TEMPORARY_PREFIX}removed-{path.name}-{uuid.uuid4().hex}"


def _is_leftover(path: Path) -> bool:
    """Whether this store has made it: others may keep something here too."""
    return _LEFTOVER_NAME.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    """Removes a directory, or what was in the place of one: a file, or a link but not what it points to.

    If it stays, that is said and no error.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)
