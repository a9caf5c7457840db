"""Learning rates against numbers worked out by hand, and the optimizer of the backbone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from partialfc.optim import Cosine, MultiStep, Polynomial, build_optimizer, learning_rate_at, set_learning_rate


def rates(schedule, *, total: int, warmup: int = 0, base: float = 1.0) -> list[float]:
    return [
        learning_rate_at(step, base=base, total_steps=total, warmup_steps=warmup, schedule=schedule)
        for step in range(total + 1)
    ]


def test_warm_up_rises_from_one_step_of_it_to_the_full_rate():
    assert rates(Polynomial(power=1.0), total=8, warmup=4, base=0.4) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0]
    )


def test_without_warm_up_the_first_step_is_at_full_rate():
    assert rates(Polynomial(power=1.0), total=4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_polynomial_of_power_two_is_the_default():
    assert rates(Polynomial(), total=5, warmup=1, base=16.0) == [16.0, 16.0, 9.0, 4.0, 1.0, 0.0]


def test_cosine_ends_at_its_minimum():
    # 0.1 + 0.9 * (1 + cos(pi * progress)) / 2 at progress 0, 1/3, 1/2, 2/3, 1.
    schedule = Cosine(minimum=0.1)
    by_step = rates(schedule, total=8, warmup=2, base=10.0)
    assert by_step[:3] == pytest.approx([5.0, 10.0, 10.0])
    assert by_step[4] == pytest.approx(10.0 * (0.1 + 0.9 * 0.75))
    assert by_step[5] == pytest.approx(5.5)
    assert by_step[6] == pytest.approx(10.0 * (0.1 + 0.9 * 0.25))
    assert by_step[8] == pytest.approx(1.0)
    assert rates(Cosine(), total=3)[3] == pytest.approx(0.0, abs=1e-15)


def test_multistep_falls_at_its_milestones_counted_from_the_start_of_the_run():
    by_step = rates(MultiStep(milestones=(0.5, 0.8)), total=10, warmup=2, base=1.0)
    assert by_step == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_multistep_meets_a_milestone_that_floats_miss():
    assert 0.55 * 100 > 55
    by_step = rates(MultiStep(milestones=(0.55,), decay=0.5), total=100)
    assert by_step[54:56] == [1.0, 0.5]


def test_multistep_without_milestones_is_constant():
    assert rates(MultiStep(), total=3, warmup=1, base=0.3) == [0.3] * 4


@pytest.mark.parametrize("schedule", [Polynomial(), Cosine(minimum=0.2), MultiStep(milestones=(0.5,))])
def test_rates_are_positive_within_the_run_never_above_base_and_stay_after_it(schedule):
    by_step = rates(schedule, total=50, warmup=7, base=0.3)
    assert all(0.0 < rate <= 0.3 for rate in by_step[:50])
    after = learning_rate_at(1000, base=0.3, total_steps=50, warmup_steps=7, schedule=schedule)
    assert after == by_step[50]


@pytest.mark.parametrize("schedule", [Polynomial(), Cosine(), MultiStep()])
def test_a_run_of_warm_up_alone(schedule):
    assert rates(schedule, total=4, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step is -1, but steps count from 0"),
        ({"warmup_steps": 11}, r"warmup_steps is 11, but must be in \[0, total_steps\], and total_steps is 10"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_impossible_steps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_at(
            **({"step": 0, "base": 1.0, "total_steps": 10, "warmup_steps": 2, "schedule": Cosine()} | arguments)
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Polynomial(power=0.0), "power of the polynomial schedule is 0.0, but must be above 0"),
        (lambda: Polynomial(power=math.nan), "power of the polynomial schedule is nan"),
        (lambda: Cosine(minimum=1.5), r"minimum of the cosine schedule is 1.5, but must be in \[0, 1\]"),
        (lambda: MultiStep(milestones=(10, 16)), r"are \[10, 16\], but must be rising shares of the run in \(0, 1\)"),
        (lambda: MultiStep(milestones=(0.8, 0.5)), r"are \[0.8, 0.5\]"),
        (lambda: MultiStep(milestones=(0.5, 0.5)), r"are \[0.5, 0.5\]"),
        (lambda: MultiStep(decay=0.0), r"decay of the multistep schedule is 0.0, but must be in \(0, 1\]"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_sgd_step_by_hand():
    network = Network()
    optimizer = build_optimizer(network, name="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    for _ in range(2):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    # v1 = 0.3 + 0.1 * 1 = 0.4, w1 = 0.8; v2 = 0.9 * 0.4 + 0.3 + 0.1 * 0.8 = 0.74, w2 = 0.8 - 0.37.
    for parameter in (network.linear.weight, network.linear.bias, network.norm.weight):
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.43))
    assert network.fixed.eq(1).all()


def test_adamw_step_by_hand():
    network = Network()
    optimizer = build_optimizer(network, name="adamw", learning_rate=0.5, weight_decay=0.1, betas=(0.8, 0.9))
    nn.init.ones_(network.linear.weight)
    network.linear.weight.grad = torch.full((3, 2), 0.3)
    optimizer.step()
    # The first Adam step is the learning rate times the sign of the gradient: 1 * (1 - 0.5 * 0.1) - 0.5.
    torch.testing.assert_close(network.linear.weight.detach(), torch.full((3, 2), 0.45))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_may_spare_norms_and_biases(name):
    network = Network()
    decaying, spared = build_optimizer(
        network, name=name, learning_rate=0.1, weight_decay=0.2, decay_norms=False
    ).param_groups
    assert [id(parameter) for parameter in decaying["params"]] == [id(network.linear.weight)]
    assert [parameter.numel() for parameter in spared["params"]] == [3, 3, 3]
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    everything = build_optimizer(network, name=name, learning_rate=0.1, weight_decay=0.2).param_groups
    assert [group["weight_decay"] for group in everything] == [0.2]


def test_set_learning_rate_reaches_all_groups():
    optimizer = build_optimizer(Network(), name="sgd", learning_rate=0.1, decay_norms=False)
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


def test_wrong_optimizers_are_explained():
    with pytest.raises(ValueError, match='unknown optimizer "adam"; known are sgd, adamw'):
        build_optimizer(Network(), name="adam", learning_rate=0.1)
    with pytest.raises(ValueError, match="Identity has no trainable parameter"):
        build_optimizer(nn.Identity(), name="sgd", learning_rate=0.1)
