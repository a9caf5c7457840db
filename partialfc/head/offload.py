"""Class centers in host memory: a device holds the rows of one step alone.

The negatives of the coming step are known before its batch is, so a thread collects them while the backbone works,
after it has written those of the step before back. The arithmetic is that of resident centers, and so are the results.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.head.class_centers import ClassCenters
from partialfc.head.class_table import ClassTable, Rows, RowTable
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.workspace import Workspace

__all__ = ["OffloadedCenters"]


@dataclass
class _Staged:
    """Rows of a step on the device, in the order of places; read and written as a `ClassTable` is.

    Attributes:
        rows: [n] int64, which they are, on the host.
        tensors: by name, [n, ...].
        moved: whether they differ from what the host has.
    """

    rows: Tensor
    tensors: dict[str, Tensor]
    moved: bool = False

    def read(self, name: str, rows: Rows, workspace: Workspace | None = None) -> Tensor:
        """A view of a run of places."""
        assert isinstance(rows, slice)
        return self.tensors[name][rows]

    def write(self, name: str, rows: Rows, values: Tensor) -> None:
        """Replaces a run of places, unless `values` are those themselves."""
        assert isinstance(rows, slice)
        own = self.tensors[name][rows]
        if own.data_ptr() != values.data_ptr() or own.dtype != values.dtype:
            own.copy_(values)
        self.moved = True


class OffloadedCenters(ClassCenters):
    """Class centers and their optimizer state in host memory. What goes to a GPU goes by way of pinned memory.

    Args:
        device: on which they are computed with.
        **arguments: of `ClassCenters`.
    """

    def __init__(self, *arguments: Any, device: torch.device | str | None, **options: Any) -> None:
        super().__init__(*arguments, device="cpu", **options)
        assert self.idle is None
        self._device = torch.device(device or torch.get_default_device())
        self._thread: ThreadPoolExecutor | None = None
        self._fetched: tuple[int, Future[_Staged]] | None = None
        self._staged: _Staged | None = None

    @property
    def device(self) -> torch.device:
        """Where `read_rows` gives them."""
        return self._device

    def begin_step(self, in_play: ClassesInPlay, step: int) -> None:
        """Brings the rows in play to the device: what was fetched ahead, and the positives that were not drawn."""
        rows = in_play.rows
        assert rows is not None
        rows = rows.cpu()
        ahead = self._take_fetched(step)
        if ahead is None or not torch.equal(ahead.rows, rows[: len(ahead.rows)]):
            self.wait()
            ahead = self._fetch(rows[:0])
        rest = self._fetch(rows[len(ahead.rows) :])
        tensors = {
            name: torch.cat([ahead.tensors[name], rest.tensors[name]]).to(self._device, non_blocking=True)
            for name in self._names
        }
        self._staged = _Staged(rows, tensors)

    def finish_step(self, next_rows: Callable[[], Tensor], next_step: int) -> None:
        """Writes the rows back, and fetches those that the next step draws, behind the caller's back."""
        staged, self._staged = self._staged, None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="class centers")
        if self._device.type == "cuda":
            # The thread copies on a stream of its own, which does not wait for this one.
            torch.cuda.current_stream(self._device).synchronize()
        future = self._thread.submit(self._write_back_and_fetch, staged, next_rows)
        self._fetched = (next_step, future)

    def _write_back_and_fetch(self, staged: _Staged | None, next_rows: Callable[[], Tensor]) -> _Staged:
        self._write_back(staged)
        return self._fetch(next_rows().cpu())

    @torch.no_grad()
    def _write_back(self, staged: _Staged | None) -> None:
        if staged is not None and staged.moved:
            for name, tensor in staged.tensors.items():
                ClassTable.write(self, name, staged.rows, tensor.cpu())

    @torch.no_grad()
    def _fetch(self, rows: Tensor) -> _Staged:
        tensors = {name: ClassTable.read(self, name, rows) for name in self._names}
        if self._device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return _Staged(rows, tensors)

    def _take_fetched(self, step: int) -> _Staged | None:
        fetched, self._fetched = self._fetched, None
        if fetched is None:
            return None
        staged = fetched[1].result()
        return staged if fetched[0] == step else None

    def wait(self) -> None:
        """Until the host has everything."""
        if self._fetched is not None:
            self._fetched[1].result()
        self._write_back(self._staged)
        self._staged = None

    def _table(self, rows: Rows, place: int | None) -> tuple[RowTable, Rows]:
        if self._staged is None or place is None:
            return self, rows
        assert isinstance(rows, Tensor)
        return self._staged, slice(place, place + len(rows))

    def read(self, name: str, rows: Rows, workspace: Workspace | None = None) -> Tensor:
        """See `ClassTable.read`; a copy on the device."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        return super().read(name, rows, workspace).to(self._device)

    def write(self, name: str, rows: Rows, values: Tensor) -> None:
        """See `ClassTable.write`."""
        super().write(name, rows.cpu() if isinstance(rows, Tensor) else rows, values.cpu())

    def gather(self) -> Tensor:
        """See `ClassCenters.gather`."""
        self.wait()
        return super().gather()

    def set(self, centers: Tensor) -> None:
        """See `ClassCenters.set`."""
        self._forget()
        super().set(centers)

    def _forget(self) -> None:
        self.wait()
        self._fetched = None

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedCenters:
        """They stay where they are.

        Raises:
            ValueError: if they would be computed with elsewhere.
        """
        device = function(torch.empty(0, device=self._device)).device
        if device != self._device:
            raise ValueError(
                f"the head was asked to move to {device}, but class centers in host memory are computed with on "
                f"{self._device}; build it with device={str(device)!r}"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which has a thread of its own."""
        self.wait()
        return {**super().__getstate__(), "_thread": None, "_fetched": None}

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.wait()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*arguments)
