"""The head in one process: what its caller sees of loss, gradients, centers, state and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from head_cases import ProbeMargin
from torch import Tensor

from partialfc import CenterAdamW, CenterSGD, PartialFC
from partialfc.head import reference_loss
from partialfc.margins import ArcFace, CosFace, Need, Softmax

DIM = 8


def build_head(num_classes: int = 50, **options: Any) -> PartialFC:
    options = {"margin": CosFace(scale=16.0), "dtype": torch.float64, "init_std": 1.0, **options}
    return PartialFC(num_classes, DIM, **options)


def batch(size: int, num_classes: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings [size, DIM] that want a gradient, and labels [size]."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(size, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    return embeddings, torch.randint(num_classes, (size,), generator=generator)


def snapshot(head: PartialFC) -> dict[str, Any]:
    return copy.deepcopy(dict(head.state_dict()))


def assert_same(got: Any, expected: Any) -> None:
    """Equal bit for bit, through mappings."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(got[key], value)
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_the_usual_five_lines():
    head = PartialFC(10_000, 16, margin=ArcFace(), sample_rate=0.1)
    embeddings = torch.randn(32, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(32) * 300
    before = head.gather_class_centers()
    loss = head(embeddings, labels)
    assert torch.equal(head.gather_class_centers(), before)
    loss.backward()

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) > 10
    assert embeddings.grad.shape == (32, 16)
    assert bool(embeddings.grad.any(1).all())
    changed = (head.gather_class_centers() != before).any(1)
    in_play = head.sampler.in_play(labels, head.partition, 0).rows
    assert torch.equal(changed.nonzero()[:, 0], in_play.sort().values)
    assert bool(changed[labels].all())
    # A tenth, to within 2 % of it, and up to 32 positives on top.
    assert 980 <= int(changed.sum()) <= 1020 + 32
    assert head.step == 1


def test_initial_centers_are_normal_of_the_given_width_and_differ_from_class_to_class():
    centers = PartialFC(5000, 16, margin=ArcFace(), init_std=0.5).gather_class_centers()
    assert centers.dtype == torch.float32
    assert float(centers.mean()) == pytest.approx(0, abs=0.01)
    assert float(centers.std()) == pytest.approx(0.5, rel=0.02)
    assert len(centers.unique(dim=0)) == 5000
    other = PartialFC(5000, 16, margin=ArcFace(), init_std=0.5, seed=1).gather_class_centers()
    assert not bool((centers == other).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_embeddings_get_a_gradient_in_their_own_dtype(dtype):
    embeddings, labels = batch(6)
    half = embeddings.detach().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    for own in (half, full):
        loss = build_head(dtype=torch.float32)(own, labels)
        assert loss.dtype == torch.float32
        loss.backward()
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, full.grad.to(dtype))
    assert bool(half.grad.any())


def test_autocast_does_not_reach_the_head():
    embeddings, labels = batch(6)
    head = build_head(dtype=torch.float32)
    plain = head.eval()(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(embeddings, labels), plain)


def test_a_second_backward_is_refused():
    head = build_head()
    loss = head(*batch(4))
    loss.backward(retain_graph=True)
    once = snapshot(head)
    with pytest.raises(RuntimeError, match=r"^backward was called twice on one loss of PartialFC: its class centers"):
        loss.backward()
    assert_same(snapshot(head), once)


def test_a_loss_is_refused_in_backward_when_the_head_has_gone_on():
    head = build_head()
    first, second = head(*batch(4)), head(*batch(4, seed=1))
    with pytest.raises(
        RuntimeError, match=r"^backward was called on a loss of PartialFC after the head had worked out"
    ):
        first.backward()
    before = snapshot(head)
    second.backward()
    assert not torch.equal(head.state_dict()["class_centers.weight"], before["class_centers.weight"])
    for change in (lambda: head.set_class_centers(torch.ones(50, DIM)), lambda: head.load_state_dict(before)):
        third = head(*batch(4))
        change()
        with pytest.raises(RuntimeError, match="or was given other class centers"):
            third.backward()


@pytest.mark.parametrize(
    "options", [{}, {"matmul_dtype": torch.bfloat16}, {"sample_rate": 0.5, "offload": True}], ids=str
)
def test_looking_at_the_loss_before_backward_does_not_change_the_step(options):
    results = []
    for looks in (False, True):
        head = build_head(**{"dtype": torch.float32, **options})
        embeddings, labels = batch(6)
        loss = head(embeddings, labels)
        if looks:
            with torch.no_grad():
                head(*batch(6, seed=1))
        loss.backward()
        results.append([embeddings.grad, head.gather_class_centers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_look_in_inference_mode_does_not_hinder_training():
    head = build_head(sample_rate=0.5)
    with torch.inference_mode():
        head(*(value.detach() for value in batch(6)))
    head(*batch(6)).backward()


def test_class_centers_must_fit_what_they_are_stored_in():
    head = build_head(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^class centers have numbers that are not finite in torch.float16"):
        head.set_class_centers(torch.full((50, DIM), 1e5))
    with pytest.raises(ValueError, match="is zero, but a cosine needs a direction"):
        head.set_class_centers(torch.full((50, DIM), 1e-9))


def test_an_unknown_law_of_sampling_is_refused_where_nothing_is_sampled():
    with pytest.raises(ValueError, match=r"^sampling is 'often', but must be one of uniform, cyclic$"):
        build_head(sampling="often")


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_changes_nothing_and_takes_all_classes(how):
    head = build_head(margin=ProbeMargin(), sample_rate=0.1)
    embeddings, labels = batch(6)
    before = snapshot(head)
    if how == "eval":
        loss = head.eval()(embeddings, labels)
    else:
        with torch.no_grad():
            loss = head(embeddings, labels)
    assert not loss.requires_grad
    assert_same(snapshot(head), before)

    softmax = build_head(margin=Softmax(), sample_rate=0.1).eval()
    expected = reference_loss(embeddings, labels, softmax.gather_class_centers(), Softmax())[0]
    torch.testing.assert_close(softmax(embeddings, labels), expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_loss_that_is_not_finite_moves_nothing(bad, sample_rate):
    head = build_head(margin=ProbeMargin(), sample_rate=sample_rate)
    head(*batch(4)).backward()
    before = snapshot(head)
    embeddings, labels = batch(4, seed=1)
    with torch.no_grad():
        embeddings[2, 3] = bad
    loss = head(embeddings, labels)
    loss.backward()
    assert not bool(loss.isfinite())
    # So the engine sees that it must not step either.
    assert not bool(embeddings.grad.isfinite().all())
    after = snapshot(head)
    assert before["_extra_state"].pop("step") == 1
    assert after["_extra_state"].pop("step") == 2
    assert_same(after, before)

    head(*batch(4, seed=2)).backward()
    assert all(bool(value.isfinite().all()) for name, value in head.state_dict().items() if "class_centers" in name)
    assert not torch.equal(head.state_dict()["class_centers.weight"], before["class_centers.weight"])


def test_the_margin_state_does_not_hold_on_to_the_graph():
    class NormAverage(CosFace):
        needs = frozenset({Need.EMBEDDING_NORM})

        def initial_state(self, num_classes):
            return {"norm": torch.tensor(0.0, dtype=torch.float64)}

        def prepare(self, row, state):
            return {}, {"norm": 0.5 * state["norm"] + 0.5 * row.embedding_norm.mean()}

    head = build_head(margin=NormAverage(scale=16.0))
    embeddings, labels = batch(4)
    for _ in range(2):
        head(embeddings, labels).backward()
    norm = head.get_extra_state()["margin"]["norm"]
    assert not norm.requires_grad
    assert float(norm) == pytest.approx(0.75 * float(embeddings.detach().norm(dim=1).mean()))


def test_class_centers_train_under_a_frozen_backbone():
    embeddings, labels = batch(6)
    frozen, trained = build_head(), build_head()
    before = frozen.gather_class_centers()
    loss = frozen(embeddings.detach(), labels)
    loss.backward()
    trained(embeddings, labels).backward()
    assert torch.equal(frozen.gather_class_centers(), trained.gather_class_centers())
    assert not torch.equal(frozen.gather_class_centers(), before)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_batches_may_be_empty_single_grow_and_shrink(sample_rate):
    for size in (0, 1):
        head = build_head(sample_rate=sample_rate)
        embeddings, labels = batch(size)
        loss = head(embeddings, labels)
        loss.backward()
        assert embeddings.grad.shape == (size, DIM)
        assert bool(loss.isfinite())
        assert float(loss.detach()) > 0 or size == 0

    # What a batch gives does not depend on the sizes of those before it.
    head, centers = build_head(), build_head().gather_class_centers()
    for size in (3, 9, 2, 0, 1, 9):
        head.set_class_centers(centers)
        embeddings, labels = batch(size, seed=size)
        loss = head(embeddings, labels)
        loss.backward()
        expected = torch.autograd.grad(reference_loss(embeddings, labels, centers, head.margin)[0], embeddings)[0]
        torch.testing.assert_close(embeddings.grad, expected if size else embeddings, rtol=0, atol=1e-13)


def test_a_factor_on_the_loss_belongs_to_the_embeddings_alone():
    one, three = build_head(), build_head()
    first, labels = batch(6)
    second = first.detach().clone().requires_grad_()
    one(first, labels).backward()
    (3 * three(second, labels)).backward()
    torch.testing.assert_close(second.grad, 3 * first.grad, rtol=1e-15, atol=0)
    assert torch.equal(one.gather_class_centers(), three.gather_class_centers())


def test_the_learning_rate_can_be_scheduled():
    head = build_head(optimizer=CenterSGD(learning_rate=0.5))
    assert head.learning_rate == 0.5
    before = head.gather_class_centers()
    head.learning_rate = 0.0
    head(*batch(6)).backward()
    assert torch.equal(head.gather_class_centers(), before)


@pytest.mark.parametrize("optimizer", [CenterSGD(), CenterAdamW()], ids=["sgd", "adamw"])
def test_a_loaded_state_goes_on_bit_for_bit(optimizer, tmp_path):
    def train(head: PartialFC, steps: range) -> list[Tensor]:
        losses = []
        for step in steps:
            loss = head(*batch(6, seed=step))
            loss.backward()
            losses.append(loss.detach())
        return losses

    options: dict[str, Any] = {"margin": ProbeMargin(), "sample_rate": 0.3, "optimizer": optimizer, "seed": 4}
    straight = build_head(**options)
    train(straight, range(3))
    torch.save(straight.state_dict(), tmp_path / "head.pt")
    resumed = build_head(**options)
    resumed.load_state_dict(torch.load(tmp_path / "head.pt"))
    assert resumed.step == 3
    assert_same(snapshot(resumed), snapshot(straight))
    assert torch.equal(torch.stack(train(resumed, range(3, 6))), torch.stack(train(straight, range(3, 6))))
    assert_same(snapshot(resumed), snapshot(straight))


def test_a_state_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(RuntimeError) as error:
        build_head(50).load_state_dict(build_head(130).state_dict())
    expected = (
        "class_centers.weight has shape (65, 2, 1, 8) in the checkpoint, but (50, 1, 1, 8) here "
        "([blocks, classes per block, ...] for 50 classes)"
    )
    assert expected in str(error.value)


def test_a_state_with_too_little_or_too_much_is_refused():
    state = dict(build_head(optimizer=CenterAdamW()).state_dict())
    with pytest.raises(RuntimeError) as error:
        build_head(optimizer=CenterSGD()).load_state_dict(state)
    assert 'Missing key(s) in state_dict: "class_centers.momentum"' in str(error.value)
    for name in ("mean", "variance", "updates"):
        assert f'"class_centers.{name}"' in str(error.value)


def test_the_state_of_another_margin_is_refused():
    message = (
        r"^the saved margin state has \['mean'\], but CosFace has \[\]; load it into the margin that it was saved from$"
    )
    with pytest.raises(ValueError, match=message):
        build_head().load_state_dict(build_head(margin=ProbeMargin()).state_dict())


def test_class_centers_can_be_set_and_their_momentum_starts_anew():
    head = build_head()
    head(*batch(6)).backward()
    centers = torch.arange(50.0 * DIM, dtype=torch.float64).view(50, DIM)
    head.set_class_centers(centers)
    assert torch.equal(head.gather_class_centers(), centers)
    assert not bool(head.state_dict()["class_centers.momentum"].any())
    head.gather_class_centers().zero_()
    assert torch.equal(head.gather_class_centers(), centers)
    with pytest.raises(ValueError, match=r"^class centers have shape \(49, 8\), but must have \(50, 8\)$"):
        head.set_class_centers(centers[:49])


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_masked_row_is_as_if_it_were_not_there(sample_rate):
    masked, without = build_head(sample_rate=sample_rate), build_head(sample_rate=sample_rate)
    embeddings, labels = batch(6)
    with torch.no_grad():
        embeddings[1] = float("nan")
    masked_labels = labels.clone()
    masked_labels[1] = masked_labels[4] = -1
    kept = [0, 2, 3, 5]
    own = embeddings.detach()[kept].clone().requires_grad_()
    loss, expected = masked(embeddings, masked_labels), without(own, labels[kept])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(embeddings.grad[kept], own.grad, rtol=0, atol=1e-14)
    assert not bool(embeddings.grad[[1, 4]].any())
    torch.testing.assert_close(masked.gather_class_centers(), without.gather_class_centers(), rtol=0, atol=1e-14)


def test_labels_out_of_range_are_named():
    head = build_head()
    before = snapshot(head)
    embeddings, _ = batch(3)
    message = (
        r"labels\[1\] on rank 0 is 50, but must be in \[0, 50\), or -1 to mask the row; 2 of 3 labels of this batch "
        r"are out of range\. Check num_classes against the data\."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        head(embeddings, torch.tensor([49, 50, -2]))
    assert_same(snapshot(head), before)
    head(embeddings, torch.tensor([49, 0, -1])).backward()


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (
            torch.zeros(3, 7),
            torch.zeros(3, dtype=torch.int64),
            "embeddings are torch.float32 of shape (3, 7), but must be floating [b, 8]",
        ),
        (
            torch.zeros(8),
            torch.zeros(1, dtype=torch.int64),
            "embeddings are torch.float32 of shape (8,), but must be floating [b, 8]",
        ),
        (
            torch.zeros(3, 8, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            "embeddings are torch.int64 of shape (3, 8), but must be floating [b, 8]",
        ),
        (
            torch.zeros(3, 8),
            torch.zeros(3),
            "labels are torch.float32 of shape (3,), but must be torch.int64 of shape (3,), one for each embedding",
        ),
        (
            torch.zeros(3, 8),
            torch.zeros(3, dtype=torch.int32),
            "labels are torch.int32 of shape (3,), but must be torch.int64 of shape (3,), one for each embedding",
        ),
        (
            torch.zeros(3, 8),
            torch.zeros(3, 1, dtype=torch.int64),
            "labels are torch.int64 of shape (3, 1), but must be torch.int64 of shape (3,), one for each embedding",
        ),
    ],
)
def test_bad_batches_are_named(embeddings, labels, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build_head()(embeddings, labels)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("num_classes", "embedding_dim", "options", "message"),
    [
        (0, 8, {}, "num_classes is 0, but must be at least 1"),
        (10, 0, {}, "embedding_dim is 0, but must be at least 1"),
        (10, 8, {"sample_rate": 0}, "sample_rate is 0, but must be in (0, 1]: the share of classes drawn at each step"),
        (
            10,
            8,
            {"sample_rate": 1.5},
            "sample_rate is 1.5, but must be in (0, 1]: the share of classes drawn at each step",
        ),
        (
            10,
            8,
            {"dtype": torch.int8},
            "dtype is torch.int8, but class centers are stored in torch.float32 or torch.float64, or with stochastic "
            "rounding in torch.float16 or torch.bfloat16",
        ),
        (10, 8, {"init_std": 0.0}, "init_std is 0.0, but must be positive and finite"),
    ],
)
def test_bad_arguments_are_named(num_classes, embedding_dim, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        PartialFC(num_classes, embedding_dim, margin=ArcFace(), **options)
    assert str(error.value) == message


def test_one_class_alone_has_no_loss():
    head = PartialFC(1, DIM, margin=ArcFace(), dtype=torch.float64)
    embeddings = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embeddings.requires_grad_()
    loss = head(embeddings, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not bool(embeddings.grad.any())
