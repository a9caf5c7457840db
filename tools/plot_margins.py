"""A picture of each loss: what its margin makes of the angle to the own class center, and of the gradient.

    python tools/plot_margins.py --out docs/images/losses
    python tools/plot_margins.py --out /tmp/losses --only ArcFace MagFace

Left, the logit of the own class against the angle theta; where the margin differs from row to row or from step to step,
a line for each of a few rows; dashed, the logit of another class at that angle, where it is not just the scaled cosine.
Right, the derivative of the own logit with respect to theta, with the exact gradient and with the detached one. It is
taken by autograd through the margin itself: nothing of a loss is written here, only which rows are shown.

The same code and the same matplotlib write the same bytes.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from partialfc.margins import (
    MARGINS,
    AdaCos,
    AdaFace,
    CircleLoss,
    CurricularFace,
    ElasticFace,
    FNormSphereFace,
    GradientMode,
    MagFace,
    Margin,
    Parameters,
    Row,
    Softmax,
    SphereFace,
    SphereFace2,
    State,
    UniFace,
    target_similarity,
)

COLOURS = ["#3a86d1", "#e0566a", "#33b07d", "#e8a33d"]
GREY, DARK = "#8c8c8c", "#202020"
# Between the whole degrees: at 0 and 180 the derivative of the arc cosine has no value.
DEGREES = torch.arange(0.125, 180.0, 0.25, dtype=torch.float64)


@dataclass(frozen=True)
class Curve:
    """One line: a margin, and the row and the moment it is shown for.

    Attributes:
        label: in the legend.
        margin: with its settings.
        negative: whether it is the logit of another class, at that angle, and not of the own one.
        target_degrees: with `negative`, the angle of the row to its own class.
        num_classes: what first scales and biases depend on.
        state: of the margin, where it is not the first one.
        norm: of the embedding.
        noise: the row's draw from the standard normal distribution.
        length: product of the lengths of embedding and class center, for margins that do not normalise them.
    """

    label: str
    margin: Margin
    negative: bool = False
    target_degrees: float = 60.0
    num_classes: int = 1_000_000
    state: Mapping[str, float] = field(default_factory=dict)
    norm: float = 20.0
    noise: float = 0.0
    length: float = 1.0

    def _parameters(self, cosine_B: Tensor) -> Parameters:
        given: State = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.state.items()}
        learned = self.margin.initial_learned(self.num_classes)
        row = Row(
            target_cosine=cosine_B.detach(),
            # Rows that are not valid leave the state as it is given.
            valid=torch.zeros_like(cosine_B, dtype=torch.bool),
            step=0,
            embedding_norm=torch.full_like(cosine_B, self.norm),
            noise=torch.full_like(cosine_B, self.noise),
            negative_logsumexp=torch.zeros_like(cosine_B),
            learned={name: torch.tensor(value, dtype=torch.float64) for name, value in learned.items()},
        )
        return self.margin.prepare(row, {**self.margin.initial_state(self.num_classes), **given})[0]

    def logit(self, theta_B: Tensor) -> Tensor:
        """[B] angles in radians -> [B], of the own class or of another."""
        similarity_B = self.length * torch.cos(theta_B)
        if not self.negative:
            parameters = self._parameters(similarity_B)
            similarity_B = target_similarity(self.margin, similarity_B, parameters)
        else:
            target = self.length * math.cos(math.radians(self.target_degrees))
            parameters = self._parameters(torch.full_like(similarity_B, target))
            similarity_B = self.margin.negative(similarity_B[:, None], parameters)[:, 0]
        return self.margin.logit_scale(parameters) * similarity_B

    def plain_logit(self, theta_B: Tensor) -> Tensor:
        """[B] angles in radians -> [B], the scaled similarity without a margin."""
        similarity_B = self.length * torch.cos(theta_B)
        return self.margin.logit_scale(self._parameters(similarity_B)) * similarity_B

    def slope(self, theta_B: Tensor, gradient: GradientMode) -> Tensor:
        """[B] angles in radians -> [B], derivative of the logit with respect to the angle, by autograd."""
        theta_B = theta_B.clone().requires_grad_()
        logit_B = replace(self, margin=replace(self.margin, gradient=gradient)).logit(theta_B)
        return torch.autograd.grad(logit_B.sum(), theta_B)[0]


def _curves() -> dict[str, list[Curve]]:
    adaface = {"norm_mean": 20.0, "norm_deviation": 5.0}
    annealing = [("step 1", 0), ("step 100", 99), ("step 1659 and later", 1658)]
    varied = {
        "Softmax": [Curve(f"‖x‖ ‖w‖ = {length}", Softmax(), length=length) for length in (10, 20, 40)],
        "SphereFace": [Curve(f"{when}, norm 20", SphereFace(), state={"iteration": done}) for when, done in annealing],
        "FNormSphereFace": [
            *(Curve(when, FNormSphereFace(), state={"iteration": done}) for when, done in annealing),
            Curve("m 1.7, lambda 0", FNormSphereFace(margin=1.7, lambda_start=0.0, lambda_min=0.0)),
        ],
        "CircleLoss": [Curve("own class", CircleLoss()), Curve("other class", CircleLoss(), negative=True)],
        "MagFace": [Curve(f"norm {norm}", MagFace(), norm=norm) for norm in (10, 60, 110)],
        "AdaFace": [
            Curve(f"norm {text}", AdaFace(), state=adaface, norm=20.0 + 5.0 * deviations)
            for text, deviations in (("low, z = -1", -4), ("mean, z = 0", 0), ("high, z = 1", 4))
        ],
        "CurricularFace": [
            Curve("own class", CurricularFace()),
            *(
                Curve(f"other class, t = {t}, own at 60°", CurricularFace(), negative=True, state={"t": t})
                for t in (0.0, 0.3, 0.6)
            ),
        ],
        "ElasticFace": [
            Curve(text, ElasticFace(), noise=noise) for text, noise in (("-1 σ", -1), ("mean", 0), ("+1 σ", 1))
        ],
        "AdaCos": [
            Curve(f"{count:,} classes, first scale", AdaCos(), num_classes=count) for count in (1_000, 1_000_000)
        ],
        "SphereFace2": [
            Curve("own class, 1,000,000 classes", SphereFace2()),
            Curve("other class", SphereFace2(), negative=True),
        ],
        "UniFace": [
            Curve("own class, 1,000,000 classes", UniFace()),
            Curve("other class", UniFace(), negative=True),
        ],
    }
    # A margin that is the same for every row has one line, with its defaults.
    return {name: varied.get(name) or [Curve("own class", margin())] for name, margin in MARGINS.items()}


CURVES = _curves()
"""The lines of each picture, by the name of the loss."""


def settings_text(margin: Margin) -> str:
    """The settings but `gradient`, such as "scale 64, margin 0.35"."""
    pairs = [(entry.name, getattr(margin, entry.name)) for entry in fields(margin) if entry.name != "gradient"]
    return ", ".join(f"{name} {_text(value)}" for name, value in pairs)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else f"{value:g}"


def picture(name: str) -> bytes:
    """A PNG of the loss of that name."""
    curves = CURVES[name]
    figure = Figure(figsize=(9.0, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{name}: {settings_text(curves[0].margin)}", fontsize=9.5, color=DARK)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_xlabel("θ in degrees", fontsize=8.5)
        axes.set_xlim(0, 180)
        axes.set_xticks(range(0, 181, 30))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    theta = torch.deg2rad(DEGREES)
    _draw_logits(left, curves, theta)
    _draw_slopes(right, [(curve, COLOURS[place]) for place, curve in enumerate(curves) if not curve.negative], theta)
    return _png(figure)


def _draw_logits(axes: Any, curves: Sequence[Curve], theta: Tensor) -> None:
    plain: list[Tensor] = []
    for curve in curves:
        # Of curves with several scales, each scaled cosine once.
        logit = curve.plain_logit(theta).detach()
        if not any(torch.allclose(logit, other) for other in plain):
            axes.plot(DEGREES, logit, color=GREY, linewidth=0.9, zorder=3, label=None if plain else "no margin")
            plain.append(logit)
    for place, curve in enumerate(curves):
        style = {"linestyle": (0, (4, 2)), "linewidth": 1.5} if curve.negative else {"linewidth": 1.9}
        axes.plot(DEGREES, curve.logit(theta).detach(), color=COLOURS[place], label=curve.label, **style)
    axes.set_title("logit", fontsize=9, loc="left")
    axes.legend(loc="best", fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none")


def _draw_slopes(axes: Any, curves: Sequence[tuple[Curve, str]], theta: Tensor) -> None:
    for curve, colour in curves:
        axes.plot(DEGREES, curve.slope(theta, "exact"), color=colour, linewidth=2.4)
    detached: list[Tensor] = []
    for curve, _ in curves:
        slope = curve.slope(theta, "detached")
        if not any(torch.allclose(slope, other) for other in detached):
            axes.plot(DEGREES, slope, color=DARK, linewidth=1.2, linestyle=(0, (2, 2)))
            detached.append(slope)
    axes.set_title("derivative of the own logit, per radian", fontsize=9, loc="left")
    lines = [Line2D([], [], color=COLOURS[0], linewidth=2.4), Line2D([], [], color=DARK, linestyle=(0, (2, 2)))]
    axes.legend(lines, ["exact", "detached"], loc="upper center", ncols=2, fontsize=7.5, frameon=False)
    axes.set_ylim(top=axes.get_ylim()[1] + 0.14 * (axes.get_ylim()[1] - axes.get_ylim()[0]))


def _png(figure: Figure) -> bytes:
    """Few colours, so that the file is small, and nothing in it but the picture."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CURVES), help="these losses; all if left out")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in CURVES]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}, but must have names of margins: {', '.join(CURVES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.out / f"{name}.png"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(picture(name))
        partial.replace(path)
        print(path)


if __name__ == "__main__":
    main()
