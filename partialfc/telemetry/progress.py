"""How far a long operation is: a bar on a terminal, an occasional line in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self, TextIO

from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar:
    """Shows count, percentage, rate and time left on standard error. A context manager.

    On a terminal this is a bar. Elsewhere (a Slurm log, a pipe) it is lines, such as

        train: 1,200/5,000 images (24.0%), 350.2 images/s, 0:00:10 left, loss=1.234
        train: 5,000/5,000 images (100.0%), 346.9 images/s, took 0:00:14, loss=0.871

    at most one per interval and one at the end; the rate is that since the previous line, at the end that of all.

    Args:
        total: count at which all is done.
        description: what is being done, one or two words.
        unit: what is counted, in the plural.
        initial: count already done, by a run that is being resumed.
        log_interval_seconds: least time between two lines; a terminal is redrawn more often.
        enabled: False makes all of it a no-op, for ranks other than 0.
        stream: where to write. Default: standard error.
        clock: seconds that never go back, for the lines.
    """

    def __init__(
        self,
        total: int,
        *,
        description: str,
        unit: str,
        initial: int = 0,
        log_interval_seconds: float = 10.0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.count = initial
        self._description = description
        self._unit = unit
        self._initial = initial
        self._log_interval_seconds = log_interval_seconds
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start_seconds = self._line_seconds = clock()
        self._line_count = initial
        self._shown: dict[str, object] = {}
        self._bar: tqdm[NoReturn] | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                unit=f" {unit}",
                file=self._stream,
                dynamic_ncols=True,
            )

    def update(self, count: int, **shown: object) -> None:
        """Counts on, and shows values beside the count from now on; floats with four digits."""
        self.count += count
        self._shown |= shown
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(_format_shown(self._shown), refresh=False)
            self._bar.update(count)
            return
        now = self._clock()
        if now - self._line_seconds >= self._log_interval_seconds:
            rate = (self.count - self._line_count) / max(now - self._line_seconds, 1e-9)
            left = _format_seconds((self.total - self.count) / rate) if rate > 0 else "unknown time"
            self._write_line(rate, f"{left} left")
            self._line_seconds, self._line_count = now, self.count

    def close(self) -> None:
        """Ends the bar, or writes the last line. Closing again does nothing."""
        if not self._enabled:
            return
        self._enabled = False
        if self._bar is not None:
            self._bar.close()
            return
        took_seconds = self._clock() - self._start_seconds
        rate = (self.count - self._initial) / max(took_seconds, 1e-9)
        self._write_line(rate, f"took {_format_seconds(took_seconds)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self, rate: float, time_text: str) -> None:
        percentage = 100.0 * self.count / self.total if self.total else 100.0
        line = (
            f"{self._description}: {self.count:,}/{self.total:,} {self._unit} ({percentage:.1f}%),"
            f" {rate:,.1f} {self._unit}/s, {time_text}"
        )
        if self._shown:
            line += f", {_format_shown(self._shown)}"
        self._stream.write(line + "\n")
        self._stream.flush()


def _format_shown(shown: dict[str, object]) -> str:
    texts = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items())
    return ", ".join(texts)


def _format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{whole_seconds:02d}"
