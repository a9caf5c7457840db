"""A text file that lists images and their labels."""

from __future__ import annotations

import csv
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from partialfc.data.sources.base import Source, TextColumn, number_identities, read_file

__all__ = ["LIST_EXTENSIONS", "ListSource", "ListedLine", "read_list"]

LIST_EXTENSIONS = (".txt", ".lst", ".csv", ".tsv")
_COLUMNS = ("path", "label", "weight", "quality")


class ListedLine(NamedTuple):
    """One line of a list."""

    number: int
    path: str
    label: str
    weight: float | None
    quality: float | None


@dataclass(frozen=True, kw_only=True)
class ListSource(Source):
    """Files named by a list. Locators are their paths as listed; relative ones lie under `root`.

    Attributes:
        root: folder of the relative paths.
        lines: int64 [num_entries], the line of each entry, which is also its name in a data shard.
    """

    locators: TextColumn
    root: str
    lines: np.ndarray

    _columns = (*Source._columns, "lines")

    @classmethod
    def open(cls, path: Path, *, root: Path | None = None) -> ListSource:
        """Reads a list: `path<TAB>label` a line, or `path label`; with commas if it ends with .csv.

        A first line that names the columns (path, label, and if wanted weight and quality) is optional. Labels are
        texts; if all are whole numbers they are ordered as numbers.

        Args:
            path: the list, UTF-8.
            root: folder of the relative paths; left out, the folder of the list.

        Raises:
            ValueError: for a line that cannot be read, or a list without any.
        """
        codes: dict[str, int] = {}
        identities, lines = array("i"), array("q")
        numbers: dict[str, array[float]] = {"weight": array("f"), "quality": array("f")}

        def paths() -> Iterator[str]:
            for line in read_list(path):
                identities.append(codes.setdefault(line.label, len(codes)))
                lines.append(line.number)
                for name, column in numbers.items():
                    if (value := getattr(line, name)) is not None:
                        column.append(value)
                yield line.path

        locators = TextColumn.of(paths())
        if not lines:
            raise ValueError(f"{path}: lists no image; expected lines of path<TAB>label")
        names, places = number_identities(list(codes), where=str(path))
        columns = {name: np.frombuffer(column, dtype=np.float32) for name, column in numbers.items() if column}
        return cls(
            path=str(path),
            identity_names=names,
            identities=places[np.frombuffer(identities, dtype=np.int32)],
            locators=locators,
            weights=columns.get("weight"),
            quality=columns.get("quality"),
            root=str(path.parent if root is None else root),
            lines=np.frombuffer(lines, dtype=np.int64),
        )

    def read(self, position: int) -> bytes:
        """The content of a file."""
        return read_file(os.path.join(self.root, self.locators[position]))

    def key(self, position: int) -> str:
        """identity/line: a list may hold files of the same name."""
        return f"{self.identity_name(position)}/{int(self.lines[position])}"

    def describe(self, position: int) -> str:
        """The path of a file, and the line that lists it."""
        path = os.path.join(self.root, self.locators[position])
        return f"{path} ({self.path}, line {int(self.lines[position])})"

    def count_bytes(self, positions: np.ndarray) -> int:
        """The sizes of the files that are there."""
        paths = (os.path.join(self.root, self.locators[position]) for position in positions.tolist())
        return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))

    def _files(self) -> Sequence[Path]:
        return (Path(self.path),)


def read_list(path: Path) -> Iterator[ListedLine]:
    """The lines of a list of images.

    Raises:
        ValueError: for a line that cannot be read, with its number.
    """
    columns: Sequence[str] = ()
    for number, fields in _rows(path):
        if not columns:
            header = [field.strip().lower() for field in fields]
            if {"path", "label"} <= set(header):
                columns = header
                if unknown := sorted(set(columns) - set(_COLUMNS)):
                    raise ValueError(f"{path}: line {number} names the columns {unknown}; allowed are {_COLUMNS}")
                continue
            columns = _COLUMNS[: len(fields)]
        if len(fields) != len(columns) or len(fields) < 2:
            raise ValueError(
                f"{path}: line {number} has {len(fields)} columns, but {', '.join(columns) or 'path, label'} are "
                f"expected: {fields!r}"
            )
        values = dict(zip(columns, fields, strict=True))
        yield ListedLine(
            number,
            values["path"],
            values["label"].strip(),
            _number(values.get("weight"), where=f"{path}: line {number}: weight", least=0.0),
            _number(values.get("quality"), where=f"{path}: line {number}: quality"),
        )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that is not empty, with its number."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.reader(file)
                for fields in reader:
                    if fields:
                        yield reader.line_num, fields
                return
            for number, line in enumerate(file, start=1):
                text = line.rstrip("\r\n")
                if text.strip():
                    # A path may hold spaces; a label may not, unless there are tabs.
                    yield number, text.split("\t") if "\t" in text else text.rsplit(maxsplit=1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error}") from error


def _number(text: str | None, *, where: str, least: float = -math.inf) -> float | None:
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{where} is {text!r}, but must be a number") from error
    if not (math.isfinite(number) and number >= least):
        raise ValueError(f"{where} is {text!r}, but must be finite{'' if least < 0 else ' and not negative'}")
    return number
