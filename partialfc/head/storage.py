"""How the numbers of a row are stored: exactly, in 16 bits, or in 8 bits by blocks. Arithmetic is in 32 or 64.

A number that does not fit is rounded up or down at random, so that it is right in the mean: the steps of training are
mostly smaller than half of what separates two 16-bit numbers, and rounding to the nearest would lose them, decay first.
The random bits are a function of keys, so that a run repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from partialfc.head.class_table import ClassTable, Rows, RowTable
from partialfc.head.workspace import Workspace
from partialfc.kernels.blockwise import dequantize_, num_scales, quantize_
from partialfc.kernels.rounding import stochastic_round_

__all__ = ["Blockwise", "Exact", "Field", "MomentumDtype", "Rounded", "RowFormat", "working_dtype"]

MomentumDtype = Literal["float32", "bfloat16", "int8"]


def working_dtype(stored: torch.dtype) -> torch.dtype:
    """In which rows stored in a dtype are computed with: float64 for float64, else float32."""
    return torch.float64 if stored == torch.float64 else torch.float32


class RowFormat(Protocol):
    """What reads and writes one quantity of the rows of a table."""

    @property
    def needs_keys(self) -> bool:
        """Whether writing draws random bits."""
        ...

    def add_to(self, table: ClassTable, name: str, like: Tensor) -> None:
        """Adds zeros of the shape and on the device of `like`, in this format."""
        ...

    def read(self, table: RowTable, name: str, rows: Rows, workspace: Workspace) -> Tensor:
        """[n, ...] in the working dtype: the stored rows themselves where that is possible, else a copy."""
        ...

    def write(self, table: RowTable, name: str, rows: Rows, values: Tensor, keys_n: Tensor | None) -> None:
        """Stores [n, ...] at `rows`; nothing to do if they are the stored rows themselves."""
        ...


@dataclass(frozen=True)
class Exact:
    """As computed."""

    dtype: torch.dtype
    needs_keys = False

    def add_to(self, table: ClassTable, name: str, like: Tensor) -> None:
        """See `RowFormat`."""
        table.add(name, torch.zeros_like(like, dtype=self.dtype))

    def read(self, table: RowTable, name: str, rows: Rows, workspace: Workspace) -> Tensor:
        """See `RowFormat`."""
        return table.read(name, rows, workspace)

    def write(self, table: RowTable, name: str, rows: Rows, values: Tensor, keys_n: Tensor | None) -> None:
        """See `RowFormat`."""
        table.write(name, rows, values)


@dataclass(frozen=True)
class Rounded:
    """In 16 bits, rounded stochastically."""

    dtype: torch.dtype
    needs_keys = True

    def add_to(self, table: ClassTable, name: str, like: Tensor) -> None:
        """See `RowFormat`."""
        table.add(name, torch.zeros_like(like, dtype=self.dtype))

    def read(self, table: RowTable, name: str, rows: Rows, workspace: Workspace) -> Tensor:
        """See `RowFormat`."""
        stored = table.read(name, rows, workspace)
        return workspace.get(f"{name} decoded", stored.shape, torch.float32, stored.device).copy_(stored)

    def write(self, table: RowTable, name: str, rows: Rows, values: Tensor, keys_n: Tensor | None) -> None:
        """See `RowFormat`."""
        assert keys_n is not None
        rounded = torch.empty(values.shape, dtype=self.dtype, device=values.device)
        stochastic_round_(_matrix(rounded), _matrix(values), keys_n)
        table.write(name, rows, rounded)


@dataclass(frozen=True)
class Blockwise:
    """In 8 bits with a scale for each block of elements of a row, rounded stochastically; see `kernels.blockwise`."""

    needs_keys = True

    def add_to(self, table: ClassTable, name: str, like: Tensor) -> None:
        """See `RowFormat`; the scales are called `<name>_scale`."""
        table.add(name, torch.zeros_like(like, dtype=torch.int8))
        shape = (*like.shape[:-1], num_scales(like.shape[-1]))
        table.add(f"{name}_scale", torch.zeros(shape, dtype=torch.float32, device=like.device))

    def read(self, table: RowTable, name: str, rows: Rows, workspace: Workspace) -> Tensor:
        """See `RowFormat`."""
        codes, scales = table.read(name, rows, workspace), table.read(f"{name}_scale", rows, workspace)
        decoded = workspace.get(f"{name} decoded", codes.shape, torch.float32, codes.device)
        dequantize_(_matrix(decoded), _matrix(codes), _matrix(scales))
        return decoded

    def write(self, table: RowTable, name: str, rows: Rows, values: Tensor, keys_n: Tensor | None) -> None:
        """See `RowFormat`."""
        assert keys_n is not None
        codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
        shape = (*values.shape[:-1], num_scales(values.shape[-1]))
        scales = torch.empty(shape, dtype=torch.float32, device=values.device)
        quantize_(_matrix(codes), _matrix(scales), _matrix(values), keys_n)
        table.write(name, rows, codes)
        table.write(f"{name}_scale", rows, scales)


def _matrix(values: Tensor) -> Tensor:
    return values.flatten(0, -2)


_MOMENTUM_FORMATS: dict[MomentumDtype, RowFormat | None] = {
    "float32": None,
    "bfloat16": Rounded(torch.bfloat16),
    "int8": Blockwise(),
}


@dataclass(frozen=True)
class Field:
    """What an optimizer remembers of a row: a number for each element, or one for the row.

    Attributes:
        per_row: one for the row.
        dtype: integers to count with, "int32"; else as `MomentumDtype`, "float32" being the working dtype.
    """

    per_row: bool = False
    dtype: MomentumDtype | Literal["int32"] = "float32"

    def shape_for(self, centers: Tensor) -> Tensor:
        """A view of [..., D] centers that has the shape of this field."""
        return centers[..., 0] if self.per_row else centers

    def working(self, working: torch.dtype) -> torch.dtype:
        """The dtype that is computed with."""
        return torch.int32 if self.dtype == "int32" else working

    def row_format(self, working: torch.dtype) -> RowFormat:
        """How the field is stored beside centers that are computed with in `working`."""
        rounded = None if self.dtype == "int32" else _MOMENTUM_FORMATS[self.dtype]
        return Exact(self.working(working)) if rounded is None else rounded
