"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and TensorBoard scalars beside it.

A line is `{"step": 12, "loss": 3.25, ...}`. JSON has no number for what is not finite, and `null` would not tell an
overflow from a 0 / 0, so these are the strings "NaN", "Infinity" and "-Infinity", which `float()` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from partialfc.telemetry.lines import drop_from_step, read_lines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["METRICS_FILE", "TENSORBOARD_DIRECTORY", "MetricsLog", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


class MetricsLog:
    """Appends metrics to `directory/metrics.jsonl` and `directory/tensorboard`. A context manager.

    Args:
        directory: of the run; made if missing.
        tensorboard: whether to write TensorBoard scalars too.
        resume_step: the next step of a resumed run. Lines of that step and later ones, which the run will write again,
            are dropped, as is a last line that was cut short; TensorBoard hides its own. None for a new run.
        enabled: False makes all of it a no-op, for ranks other than 0.

    Raises:
        FileExistsError: if a new run finds metrics of another.
        ValueError: if a line that is not the last one cannot be read.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        enabled: bool = True,
    ) -> None:
        self._file: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if not enabled:
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        if resume_step is not None:
            drop_from_step(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise FileExistsError(
                f"{path} holds the metrics of another run: resume that run (resume_step) or choose another directory"
            )
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            # Imported here because it takes a second that most processes can save.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(directory / TENSORBOARD_DIRECTORY, purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line and flushes it, so that a killed run leaves it behind.

        Args:
            step: the step that the values belong to.
            values: name to number, non-finite numbers included; "step" is not a name.

        Raises:
            ValueError: if a value is named "step".
        """
        if self._file is None:
            return
        if "step" in values:
            raise ValueError('a metric may not be named "step": that is the key of the step itself')
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step} | {name: _to_json(number) for name, number in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)

    def close(self) -> None:
        """Closes the files. Writing is over."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The lines of a metrics file, non-finite numbers restored; "step" is an int. A last line cut short is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line that is not the last one cannot be read.
    """
    rows = []
    for row in read_lines(path):
        try:
            rows.append({name: value if name == "step" else float(value) for name, value in row.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a line of metrics: {str(row)[:80]!r}") from error
    return rows


def _to_json(number: float) -> float | str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number
