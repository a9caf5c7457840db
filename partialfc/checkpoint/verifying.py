"""The files of a checkpoint read and compared with their records, by all ranks together."""

from __future__ import annotations

import time
from pathlib import Path

from partialfc.checkpoint.manifest import FileRecord, find_damage
from partialfc.distributed.collectives import max_over_ranks
from partialfc.distributed.mesh import ShardMesh
from partialfc.telemetry import ProgressBar

__all__ = ["check_files"]

_ROUND_SECONDS = 10.0
_LONG_BYTES = 2**30  # from here on a rank's share takes a second or more, and progress is shown


def check_files(path: Path, files: dict[str, FileRecord], mesh: ShardMesh) -> None:
    """Compares files with their records, each rank a share of them. Collective.

    It may take as long as it takes: ranks whose share is small (one file may hold nearly everything) hear from the
    others before a collective would time out.

    Args:
        path: where the files are.
        files: records by name.
        mesh: the ranks.

    Raises:
        ValueError: on the rank that finds a difference, naming the file.
    """
    share = _share(files, mesh)
    rounds, total = _Rounds(mesh), sum(record.size_bytes for record in share.values())
    shown = mesh.rank == 0 and total >= _LONG_BYTES
    with ProgressBar(total, description="verify the checkpoint", unit="bytes", enabled=shown) as bar:

        def on_bytes(count: int) -> None:
            bar.update(count)
            rounds.working()

        try:
            damage = find_damage(path, share, on_bytes=on_bytes)
        finally:
            rounds.finish()
    if damage is not None:
        raise ValueError(damage)


class _Rounds:
    """Ranks that work, and those that have ended, meet every few seconds until all have ended."""

    def __init__(self, mesh: ShardMesh) -> None:
        self._mesh = mesh
        self._next = time.monotonic() + _ROUND_SECONDS

    def working(self) -> None:
        """To be called often."""
        if time.monotonic() >= self._next:
            self._meet(1)
            self._next = time.monotonic() + _ROUND_SECONDS

    def finish(self) -> None:
        """This rank has ended. Returns when all have."""
        while self._meet(0):
            pass

    def _meet(self, working: int) -> int:
        return max_over_ranks([working], self._mesh, what="who still verifies")[0]


def _share(files: dict[str, FileRecord], mesh: ShardMesh) -> dict[str, FileRecord]:
    """This rank's files: every `size`-th from the largest down."""
    by_size = sorted(files, key=lambda name: (-files[name].size_bytes, name))
    return {name: files[name] for name in by_size[mesh.rank :: mesh.size]}
