"""Saving and restoring a run."""

from partialfc.checkpoint.agreement import CheckpointError
from partialfc.checkpoint.lock import RunLock, RunLockedError
from partialfc.checkpoint.store import CheckpointStore

__all__ = ["CheckpointError", "CheckpointStore", "RunLock", "RunLockedError"]
