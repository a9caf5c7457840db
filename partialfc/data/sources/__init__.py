"""Where images come from: folders, lists, records, Parquet, LMDB, and splits that are packed already."""

from __future__ import annotations

from pathlib import Path

from partialfc.data.sources.base import SkippedFile, Source
from partialfc.data.sources.folder import FolderSource
from partialfc.data.sources.listing import LIST_EXTENSIONS, ListSource
from partialfc.data.sources.lmdb import LmdbSource
from partialfc.data.sources.parquet import ParquetSource
from partialfc.data.sources.records import RecordSource
from partialfc.data.sources.split import SplitSource
from partialfc.data.split_format import MANIFEST

__all__ = [
    "FolderSource",
    "ListSource",
    "LmdbSource",
    "ParquetSource",
    "RecordSource",
    "SkippedFile",
    "Source",
    "SplitSource",
    "open_source",
]

_ACCEPTED = (
    "a folder with one folder for each identity, insightface's train.rec (or its folder), a list (.lst, .txt, .csv, "
    ".tsv) of path and label, Parquet (a file or a folder of them), LMDB (a folder with data.mdb, or a .mdb file), or "
    "a packed split"
)


def open_source(
    path: str | Path,
    *,
    root: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Opens what lies at a path as a source of images.

    Args:
        path: a folder of identity folders, a .rec file or the folder of train.rec, a list (.lst, .txt, .csv, .tsv), a
            Parquet file or a folder of such, a folder with data.mdb or an .mdb file, or a packed split.
        root: of a list: the folder of its relative paths; left out, the folder of the list.
        image_column: of Parquet: the column of images; left out, a usual name is looked for.
        label_column: of Parquet: the column of labels; likewise.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is none of these, an option is given that the kind does not have, or it is damaged.
        ImportError: if the library that reads the kind is missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected {_ACCEPTED}")
    kind = _kind(path)
    if root is not None and kind is not ListSource:
        raise ValueError(f"{path}: root is for lists alone, but this is read as {kind.__name__}")
    if (image_column or label_column) and kind is not ParquetSource:
        raise ValueError(f"{path}: image_column and label_column are for Parquet, but this is read as {kind.__name__}")
    if kind is ListSource:
        return ListSource.open(path, root=None if root is None else Path(root))
    if kind is ParquetSource:
        return ParquetSource.open(path, image_column=image_column, label_column=label_column)
    if kind is SplitSource:
        return SplitSource.open([path])
    if kind is RecordSource:
        return RecordSource.open(path)
    if kind is LmdbSource:
        return LmdbSource.open(path)
    return FolderSource.open(path)


def _kind(path: Path) -> type[Source]:
    extension = path.suffix.lower()
    if path.is_dir():
        if (path / "train.rec").is_file():
            return RecordSource
        if (path / "data.mdb").is_file():
            return LmdbSource
        if (path / MANIFEST).is_file():
            return SplitSource
        return ParquetSource if any(path.glob("*.parquet")) else FolderSource
    for extensions, kind in (
        ((".rec",), RecordSource),
        (LIST_EXTENSIONS, ListSource),
        ((".parquet",), ParquetSource),
        ((".mdb",), LmdbSource),
    ):
        if extension in extensions:
            return kind
    raise ValueError(f"{path}: a file that ends with {extension!r} cannot be imported; expected {_ACCEPTED}")
