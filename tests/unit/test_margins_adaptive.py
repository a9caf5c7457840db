"""MagFace, AdaFace, CurricularFace, ElasticFace and AdaCos against their papers, by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from partialfc.margins import AdaCos, AdaFace, CurricularFace, ElasticFace, MagFace, Need, Row

THETA = torch.linspace(0.002, math.pi - 0.002, 500, dtype=torch.float64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(formula: Callable[[float], float]) -> Tensor:
    return doubles(*(formula(theta) for theta in THETA.tolist()))


def make_row(cosine: Tensor, valid: list[bool] | None = None, **more: Tensor) -> Row:
    mask = torch.ones(len(cosine), dtype=torch.bool) if valid is None else torch.tensor(valid, dtype=torch.bool)
    return Row(cosine, mask, 0, **more)


def floats(state) -> dict[str, float]:
    assert all(value.dtype == torch.float64 for value in state.values())
    return {name: float(value) for name, value in state.items()}


# MagFace: m(a) = 0.45 + 0.35 (a - 10) / 100 with the defaults.


def test_magface_margin_is_linear_in_the_norm_and_level_outside():
    norm = doubles(3.0, 10.0, 35.0, 60.0, 110.0, 500.0).requires_grad_()
    parameters, state = MagFace().prepare(make_row(torch.zeros(6).double(), embedding_norm=norm), {})
    assert state == {}
    torch.testing.assert_close(parameters["margin"].detach(), doubles(0.45, 0.45, 0.5375, 0.625, 0.8, 0.8))
    (slope,) = torch.autograd.grad(parameters["margin"].sum(), norm)
    torch.testing.assert_close(slope[[0, 2, 3, 5]], doubles(0.0, 0.0035, 0.0035, 0.0))


def test_magface_target_and_its_gradient_for_the_norm():
    for a in (12.0, 60.0, 100.0):
        m = 0.45 + 0.35 * (a - 10) / 100
        norm = torch.full_like(THETA, a).requires_grad_()
        margin = MagFace()
        parameters, _ = margin.prepare(make_row(THETA.cos(), embedding_norm=norm), {})
        target = margin.target(THETA.cos(), parameters)

        def linear(theta: float, m: float = m) -> float:
            return math.cos(theta + m) if theta < math.pi - m else math.cos(theta) - m * math.sin(m)

        torch.testing.assert_close(target.detach(), by_hand(linear), rtol=0, atol=1e-12)

        # d f / d a = d f / d m * m'(a), m' = 0.0035: not detached.
        def slope(theta: float, m: float = m) -> float:
            return 0.0035 * (-math.sin(theta + m) if theta < math.pi - m else -math.sin(m) - m * math.cos(m))

        (gradient,) = torch.autograd.grad(target.sum(), norm)
        torch.testing.assert_close(gradient, by_hand(slope), rtol=0, atol=1e-12)
        assert bool((gradient < 0).all())  # a longer embedding has it harder


def test_magface_tails():
    parameters = {"margin": torch.full_like(THETA, 0.7)}
    for tail, formula in (
        ("none", lambda theta: math.cos(theta + 0.7)),
        ("easy", lambda theta: math.cos(theta + 0.7) if theta < math.pi / 2 else math.cos(theta)),
    ):
        target = MagFace(tail=tail).target(THETA.cos(), parameters)
        torch.testing.assert_close(target, by_hand(formula), rtol=0, atol=1e-12)


def test_magface_regularizer_and_its_slope():
    # lambda_g (1 / a + a / u^2) and lambda_g (1 / u^2 - 1 / a^2), with u = 110 and lambda_g = 35.
    norm = doubles(3.0, 20.0, 55.0, 109.0, 500.0).requires_grad_()
    terms = MagFace().regularizer(make_row(torch.zeros(5).double(), embedding_norm=norm))
    expected = [35 * (1 / a + a / 110**2) for a in (10.0, 20.0, 55.0, 109.0, 110.0)]
    torch.testing.assert_close(terms.detach(), doubles(*expected), rtol=1e-14, atol=0)
    (slope,) = torch.autograd.grad(terms.sum(), norm)
    inside = [35 * (1 / 110**2 - 1 / a**2) for a in (20.0, 55.0, 109.0)]
    torch.testing.assert_close(slope, doubles(0.0, *inside, 0.0), rtol=1e-12, atol=0)
    assert MagFace().needs == {Need.EMBEDDING_NORM}


# AdaFace


def adaface(norms: list[float], valid: list[bool] | None = None, before=(20.0, 100.0), **settings):
    margin = AdaFace(**settings)
    assert floats(margin.initial_state(10)) == {"norm_mean": 20.0, "norm_deviation": 100.0}
    state = {"norm_mean": doubles(before[0])[0], "norm_deviation": doubles(before[1])[0]}
    row = make_row(torch.zeros(len(norms)).double(), valid, embedding_norm=doubles(*norms).requires_grad_())
    parameters, state = margin.prepare(row, state)
    assert not parameters["quality"].requires_grad
    return parameters["quality"], floats(state)


def test_adaface_updates_its_averages_before_it_uses_them():
    norms = [12.0, 31.0, 25.0, 18.0]
    quality, state = adaface(norms, batch_weight=0.25)
    mean = 0.75 * 20 + 0.25 * statistics.mean(norms)
    deviation = 0.75 * 100 + 0.25 * statistics.stdev(norms)  # unbiased
    assert state == pytest.approx({"norm_mean": mean, "norm_deviation": deviation}, rel=1e-14)
    expected = [0.333 * (a - mean) / (deviation + 1e-3) for a in norms]
    torch.testing.assert_close(quality, doubles(*expected), rtol=1e-12, atol=0)


def test_adaface_by_default_gives_the_batch_a_hundredth():
    _, state = adaface([10.0, 14.0])
    expected = {"norm_mean": 0.99 * 20 + 0.01 * 12, "norm_deviation": 0.99 * 100 + 0.01 * math.sqrt(8)}
    assert state == pytest.approx(expected, rel=1e-14)


def test_adaface_leaves_masked_rows_out_of_its_averages():
    quality, state = adaface([12.0, 1000.0, 31.0, 25.0], [True, False, True, True], batch_weight=0.5)
    mean = 0.5 * 20 + 0.5 * statistics.mean([12.0, 31.0, 25.0])
    deviation = 0.5 * 100 + 0.5 * statistics.stdev([12.0, 31.0, 25.0])
    assert state == pytest.approx({"norm_mean": mean, "norm_deviation": deviation}, rel=1e-14)
    assert float(quality[0]) == pytest.approx(0.333 * (12 - mean) / (deviation + 1e-3), rel=1e-12)


def test_adaface_with_a_single_row_has_a_mean_but_no_deviation():
    _, state = adaface([12.0, 7.0], [True, False], batch_weight=0.5)
    assert state == {"norm_mean": 16.0, "norm_deviation": 100.0}


def test_adaface_without_rows_keeps_its_averages():
    quality, state = adaface([12.0, 7.0], [False, False], batch_weight=0.5)
    assert state == {"norm_mean": 20.0, "norm_deviation": 100.0}
    assert bool(quality.isfinite().all())
    _, state = adaface([], [], batch_weight=0.5)
    assert state == {"norm_mean": 20.0, "norm_deviation": 100.0}


def test_adaface_clips_the_norm_and_the_quality():
    # Norms count as 0.001 to 100, which gives mean 50.0005 and deviation 99.999 / sqrt(2).
    quality, state = adaface([0.0, 5000.0], batch_weight=1.0, concentration=1.0)
    assert state == pytest.approx({"norm_mean": 50.0005, "norm_deviation": 99.999 / math.sqrt(2)}, rel=1e-14)
    torch.testing.assert_close(quality, doubles(-1, 1) * 49.9995 / (99.999 / math.sqrt(2) + 1e-3), rtol=1e-12, atol=0)
    quality, _ = adaface([0.0, 5000.0], batch_weight=1.0, concentration=2.0)
    assert quality.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("z", [-1.0, -0.3, 0.0, 0.6, 1.0])
def test_adaface_target_is_the_formula_of_the_paper(z):
    # g_angle = -m z, g_add = m z + m (eq. 14 and 15).
    def formula(theta: float) -> float:
        shifted = min(max(theta - 0.4 * z, 1e-3), math.pi - 1e-3)
        return math.cos(shifted) - (0.4 * z + 0.4)

    target = AdaFace().target(THETA.cos(), {"quality": torch.full_like(THETA, z)})
    torch.testing.assert_close(target, by_hand(formula), rtol=0, atol=1e-12)


def test_adaface_goes_from_an_angular_to_an_additive_margin():
    theta = THETA[(THETA > 0.5) & (THETA < 2.6)]
    worst = AdaFace().target(theta.cos(), {"quality": torch.full_like(theta, -1.0)})
    torch.testing.assert_close(worst, (theta + 0.4).cos(), rtol=0, atol=1e-12)  # ArcFace
    middle = AdaFace().target(theta.cos(), {"quality": torch.zeros_like(theta)})
    torch.testing.assert_close(middle, theta.cos() - 0.4, rtol=0, atol=1e-12)  # CosFace


# CurricularFace


def test_curricularface_updates_t_before_it_uses_it():
    margin = CurricularFace()
    state = margin.initial_state(10)
    assert floats(state) == {"t": 0.0}
    parameters, state = margin.prepare(make_row(doubles(0.3, 0.9, -0.6)), state)
    assert floats(state) == pytest.approx({"t": 0.01 * 0.2}, rel=1e-12)
    torch.testing.assert_close(parameters["t"], doubles(0.002, 0.002, 0.002))
    parameters, state = margin.prepare(make_row(doubles(0.5)), state)
    assert floats(state) == pytest.approx({"t": 0.99 * 0.002 + 0.01 * 0.5}, rel=1e-12)
    torch.testing.assert_close(parameters["t"], doubles(0.00698))


def test_curricularface_leaves_masked_rows_out_of_t():
    margin, state = CurricularFace(momentum=0.5), {"t": doubles(0.4)[0]}
    _, after = margin.prepare(make_row(doubles(0.3, -0.9, 0.5), [True, False, True]), state)
    assert floats(after) == pytest.approx({"t": 0.5 * 0.4 + 0.5 * 0.4}, rel=1e-12)
    _, after = margin.prepare(make_row(doubles(0.3, 0.9), [False, True]), state)
    assert floats(after) == pytest.approx({"t": 0.5 * 0.4 + 0.5 * 0.9}, rel=1e-12)
    _, after = margin.prepare(make_row(doubles(0.3, -0.9), [False, False]), state)
    assert floats(after) == {"t": 0.4}
    _, after = margin.prepare(make_row(doubles()), state)
    assert floats(after) == {"t": 0.4}


def test_curricularface_negatives_are_hard_above_the_shifted_target():
    margin = CurricularFace(momentum=0.0)
    # Targets at 60 degrees, and so close to pi that theta + 0.5 is past it: there cos(theta + m) = -0.983 counts as it
    # is, although the linear tail of the target is at -1.190.
    theta = [math.pi / 3, math.acos(-0.95)]
    row = make_row(doubles(*(math.cos(t) for t in theta)))
    parameters, state = margin.prepare(row, {"t": doubles(0.7)[0]})
    t = (0.5 - 0.95) / 2
    assert floats(state) == pytest.approx({"t": t})
    limits = [math.cos(angle + 0.5) for angle in theta]
    assert limits == pytest.approx([0.0236, -0.9834], abs=1e-4)
    torch.testing.assert_close(parameters["hard"], doubles(*limits), rtol=0, atol=1e-12)

    cosine = [[0.0, 0.02, 0.03, 0.9], [-1.0, -0.99, -0.98, 0.3]]
    leaf = torch.tensor(cosine, dtype=torch.float64, requires_grad=True)
    values = margin.negative(leaf, parameters)
    (slopes,) = torch.autograd.grad(64.0 * values.sum(), leaf)
    expected, expected_slopes = [], []
    for limit, cosines in zip(limits, cosine, strict=True):
        expected.append([c * (t + c) if c > limit else c for c in cosines])
        expected_slopes.append([64.0 * (t + 2 * c) if c > limit else 64.0 for c in cosines])
    torch.testing.assert_close(values.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(slopes, torch.tensor(expected_slopes, dtype=torch.float64), rtol=1e-12, atol=0)
    # Both kinds are there in both rows.
    assert (values.detach() == leaf.detach()).tolist() == [[True, True, False, False]] * 2


def test_curricularface_target_is_that_of_arcface():
    def linear(theta: float) -> float:
        return math.cos(theta + 0.5) if theta < math.pi - 0.5 else math.cos(theta) - 0.5 * math.sin(0.5)

    torch.testing.assert_close(CurricularFace().target(THETA.cos(), {}), by_hand(linear), rtol=0, atol=1e-12)
    plain = CurricularFace(tail="none").target(THETA.cos(), {})
    torch.testing.assert_close(plain, by_hand(lambda theta: math.cos(theta + 0.5)), rtol=0, atol=1e-12)


def test_curricularface_negatives_have_no_bound():
    assert CurricularFace().logit_bound is None


# ElasticFace


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (ElasticFace(), (0.5, 0.05)),
        (ElasticFace(sort=True), (0.5, 0.0175)),
        (ElasticFace(variant="cos"), (0.35, 0.05)),
        (ElasticFace(variant="cos", sort=True), (0.35, 0.025)),
        (ElasticFace(margin=0.2, deviation=0.01, sort=True), (0.2, 0.01)),
        (ElasticFace(margin=0.0, deviation=0.0), (0.0, 0.0)),
    ],
    ids=str,
)
def test_elasticface_draws_margins_with_the_mean_and_deviation_of_the_paper(margin, expected):
    assert margin.needs == {Need.NOISE}
    assert margin.mean_and_deviation == expected
    noise = doubles(2.0, 0.5, -1.0)  # falling, as are the sorted margins where cosines rise
    parameters, state = margin.prepare(make_row(doubles(-0.5, 0.0, 0.5), noise=noise), {})
    assert state == {}
    mean, deviation = expected
    torch.testing.assert_close(
        parameters["margin"], doubles(mean + 2 * deviation, mean + 0.5 * deviation, mean - deviation)
    )


def test_elasticface_has_a_margin_of_its_own_for_each_row():
    margins = torch.linspace(0.1, 0.9, len(THETA), dtype=torch.float64)

    def arc(theta: float, m: float) -> float:
        return math.cos(theta + m) if theta < math.pi - m else math.cos(theta) - m * math.sin(m)

    pairs = list(zip(THETA.tolist(), margins.tolist(), strict=True))
    for margin, formula in (
        (ElasticFace(), arc),
        (ElasticFace(tail="none"), lambda theta, m: math.cos(theta + m)),
        (ElasticFace(variant="cos"), lambda theta, m: math.cos(theta) - m),
    ):
        expected = doubles(*(formula(theta, m) for theta, m in pairs))
        torch.testing.assert_close(margin.target(THETA.cos(), {"margin": margins}), expected, rtol=0, atol=1e-12)


def sorted_margins(cosine: list[float], noise: list[float], valid: list[bool] | None = None) -> list[float]:
    # With mean 1 and deviation 1 the margins are 1 + noise.
    row = make_row(doubles(*cosine), valid, noise=doubles(*noise))
    return ElasticFace(margin=1.0, deviation=1.0, sort=True).prepare(row, {})[0]["margin"].tolist()


def test_elasticface_plus_gives_the_largest_margin_to_the_hardest_row():
    assert sorted_margins([0.1, 0.9, 0.5], [0.25, 0.75, 0.5]) == [1.75, 1.25, 1.5]
    # Ranks, not the order that sorts: here the two differ.
    assert sorted_margins([0.5, 0.9, 0.1], [0.5, 0.25, -0.5]) == [1.25, 0.5, 1.5]
    assert sorted_margins([0.4, 0.1, 0.2, 0.3], [0.0, 0.25, 0.5, 0.75]) == [1.0, 1.75, 1.5, 1.25]


def test_elasticface_plus_deals_the_margins_of_valid_rows_to_valid_rows():
    # The masked row has the smallest cosine and the largest margin, and takes part with neither.
    margins = sorted_margins([0.6, -0.9, 0.1, 0.3], [0.5, 0.9, 0.25, -0.25], [True, False, True, True])
    assert [margins[0], margins[2], margins[3]] == [0.75, 1.5, 1.25]
    assert sorted_margins([0.6, -0.9], [0.5, 0.75], [False, True])[1] == 1.75


def test_elasticface_without_sorting_does_not_look_at_the_cosine():
    row = make_row(doubles(0.1, 0.9, 0.5), noise=doubles(0.25, 0.75, 0.5))
    assert ElasticFace(margin=1.0, deviation=1.0).prepare(row, {})[0]["margin"].tolist() == [1.25, 1.75, 1.5]


# AdaCos


def adacos(sums: list[float], theta: list[float], valid: list[bool] | None = None, *, dynamic: bool = True) -> float:
    """The scale after a step, from the sums over the other classes and the angles of rows."""
    margin = AdaCos(dynamic=dynamic)
    row = make_row(
        doubles(*(math.cos(t) for t in theta)),
        valid,
        negative_logsumexp=doubles(*(math.log(value) if value else -math.inf for value in sums)),
    )
    state = {"scale": doubles(9.0)[0]}
    parameters, state = margin.prepare(row, state)
    assert torch.equal(margin.logit_scale(parameters), state["scale"].repeat(len(theta)))
    return floats(state)["scale"]


def test_adacos_starts_from_the_number_of_classes():
    assert floats(AdaCos().initial_state(10)) == pytest.approx({"scale": math.sqrt(2) * math.log(9)}, rel=1e-14)
    assert floats(AdaCos().initial_state(85742)) == pytest.approx({"scale": math.sqrt(2) * math.log(85741)}, rel=1e-14)
    assert float(AdaCos().statistic_scale({"scale": doubles(9.0)[0]})) == 9.0
    assert AdaCos().needs == {Need.NEGATIVE_LOGSUMEXP}
    assert AdaCos().needs_sampling_correction
    assert AdaCos().logit_bound is None


def test_adacos_takes_the_mean_of_sums_and_the_median_angle():
    # B = (200 + 1000 + 600) / 3, median 0.5.
    scale = adacos([200.0, 1000.0, 600.0], [0.7, 0.1, 0.5])
    assert scale == pytest.approx(math.log(600) / math.cos(0.5), rel=1e-13)


def test_adacos_takes_the_lower_of_two_medians():
    scale = adacos([200.0, 1000.0, 600.0, 200.0], [0.7, 0.1, 0.5, 0.3])
    assert scale == pytest.approx(math.log(500) / math.cos(0.3), rel=1e-13)


def test_adacos_does_not_take_an_angle_beyond_a_quarter_of_pi():
    scale = adacos([200.0, 1000.0, 600.0], [1.7, 0.1, 1.5])
    assert scale == pytest.approx(math.log(600) / math.cos(math.pi / 4), rel=1e-13)


def test_adacos_leaves_masked_rows_out():
    scale = adacos([200.0, 1e9, 600.0, 1.0], [0.7, 0.1, 0.5, 0.2], [True, False, True, False])
    assert scale == pytest.approx(math.log(400) / math.cos(0.5), rel=1e-13)


@pytest.mark.parametrize(
    ("sums", "valid"),
    [
        ([200.0, 400.0], [False, False]),  # no rows
        ([0.0, 0.0], None),  # no negatives in play
        ([0.5, 0.5], None),  # a negative logarithm
        ([], []),
    ],
)
def test_adacos_keeps_its_scale_when_there_is_no_estimate(sums, valid):
    assert adacos(sums, [0.5, 0.7][: len(sums)], valid) == 9.0


def test_fixed_adacos_keeps_its_scale():
    assert adacos([200.0, 1000.0, 600.0], [0.7, 0.1, 0.5], dynamic=False) == 9.0


def test_adacos_has_no_margin():
    cosine = THETA.cos()
    assert AdaCos().target(cosine, {}) is cosine
    assert AdaCos().negative(cosine[None], {}).data_ptr() == cosine.data_ptr()
