"""Saving and restoring a run."""

from partialfc.checkpoint.store import CheckpointError, CheckpointStore

__all__ = ["CheckpointError", "CheckpointStore"]
