"""SphereFace and FNormSphereFace: psi in angles, the annealing, and what scales the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from partialfc.margins import FNormSphereFace, Margin, Need, Row, SphereFace
from partialfc.margins.angles import monotone_multiple_angle

THETA = torch.linspace(0.002, math.pi - 0.002, 2000, dtype=torch.float64)
NO_ANNEALING = {"lambda_start": 0.0, "lambda_min": 0.0}


def psi(theta: float, m: float) -> float:
    """Eq. 7 of SphereFace: piece k is where theta is in [k pi / m, (k + 1) pi / m]."""
    for k in range(math.ceil(m)):
        if theta <= (k + 1) * math.pi / m:
            return (-1) ** k * math.cos(m * theta) - 2 * k
    raise AssertionError(theta)


def row(cosine: Tensor, norm: Tensor | None = None) -> Row:
    return Row(cosine, torch.ones(len(cosine), dtype=torch.bool), step=0, embedding_norm=norm)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 1.35, 1.7, 2.5, 3.99])
def test_psi_is_the_formula_of_the_paper(m):
    expected = torch.tensor([psi(theta, m) for theta in THETA.tolist()], dtype=torch.float64)
    torch.testing.assert_close(monotone_multiple_angle(THETA.cos(), m), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 1.35, 1.7, 2.5, 3.99])
def test_psi_falls_with_the_angle_and_has_no_jump(m):
    values = monotone_multiple_angle(THETA.cos(), m)
    assert bool((values.diff() < 0).all())
    # |psi'| <= m, so a step of theta moves it by m times that at most.
    assert float(values.diff().abs().max()) <= m * float(THETA[1] - THETA[0]) * 1.001


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_psi_of_an_integer_at_the_ends(m, dtype):
    # psi(0) = 1, psi(pi) = 1 - 2 m; d psi / d cos is m^2 at both, as the derivative of a Chebyshev polynomial.
    cosine = torch.tensor([1.0, -1.0], dtype=dtype, requires_grad=True)
    values = monotone_multiple_angle(cosine, m)
    assert values.tolist() == [1.0, 1.0 - 2 * m]
    assert torch.autograd.grad(values.sum(), cosine)[0].tolist() == [m**2, m**2]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 1.35, 1.7, 2.5])
def test_slope_of_psi_is_a_ratio_of_sines(m):
    # d psi / d cos = (-1)^k m sin(m theta) / sin(theta).
    cosine = THETA.cos().requires_grad_()
    (slope,) = torch.autograd.grad(monotone_multiple_angle(cosine, m).sum(), cosine)
    expected = [(-1) ** int(m * t / math.pi) * m * math.sin(m * t) / math.sin(t) for t in THETA.tolist()]
    torch.testing.assert_close(slope.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_psi_of_four_at_known_angles():
    # theta = pi/3 is in piece 1: -cos(4 pi/3) - 2 = 0.5 - 2; pi/2 is the end of piece 1: -1 - 2; 2 pi/3 in piece 2.
    cosine = torch.tensor([math.pi / 3, math.pi / 2, 2 * math.pi / 3], dtype=torch.float64).cos()
    expected = torch.tensor([-1.5, -3.0, -4.5], dtype=torch.float64)
    torch.testing.assert_close(monotone_multiple_angle(cosine, 4), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [SphereFace, FNormSphereFace])
def test_lambda_falls_from_the_first_step_to_the_floor_at_step_1659(make):
    margin = make()
    cosine = torch.tensor([0.5, -0.5], dtype=torch.float64)
    state = margin.initial_state(10)
    assert {name: float(value) for name, value in state.items()} == {"iteration": 0.0}
    blends = [math.nan]
    for _ in range(1661):
        parameters, state = margin.prepare(row(cosine, torch.ones(2)), state)
        assert parameters["lambda"].shape == (2,)
        assert parameters["lambda"][0] == parameters["lambda"][1]
        blends.append(float(parameters["lambda"][0]))
    assert float(state["iteration"]) == 1661.0
    assert blends[1] == pytest.approx(1000 / 1.12, rel=1e-14)
    assert blends[100] == pytest.approx(1000 / 13, rel=1e-14)
    # 1000 / (1 + 0.12 k) passes 5 between k = 1658 and 1659.
    assert blends[1658] == pytest.approx(1000 / 199.96, rel=1e-14)
    assert blends[1658] > 5.0
    assert blends[1659:] == [5.0, 5.0, 5.0]


def test_lambda_follows_its_settings():
    margin = SphereFace(lambda_start=200.0, lambda_min=0.5, lambda_rate=0.5, lambda_power=2.0)
    state = {"iteration": torch.tensor(5.0, dtype=torch.float64)}
    parameters, state = margin.prepare(row(torch.zeros(1, dtype=torch.float64), torch.ones(1)), state)
    assert float(parameters["lambda"]) == pytest.approx(200.0 / 4**2, rel=1e-14)  # of step 6
    assert float(state["iteration"]) == 6.0


@pytest.mark.parametrize(
    ("margin", "m"),
    [*[(SphereFace(margin=m), m) for m in (1, 2, 3, 4, 5)], *[(FNormSphereFace(margin=m), m) for m in (1.7, 4.0)]],
    ids=str,
)
def test_target_blends_cosine_and_psi(margin: Margin, m):
    for done in (0.0, 99.0, 5000.0):
        state = {"iteration": torch.tensor(done, dtype=torch.float64)}
        parameters, _ = margin.prepare(row(THETA.cos(), torch.ones(len(THETA))), state)
        blend = max(5.0, 1000 / (1 + 0.12 * (done + 1)))
        expected = [(blend * math.cos(t) + psi(t, m)) / (1 + blend) for t in THETA.tolist()]
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(margin.target(THETA.cos(), parameters), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1.0, 1.7, 4.0])
def test_without_annealing_the_target_is_psi(m):
    margin = FNormSphereFace(scale=30.0, margin=m, **NO_ANNEALING)
    parameters, _ = margin.prepare(row(THETA.cos()), margin.initial_state(10))
    expected = torch.tensor([psi(theta, m) for theta in THETA.tolist()], dtype=torch.float64)
    torch.testing.assert_close(margin.target(THETA.cos(), parameters), expected, rtol=0, atol=1e-12)


def test_sphereface_is_scaled_by_the_norm_of_the_embedding_with_gradient():
    margin = SphereFace(**NO_ANNEALING)
    assert margin.needs == {Need.EMBEDDING_NORM}
    assert margin.logit_bound is None
    norm = torch.tensor([2.0, 7.0], dtype=torch.float64, requires_grad=True)
    # At pi / 3 psi of 4 is -1.5.
    cosine = torch.tensor([0.5, 0.5], dtype=torch.float64)
    parameters, _ = margin.prepare(row(cosine, norm), margin.initial_state(10))
    logits = margin.logit_scale(parameters) * margin.target(cosine, parameters)
    torch.testing.assert_close(logits.detach(), torch.tensor([-3.0, -10.5], dtype=torch.float64), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(logits.sum(), norm)
    torch.testing.assert_close(gradient, torch.tensor([-1.5, -1.5], dtype=torch.float64), rtol=1e-14, atol=0)


def test_fnorm_sphereface_is_scaled_by_a_number():
    margin = FNormSphereFace(scale=30.0, margin=1.7, **NO_ANNEALING)
    assert margin.needs == frozenset()
    assert margin.logit_bound == 30.0
    parameters, _ = margin.prepare(row(torch.zeros(2)), margin.initial_state(10))
    assert margin.logit_scale(parameters) == 30.0
