"""Center optimizers against torch.optim on the reference loss, and rows that are not in play."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from partialfc import CenterAdagrad, CenterAdamW, CenterSGD, PartialFC
from partialfc.head import reference_loss
from partialfc.head.optimizers import CenterOptimizer
from partialfc.margins import ArcFace, CosFace, Softmax

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
        (CenterAdagrad(), ["class_centers.weight", "class_centers.squares"]),
        (
            CenterAdamW(),
            [f"class_centers.{name}" for name in ("weight", "mean", "variance", "updates")],
        ),
    ],
    ids=["sgd", "adagrad", "adamw"],
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


@pytest.mark.parametrize(
    ("optimizer", "centers", "state"),
    [
        # Two steps by hand: gradient 0.5, then 0.25; centers from 1; rate 0.1.
        (CenterSGD(momentum=0.5, weight_decay=1.0), 0.665, {"momentum": 1.85}),
        (CenterSGD(momentum=0.0, weight_decay=0.0), 0.925, {}),
        (CenterAdagrad(epsilon=1e-30, weight_decay=0.0), 1 - 0.1 - 0.1 * 0.25 / 0.3125**0.5, {"squares": 0.3125}),
        (
            CenterAdamW(beta1=0.5, beta2=0.5, epsilon=0.0, weight_decay=1.0),
            (0.9 - 0.1) * 0.9 - 0.1 * (0.25 / 0.75) / (0.09375 / 0.75) ** 0.5,
            {"mean": 0.25, "variance": 0.09375, "updates": 2},
        ),
    ],
    ids=["sgd", "plain sgd", "adagrad", "adamw"],
)
def test_optimizers_move_centers_and_state_where_they_are(optimizer, centers, state):
    shape = (2, 1, 3)
    moved = torch.ones(shape, dtype=torch.float64)
    fields = {
        name: torch.zeros_like(field.shape_for(moved), dtype=field.working(torch.float64))
        for name, field in optimizer.fields.items()
    }
    for gradient in (0.5, 0.25):
        optimizer.update_(moved, torch.full(shape, gradient, dtype=torch.float64), fields, learning_rate=0.1)
    torch.testing.assert_close(moved, torch.full_like(moved, centers), rtol=1e-14, atol=0)
    assert fields.keys() == state.keys()
    for name, value in state.items():
        expected = torch.full_like(fields[name], value)
        torch.testing.assert_close(fields[name], expected, rtol=1e-14, atol=0)
        assert fields[name].shape == (shape[:2] if name in ("squares", "updates") else shape)


def adagrad_steps(optimizer: CenterAdagrad, dim: int) -> tuple[PartialFC, list[tuple[Tensor, Tensor]]]:
    """A head in float64, and batches for it."""
    head = PartialFC(
        40, dim, margin=Softmax(bias=False), optimizer=optimizer, dtype=torch.float64, init_std=1.0, num_subcenters=1
    )
    generator = torch.Generator().manual_seed(0)
    return head, [
        (
            torch.randn(6, dim, generator=generator, dtype=torch.float64),
            torch.randint(40, (6,), generator=generator),
        )
        for _ in range(8)
    ]


def test_adagrad_of_rows_of_one_number_is_that_of_torch():
    head, batches = adagrad_steps(CenterAdagrad(learning_rate=0.3, epsilon=1e-6, weight_decay=0.1), 1)
    centers = head.gather_class_centers().requires_grad_()
    expected = torch.optim.Adagrad([centers], lr=0.3, eps=1e-6, weight_decay=0.1)
    for step, (embeddings, labels) in enumerate(batches):
        head.learning_rate = expected.param_groups[0]["lr"] = 0.3 / (step + 1)
        head(embeddings, labels).backward()
        expected.zero_grad()
        reference_loss(embeddings, labels, centers, head.margin)[0].backward()
        expected.step()
        torch.testing.assert_close(head.gather_class_centers(), centers.detach(), rtol=0, atol=1e-12)
    squares = head.class_centers.read("squares", None).flatten()
    torch.testing.assert_close(squares, expected.state[centers]["sum"].flatten(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_adagrad_of_a_row_grows_by_the_mean_of_its_squared_gradient(fused):
    head, batches = adagrad_steps(CenterAdagrad(learning_rate=0.3, epsilon=1e-3, weight_decay=0.1), 5)
    head.fused = fused
    centers, squares = head.gather_class_centers(), torch.zeros(40, dtype=torch.float64)
    for embeddings, labels in batches:
        head(embeddings, labels).backward()
        leaf = centers.clone().requires_grad_()
        reference_loss(embeddings, labels, leaf, head.margin)[0].backward()
        assert leaf.grad is not None
        for number in range(40):
            gradient = leaf.grad[number] + 0.1 * centers[number]
            squares[number] += sum(float(value) ** 2 for value in gradient) / 5
            centers[number] -= 0.3 * gradient / (squares[number].sqrt() + 1e-3)
        torch.testing.assert_close(head.gather_class_centers(), centers, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.class_centers.read("squares", None)[:, 0], squares, rtol=1e-12, atol=0)


# (dtype of centers, optimizer): bytes of a class at D = 512.
SIZES: list[tuple[torch.dtype, CenterOptimizer, int]] = [
    (torch.float32, CenterSGD(), 4096),
    (torch.float32, CenterSGD(momentum=0.0), 2048),
    (torch.float32, CenterSGD(momentum_dtype="bfloat16"), 2048 + 1024),
    (torch.float32, CenterAdamW(), 3 * 2048 + 4),
    (torch.float32, CenterAdagrad(), 2048 + 4),
    (torch.float16, CenterSGD(), 1024 + 2048),
    (torch.float16, CenterSGD(momentum_dtype="bfloat16"), 2048),
    (torch.bfloat16, CenterSGD(momentum_dtype="bfloat16"), 2048),
    (torch.float16, CenterSGD(momentum_dtype="int8"), 1024 + 512 + 32),
    (torch.float16, CenterAdagrad(), 1028),
    (torch.float16, CenterSGD(momentum=0.0), 1024),
]


@pytest.mark.parametrize(("dtype", "optimizer", "num_bytes"), SIZES, ids=str)
def test_bytes_of_a_class(dtype, optimizer, num_bytes):
    head = PartialFC(256, 512, margin=ArcFace(), dtype=dtype, optimizer=optimizer)
    assert sum(buffer.nbytes for buffer in head.buffers()) == 256 * num_bytes
    # And in a checkpoint.
    saved = [value for value in head.state_dict().values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in saved) == 256 * num_bytes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CenterSGD(learning_rate=-0.1), "CenterSGD.learning_rate is -0.1, but must not be negative"),
        (lambda: CenterSGD(momentum=-1.0), "CenterSGD.momentum is -1.0, but must be in \\[0, 1\\)"),
        (lambda: CenterSGD(weight_decay=-1e-4), "CenterSGD.weight_decay is -0.0001, but must not be negative"),
        (
            lambda: CenterSGD(momentum_dtype="float16"),
            r"CenterSGD.momentum_dtype is 'float16', but must be one of \('float32', 'bfloat16', 'int8'\)",
        ),
        (lambda: CenterSGD(decay="none"), r"CenterSGD.decay is 'none', but must be one of \('lazy', 'dense'\)"),
        (lambda: CenterAdagrad(epsilon=0.0), "CenterAdagrad.epsilon is 0.0, but must be positive"),
        (lambda: CenterAdamW(epsilon=-1.0), "CenterAdamW.epsilon is -1.0, but must not be negative"),
        (lambda: CenterAdamW(beta1=1.0), r"CenterAdamW.beta1 is 1.0, but must be in \[0, 1\)"),
        (lambda: CenterAdamW(beta2=-0.5), r"CenterAdamW.beta2 is -0.5, but must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build()
