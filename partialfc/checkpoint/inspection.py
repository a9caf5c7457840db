"""What there is of checkpoints, found out by one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.checkpoint.directory import step_of
from partialfc.checkpoint.manifest import MANIFEST_NAME, DamageError, Manifest, ManifestError, compare

__all__ = ["CheckpointSummary", "find_checkpoints", "summarize"]

_FOLDER = "checkpoints"


@dataclass(frozen=True)
class CheckpointSummary:
    """One committed checkpoint.

    Attributes:
        path: its directory.
        step: of training.
        total_bytes: of its files.
        metadata: what was saved beside the state; empty if the manifest cannot be read.
        damage: what is wrong with it, naming the file; None if nothing was found.
    """

    path: Path
    step: int
    total_bytes: int
    metadata: dict[str, Any]
    damage: str | None


def find_checkpoints(path: Path) -> list[Path]:
    """The committed checkpoints at a place, the newest last.

    Args:
        path: of a run, of its checkpoints, or of one of them.

    Raises:
        ValueError: if it is none of these, or there is none.
    """
    if step_of(path.absolute()) is None and step_of(path.resolve()) is not None:
        path = path.resolve()  # a link such as `latest`
    if step_of(path.absolute()) is not None and path.is_dir():
        return [path]
    folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
    found = [entry for entry in folder.iterdir() if step_of(entry) is not None] if folder.is_dir() else []
    if not found:
        raise ValueError(
            f"{path} has no checkpoints; give the run.directory of a training, its folder of checkpoints, or one of "
            "them, such as runs/quickstart/checkpoints/step-00000500"
        )
    return sorted(found, key=lambda entry: step_of(entry) or 0)


def summarize(path: Path, *, contents: bool, on_bytes: Callable[[int], None] = lambda count: None) -> CheckpointSummary:
    """Looks at a committed checkpoint.

    Args:
        path: its directory.
        contents: whether to read all files and compare their checksums; else their sizes are compared, and what is
            small is read.
        on_bytes: called with the number of bytes read, as they are.
    """
    step = step_of(path.absolute())
    assert step is not None
    try:
        manifest = Manifest.read(path)
    except ManifestError as error:
        return CheckpointSummary(path, step, _bytes_in(path), {}, str(error))
    damage = None
    try:
        compare(path, manifest.files, contents=contents, on_bytes=on_bytes)
        if not contents:
            compare(path, {name: record for name, record in manifest.files.items() if name == ".metadata"})
    except DamageError as error:
        damage = str(error)
    return CheckpointSummary(path, step, manifest.total_bytes, manifest.metadata, damage)


def _bytes_in(path: Path) -> int:
    """The size of the files of a directory but its manifest, as far as there is such a directory with files."""
    total = 0
    with suppress(OSError):
        for file in path.iterdir():
            with suppress(OSError):
                total += file.stat().st_size if file.name != MANIFEST_NAME else 0
    return total
