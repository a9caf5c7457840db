"""What holds for every margin: derivatives, the ends, falling with the angle, dtypes, and messages about settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from partialfc.margins import (
    MARGINS,
    AdaCos,
    AdaFace,
    ArcFace,
    CenterLoss,
    CircleLoss,
    CombinedMargin,
    ContrastiveLoss,
    CosFace,
    CurricularFace,
    ElasticFace,
    FNormSphereFace,
    MagFace,
    Margin,
    NormFace,
    Parameters,
    Row,
    Softmax,
    SphereFace,
    SphereFace2,
    TripletLoss,
    UniFace,
    target_similarity,
)

NO_ANNEALING = {"lambda_start": 0.0, "lambda_min": 0.0}
EVERY: list[Margin] = [
    Softmax(),
    NormFace(),
    NormFace(scale=30.0, learned=True),
    CosFace(),
    ArcFace(),
    ArcFace(tail="none"),
    ArcFace(tail="easy"),
    CombinedMargin(m1=0.9, m2=0.4, m3=0.15),
    CircleLoss(),
    *[SphereFace(margin=m, **NO_ANNEALING) for m in (1, 2, 3, 4, 5)],
    SphereFace(),
    FNormSphereFace(),
    *[FNormSphereFace(margin=m, **NO_ANNEALING) for m in (1.35, 1.7, 2.5, 4.0)],
    MagFace(),
    MagFace(tail="none"),
    MagFace(tail="easy"),
    AdaFace(),
    AdaFace(concentration=30.0),
    CurricularFace(),
    CurricularFace(margin=1.2, momentum=0.3, tail="easy"),
    ElasticFace(),
    ElasticFace(deviation=0.3, sort=True),
    ElasticFace(variant="cos"),
    AdaCos(),
    AdaCos(dynamic=False),
    SphereFace2(),
    SphereFace2(exponent=1.0),
    SphereFace2(exponent=2.5),
    UniFace(),
]
HAS_NORM_GRADIENT = (SphereFace, MagFace)
NUM_CLASSES = 10


def learned_of(margin: Margin, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in margin.initial_learned(NUM_CLASSES).items()}


def make_row(cosine: Tensor, norm: Tensor, learned: Mapping[str, Tensor]) -> Row:
    count = len(cosine)
    return Row(
        target_cosine=cosine.detach(),
        valid=torch.ones(count, dtype=torch.bool),
        step=3,
        embedding_norm=norm,
        noise=torch.linspace(-1.5, 1.5, count).to(cosine.dtype),
        negative_logsumexp=torch.linspace(6.0, 9.0, count).to(cosine.dtype),
        learned=learned,
    )


def norms(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(13.0, 97.0, count, dtype=dtype)


def prepared(margin: Margin, cosine: Tensor) -> Parameters:
    row = make_row(cosine, norms(len(cosine), cosine.dtype), learned_of(margin, cosine.dtype))
    return margin.prepare(row, margin.initial_state(NUM_CLASSES))[0]


def slope(function, cosine: Tensor) -> Tensor:
    leaf = cosine.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return gradient


def test_this_file_goes_over_the_whole_table():
    assert {type(margin).__name__ for margin in EVERY} == set(MARGINS)


# The weights of Circle loss are constants by the paper (section 3.1), so its slopes are not derivatives of its values:
# test_margins.py compares them with alpha instead.
@pytest.mark.parametrize("margin", [margin for margin in EVERY if not isinstance(margin, CircleLoss)], ids=str)
def test_exact_gradients_of_logits_are_derivatives_also_through_the_parameters(margin):
    count = 9
    cosine = torch.linspace(-0.97, 0.96, count, dtype=torch.float64)
    with_norm = isinstance(margin, HAS_NORM_GRADIENT)
    learned = learned_of(margin, torch.float64)
    leaves = [norms(count)] * with_norm + list(learned.values())
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    state = margin.initial_state(NUM_CLASSES)

    def parameters(leaves: Sequence[Tensor]) -> Parameters:
        norm, numbers = (leaves[0], leaves[1:]) if with_norm else (norms(count), leaves)
        row = make_row(cosine, norm, dict(zip(learned, numbers, strict=True)))
        return margin.prepare(row, state)[0]

    def own_logits(cosine_B: Tensor, *leaves: Tensor) -> Tensor:
        values = parameters(leaves)
        return margin.logit_scale(values) * margin.target(cosine_B, values)

    def other_logits(cosine_Bn: Tensor, *leaves: Tensor) -> Tensor:
        values = parameters(leaves)
        scale = margin.logit_scale(values)
        scale = scale[:, None] if isinstance(scale, Tensor) else scale
        return scale * margin.negative(cosine_Bn, values)

    other = torch.linspace(-0.93, 0.98, 3 * count, dtype=torch.float64).view(3, count).T.contiguous()
    checked = {"eps": 1e-7, "atol": 1e-5, "rtol": 1e-5}
    assert torch.autograd.gradcheck(own_logits, (cosine.clone().requires_grad_(), *leaves), **checked)
    assert torch.autograd.gradcheck(other_logits, (other.requires_grad_(), *leaves), **checked)
    for gradient in torch.autograd.grad(own_logits(cosine, *leaves).sum(), leaves) if leaves else ():
        # The easy tail has no margin where the cosine is negative, and then none that depends on the norm.
        felt = cosine > 0 if getattr(margin, "tail", "") == "easy" else torch.tensor(True)
        assert torch.equal(gradient != 0, felt.expand_as(gradient))
    if with_norm and isinstance(margin, MagFace):
        row = make_row(cosine, leaves[0], {})
        assert torch.autograd.gradcheck(
            lambda norm: margin.regularizer(replace(row, embedding_norm=norm)), leaves, eps=1e-5
        )


@pytest.mark.parametrize("margin", [margin for margin in EVERY if not isinstance(margin, HAS_NORM_GRADIENT)], ids=str)
def test_no_other_margin_has_a_gradient_for_the_norm(margin):
    cosine = torch.linspace(-0.97, 0.96, 5, dtype=torch.float64)
    row = make_row(cosine, norms(5).requires_grad_(), learned_of(margin, torch.float64))
    parameters, state = margin.prepare(row, margin.initial_state(NUM_CLASSES))
    assert not any(value.requires_grad for value in (*parameters.values(), *state.values()))


ENDS = [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6]


# Circle loss has weights that are constants of the step, and refuses another kind of detachment.
DETACHABLE = [margin for margin in EVERY if not isinstance(margin, CircleLoss)]


@pytest.mark.parametrize("margin", DETACHABLE, ids=str)
def test_detached_gradient_is_one_and_the_values_are_the_same(margin):
    detached = replace(margin, gradient="detached")
    cosine = torch.tensor([*torch.linspace(-0.99, 0.99, 50).tolist(), *ENDS], dtype=torch.float64)
    parameters = prepared(margin, cosine)
    assert torch.equal(
        slope(lambda leaf: target_similarity(detached, leaf, parameters), cosine), torch.ones_like(cosine)
    )
    values = target_similarity(detached, cosine, parameters)
    torch.testing.assert_close(values, margin.target(cosine, parameters), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        detached.negative(cosine[:, None], parameters), margin.negative(cosine[:, None], parameters), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["exact", "detached"])
@pytest.mark.parametrize("margin", EVERY, ids=str)
def test_the_ends_are_finite_and_of_the_dtype_of_the_cosine(margin, gradient, dtype):
    if margin in DETACHABLE:
        margin = replace(margin, gradient=gradient)
    # A product of unit vectors may pass 1 by rounding.
    cosine = torch.tensor(ENDS, dtype=dtype)
    # The row's own cosine is at the end as well.
    parameters = prepared(margin, cosine)
    assert {value.dtype for value in parameters.values()} <= {dtype}
    for function in (
        lambda leaf: margin.logit_scale(parameters) * target_similarity(margin, leaf, parameters),
        lambda leaf: margin.negative(leaf.expand(len(ENDS), -1), parameters),
    ):
        values = function(cosine)
        assert values.dtype == dtype
        assert bool(values.isfinite().all())
        assert bool(slope(function, cosine).isfinite().all())


FALLING: list[Margin] = [
    margin
    for margin in EVERY
    if getattr(margin, "tail", "linear") == "linear" and not isinstance(margin, (CircleLoss, AdaFace))
]


@pytest.mark.parametrize("margin", FALLING, ids=str)
def test_the_target_falls_with_the_angle(margin):
    theta = torch.linspace(0.002, math.pi - 0.002, 2000, dtype=torch.float64)
    rows = prepared(margin, torch.linspace(-0.9, 0.9, 7, dtype=torch.float64))
    for row in range(7):
        # The parameters of one row, with which it turns from theta 0 to pi.
        parameters = {name: value[row].expand(len(theta)) for name, value in rows.items()}
        steps = margin.target(theta.cos(), parameters).diff()
        # g of SphereFace2 is level to all digits at theta = pi.
        assert bool((steps <= 0).all())
        assert bool((steps[theta[1:] < math.pi - 0.1] < 0).all())


@pytest.mark.parametrize("make", [MagFace, ElasticFace], ids=lambda make: make.__name__)
def test_linear_tail_falls_with_the_angle_whatever_the_margin_of_the_row(make):
    theta = torch.linspace(0.002, math.pi - 0.002, 1000, dtype=torch.float64)
    margins = torch.tensor([0.0, 0.1, 0.45, 0.5, 0.8, 1.5, 2.0, 2.4, 2.8, 3.1], dtype=torch.float64)
    parameters = {"margin": margins.repeat_interleave(len(theta))}
    targets = make().target(theta.cos().repeat(len(margins)), parameters).view(len(margins), -1)
    assert bool((targets.diff(dim=1) < 0).all())
    # And each row is ArcFace with that margin.
    for margin, row in zip(margins.tolist(), targets, strict=True):
        torch.testing.assert_close(row, ArcFace(margin=margin).target(theta.cos(), {}), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SphereFace(margin=2.5), "SphereFace.margin is 2.5, but must be an integer from 1 to 32"),
        (lambda: SphereFace(margin=0), "SphereFace.margin is 0, but must be an integer from 1 to 32"),
        (
            lambda: SphereFace(lambda_start=-1.0),
            "SphereFace.lambda_start is -1.0, but must be a number that is not negative",
        ),
        (
            lambda: SphereFace(lambda_min=-1.0),
            "SphereFace.lambda_min is -1.0, but must be a number that is not negative",
        ),
        (
            lambda: SphereFace(lambda_rate=-1.0),
            "SphereFace.lambda_rate is -1.0, but must be a number that is not negative",
        ),
        (
            lambda: FNormSphereFace(lambda_power=-1.0),
            "FNormSphereFace.lambda_power is -1.0, but must be a number that is not negative",
        ),
        (lambda: FNormSphereFace(margin=0.9), "FNormSphereFace.margin is 0.9, but must be a number from 1 to 32"),
        (lambda: FNormSphereFace(scale=0.0), "FNormSphereFace.scale is 0.0, but must be a positive number"),
        (lambda: MagFace(scale=0.0), "MagFace.scale is 0.0, but must be a positive number"),
        (lambda: MagFace(norm_low=0.0), "MagFace.norm_low is 0.0, but must be a positive number"),
        (lambda: MagFace(norm_high=10.0), "MagFace.norm_high is 10.0, but must be more than norm_low, 10.0"),
        (lambda: MagFace(margin_low=-0.1), "MagFace.margin_low is -0.1, but must be in [0, pi), in radians"),
        (
            lambda: MagFace(margin_high=0.4),
            "MagFace.margin_high is 0.4, but must be in [margin_low, pi), 0.45 to pi, in radians",
        ),
        (
            lambda: MagFace(margin_high=3.2),
            "MagFace.margin_high is 3.2, but must be in [margin_low, pi), 0.45 to pi, in radians",
        ),
        (lambda: MagFace(lambda_g=-1.0), "MagFace.lambda_g is -1.0, but must be a number that is not negative"),
        (lambda: MagFace(tail="flat"), "MagFace.tail is 'flat', but must be one of ('linear', 'none', 'easy')"),
        (lambda: AdaFace(margin=1.6), "AdaFace.margin is 1.6, but must be in [0, pi / 2), in radians"),
        (
            lambda: AdaFace(concentration=-1.0),
            "AdaFace.concentration is -1.0, but must be a number that is not negative",
        ),
        (lambda: AdaFace(batch_weight=0.0), "AdaFace.batch_weight is 0.0, but must be in (0, 1]"),
        (lambda: AdaFace(batch_weight=1.1), "AdaFace.batch_weight is 1.1, but must be in (0, 1]"),
        (lambda: CurricularFace(margin=28.6), "CurricularFace.margin is 28.6, but must be in [0, pi), in radians"),
        (lambda: CurricularFace(momentum=1.0), "CurricularFace.momentum is 1.0, but must be in [0, 1)"),
        (lambda: CurricularFace(tail=""), "CurricularFace.tail is '', but must be one of ('linear', 'none', 'easy')"),
        (lambda: ElasticFace(variant="sphere"), "ElasticFace.variant is 'sphere', but must be one of ('arc', 'cos')"),
        (lambda: ElasticFace(margin=-0.1), "ElasticFace.margin is -0.1, but must be in [0, pi), or null"),
        (
            lambda: ElasticFace(deviation=-0.1),
            "ElasticFace.deviation is -0.1, but must be a number that is not negative, or null",
        ),
        (lambda: ElasticFace(tail="flat"), "ElasticFace.tail is 'flat', but must be one of ('linear', 'none', 'easy')"),
        (
            lambda: CircleLoss(gradient="detached"),
            "CircleLoss.gradient is 'detached', but must be 'exact', in which the weights are constants of the step",
        ),
        (lambda: AdaCos(gradient="half"), "AdaCos.gradient is 'half', but must be one of ('exact', 'detached')"),
        (lambda: AdaCos().initial_state(2), "AdaCos has a scale for 3 classes or more, but num_classes is 2"),
        (lambda: SphereFace2(balance=1.0), "SphereFace2.balance is 1.0, but must be in (0, 1)"),
        (lambda: SphereFace2(exponent=0.5), "SphereFace2.exponent is 0.5, but must be a number of at least 1"),
        (lambda: SphereFace2(loss_scale=0.0), "SphereFace2.loss_scale is 0.0, but must be a positive number"),
        (
            lambda: SphereFace2().initial_learned(1),
            "SphereFace2 tells classes apart and needs 2 or more, but num_classes is 1",
        ),
        (lambda: UniFace(negative_weight=0.0), "UniFace.negative_weight is 0.0, but must be a positive number"),
        (lambda: SphereFace(margin=math.inf), "SphereFace.margin is inf, but must be finite, in float32 too"),
        (lambda: CosFace(margin=math.nan), "CosFace.margin is nan, but must be finite, in float32 too"),
        (lambda: CosFace(margin="0.35"), "CosFace.margin is '0.35', but must be a number"),
        (lambda: CosFace(scale=True), "CosFace.scale is True, but must be a number"),
        (lambda: MagFace(norm_high=1e300), "MagFace.norm_high is 1e+300, but must be finite, in float32 too"),
        (lambda: NormFace(learned="false"), "NormFace.learned is 'false', but must be True or False"),
        (lambda: CenterLoss(alpha=math.inf), "CenterLoss.alpha is inf, but must be finite, in float32 too"),
        (lambda: SphereFace2(margin=-1.0), "SphereFace2.margin is -1.0, but must be a number that is not negative"),
        (lambda: UniFace(scale=math.nan), "UniFace.scale is nan, but must be finite, in float32 too"),
        (lambda: CenterLoss(weight=0.0), "CenterLoss.weight is 0.0, but must be a positive number"),
        (lambda: CenterLoss(alpha=-0.5), "CenterLoss.alpha is -0.5, but must be a number that is not negative"),
        (lambda: CenterLoss(update="sgd"), "CenterLoss.update is 'sgd', but must be one of ('paper', 'gradient')"),
        (lambda: ContrastiveLoss(weight=-1.0), "ContrastiveLoss.weight is -1.0, but must be a positive number"),
        (
            lambda: ContrastiveLoss(margin=-1.0),
            "ContrastiveLoss.margin is -1.0, but must be a number that is not negative",
        ),
        (lambda: TripletLoss(weight=math.nan), "TripletLoss.weight is nan, but must be finite, in float32 too"),
        (lambda: TripletLoss(margin=-0.3), "TripletLoss.margin is -0.3, but must be a number that is not negative"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build()
    assert str(error.value) == message
