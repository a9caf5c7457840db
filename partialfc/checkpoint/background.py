"""A thread that writes a checkpoint while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch.distributed as dist

from partialfc.checkpoint.agreement import CheckpointError, agree
from partialfc.distributed.collectives import max_over_ranks
from partialfc.distributed.mesh import ShardMesh

__all__ = ["BackgroundSave"]


class BackgroundSave:
    """The save under way, of which there is one at most. The same on all ranks, which start and end each together.

    Its ranks agree over a group of their own: collectives of two threads over one group could come in another order on
    each rank. A process that ends otherwise than by a signal waits for the thread.

    Args:
        mesh: the ranks that save together: all of the job.
    """

    def __init__(self, mesh: ShardMesh) -> None:
        self._mesh = mesh
        self._own_mesh: ShardMesh | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: tuple[str, Future[object]] | None = None

    def start(self, what: str, write: Callable[[ShardMesh], object]) -> None:
        """Begins. Collective.

        Args:
            what: what is done, for messages.
            write: all of it; is given the mesh to communicate over.
        """
        assert self._under_way is None
        if self._own_mesh is None:
            self._own_mesh = _mesh_of_its_own(self._mesh)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        mesh, thread = self._own_mesh, self._thread
        assert thread is not None
        self._under_way = what, thread.submit(write, mesh)

    def is_over(self) -> bool:
        """Whether there is one that has ended on all ranks, and has not been reported. Collective if there is one."""
        if self._under_way is None:
            return False
        busy = not self._under_way[1].done()
        return not max_over_ranks([int(busy)], self._mesh, what="whether a checkpoint is being written")[0]

    def join(self, timeout_seconds: float | None = None) -> None:
        """Waits until nothing is under way, or for so long; how it ended remains to be reported. Not collective."""
        if self._under_way is not None:
            wait([self._under_way[1]], timeout_seconds)

    def report(self) -> None:
        """Waits, and tells how it ended, once. Collective.

        Raises:
            CheckpointError: if it failed on any rank.
        """
        if self._under_way is None:
            return
        (what, future), self._under_way = self._under_way, None
        # What the threads have agreed on all ranks know; but a thread may also have ended by itself.
        outcomes = agree(what, lambda: _agreed_failure(future), self._mesh)
        failure = next((outcome for outcome in outcomes if outcome is not None), None)
        if failure is not None:
            raise CheckpointError(str(failure), passing=failure.passing) from future.exception()


def _agreed_failure(future: Future[object]) -> CheckpointError | None:
    error = future.exception()
    if error is None or isinstance(error, CheckpointError):
        return error
    raise error


def _mesh_of_its_own(mesh: ShardMesh) -> ShardMesh:
    if mesh.group is None:
        return mesh
    # Groups of some ranks are named by how many groups each rank has: where that differs, they never find each other.
    assert mesh.size == dist.get_world_size(), "a save in the background takes all ranks of the job"
    return ShardMesh.from_group(dist.new_group(backend="gloo"))
