"""Dense decay: rows that are not in play move as if every row were updated in every step, and are touched only in play.

The expectation is that of torch.optim.SGD over all rows of a [C, K D] matrix, with a gradient of zero where a row is
not in play. Everything is in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import CenterSGD, PartialFC
from partialfc.head import idle_steps, reference_loss
from partialfc.margins import CosFace, Softmax

NUM_CLASSES, DIM, STEPS, SAMPLE_RATE = 130, 6, 35, 0.1
MARGIN = CosFace(scale=16.0)
OPTIMIZERS = {
    "momentum": CenterSGD(momentum=0.9, weight_decay=0.05, decay="dense"),
    "plain": CenterSGD(momentum=0.0, weight_decay=0.05, decay="dense"),
    "no decay": CenterSGD(momentum=0.9, weight_decay=0.0, decay="dense"),
}
EVERY_WAY = pytest.mark.parametrize("fused", [True, False], ids=["fused", "autograd"])
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(4, DIM, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(NUM_CLASSES, (4,), generator=generator)


def learning_rate_at(step: int) -> float:
    return 0.3 * (1 + math.cos(step)) / 2 + 0.01


def build(optimizer: CenterSGD, **options: Any) -> PartialFC:
    options = {"margin": MARGIN, "sample_rate": SAMPLE_RATE, "dtype": torch.float64, "init_std": 1.0, **options}
    return PartialFC(NUM_CLASSES, DIM, optimizer=optimizer, **options)


def train(head: PartialFC, step: int) -> float:
    embeddings, labels = batch(step)
    head.learning_rate = learning_rate_at(step)
    loss = head(embeddings, labels)
    loss.backward()
    return float(loss.detach())


def in_play(head: PartialFC, step: int) -> Tensor:
    """[C] bool."""
    assert head.sampler is not None
    rows = head.sampler.in_play(batch(step)[1], head.partition, step).rows
    assert rows is not None
    return torch.zeros(NUM_CLASSES, dtype=torch.bool).index_fill(0, rows, True)


class Expected:
    """All rows in every step, by torch.optim.SGD."""

    def __init__(self, head: PartialFC, optimizer: CenterSGD) -> None:
        self.head, self.centers = head, head.gather_class_centers().requires_grad_()
        settings = {"momentum": optimizer.momentum, "weight_decay": optimizer.weight_decay}
        self.optimizer = torch.optim.SGD([self.centers], lr=1.0, **settings)

    def train(self, step: int) -> float:
        embeddings, labels = batch(step)
        chosen = in_play(self.head, step)
        loss, _ = reference_loss(embeddings, (chosen.cumsum(0) - 1)[labels], self.centers[chosen], MARGIN)
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(step)
        self.optimizer.zero_grad()
        loss.backward()
        assert self.centers.grad is not None
        assert not bool(self.centers.grad[~chosen].any())
        self.optimizer.step()
        return float(loss.detach())

    @property
    def momentum(self) -> Tensor:
        """[C, D], zero before the first step."""
        value = self.optimizer.state[self.centers].get("momentum_buffer")
        return torch.zeros_like(self.centers) if value is None else value


def assert_up_to_date(head: PartialFC, expected: Expected) -> None:
    state = head.state_dict()
    rows = {name: state[f"class_centers.{name}"].flatten(0, 1)[:NUM_CLASSES, 0] for name in head.class_centers.formats}
    torch.testing.assert_close(rows["weight"], expected.centers.detach(), rtol=0, atol=1e-10)
    if "momentum" in rows:
        torch.testing.assert_close(rows["momentum"], expected.momentum, rtol=0, atol=1e-10)


@EVERY_WAY
@EVERY_OPTIMIZER
def test_it_equals_an_update_of_all_rows(optimizer, fused):
    head = build(optimizer, fused=fused)
    expected = Expected(head, optimizer)
    ages = []
    for step in range(STEPS):
        # Nothing else looks at the head, so that rows fall far behind.
        assert train(head, step) == pytest.approx(expected.train(step), rel=1e-10)
        ages.append(int((head.class_centers.idle.count - head.class_centers.current_n).max()))
    assert max(ages) > 20
    torch.testing.assert_close(head.gather_class_centers(), expected.centers.detach(), rtol=0, atol=1e-10)
    assert_up_to_date(head, expected)
    # The lazy law ends elsewhere.
    lazy = build(replace(optimizer, decay="lazy"), fused=fused)
    for step in range(STEPS):
        train(lazy, step)
    difference = (lazy.gather_class_centers() - expected.centers.detach()).abs().max()
    assert float(difference) > 0.05 or not (optimizer.momentum or optimizer.weight_decay)


@EVERY_WAY
@pytest.mark.parametrize("most_steps", [1, 7, 4096])
@EVERY_OPTIMIZER
def test_a_look_at_any_step_sees_all_rows_up_to_date(optimizer, most_steps, fused, monkeypatch):
    monkeypatch.setattr(idle_steps, "_MOST_STEPS", most_steps)
    head = build(optimizer, fused=fused)
    expected = Expected(head, optimizer)
    for step in range(STEPS):
        assert train(head, step) == pytest.approx(expected.train(step), rel=1e-10)
        assert head.class_centers.idle.count < most_steps
        centers, look = expected.centers.detach(), step % 5
        if look == 0:
            torch.testing.assert_close(head.gather_class_centers(), centers, rtol=0, atol=1e-10)
        elif look == 1:
            assert_up_to_date(head, expected)
        elif look == 2:
            embeddings, labels = batch(1000 + step)
            loss = head.eval()(embeddings, labels)
            torch.testing.assert_close(loss, reference_loss(embeddings, labels, centers, MARGIN)[0], rtol=1e-10, atol=0)
            head.train()
    assert_up_to_date(head, expected)


@pytest.mark.parametrize("most_steps", [1, 7])
@EVERY_OPTIMIZER
def test_across_the_point_where_all_rows_must_be_brought_up_to_date(optimizer, most_steps, monkeypatch):
    monkeypatch.setattr(idle_steps, "_MOST_STEPS", most_steps)
    head = build(optimizer)
    expected = Expected(head, optimizer)
    for step in range(STEPS):
        train(head, step)
        expected.train(step)
        assert head.class_centers.idle.count == (step + 1) % most_steps
        assert len(head.class_centers.idle._products) <= most_steps + 1
    assert_up_to_date(head, expected)


@EVERY_OPTIMIZER
def test_across_saving_and_loading(optimizer, tmp_path):
    head = build(optimizer)
    expected = Expected(head, optimizer)
    for step in range(STEPS):
        if step in (3, 17):
            torch.save(head.state_dict(), tmp_path / "head.pt")
            head = build(optimizer, seed=0)
            # What the new one noted before it was loaded is not part of what it has loaded.
            for other in range(2):
                train(head, 500 + other)
            head.load_state_dict(torch.load(tmp_path / "head.pt"))
            assert head.step == step
        assert train(head, step) == pytest.approx(expected.train(step), rel=1e-10)
    assert_up_to_date(head, expected)


def test_saving_changes_nothing():
    saving, straight = (build(OPTIMIZERS["momentum"]) for _ in range(2))
    for step in range(STEPS):
        train(saving, step)
        train(straight, step)
        saving.state_dict()
    torch.testing.assert_close(saving.gather_class_centers(), straight.gather_class_centers(), rtol=0, atol=1e-10)


@EVERY_WAY
@EVERY_OPTIMIZER
def test_a_step_that_is_skipped_moves_no_row_at_all(optimizer, fused):
    head = build(optimizer, fused=fused)
    expected = Expected(head, optimizer)
    for step in range(STEPS):
        if step % 4 == 2:
            embeddings, labels = batch(step)
            embeddings[0, 0] = math.nan
            head.learning_rate = learning_rate_at(step)
            head(embeddings, labels).backward()
            continue
        train(head, step)
        expected.train(step)
    assert head.step == STEPS
    assert_up_to_date(head, expected)


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["momentum"], OPTIMIZERS["plain"]], ids=["momentum", "plain"])
def test_setting_the_centers_forgets_what_rows_had_to_catch_up_with(optimizer):
    head = build(optimizer)
    for step in range(5):
        train(head, step)
    centers = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    head.set_class_centers(centers)
    assert torch.equal(head.gather_class_centers(), centers)
    expected = Expected(head, optimizer)
    for step in range(5, 15):
        train(head, step)
        expected.train(step)
    assert_up_to_date(head, expected)


@EVERY_WAY
@EVERY_OPTIMIZER
def test_with_all_rows_in_play_dense_is_lazy_bit_for_bit(optimizer, fused):
    dense, lazy = (
        build(replace(optimizer, decay=decay), sample_rate=1.0, fused=fused, dtype=torch.float32)
        for decay in ("dense", "lazy")
    )
    for step in range(5):
        assert train(dense, step) == train(lazy, step)
    got, expected = dense.state_dict(), lazy.state_dict()
    assert got.keys() == expected.keys()
    names = [name for name in expected if isinstance(expected[name], Tensor)]
    assert all(torch.equal(got[name], expected[name]) for name in names)


@EVERY_WAY
def test_rows_are_touched_only_when_in_play(fused):
    head = build(OPTIMIZERS["momentum"], fused=fused)
    centers = head.class_centers
    moved = torch.zeros(NUM_CLASSES, dtype=torch.bool)
    for step in range(STEPS):
        before = {name: centers.read(name, None).clone() for name in centers.formats}
        stamps = centers.current_n.clone()
        train(head, step)
        chosen = in_play(head, step)
        for name, value in before.items():
            changed = (centers.read(name, None) != value).flatten(1).any(1)
            assert torch.equal(changed, chosen), f"{name} at step {step}"
        assert torch.equal(centers.current_n[~chosen], stamps[~chosen])
        assert bool((centers.current_n[chosen] == step + 1).all())
        moved |= chosen
    assert not bool(moved.all()), "some rows were never in play"


def test_several_sub_centers_and_class_biases():
    """K rows for each class fall behind together; biases have no decay, and stay lazy."""
    head = build(OPTIMIZERS["momentum"], margin=Softmax(), num_subcenters=3)
    lazy = build(replace(OPTIMIZERS["momentum"], decay="lazy"), margin=Softmax(), num_subcenters=3)
    never = torch.ones(NUM_CLASSES, dtype=torch.bool)
    before = head.gather_class_centers()
    assert before.shape == (NUM_CLASSES, 3, DIM)
    for step in range(3):
        train(head, step)
        train(lazy, step)
        never &= ~in_play(head, step)
    assert 60 < int(never.sum()) < NUM_CLASSES
    # What no gradient ever reached has decayed three times, with the momentum of decay by hand.
    weight, momentum = before[never], torch.zeros_like(before[never])
    for step in range(3):
        momentum = 0.9 * momentum + 0.05 * weight
        weight = weight - learning_rate_at(step) * momentum
    torch.testing.assert_close(head.gather_class_centers()[never], weight, rtol=0, atol=1e-12)
    assert torch.equal(lazy.gather_class_centers()[never], before[never])
    assert head.class_bias is not None
    assert not head.class_bias.optimizer.moves_idle_rows
    assert not bool(head.class_bias.read("momentum", None)[never].any())
