"""Files of one JSON object a line, each with the step that it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["drop_from_step", "read_lines"]


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a file. A last line that was cut short is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line that is not the last one is no object with a step.
    """
    rows = []
    complete_lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(complete_lines, start=1):
        try:
            row = json.loads(line)
            _ = row["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of a run: {line[:80]!r}") from error
        rows.append(row)
    return rows


def drop_from_step(path: Path, step: int) -> None:
    """Rewrites a file, in one rename, without the lines at or beyond `step`. A file that is missing stays so."""
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if row["step"] < step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in kept:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
