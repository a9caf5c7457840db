"""Parquet files with a column of image files and a column of labels, as data sets of Hugging Face have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.data.errors import DataError, SampleError
from partialfc.data.sources.base import Source, number_identities

__all__ = ["ParquetSource"]

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
_LABEL_COLUMNS = ("label", "labels", "identity", "cls", "class", "person_id", "id")
_LOCATOR = np.dtype([("file", "<i4"), ("group", "<i4"), ("row", "<i8")])
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Source):
    """Rows of Parquet files. An image is binary, or a struct with binary `bytes`; a label is a whole number or a text.

    Attributes:
        files: the files, in the order of their rows.
        image_column: the column that holds the images.
    """

    locators: np.ndarray
    files: tuple[str, ...]
    image_column: str

    @classmethod
    def open(cls, path: Path, *, image_column: str | None = None, label_column: str | None = None) -> ParquetSource:
        """Reads the labels. Columns named weight and quality are taken along.

        Args:
            path: a Parquet file, or a folder of such.
            image_column: name of the column of images; left out, a usual name is looked for.
            label_column: name of the column of labels; likewise.

        Raises:
            ImportError: if pyarrow is missing.
            ValueError: if there is no such column, or a label is missing.
        """
        parquet = _import_parquet()
        files = tuple(str(file) for file in sorted(path.glob("*.parquet"))) if path.is_dir() else (str(path),)
        opened = [parquet.ParquetFile(file) for file in files]
        columns = opened[0].schema_arrow.names
        image_column = _choose_column(columns, image_column, _IMAGE_COLUMNS, "image_column", files[0])
        label_column = _choose_column(columns, label_column, _LABEL_COLUMNS, "label_column", files[0])
        codes: dict[str, int] = {}
        wanted = [label_column, *(name for name in ("weight", "quality") if name in columns)]
        identities, locators, numbers = [], [], {name: [] for name in wanted[1:]}  # type: ignore[var-annotated]
        for number, file in enumerate(opened):
            if missing := sorted({image_column, *wanted} - set(file.schema_arrow.names)):
                raise ValueError(f"{files[number]}: has no column {missing}, as {files[0]} has")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=wanted)
                identities.append(_codes(table[label_column], codes, f"{files[number]}: column {label_column}"))
                rows = np.empty(len(table), dtype=_LOCATOR)
                rows["file"], rows["group"], rows["row"] = number, group, np.arange(len(table))
                locators.append(rows)
                for name, pieces in numbers.items():
                    pieces.append(table[name].to_numpy().astype(np.float32))
        if not codes:
            raise ValueError(f"{path}: holds no row")
        names, places = number_identities(list(codes), where=str(path))
        found = {name: np.concatenate(pieces) for name, pieces in numbers.items()}
        return cls(
            path=str(path),
            identity_names=names,
            identities=places[np.concatenate(identities)],
            locators=np.concatenate(locators),
            weights=found.get("weight"),
            quality=found.get("quality"),
            files=files,
            image_column=image_column,
        )

    def read(self, position: int) -> bytes:
        """The image of a row. Rows of a row group are read in order, a few at a time; going back starts it anew."""
        file, group, row = (int(number) for number in self.locators[position])
        data = self._reader.read(file, group, row)
        if data is None:
            raise SampleError("not an image", f"row {row} of row group {group} has no image")
        return data

    def key(self, position: int) -> str:
        """identity/file-group-row."""
        file, group, row = (int(number) for number in self.locators[position])
        return f"{self.identity_name(position)}/{file}-{group}-{row}"

    def describe(self, position: int) -> str:
        """The file, the row group and the row in it."""
        file, group, row = (int(number) for number in self.locators[position])
        return f"{self.files[file]}, row group {group}, row {row}"

    def count_bytes(self, positions: np.ndarray) -> int:
        """A share of the column's bytes, as large as that of its rows."""
        parquet = _import_parquet()
        total = rows = 0
        for file in self.files:
            metadata = parquet.read_metadata(file)
            rows += metadata.num_rows
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    if column.path_in_schema in (self.image_column, f"{self.image_column}.bytes"):
                        total += column.total_uncompressed_size
        return round(total * len(positions) / rows)

    @cached_property
    def _reader(self) -> _RowReader:
        return _RowReader(self.files, self.image_column)

    def _files(self) -> Sequence[Path]:
        return [Path(file) for file in self.files]


class _RowReader:
    """Goes forward through row groups, holding a few rows at a time: a row group may be larger than memory."""

    def __init__(self, files: Sequence[str], column: str) -> None:
        self._files, self._column = files, column
        self._place = (-1, -1)
        self._rows: Iterator[Any] = iter(())
        self._next = 0

    def read(self, file: int, group: int, row: int) -> bytes | None:
        if (file, group) != self._place or row < self._next:
            self._place, self._next = (file, group), 0
            self._rows = self._iterate(file, group)
        try:
            for value in self._rows:
                self._next += 1
                if self._next > row:
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(data, bytes | None):
                        raise ValueError(
                            f"{self._files[file]}: column {self._column} holds {type(data).__name__}, but must hold "
                            "the bytes of images; name another column, or pack a list of paths"
                        )
                    return data
        except OSError as error:  # pyarrow's errors of a damaged file are such
            raise DataError(f"{self._files[file]}, row group {group}: cannot be read: {error}") from error
        raise DataError(f"{self._files[file]}, row group {group}: ends before row {row}; the file was changed")

    def _iterate(self, file: int, group: int) -> Iterator[Any]:
        opened = _import_parquet().ParquetFile(self._files[file], pre_buffer=False, buffer_size=1 << 20)
        for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[self._column], use_threads=False):
            yield from batch.column(0).to_pylist()


def _choose_column(columns: Sequence[str], asked: str | None, usual: Sequence[str], option: str, file: str) -> str:
    candidates = usual if asked is None else [asked]
    for name in candidates:
        if name in columns:
            return name
    raise ValueError(f"{file}: has no column {' or '.join(candidates)}, but {list(columns)}; set {option}")


def _codes(labels: Any, codes: dict[str, int], where: str) -> np.ndarray:
    """The number of each label; new ones are added to `codes`."""
    if labels.null_count:
        raise ValueError(f"{where}: {labels.null_count} rows have no label")
    kind = str(labels.type)
    if not (kind.startswith(("int", "uint")) or "string" in kind):
        raise ValueError(f"{where}: is of type {kind}, but labels are whole numbers or texts")
    encoded = labels.combine_chunks().dictionary_encode()
    numbers = [codes.setdefault(str(name), len(codes)) for name in encoded.dictionary.to_pylist()]
    indices: np.ndarray = np.asarray(numbers, dtype=np.int32)[encoded.indices.to_numpy()]
    return indices


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("reading Parquet files needs pyarrow: pip install partialfc[parquet]") from error
    return parquet
