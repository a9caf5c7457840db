from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from partialfc.evaluation.plots import _roc_points, _running_mean, plot_loss, plot_roc


def curve(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    thresholds = torch.linspace(6, -6, 5000, dtype=torch.float64)
    far = torch.special.ndtr(-thresholds)
    return far, torch.special.ndtr(shift - thresholds)


def is_drawing(path: Path) -> bool:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    return pixels.shape[0] > 400 and len(colours) > 20


def test_roc_is_drawn_without_global_state(tmp_path: Path) -> None:
    plot_roc({"step 100": curve(1.0), "step 2000": curve(3.0)}, tmp_path / "roc.png")
    assert is_drawing(tmp_path / "roc.png")
    assert [path.name for path in tmp_path.iterdir()] == ["roc.png"]
    assert pyplot.get_fignums() == []


def test_roc_points_never_show_more_than_the_curve_has() -> None:
    far = np.array([0.0, 0.0, 0.01, 0.01, 0.5, 1.0])
    tar = np.array([0.0, 0.2, 0.3, 0.6, 0.7, 1.0])
    grid, best = _roc_points(far, tar, 0.001)
    assert best[grid < 0.01].max() == 0.2
    assert best[(grid >= 0.01) & (grid < 0.5)].tolist() == [0.6] * int(((grid >= 0.01) & (grid < 0.5)).sum())
    assert best[-1] == 1.0


def test_loss_is_drawn_with_gaps(tmp_path: Path) -> None:
    steps = list(range(0, 5000, 10))
    losses = [10 * 0.999**step + 0.5 * (step % 7) for step in steps]
    losses[40] = float("nan")
    plot_loss(steps, losses, tmp_path / "loss.png")
    assert is_drawing(tmp_path / "loss.png")
    plot_loss([1, 2, 3], [3.0, 2.0, 1.0], str(tmp_path / "loss.png"))
    assert is_drawing(tmp_path / "loss.png")


def test_running_mean_is_centered_and_skips_gaps() -> None:
    values = np.array([4.0, 2.0, np.nan, 6.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(_running_mean(values, 3), [3.0, 3.0, 4.0, 6.0, 6.0, np.nan, np.nan])
    np.testing.assert_allclose(_running_mean(values, 2), [4.0, 3.0, 2.0, 6.0, 6.0, np.nan, np.nan])


def test_plots_refuse_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"roc\.png: there is no curve"):
        plot_roc({}, tmp_path / "roc.png")
    with pytest.raises(ValueError, match=r"loss\.png: 2 steps and 1 losses"):
        plot_loss([1, 2], [1.0], tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError):
        plot_loss([1], [1.0], tmp_path / "missing" / "loss.png")
    assert list(tmp_path.iterdir()) == []
