"""Figures of a run as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_loss", "plot_roc"]

_MAX_POINTS = 2000


def plot_roc(curves: Mapping[str, tuple[Tensor, Tensor]], path: str | Path) -> None:
    """Draws ROC curves over a logarithmic axis of the false accept rate.

    Args:
        curves: for each name the false and the true accept rates, [K] each, ascending (see `roc_curve`). The axis
            starts at the lowest false accept rate above 0 of any curve.
        path: the PNG file to write; its folder must exist.

    Raises:
        ValueError: if there is no curve, or none reaches a false accept rate above 0.
    """
    points = {name: (_array(far), _array(tar)) for name, (far, tar) in curves.items()}
    positive = [far[far > 0].min() for far, _ in points.values() if (far > 0).any()]
    if not positive:
        raise ValueError(f"{path}: there is no curve with a false accept rate above 0 to draw")
    lowest = min(positive)

    figure, axes = _figure()
    for name, (far, tar) in points.items():
        axes.plot(*_roc_points(far, tar, lowest), drawstyle="steps-post", linewidth=1.6, label=name)
    axes.set_xscale("log")
    axes.set_xlim(lowest, 1.0)
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("true accept rate")
    axes.grid(which="minor", alpha=0.12)
    _legend(axes)
    _write(figure, Path(path))


def plot_loss(steps: Sequence[int], losses: Sequence[float], path: str | Path) -> None:
    """Draws the training loss over steps, with its running mean once there are enough points.

    Args:
        steps: [K], ascending.
        losses: [K]; values that are not finite leave a gap.
        path: the PNG file to write; its folder must exist.

    Raises:
        ValueError: if there is nothing to draw or the lengths differ.
    """
    if len(steps) == 0 or len(steps) != len(losses):
        raise ValueError(f"{path}: {len(steps)} steps and {len(losses)} losses do not make a curve")
    x, y = np.asarray(steps), np.asarray(losses, dtype=np.float64)
    y = np.where(np.isfinite(y), y, np.nan)
    window = len(x) // 25  # about 25 independent means over the whole run

    figure, axes = _figure()
    if window > 1:
        axes.plot(x, y, linewidth=0.8, alpha=0.35, color="C0", label="each step logged")
        axes.plot(x, _running_mean(y, window), linewidth=1.8, color="C0", label=f"mean of {window}")
        _legend(axes)
    else:
        axes.plot(x, y, linewidth=1.6, marker=".", color="C0")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.margins(x=0.01)
    _write(figure, Path(path))


def _figure() -> tuple[Figure, Any]:
    # Imported here, since it takes a second at each start of each rank, and one of them draws at the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Any) -> None:
    """A line above the axes, where it hides no curve."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _roc_points(far: np.ndarray, tar: np.ndarray, lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points, spread evenly over the logarithm, each the best true accept rate at its rate."""
    grid = np.geomspace(lowest, 1.0, _MAX_POINTS)
    at_most = np.searchsorted(far, grid, side="right") - 1
    return grid, tar[np.maximum(at_most, 0)]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of `window` values around each, of fewer at the ends, gaps left out."""
    known = np.isfinite(values)
    sums = np.concatenate([np.zeros(1), np.where(known, values, 0.0).cumsum()])
    counts = np.concatenate([np.zeros(1), known.cumsum()])
    first = np.maximum(np.arange(len(values)) - window // 2, 0)
    last = np.minimum(np.arange(len(values)) - window // 2 + window, len(values))
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def _write(figure: Figure, path: Path) -> None:
    """Writes beside the target and renames, so that a reader never sees half a picture."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
