"""How `torch.distributed.checkpoint` (DCP) writes and reads a directory, without what it would let pass."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from partialfc.checkpoint.file_system import explained
from partialfc.checkpoint.manifest import FileRecord
from partialfc.checkpoint.parts import FlatState, PartPlanner

__all__ = ["check_state", "read_state", "write_parts", "write_state"]


def write_state(directory: Path, state: FlatState, group: dist.ProcessGroup | None) -> dict[str, FileRecord]:
    """Writes this rank's part of a state into an empty directory, durably.

    Returns:
        The files that this rank wrote, with checksums taken as the bytes passed by: what a disk loses later differs.
    """
    if group is None:
        return write_parts(directory, [state])
    if not dist.is_initialized():
        # DCP would take that for a process on its own, and each rank would write for itself.
        raise RuntimeError("the process group has ended")
    writer, file_system = _open_writer(directory)
    planner = PartPlanner(state.paths)
    dcp.save(dict(state.values), storage_writer=writer, planner=planner, process_group=group)
    return file_system.records


def write_parts(
    directory: Path, states: list[FlatState], on_file: Callable[[], None] = lambda: None
) -> dict[str, FileRecord]:
    """Writes alone what several ranks would write together, one file after the other.

    Args:
        directory: an empty one.
        states: of each rank.
        on_file: called after each file.

    Returns:
        All files.
    """
    writer, file_system = _open_writer(directory)
    writer.set_up_storage_writer(True)
    planners = [PartPlanner(state.paths) for state in states]
    plans = []
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(dict(state.values), is_coordinator=rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    results = []
    for planner, plan in zip(planners, writer.prepare_global_plan(plans), strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
        on_file()
    writer.finish(metadata, results)
    return file_system.records


def _open_writer(directory: Path) -> tuple[dcp.FileSystemWriter, _HashingFileSystem]:
    # Our file system syncs files itself: DCP syncs `.metadata` with its last bytes still in the process's buffer.
    # Nothing is copied ahead: that takes the current GPU, which in a thread is the first one of the node.
    writer = dcp.FileSystemWriter(directory, sync_files=False, overwrite=False, per_thread_copy_ahead=0)
    writer.fs = file_system = _HashingFileSystem()
    return writer, file_system


def read_state(directory: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fills the tensors of `state` in place and replaces its other leaves.

    Raises:
        CheckpointException: on every rank, if a read fails or `state` does not fit (see `_StrictPlanner`).
    """
    reader = dcp.FileSystemReader(directory)
    with _no_single_process_warning():
        dcp.load(
            state,
            storage_reader=reader,
            planner=_StrictPlanner(),
            process_group=group,
            no_dist=group is None,
        )


def check_state(state: Mapping[Any, Any], path: str = "state") -> None:
    """Refuses dictionaries whose keys are not strings.

    DCP turns keys into strings: tensors under integer keys (as in the state of a torch optimizer) come back, but other
    leaves would be put beside the originals, under the string.

    Raises:
        ValueError: naming the first such dictionary.
    """
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{path} has the key {key!r} of type {type(key).__name__}, but keys of a checkpoint must be strings; "
                "name parameters by their full names (torch.distributed.checkpoint.state_dict does so for optimizers)"
            )
        if isinstance(value, Mapping):
            check_state(value, f"{path}[{key!r}]")


class _StrictPlanner(dcp.DefaultLoadPlanner):
    """Refuses what DCP would load silently: another dtype, another kind of leaf, or less than a whole section.

    A section is a top-level key. Loading some sections alone is ordinary (the backbone, to evaluate it); within a
    section, a saved entry that nobody asks for is most often optimizer state that has not been created yet.
    """

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        for name, value in self.state_dict.items():
            if name not in saved:
                continue
            stored = saved[name]
            if isinstance(stored, TensorStorageMetadata) != isinstance(value, Tensor):
                kinds = ("a tensor", "not a tensor")
                stored_kind, kind = kinds if isinstance(stored, TensorStorageMetadata) else kinds[::-1]
                raise ValueError(f"{name} is {stored_kind} in the checkpoint but {kind} in the state to load into")
            if isinstance(stored, TensorStorageMetadata) and stored.properties.dtype != value.dtype:
                raise ValueError(
                    f"{name} has dtype {stored.properties.dtype} in the checkpoint but {value.dtype} in the state to "
                    "load into; load it as it is and convert it afterwards"
                )
        if unclaimed := self._unclaimed(self.metadata):
            raise ValueError(
                f"the checkpoint has {len(unclaimed)} entries that the state to load into lacks, the first is "
                f"{unclaimed[0]}; create them before loading (optimizer state, say), or leave out the whole section"
            )
        return super().create_local_plan()

    def _unclaimed(self, metadata: Metadata) -> list[str]:
        paths = cast(dict[str, tuple[str | int, ...]], metadata.planner_data)
        return sorted(
            name
            for name in metadata.state_dict_metadata
            if name not in self.state_dict and paths[name][0] in self.original_state_dict
        )


class _HashingFile(io.BufferedWriter):
    """A file written from start to end, hashed on the way, and on disk once it is closed."""

    def __init__(self, path: Path) -> None:
        # Exclusive: a file that is there already belongs to another writer.
        super().__init__(io.FileIO(path, "xb"))
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.size_bytes += written
        return written

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("the checksum of a file needs it to be written from start to end")

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
                os.fsync(self.fileno())
            finally:
                super().close()


class _HashingFileSystem(FileSystem):
    """DCP's file system, keeping a record of every file written."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", mode
        with explained(Path(path).parent):
            stream = _HashingFile(Path(path))
            try:
                with stream:
                    yield stream
            except Exception:
                # What torch makes of a full disk is "unexpected pos 704 vs 598".
                if stream.failure is not None:
                    raise stream.failure from None
                raise
        self.records[Path(path).name] = FileRecord(stream.size_bytes, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """DCP warns of a missing process group, which is an ordinary case here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
