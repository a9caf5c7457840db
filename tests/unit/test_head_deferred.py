"""Updates that wait until it is known whether a step is made: all of it then happens, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import CenterAdamW, CenterSGD, HeadGroup, PartialFC
from partialfc.head import VariationalPrototypes
from partialfc.margins import AdaFace, ArcFace, CenterLoss, CosFace, CurricularFace, NormFace, Softmax, UniFace

NUM_CLASSES, DIM, BATCH, STEPS = 130, 8, 6, 5
NO_DELAY = VariationalPrototypes(weight=0.4, start_step=1)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"margin": ArcFace()},
    "sampled, state of a margin": {"margin": AdaFace(), "sample_rate": 0.3, "optimizer": CenterAdamW(0.01)},
    "learned number": {"margin": NormFace(scale=16.0, learned=True)},
    "class biases": {"margin": Softmax(), "sample_rate": 0.3},
    "everything": {
        "margin": UniFace(scale=16.0),
        "sample_rate": 0.3,
        "auxiliaries": [CenterLoss(weight=0.1)],
        "variational": NO_DELAY,
    },
    "autograd": {"margin": CurricularFace(), "fused": False, "auxiliaries": [CenterLoss()], "variational": NO_DELAY},
    "autograd, biases": {"margin": Softmax(), "fused": False, "sample_rate": 0.3},
    "host memory": {"margin": CosFace(), "sample_rate": 0.3, "offload": True},
    "dense decay": {"margin": CosFace(), "sample_rate": 0.3, "optimizer": CenterSGD(decay="dense")},
    "16 bits": {
        "margin": CosFace(),
        "dtype": torch.float16,
        "sample_rate": 0.3,
        "optimizer": CenterSGD(momentum_dtype="int8"),
    },
}


def build(name: str, *, defers: bool = True) -> PartialFC:
    head = PartialFC(NUM_CLASSES, DIM, init_std=1.0, seed=3, **HEADS[name])
    head.defers_updates = defers
    return head


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(BATCH, DIM, generator=generator).requires_grad_()
    return embeddings, torch.randint(NUM_CLASSES, (BATCH,), generator=generator)


def backward(head: PartialFC, step: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the embeddings)."""
    embeddings, labels = batch(step)
    loss = head(factor * embeddings, labels)
    loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


def everything(head: PartialFC) -> dict[str, Any]:
    """A copy of all that a checkpoint would have, but for the step."""
    state = {name: value.clone() for name, value in head.state_dict().items() if isinstance(value, Tensor)}
    margin = head.get_extra_state()["margin"].items()
    return state | {f"margin {name}": value.clone() for name, value in margin}


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("name", HEADS)
def test_deferred_steps_that_are_made_are_ordinary_steps(name: str) -> None:
    at_once, deferred = build(name, defers=False), build(name)
    for step in range(STEPS):
        expected, got = backward(at_once, step), backward(deferred, step)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        deferred.finish_update(True)
        assert deferred.step == at_once.step == step + 1
        assert deferred.diagnostics() == at_once.diagnostics()
        assert_equal(everything(deferred), everything(at_once))


@pytest.mark.parametrize("name", HEADS)
def test_a_step_that_is_not_made_moves_nothing_and_counts(name: str) -> None:
    head = build(name)
    for step in range(2):
        backward(head, step)
        head.finish_update(True)
    before, diagnostics = everything(head), head.diagnostics()
    backward(head, 2)
    head.finish_update(False)
    assert head.step == 3
    assert_equal(everything(head), before)
    assert head.diagnostics() == diagnostics
    # With the next step it goes on.
    backward(head, 3)
    head.finish_update(True)
    assert head.step == 4
    assert not torch.equal(head.state_dict()["class_centers.weight"], before["class_centers.weight"])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("defers", [True, False])
def test_a_loss_that_is_not_finite_moves_nothing(name: str, defers: bool) -> None:
    head = build(name, defers=defers)
    backward(head, 0)
    if defers:
        head.finish_update(True)
    before = everything(head)
    loss, _ = backward(head, 1, factor=float("nan"))
    assert bool(loss.isnan())
    if defers:
        head.finish_update(True)
    assert head.step == 2
    assert_equal(everything(head), before)


def test_nothing_has_moved_before_the_update_is_finished() -> None:
    head = build("everything")
    before = everything(head)
    backward(head, 0)
    assert head.step == 0
    assert_equal(everything(head), before)


def test_the_order_of_calls() -> None:
    head = build("plain")
    with pytest.raises(RuntimeError, match="finish_update was called on a PartialFC without an update that waits"):
        head.finish_update(True)
    embeddings, labels = batch(0)
    loss = head(embeddings, labels)
    with pytest.raises(RuntimeError, match="without an update that waits"):
        head.finish_update(True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()
    for mode in (True, False):
        head.train(mode)
        with pytest.raises(RuntimeError, match="update of its last step waits, since defers_updates is True"):
            head(embeddings, labels)
    head.train()
    head.finish_update(True)
    assert head.step == 1
    with pytest.raises(RuntimeError, match="without an update that waits"):
        head.finish_update(True)
    # Other class centers, or those of a checkpoint, take the place of an update that waits.
    backward(head, 1)
    head.set_class_centers(torch.eye(NUM_CLASSES, DIM) + 1)
    with pytest.raises(RuntimeError, match="without an update that waits"):
        head.finish_update(True)
    backward(head, 1)
    head.load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match="without an update that waits"):
        head.finish_update(True)


def group(*, defers: bool) -> HeadGroup:
    heads = HeadGroup({"a": build("plain"), "b": build("learned number")})
    heads.defers_updates = defers
    return heads


def group_backward(heads: HeadGroup, step: int, factor_of_b: float = 1.0) -> None:
    embeddings, labels = batch(step)
    factors = torch.tensor([[1.0]] * 3 + [[factor_of_b]] * 3)
    heads(factors * embeddings, {"a": labels[:3], "b": labels[3:]}).backward()


def test_a_group_defers_and_finishes_all_of_its_heads() -> None:
    at_once, deferred = group(defers=False), group(defers=True)
    assert not at_once.defers_updates
    assert deferred.defers_updates
    assert all(deferred[name].defers_updates for name in deferred.names)
    for step in range(3):
        group_backward(at_once, step)
        group_backward(deferred, step)
        deferred.finish_update(True)
    for name in deferred.names:
        assert_equal(everything(deferred[name]), everything(at_once[name]))
    before = [everything(deferred[name]) for name in deferred.names]
    group_backward(deferred, 3)
    deferred.finish_update(False)
    # Nor does anything move if the loss of one head is not finite.
    group_backward(deferred, 4, factor_of_b=float("nan"))
    deferred.finish_update(True)
    for name, expected in zip(deferred.names, before, strict=True):
        assert_equal(everything(deferred[name]), expected)
        assert deferred[name].step == 5


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1])
def test_a_learning_rate_that_is_none(rate: float) -> None:
    head = build("plain", defers=False)
    before, head.learning_rate = everything(head), rate
    with pytest.raises(ValueError, match=rf"learning_rate of the head is {rate}, but must be finite and not negative"):
        head(*batch(0))
    assert_equal(everything(head), before)
