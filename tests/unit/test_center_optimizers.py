"""Center optimizers against torch.optim on the reference loss, and rows that are not in play."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from partialfc import CenterAdamW, CenterSGD, PartialFC
from partialfc.head import reference_loss
from partialfc.margins import CosFace

NUM_CLASSES, DIM, STEPS = 40, 6, 6
MARGIN = CosFace(scale=16.0)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(8, DIM, generator=generator, dtype=torch.float64),
            torch.randint(NUM_CLASSES, (8,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def learning_rate_at(step: int) -> float:
    return 0.3 / (step + 1)


def build_head(optimizer, sample_rate: float = 1.0) -> PartialFC:
    return PartialFC(
        NUM_CLASSES,
        DIM,
        margin=MARGIN,
        sample_rate=sample_rate,
        optimizer=optimizer,
        dtype=torch.float64,
        init_std=1.0,
    )


@pytest.mark.parametrize(
    ("optimizer", "build_expected"),
    [
        (
            CenterSGD(learning_rate=0.3, momentum=0.9, weight_decay=0.1),
            lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.1),
        ),
        (
            CenterSGD(learning_rate=0.3, momentum=0.0, weight_decay=0.0),
            lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        ),
        (
            CenterAdamW(learning_rate=0.3, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "plain sgd", "adamw"],
)
def test_with_all_rows_in_play_steps_are_those_of_torch(optimizer, build_expected):
    head = build_head(optimizer)
    centers = head.gather_class_centers().requires_grad_()
    expected = build_expected([centers])
    for step, (embeddings, labels) in enumerate(batches()):
        # A schedule sets both rates.
        head.learning_rate = expected.param_groups[0]["lr"] = learning_rate_at(step)
        head(embeddings, labels).backward()
        expected.zero_grad()
        reference_loss(embeddings, labels, centers, MARGIN)[0].backward()
        expected.step()
        torch.testing.assert_close(head.gather_class_centers(), centers.detach(), rtol=0, atol=1e-12)
    # The steps were worth comparing.
    assert float((centers.detach() - build_head(optimizer).gather_class_centers()).abs().mean()) > 0.01


def in_play(head: PartialFC, labels: Tensor, step: int) -> Tensor:
    assert head.sampler is not None
    rows = head.sampler.in_play(labels, head.partition, step).rows
    return torch.zeros(NUM_CLASSES, dtype=torch.bool).index_fill(0, rows, True)


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (CenterSGD(), ["class_centers.weight", "class_centers.momentum"]),
        (
            CenterAdamW(),
            [f"class_centers.{name}" for name in ("weight", "mean", "variance", "updates")],
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_rows_not_in_play_keep_their_value_and_their_state(optimizer, names):
    head = build_head(optimizer, sample_rate=0.2)
    for step, (embeddings, labels) in enumerate(batches()):
        before = {name: value.clone() for name, value in head.state_dict().items() if name in names}
        head(embeddings, labels).backward()
        moving = in_play(head, labels, step)
        assert 8 <= int(moving.sum()) < NUM_CLASSES
        for name in names:
            # Of 40 classes each is a block of its own.
            after = head.state_dict()[name]
            changed = (after != before[name]).flatten(1).any(1)
            assert torch.equal(changed, moving), f"{name} at step {step}"


def test_adamw_counts_the_updates_of_each_row():
    head = build_head(CenterAdamW(), sample_rate=0.2)
    expected = torch.zeros(NUM_CLASSES, dtype=torch.int64)
    for step, (embeddings, labels) in enumerate(batches()):
        head(embeddings, labels).backward()
        expected += in_play(head, labels, step)
    assert torch.equal(head.state_dict()["class_centers.updates"].flatten().long(), expected)
    assert len(expected.unique()) > 2


def test_the_first_step_of_adamw_is_as_long_for_a_row_that_comes_late():
    # Without decay, Adam's first step is the learning rate in each element, whatever the gradient.
    head = build_head(CenterAdamW(learning_rate=0.01, weight_decay=0.0, epsilon=1e-14), sample_rate=0.2)
    seen = torch.zeros(NUM_CLASSES, dtype=torch.bool)
    late = 0
    for step, (embeddings, labels) in enumerate(batches()):
        before = head.gather_class_centers()
        head(embeddings, labels).backward()
        moving = in_play(head, labels, step)
        first = moving & ~seen
        lengths = (head.gather_class_centers() - before)[first].abs()
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01), rtol=1e-6, atol=0)
        seen |= moving
        late += int(first.sum()) if step else 0
    assert late > 5


def test_optimizers_leave_their_arguments_alone():
    centers, gradient = torch.ones(2, 3), torch.full((2, 3), 0.5)
    for optimizer in (CenterSGD(), CenterAdamW()):
        state = optimizer.initial_state(centers)
        optimizer.update(centers, gradient, state, learning_rate=0.1)
        assert torch.equal(centers, torch.ones(2, 3))
        assert torch.equal(gradient, torch.full((2, 3), 0.5))
        assert all(not bool(value.any()) for value in state.values())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CenterSGD(learning_rate=-0.1), "CenterSGD.learning_rate is -0.1, but must not be negative"),
        (lambda: CenterSGD(momentum=-1.0), "CenterSGD.momentum is -1.0, but must be in \\[0, 1\\)"),
        (lambda: CenterSGD(weight_decay=-1e-4), "CenterSGD.weight_decay is -0.0001, but must not be negative"),
        (lambda: CenterAdamW(epsilon=-1.0), "CenterAdamW.epsilon is -1.0, but must not be negative"),
        (lambda: CenterAdamW(beta1=1.0), r"CenterAdamW.beta1 is 1.0, but must be in \[0, 1\)"),
        (lambda: CenterAdamW(beta2=-0.5), r"CenterAdamW.beta2 is -0.5, but must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build()
