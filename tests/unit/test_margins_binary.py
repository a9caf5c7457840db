"""SphereFace2 and UniFace against their papers, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from partialfc.head import reference_loss
from partialfc.margins import Aggregate, Margin, Row, SphereFace2, UniFace

THETA = torch.linspace(0.002, math.pi - 0.002, 500, dtype=torch.float64)
BIAS = 1.7


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def parameters(margin: Margin, count: int, bias: Tensor | None = None):
    bias = doubles(BIAS)[0] if bias is None else bias
    row = Row(torch.zeros(count).double(), torch.ones(count, dtype=torch.bool), 0, learned={"bias": bias})
    values, state = margin.prepare(row, margin.initial_state(10))
    assert state == {}
    return values


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def g(z: float, t: float = 3.0) -> float:
    return 2 * ((z + 1) / 2) ** t - 1


def test_g_of_sphereface2_at_known_places():
    # 2 (1/2)^3 - 1 = -3/4; the ends stay; (3/4)^3 = 27/64.
    margin = SphereFace2(margin=0.0)
    cosine = doubles(-1.0, 0.0, 0.5, 1.0)
    target = margin.target(cosine, parameters(margin, 4, doubles(0.0)[0]))
    assert target.tolist() == [-1.0, -0.75, 27 / 32 - 1, 1.0]


@pytest.mark.parametrize("t", [1.0, 2.0, 2.5, 3.0])
def test_logits_of_sphereface2_are_the_formula_of_the_paper(t):
    # r (g(cos) - m) + b for the own class, r (g(cos) + m) + b for the others.
    margin = SphereFace2(exponent=t)
    values = parameters(margin, len(THETA))
    own = margin.logit_scale(values) * margin.target(THETA.cos(), values)
    other = margin.logit_scale(values) * margin.negative(THETA.cos()[:, None], values)[:, 0]
    expected_own = [40 * (g(math.cos(theta), t) - 0.4) + BIAS for theta in THETA.tolist()]
    expected_other = [40 * (g(math.cos(theta), t) + 0.4) + BIAS for theta in THETA.tolist()]
    torch.testing.assert_close(own, doubles(*expected_own), rtol=0, atol=1e-12)
    torch.testing.assert_close(other, doubles(*expected_other), rtol=0, atol=1e-12)


def test_logits_of_uniface_are_the_formula_of_the_paper():
    # s (cos - m) - b for the own class, s cos - b for the others.
    margin = UniFace()
    values = parameters(margin, len(THETA))
    own = margin.logit_scale(values) * margin.target(THETA.cos(), values)
    other = margin.logit_scale(values) * margin.negative(THETA.cos()[:, None], values)[:, 0]
    torch.testing.assert_close(own, 64 * (THETA.cos() - 0.4) - BIAS, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, 64 * THETA.cos() - BIAS, rtol=0, atol=1e-12)


def test_slopes_of_negatives_of_sphereface2():
    # g' = t ((z + 1) / 2)^(t - 1); 1 if the gradient is detached, as in the authors' code.
    cosine = THETA.cos()[None].requires_grad_()
    for gradient, expected in (("exact", 3 * ((THETA.cos() + 1) / 2) ** 2), ("detached", torch.ones_like(THETA))):
        margin = SphereFace2(gradient=gradient)
        (slope,) = torch.autograd.grad(margin.negative(cosine, parameters(margin, 1)).sum(), cosine)
        torch.testing.assert_close(slope[0], expected, rtol=1e-12, atol=0)


def test_both_halves_of_the_row_loss():
    own, negatives = doubles(0.3, -2.0, 60.0, -60.0), doubles(0.5, 7.0, 0.0, 1.0)
    both = list(zip(own.tolist(), negatives.tolist(), strict=True))
    # l_w / r (lambda softplus(-own) + (1 - lambda) sum softplus(other)), with the sum given.
    expected = [50 / 40 * (0.7 * softplus(-z) + 0.3 * n) for z, n in both]
    torch.testing.assert_close(SphereFace2().row_loss(own, negatives), doubles(*expected), rtol=1e-12, atol=1e-15)
    expected = [2 / 30 * (0.9 * softplus(-z) + 0.1 * n) for z, n in both]
    other = SphereFace2(scale=30.0, balance=0.9, loss_scale=2.0).row_loss(own, negatives)
    torch.testing.assert_close(other, doubles(*expected), rtol=1e-12, atol=1e-15)
    expected = [softplus(-z) + 0.25 * n for z, n in both]
    unified = UniFace(negative_weight=0.25).row_loss(own, negatives)
    torch.testing.assert_close(unified, doubles(*expected), rtol=1e-12, atol=1e-15)


def whole_loss(margin: Margin, cosine: list[list[float]], labels: list[int], bias: Tensor) -> Tensor:
    # With unit vectors along the axes as class centers, an embedding of length 1 is its list of cosines.
    count = len(cosine[0])
    rows = []
    for cosines in cosine:
        rest = math.sqrt(1 - sum(c * c for c in cosines))
        rows.append([*cosines, rest])
    centers = torch.eye(count + 1, dtype=torch.float64)[:count]
    embeddings = torch.tensor(rows, dtype=torch.float64)
    return reference_loss(embeddings, torch.tensor(labels), centers, margin, learned={"bias": bias})[0]


COSINES, LABELS = [[0.1, -0.3, 0.6, 0.2], [0.5, 0.05, -0.2, 0.1]], [2, 1]


def test_sphereface2_is_a_sum_of_binary_losses():
    margin, bias = SphereFace2(scale=5.0), doubles(BIAS)[0].requires_grad_()
    expected, slope = 0.0, 0.0
    for cosines, label in zip(COSINES, LABELS, strict=True):
        for j, c in enumerate(cosines):
            z = 5 * (g(c) - 0.4) + BIAS if j == label else 5 * (g(c) + 0.4) + BIAS
            expected += 50 / 5 * (0.7 * softplus(-z) if j == label else 0.3 * softplus(z)) / 2
            slope += 50 / 5 * (-0.7 * sigmoid(-z) if j == label else 0.3 * sigmoid(z)) / 2
    loss = whole_loss(margin, COSINES, LABELS, bias)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(torch.autograd.grad(loss, bias)[0]) == pytest.approx(slope, rel=1e-12)


def test_uniface_is_a_sum_of_binary_losses():
    margin, bias = UniFace(scale=5.0, negative_weight=0.5), doubles(BIAS)[0].requires_grad_()
    expected, slope = 0.0, 0.0
    for cosines, label in zip(COSINES, LABELS, strict=True):
        for j, c in enumerate(cosines):
            z = 5 * (c - 0.4) - BIAS if j == label else 5 * c - BIAS
            expected += (softplus(-z) if j == label else 0.5 * softplus(z)) / 2
            slope += (sigmoid(-z) if j == label else -0.5 * sigmoid(z)) / 2
    loss = whole_loss(margin, COSINES, LABELS, bias)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(torch.autograd.grad(loss, bias)[0]) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize(("num_classes", "bias"), [(2_000_000, 0.33864), (10572, 5.5816), (85742, 3.4882)])
def test_first_bias_of_sphereface2_at_known_numbers_of_classes(num_classes, bias):
    assert SphereFace2().initial_learned(num_classes) == {"bias": pytest.approx(bias, abs=5e-5)}


@pytest.mark.parametrize(
    ("settings", "num_classes"),
    [
        *[({}, count) for count in (4, 100, 10572, 2_000_000, 100_000_000)],
        *[({"balance": 0.9, "margin": 0.2}, count) for count in (10, 10572, 2_000_000)],
        *[({"scale": 10.0, "exponent": 1.0}, count) for count in (2, 3, 10572)],
        # With lambda / ((1 - lambda) (C - 1)) above 1 the usual form of the root cancels.
        *[({}, count) for count in (2, 3)],
        ({"scale": 64.0}, 3),
        ({"scale": 64.0, "balance": 0.99}, 20),
    ],
)
def test_first_bias_of_sphereface2_is_where_the_two_pulls_balance(settings, num_classes):
    # The slope of the loss for the bias when all cosines are 0: its two terms cancel.
    margin = SphereFace2(**settings)
    bias = margin.initial_learned(num_classes)["bias"]
    level = 2 * 0.5**margin.exponent - 1
    own = margin.balance * sigmoid(-(margin.scale * (level - margin.margin) + bias))
    other = (1 - margin.balance) * (num_classes - 1) * sigmoid(margin.scale * (level + margin.margin) + bias)
    assert own == pytest.approx(other, rel=1e-9)


def test_first_bias_of_sphereface2_has_no_gradient_at_right_angles():
    # The same through the loss itself: 8 classes, and an embedding at right angles to all of them.
    bias = doubles(SphereFace2().initial_learned(8)["bias"])[0].requires_grad_()
    loss = whole_loss(SphereFace2(), [[0.0] * 8], [3], bias)
    (slope,) = torch.autograd.grad(loss, bias)
    assert abs(float(slope)) < 1e-12
    shifted = (bias.detach() + 0.1).requires_grad_()
    (slope,) = torch.autograd.grad(whole_loss(SphereFace2(), [[0.0] * 8], [3], shifted), shifted)
    assert float(slope) > 0.01


def test_first_bias_of_uniface():
    assert UniFace().initial_learned(2_000_000) == {"bias": pytest.approx(16.8, abs=0.02)}
    assert UniFace().initial_learned(100) == {"bias": pytest.approx(math.log(1000), rel=1e-15)}


@pytest.mark.parametrize("make", [SphereFace2, UniFace])
def test_both_are_sums_over_independent_classes(make):
    margin = make()
    assert margin.aggregate is Aggregate.SOFTPLUS_SUM
    assert margin.needs_sampling_correction
    assert not margin.allows_several_labels
    assert margin.logit_bound is None
    assert margin.initial_state(10) == {}
