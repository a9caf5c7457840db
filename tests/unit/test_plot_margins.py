"""The pictures of the losses: that every margin has one, what it shows, and the command that draws them."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from partialfc.margins import MARGINS, ArcFace, ElasticFace, MagFace, SphereFace, UniFace

TOOL = Path(__file__).parents[2] / "tools" / "plot_margins.py"
THETA = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_margins", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def test_every_margin_has_curves_of_its_own(plot):
    assert list(plot.CURVES) == list(MARGINS)
    for name, curves in plot.CURVES.items():
        assert 1 <= len(curves) <= len(plot.COLOURS), name
        assert not curves[0].negative, name
        assert {type(curve.margin) for curve in curves} == {MARGINS[name]}
        assert len({curve.label for curve in curves}) == len(curves), name


def test_curves_are_what_the_margins_say(plot):
    cosine = THETA.cos()
    torch.testing.assert_close(plot.Curve("", ArcFace()).logit(THETA), 64 * (THETA + 0.5).cos())
    low, _, high = plot.CURVES["MagFace"]
    torch.testing.assert_close(low.logit(THETA), 64 * (THETA + 0.45).cos())
    torch.testing.assert_close(high.logit(THETA), 64 * (THETA + 0.8).cos())
    elastic = plot.Curve("", ElasticFace(), noise=-1.0)
    torch.testing.assert_close(elastic.logit(THETA), 64 * (THETA + 0.45).cos())
    for curve, quality in zip(plot.CURVES["AdaFace"], (-1, 0, 1), strict=True):
        expected = 64 * ((THETA - 0.4 * quality).clamp(min=1e-3).cos() - 0.4 * (1 + quality))
        torch.testing.assert_close(curve.logit(THETA), expected)
    # cos(60 degrees + 0.5) is the border, above which another class is hard.
    negative = next(curve for curve in plot.CURVES["CurricularFace"] if curve.state == {"t": 0.3})
    torch.testing.assert_close(negative.logit(THETA)[:2], 64 * cosine[:2] * (0.3 + cosine[:2]))
    torch.testing.assert_close(negative.logit(THETA)[2], 64 * cosine[2])
    bias = math.log(1e7)
    torch.testing.assert_close(plot.Curve("", UniFace(), negative=True).logit(THETA), 64 * cosine - bias)
    torch.testing.assert_close(plot.Curve("", SphereFace(), norm=3.0).plain_logit(THETA), 3 * cosine)
    small, large = (curve.logit(torch.zeros(1, dtype=torch.float64)) for curve in plot.CURVES["AdaCos"])
    torch.testing.assert_close(torch.cat([small, large]) ** 2 / 2, torch.tensor([999.0, 999_999.0]).double().log() ** 2)


def test_slopes_are_derivatives(plot):
    curve = plot.Curve("", MagFace(), norm=10.0)
    torch.testing.assert_close(curve.slope(THETA, "exact"), -64 * (THETA + 0.45).sin())
    torch.testing.assert_close(curve.slope(THETA, "detached"), -64 * THETA.sin())


def test_settings_are_written_as_in_the_documentation(plot):
    assert plot.settings_text(ArcFace()) == "scale 64, margin 0.5, tail linear"
    assert (
        plot.settings_text(ElasticFace())
        == "scale 64, variant arc, margin null, deviation null, sort false, tail linear"
    )


def test_the_command_writes_the_same_small_pictures_each_time(plot, tmp_path, capsys):
    names = ["CurricularFace", "UniFace"]
    for folder in (tmp_path / "new" / "a", tmp_path / "new" / "b"):
        plot.main(["--out", str(folder), "--only", *names])
        assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in names]
    assert capsys.readouterr().out.splitlines()[:2] == [str(tmp_path / "new" / "a" / f"{name}.png") for name in names]
    for name in names:
        path = tmp_path / "new" / "a" / f"{name}.png"
        assert path.read_bytes() == (tmp_path / "new" / "b" / f"{name}.png").read_bytes()
        assert path.stat().st_size < 40_000
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("PNG", (900, 340))
            assert picture.info == {}
            assert len(picture.convert("RGB").getcolors()) > 20


def test_an_unknown_name_is_an_error_that_lists_the_names(plot, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plot.main(["--out", str(tmp_path / "out"), "--only", "ArcFace", "Arcface"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"--only has Arcface, but must have names of margins: {', '.join(MARGINS)}" in message
    assert not (tmp_path / "out").exists()
