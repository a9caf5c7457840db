"""The files of a checkpoint read and compared with their records, by all ranks together."""

from __future__ import annotations

from pathlib import Path

from partialfc.checkpoint.manifest import FileRecord, compare
from partialfc.checkpoint.rounds import Rounds
from partialfc.distributed.mesh import ShardMesh
from partialfc.telemetry import ProgressBar

__all__ = ["check_files"]

_LONG_BYTES = 2**30  # from here on a rank's share takes a second or more, and progress is shown


def check_files(path: Path, files: dict[str, FileRecord], *, mesh: ShardMesh) -> None:
    """Compares files with their records, each rank a share of them. Collective.

    It may take as long as it takes: ranks whose share is small (one file may hold nearly everything) hear from the
    others before a collective would time out.

    Args:
        path: where the files are.
        files: records by name.
        mesh: the ranks.

    Raises:
        DamageError: on the rank that finds a difference, naming the file; there alone, after all have ended.
    """
    share = _share(files, mesh)
    rounds, total = Rounds(mesh, what="who still verifies"), sum(record.size_bytes for record in share.values())
    shown = mesh.rank == 0 and total >= _LONG_BYTES
    with ProgressBar(total, description="verify the checkpoint", unit="bytes", enabled=shown) as bar:

        def on_bytes(count: int) -> None:
            bar.update(count)
            rounds.working()

        try:
            compare(path, share, on_bytes=on_bytes)
        finally:
            rounds.finish()


def _share(files: dict[str, FileRecord], mesh: ShardMesh) -> dict[str, FileRecord]:
    """This rank's files: every `size`-th from the largest down."""
    by_size = sorted(files, key=lambda name: (-files[name].size_bytes, name))
    return {name: files[name] for name in by_size[mesh.rank :: mesh.size]}
