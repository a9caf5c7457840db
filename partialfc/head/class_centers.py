"""This rank's class centers and the state of their optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_table import ClassTable, Rows, RowTable
from partialfc.head.idle_steps import IdleSteps
from partialfc.head.optimizers import CenterOptimizer
from partialfc.head.sampling import ClassesInPlay
from partialfc.head.storage import Exact, Rounded, RowFormat, working_dtype
from partialfc.head.workspace import Workspace
from partialfc.keyed import hash64

__all__ = ["ClassCenters"]

_INITIALISATION_STREAM = 1  # keeps these hashes apart from those of other parts that use the same seed
_ROUNDING_STREAM = 6
_SETTLED_AT_ONCE = 4096


class ClassCenters(ClassTable):
    """A matrix of K rows of D numbers for each class, learnable, and what its optimizer remembers of each row.

    Args:
        partition: which classes live here.
        row_shape: (K, D).
        optimizer: moves the rows.
        mesh: the ranks over which the classes are sharded.
        seed: block k is drawn from N(0, init_std^2) by a generator keyed by (seed, k), whatever rank owns it.
        init_std: standard deviation of each element.
        dtype: in which they are stored: float32, float64, or, rounded stochastically, float16 or bfloat16.
        sampled: whether a step may leave rows out.
        device: where the matrix lives.

    Attributes:
        working_dtype: of what `read_rows` gives.
        workspace: where its copies are; each is lost when the next one of its kind is asked for.
    """

    weight: Tensor
    current_n: Tensor

    def __init__(
        self,
        partition: ClassPartition,
        row_shape: tuple[int, int],
        *,
        optimizer: CenterOptimizer,
        mesh: ShardMesh,
        seed: int,
        init_std: float,
        dtype: torch.dtype,
        sampled: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(partition, mesh=mesh)
        self.optimizer, self.seed, self.workspace = optimizer, seed, Workspace()
        self.working_dtype, self._last_step = working_dtype(dtype), 0
        exact = dtype == self.working_dtype
        self.formats: dict[str, RowFormat] = {"weight": Exact(dtype) if exact else Rounded(dtype)}
        shape = (len(partition.local_blocks), partition.block_size, *row_shape)
        like = torch.empty(1, dtype=self.working_dtype, device=device).expand(shape)
        self.formats["weight"].add_to(self, "weight", like)
        for name, field in optimizer.fields.items():
            self.formats[name] = field.row_format(self.working_dtype)
            self.formats[name].add_to(self, name, field.shape_for(like))
        self.idle: IdleSteps | None = None
        if optimizer.moves_idle_rows and sampled:
            self.idle = IdleSteps()
            # Of each row the number of noted steps that it has seen. Not saved: what is saved is up to date.
            stamps = torch.zeros(partition.num_local_classes, dtype=torch.int32, device=device)
            self.register_buffer("current_n", stamps, persistent=False)
        if init_std:
            self._draw(init_std)

    @property
    def device(self) -> torch.device:
        """Where `read_rows` gives them."""
        return self.weight.device

    def _draw(self, init_std: float) -> None:
        for index, block in enumerate(self.partition.local_blocks):
            # Drawn on the CPU in float32, so that neither device nor dtype changes a run.
            generator = torch.Generator().manual_seed(hash64(self.seed, _INITIALISATION_STREAM, block))
            self.weight[index] = init_std * torch.randn(self.weight.shape[1:], generator=generator)

    def wait(self) -> None:
        """Until reading gives what the last step left."""

    def begin_step(self, in_play: ClassesInPlay, step: int) -> None:
        """Before anything is read in a step that may move the classes in play."""

    def finish_step(self, next_rows: Callable[[], Tensor], next_step: int) -> None:
        """When nothing will be read or moved any more before the next step, which draws `next_rows`, and maybe more."""

    def read_rows(self, rows: Rows, place: int | None = None) -> Tensor:
        """[n, K, D], the centers at `rows`: themselves if they are a run stored as computed with, else a copy.

        Args:
            rows: local.
            place: of the first of them among the classes in play, if they are those of a tile.
        """
        table, place_or_rows = self._table(rows, place)
        return self.formats["weight"].read(table, "weight", place_or_rows, self.workspace)

    def _table(self, rows: Rows, place: int | None) -> tuple[RowTable, Rows]:
        """Where rows are, and under which numbers."""
        return self, rows

    @torch.no_grad()
    def step_(
        self,
        rows: Rows,
        weight_nKD: Tensor,
        gradient_nKD: Tensor,
        *,
        learning_rate: float,
        step: int,
        place: int | None = None,
    ) -> None:
        """Moves the centers at `rows` by one step of the optimizer.

        Args:
            rows: local.
            weight_nKD: [n, K, D], what `read_rows` gave for them; changed.
            gradient_nKD: [n, K, D], of the loss; changed.
            learning_rate: of this step.
            step: its number, a key of what is rounded.
            place: as in `read_rows`.
        """
        fields = self.optimizer.fields
        table, place_or_rows = self._table(rows, place)
        state = {name: self.formats[name].read(table, name, place_or_rows, self.workspace) for name in fields}
        self.optimizer.update_(weight_nKD, gradient_nKD, state, learning_rate=learning_rate)
        self._write(rows, {"weight": weight_nKD, **state}, step, place)
        if self.idle is not None:
            self._stamp(rows, self.idle.count + 1)

    def end_step(self, *, learning_rate: float, step: int) -> None:
        """After the last `step_` of a step: rows that were in none of them have been idle."""
        self._last_step = step
        if self.idle is None:
            return
        self.idle.add(self.optimizer.idle_step(learning_rate))
        if self.idle.is_full:
            self.settle_all()

    @property
    def is_behind(self) -> bool:
        """Whether there may be rows that are not up to date."""
        return self.idle is not None and self.idle.count > 0

    @torch.no_grad()
    def settle(self, rows: Rows) -> None:
        """Brings the rows at `rows` up to date, if rows move while they are not in play."""
        assert self.idle is not None
        stamps = self.current_n[slice(None) if rows is None else rows]
        names = ["weight", *self.optimizer.fields]
        values = {name: self.formats[name].read(self, name, rows, self.workspace) for name in names}
        self.idle.catch_up_(values["weight"], values.get("momentum"), (self.idle.count - stamps).long())
        # Steps have numbers from 0 on; the keys of what is rounded here must be others.
        self._write(rows, values, -1 - self._last_step)
        self._stamp(rows, self.idle.count)

    def settle_all(self) -> None:
        """Brings every row up to date."""
        if not self.is_behind:
            return
        assert self.idle is not None
        for start in range(0, self.partition.num_local_classes, _SETTLED_AT_ONCE):
            stop = min(start + _SETTLED_AT_ONCE, self.partition.num_local_classes)
            self.settle(slice(start, stop))
        self.idle.clear()
        self.current_n.zero_()

    def _stamp(self, rows: Rows, count: int) -> None:
        self.current_n[slice(None) if rows is None else rows] = count

    def _write(self, rows: Rows, values: dict[str, Tensor], step: int, place: int | None = None) -> None:
        table, place_or_rows = self._table(rows, place)
        for number, (name, value) in enumerate(values.items()):
            row_format = self.formats[name]
            keys = self._keys(rows, value, number, step) if row_format.needs_keys else None
            row_format.write(table, name, place_or_rows, value, keys)

    def _keys(self, rows: Rows, value_nKD: Tensor, number: int, step: int) -> Tensor:
        """[n * K] int64, a hash for each row of numbers, the same on any number of ranks."""
        if not isinstance(rows, Tensor):
            start = 0 if rows is None else rows.start
            rows = torch.arange(start, start + len(value_nKD), device=value_nKD.device)
        num_subcenters = value_nKD.shape[1]
        subcenter = torch.arange(num_subcenters, device=rows.device)
        row = (rows + self.partition.class_start)[:, None] * num_subcenters + subcenter
        return hash64(hash64(self.seed, _ROUNDING_STREAM, number, step), row).flatten()

    def gather(self) -> Tensor:
        """[num_classes, K, D] on every rank, a copy in the working dtype. Collective."""
        self.settle_all()
        return self.gather_all("weight").to(self.working_dtype)

    @torch.no_grad()
    def set(self, centers: Tensor) -> None:
        """Takes this rank's rows of `centers` [num_classes, K, D]; optimizer state starts anew."""
        assert centers.shape == (self.partition.num_classes, *self.weight.shape[2:])
        start = self.partition.class_start
        for name in self._names:
            getattr(self, name).zero_()
        self.write("weight", None, centers[start : start + self.partition.num_local_classes])
        self._forget_idle_steps()

    def _forget_idle_steps(self) -> None:
        if self.idle is not None:
            self.idle.clear()
            self.current_n.zero_()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle_all()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._forget_idle_steps()
