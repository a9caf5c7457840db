"""Margins that are the same for every row, against the formulas of their papers, written out in angles.

The others have files of their own, and `test_margins_all.py` has what holds for every margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import partialfc.margins
from partialfc.margins import (
    MARGINS,
    ArcFace,
    CircleLoss,
    CombinedMargin,
    CosFace,
    Margin,
    Need,
    NormFace,
    Row,
    ScaledMargin,
    Softmax,
    target_similarity,
)

# Angles from 0 to pi without the ends, where the arc cosine is cut off, and without pi / 2, where "easy" jumps.
THETA = torch.linspace(0.002, math.pi - 0.002, 2000, dtype=torch.float64)

ALL_MARGINS: list[Margin] = [
    Softmax(),
    NormFace(),
    CosFace(),
    ArcFace(),
    ArcFace(tail="none"),
    ArcFace(tail="easy"),
    ArcFace(margin=2.8),
    CombinedMargin(),
    CombinedMargin(m1=1.35, m2=0.0, m3=0.0),
    CombinedMargin(m1=0.9, m2=0.4, m3=0.15),
    CombinedMargin(m1=0.5, m2=0.2, m3=0.0),
    CombinedMargin(m1=1.35, m2=0.2, m3=0.1, tail="none"),
]


def value(margin: Margin, cosine: Tensor) -> Tensor:
    return target_similarity(margin, cosine, {})


def slope(margin: Margin, cosine: Tensor) -> Tensor:
    leaf = cosine.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(margin, leaf).sum(), leaf)
    return gradient


def by_hand(formula: Callable[[float], float]) -> Tensor:
    return torch.tensor([formula(theta) for theta in THETA.tolist()], dtype=torch.float64)


def arc_linear(theta: float) -> float:
    return math.cos(theta + 0.5) if theta < math.pi - 0.5 else math.cos(theta) - 0.5 * math.sin(0.5)


def arc_easy(theta: float) -> float:
    return math.cos(theta + 0.5) if theta < math.pi / 2 else math.cos(theta)


def sphere_linear(theta: float) -> float:
    # cos(1.35 theta) reaches -1 at pi / 1.35; from there on the cosine itself, lowered to meet it.
    seam = math.pi / 1.35
    return math.cos(1.35 * theta) if theta < seam else math.cos(theta) - math.cos(seam) - 1


def combined_linear(theta: float) -> float:
    if theta + 0.3 < math.pi:
        return math.cos(theta + 0.3) - 0.2
    return math.cos(theta) - 0.3 * math.sin(0.3) - 0.2


@pytest.mark.parametrize(
    ("margin", "formula"),
    [
        (Softmax(), math.cos),
        (NormFace(), math.cos),
        (CosFace(margin=0.35), lambda theta: math.cos(theta) - 0.35),
        (ArcFace(margin=0.5), arc_linear),
        (ArcFace(margin=0.5, tail="none"), lambda theta: math.cos(theta + 0.5)),
        (ArcFace(margin=0.5, tail="easy"), arc_easy),
        (CombinedMargin(m1=1.0, m2=0.3, m3=0.2), combined_linear),
        (CombinedMargin(m1=1.35, m2=0.0, m3=0.0), sphere_linear),
        (CombinedMargin(m1=0.9, m2=0.4, m3=0.15, tail="none"), lambda theta: math.cos(0.9 * theta + 0.4) - 0.15),
        # 0.5 theta + 0.2 never passes pi, so there is no tail.
        (CombinedMargin(m1=0.5, m2=0.2, m3=0.0), lambda theta: math.cos(0.5 * theta + 0.2)),
    ],
    ids=lambda value: str(value) if isinstance(value, Margin) else "",
)
@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_target_is_the_formula_of_the_paper(margin, formula, gradient):
    margin = type(margin)(**{**vars(margin), "gradient": gradient})
    torch.testing.assert_close(value(margin, THETA.cos()), by_hand(formula), rtol=0, atol=1e-12)


def test_negatives_are_left_as_they_are():
    cosine = THETA.cos()[None]
    for margin in ALL_MARGINS:
        assert margin.negative(cosine, {}) is cosine


@pytest.mark.parametrize(
    "margin",
    [
        *[ArcFace(margin=m) for m in (0.0, 0.1, 0.5, 1.5, 2.4, 2.8, 3.1)],
        CombinedMargin(m1=1.35, m2=0.0, m3=0.0),
        CombinedMargin(m1=1.35, m2=0.5, m3=0.1),
        CombinedMargin(m1=3.0, m2=0.2, m3=0.0),
        CombinedMargin(m1=0.9, m2=0.4, m3=0.15),
        CombinedMargin(m1=0.5, m2=0.2, m3=0.0),
    ],
    ids=str,
)
def test_linear_tail_keeps_the_target_falling_with_the_angle(margin):
    # Where theta is near 0 or pi the arc cosine is cut off, and the target is level.
    targets = value(margin, torch.cat([torch.tensor([1.0]), THETA.cos(), torch.tensor([-1.0])]))
    assert bool((targets.diff() <= 0).all())
    assert bool((targets[1:-1].diff() < 0).all())


def test_without_tail_the_target_rises_again_past_pi():
    assert float(value(ArcFace(margin=0.5, tail="none"), THETA.cos()).diff()[-1]) > 0


def test_no_tail_changes_an_angle_that_never_passes_pi():
    # At theta = pi itself 0.5 theta + 0.2 is still far below pi.
    at_pi = value(CombinedMargin(m1=0.5, m2=0.2, m3=0.0), torch.tensor([-1.0], dtype=torch.float64))
    assert float(at_pi) == pytest.approx(math.cos(0.5 * math.pi + 0.2), abs=1e-3)


@pytest.mark.parametrize("margin", ALL_MARGINS, ids=str)
def test_exact_gradient_is_the_derivative(margin):
    cosine = torch.linspace(-0.99, 0.99, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda cosine: value(margin, cosine), (cosine,), eps=1e-7, atol=1e-6)


def test_exact_derivative_of_arcface_is_a_ratio_of_sines():
    theta = torch.linspace(0.002, math.pi - 0.502, 500, dtype=torch.float64)
    expected = (theta + 0.5).sin() / theta.sin()
    torch.testing.assert_close(slope(ArcFace(margin=0.5), theta.cos()), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("margin", ALL_MARGINS, ids=str)
def test_detached_gradient_is_one_and_the_values_are_the_same(margin):
    detached = type(margin)(**{**vars(margin), "gradient": "detached"})
    cosine = torch.cat([torch.tensor([-1.0]), THETA.cos(), torch.tensor([1.0])])
    assert torch.equal(slope(detached, cosine), torch.ones_like(cosine))
    torch.testing.assert_close(value(detached, cosine), value(margin, cosine), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["exact", "detached"])
@pytest.mark.parametrize("margin", ALL_MARGINS, ids=str)
def test_the_ends_are_finite(margin, gradient, dtype):
    margin = type(margin)(**{**vars(margin), "gradient": gradient})
    # A product of unit vectors may pass 1 by rounding.
    cosine = torch.tensor([1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6], dtype=dtype)
    assert bool(value(margin, cosine).isfinite().all())
    assert bool(slope(margin, cosine).isfinite().all())


def test_arcface_and_cosface_are_cases_of_the_combined_margin():
    cosine = THETA.cos()
    for m in (0.0, 0.3, 0.5, 2.8):
        for tail in ("linear", "none", "easy"):
            combined = CombinedMargin(m1=1.0, m2=m, m3=0.0, tail=tail)
            assert torch.equal(value(ArcFace(margin=m, tail=tail), cosine), value(combined, cosine))
            assert torch.equal(slope(ArcFace(margin=m, tail=tail), cosine), slope(combined, cosine))
    combined = CombinedMargin(m1=1.0, m2=0.0, m3=0.35)
    torch.testing.assert_close(value(CosFace(margin=0.35), cosine), value(combined, cosine), rtol=0, atol=1e-14)
    torch.testing.assert_close(slope(CosFace(margin=0.35), cosine), slope(combined, cosine), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ArcFace(scale=0), "ArcFace.scale is 0, but must be a positive number"),
        (lambda: CosFace(scale=math.nan), "CosFace.scale is nan, but must be finite, in float32 too"),
        (lambda: Softmax(gradient="half"), "Softmax.gradient is 'half', but must be one of ('exact', 'detached')"),
        (lambda: ArcFace(margin=-0.1), "ArcFace.margin is -0.1, but must be in [0, pi), in radians"),
        (lambda: ArcFace(margin=28.6), "ArcFace.margin is 28.6, but must be in [0, pi), in radians"),
        (lambda: ArcFace(tail="flat"), "ArcFace.tail is 'flat', but must be one of ('linear', 'none', 'easy')"),
        (lambda: CombinedMargin(m1=0.0), "CombinedMargin.m1 is 0.0, but must be a positive number"),
        (lambda: CombinedMargin(m2=4.0), "CombinedMargin.m2 is 4.0, but must be in [0, pi), in radians"),
        (lambda: CombinedMargin(tail=""), "CombinedMargin.tail is '', but must be one of ('linear', 'none', 'easy')"),
        (lambda: CircleLoss(margin=1.0), "CircleLoss.margin is 1.0, but must be in (-1, 1)"),
        (lambda: CircleLoss(margin=-1.0), "CircleLoss.margin is -1.0, but must be in (-1, 1)"),
        (lambda: NormFace(scale=-1.0, learned=True), "NormFace.scale is -1.0, but must be a positive number"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    assert str(error.value) == message


def test_the_table_has_every_margin():
    exported = {
        name: entry
        for name in partialfc.margins.__all__
        if isinstance(entry := getattr(partialfc.margins, name), type) and issubclass(entry, Margin)
    }
    assert exported.pop("Margin") is Margin
    assert exported.pop("ScaledMargin") is ScaledMargin
    assert exported == MARGINS


def test_only_normalised_plain_negatives_have_a_bound():
    assert Softmax().logit_bound is None
    assert ArcFace(scale=64.0).logit_bound == 64.0
    assert NormFace(scale=30.0).logit_bound == 30.0
    # Its weights bring a negative to 240, and a trained scale may grow to anything.
    assert CircleLoss().logit_bound is None
    assert NormFace(scale=30.0, learned=True).logit_bound is None


def test_the_margins_here_need_nothing_and_keep_nothing():
    row = Row(torch.zeros(2), torch.ones(2, dtype=torch.bool), step=0)
    for margin in [*ALL_MARGINS, CircleLoss()]:
        assert margin.needs == frozenset[Need]()
        assert margin.initial_state(10) == {}
        assert margin.initial_learned(10) == {}
        parameters, state = margin.prepare(row, margin.initial_state(10))
        assert parameters == {}
        assert state == {}
        assert margin.logit_scale(parameters) == margin.scale
        assert margin.regularizer(row) is None


def test_softmax_alone_has_a_class_bias_and_compares_no_cosines():
    assert Softmax().has_class_bias
    assert not Softmax(bias=False).has_class_bias
    assert not Softmax().compares_cosines
    for margin in [*ALL_MARGINS[1:], CircleLoss()]:
        assert margin.compares_cosines
        assert not margin.has_class_bias


@pytest.mark.parametrize("m", [-0.3, 0.0, 0.25, 0.6])
def test_circle_loss_is_the_formula_of_the_paper(m):
    # The two brackets reach 0 at cos = 1 + m and cos = -m.
    def own(theta: float) -> float:
        return max(1 + m - math.cos(theta), 0.0) * (math.cos(theta) - (1 - m))

    def other(theta: float) -> float:
        return max(math.cos(theta) + m, 0.0) * (math.cos(theta) - m)

    margin = CircleLoss(margin=m)
    torch.testing.assert_close(value(margin, THETA.cos()), by_hand(own), rtol=0, atol=1e-14)
    torch.testing.assert_close(margin.negative(THETA.cos()[None], {})[0], by_hand(other), rtol=0, atol=1e-14)


@pytest.mark.parametrize("m", [-0.3, 0.0, 0.25, 0.6])
def test_slopes_of_circle_loss_are_the_weights_of_the_paper(m):
    # alpha_p = [O_p - s_p]_+ with O_p = 1 + m, and alpha_n = [s_n - O_n]_+ with O_n = -m (eq. 5), both constants, so
    # that the slope is not the derivative of the value.
    margin = CircleLoss(margin=m)
    own = by_hand(lambda theta: max(1 + m - math.cos(theta), 0.0))
    torch.testing.assert_close(slope(margin, THETA.cos()), own, rtol=0, atol=1e-14)
    cosine = THETA.cos()[None].requires_grad_()
    (slopes,) = torch.autograd.grad(margin.negative(cosine, {}).sum(), cosine)
    other = by_hand(lambda theta: max(math.cos(theta) + m, 0.0))
    torch.testing.assert_close(slopes[0], other, rtol=0, atol=1e-14)


def test_circle_loss_of_the_paper_at_a_quarter():
    # Decision boundary (s_n)^2 + (s_p - 1)^2 = 2 m^2: at s_p = 0.75, s_n = 0.25 both logits are 0.
    margin = CircleLoss(margin=0.25)
    assert float(value(margin, torch.tensor([0.75]))) == 0.0
    assert float(margin.negative(torch.tensor([[0.25]]), {})) == 0.0
    assert 256 * float(value(margin, torch.tensor([-1.0]))) == -1008.0
    assert 256 * float(margin.negative(torch.tensor([[1.0]]), {})) == 240.0


def test_normface_learns_its_scale():
    margin = NormFace(scale=30.0, learned=True)
    assert margin.initial_learned(10) == {"scale": 30.0}
    scale = torch.tensor(25.0, dtype=torch.float64, requires_grad=True)
    cosine = torch.tensor([0.5, -0.25, 0.75], dtype=torch.float64)
    row = Row(cosine, torch.ones(3, dtype=torch.bool), step=0, learned={"scale": scale})
    parameters, state = margin.prepare(row, margin.initial_state(10))
    assert state == {}
    logits = margin.logit_scale(parameters) * value(margin, cosine)
    torch.testing.assert_close(logits, torch.tensor([12.5, -6.25, 18.75], dtype=torch.float64), rtol=1e-15, atol=0)
    assert float(torch.autograd.grad(logits.sum(), scale)[0]) == 1.0  # the sum of the cosines
