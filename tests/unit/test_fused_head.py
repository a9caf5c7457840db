"""The fused step: what it never makes, and that it gives what autograd over all logits gives.

Shapes: V cases, n classes in play, C classes, c of a tile, D embedding dimension.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_cases import BOTH_GRADIENTS, NEAR_NORMS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialfc import CenterAdamW, CenterSGD, HeadGroup, PartialFC
from partialfc.head import passes, tiles
from partialfc.margins import (
    AdaCos,
    AdaFace,
    ArcFace,
    CircleLoss,
    CosFace,
    CurricularFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
    SphereFace2,
    UniFace,
)

NUM_CASES, NUM_CLASSES, DIM, TILE_NUMBERS = 64, 20_000, 32, 2**14
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
SOME: list[Margin] = [ArcFace(), CircleLoss(), CurricularFace(), Softmax(), SphereFace2()]


class Storages(TorchDispatchMode):
    """Notes the largest storage, in elements, of what anything returns, but for views of what a head keeps."""

    def __init__(self, head: PartialFC) -> None:
        super().__init__()
        self.kept = {buffer.untyped_storage().data_ptr() for buffer in head.buffers()}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.kept:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


class SixteenBits(TorchDispatchMode):
    """Notes what results of matrix products, and what arguments of exponentials, are in 16 bits."""

    products = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
    exponentials = ("exp", "logsumexp", "softplus", "sigmoid", "softmax", "log_softmax")

    def __init__(self) -> None:
        super().__init__()
        self.product_shapes: set[tuple[int, ...]] = set()
        self.other_product_shapes: set[tuple[int, ...]] = set()
        self.exponentials_seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        if name in self.products:
            shapes = self.product_shapes if result.dtype in SIXTEEN_BITS else self.other_product_shapes
            shapes.add(tuple(result.shape))
        if name in self.exponentials:
            self.exponentials_seen.add(args[0].dtype)
        return result


def build(margin: Margin, num_classes: int = NUM_CLASSES, **options: Any) -> PartialFC:
    return PartialFC(num_classes, DIM, margin=margin, **{"init_std": 1.0, "seed": 3, **options})


def batch(head: PartialFC, size: int = NUM_CASES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings [size, DIM] in float32 that want a gradient, and labels [size]."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(size, DIM, generator=generator)
    return embeddings.requires_grad_(), torch.randint(head.partition.num_classes, (size,), generator=generator)


def step(head: PartialFC, seed: int = 0, size: int = NUM_CASES) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the embeddings); the centers move."""
    embeddings, labels = batch(head, size, seed)
    loss = head(embeddings, labels)
    loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


def largest_of_a_step(head: PartialFC) -> int:
    step(head)
    # The second step finds the buffers of the first, and must count them all the same.
    with Storages(head) as storages:
        step(head, seed=1)
    return storages.largest


def relative(got: Tensor, expected: Tensor) -> float:
    """The length of the difference by that of what is expected."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.TILE_NUMBERS, "cpu", TILE_NUMBERS)
    monkeypatch.setattr(tiles, "ROWS_AT_ONCE", 256)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
@pytest.mark.parametrize("margin", SOME, ids=lambda margin: type(margin).__name__)
def test_nothing_as_large_as_logits_or_class_centers_is_made(margin, sample_rate):
    num_in_play = int(sample_rate * NUM_CLASSES)
    forbidden = min(NUM_CASES, DIM) * num_in_play  # [n, D] is the smaller of the two
    largest = largest_of_a_step(build(margin, sample_rate=sample_rate))
    assert DIM * NUM_CASES <= largest <= TILE_NUMBERS < forbidden / 3
    # The other way has all logits.
    head = build(margin, sample_rate=sample_rate, fused=False)
    assert largest_of_a_step(head) >= 0.98 * NUM_CASES * num_in_play


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
@pytest.mark.parametrize("margin", [ArcFace(), CurricularFace()], ids=lambda margin: type(margin).__name__)
def test_the_largest_tensor_is_the_same_for_any_number_of_classes(margin, sample_rate):
    counts = (NUM_CLASSES, 2 * NUM_CLASSES, 4 * NUM_CLASSES)
    fused, autograd = (
        [largest_of_a_step(build(margin, count, sample_rate=sample_rate, fused=fused)) for count in counts]
        for fused in (True, False)
    )
    assert max(fused) <= 1.05 * min(fused)
    assert max(autograd) > 3 * min(autograd)


def test_tiles_as_they_are_stay_small_beside_logits_and_class_centers():
    num_classes = 60_000
    largest = largest_of_a_step(build(ArcFace(), num_classes))
    assert largest <= tiles.TILE_NUMBERS["cpu"] < DIM * num_classes / 2


@pytest.mark.parametrize("optimizer", [CenterSGD(learning_rate=0.05), CenterAdamW(learning_rate=0.01)], ids=str)
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_other_formats_make_nothing_large_either(sample_rate, optimizer, small_tiles):
    head = build(ArcFace(), sample_rate=sample_rate, optimizer=optimizer, dtype=torch.float16)
    assert largest_of_a_step(head) <= TILE_NUMBERS


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("margin", BOTH_GRADIENTS, ids=str)
def test_it_gives_what_autograd_gives_in_float32(margin, sample_rate):
    options = {"sample_rate": sample_rate, "optimizer": CenterSGD(learning_rate=0.01)}
    fused, autograd = (build(margin, 700, fused=fused, **options) for fused in (True, False))
    before = fused.gather_class_centers()
    for number in range(3):
        loss, gradient = step(fused, number, size=20)
        expected_loss, expected_gradient = step(autograd, number, size=20)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
        assert relative(gradient, expected_gradient) < 1e-5
    after = autograd.gather_class_centers()
    assert relative(fused.gather_class_centers(), after) < 1e-5
    # By how far they went, too, which is less than how long they are.
    assert relative(fused.gather_class_centers() - before, after - before) < 1e-4
    assert float((after - before).abs().max()) > 3e-4


@pytest.mark.parametrize("margin", SOME, ids=lambda margin: type(margin).__name__)
def test_the_embedding_gradient_is_the_same_wherever_the_centers_go(margin):
    still, moving = build(margin, 700), build(margin, 700)
    still.learning_rate, moving.learning_rate = 0.0, 3.0
    (loss, gradient), (other_loss, other_gradient) = step(still), step(moving)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient, other_gradient)
    assert not torch.equal(still.gather_class_centers(), moving.gather_class_centers())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("margin", [*SOME, MagFace(**NEAR_NORMS), AdaCos(), UniFace()], ids=str)
def test_products_of_16_bits_are_close_to_those_of_32(margin, sample_rate):
    exact, rounded = (
        build(margin, 2000, sample_rate=sample_rate, matmul_dtype=operands) for operands in (None, torch.bfloat16)
    )
    before = exact.gather_class_centers()
    (expected_loss, expected_gradient), (loss, gradient) = step(exact), step(rounded)
    assert loss.dtype == gradient.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected_loss), rel=2e-3)
    assert 0 < relative(gradient, expected_gradient) < 2e-2
    moved, expected = rounded.gather_class_centers() - before, exact.gather_class_centers() - before
    assert 0 < relative(moved, expected) < 2e-2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("margin", SOME, ids=lambda margin: type(margin).__name__)
def test_logits_are_never_in_16_bits(margin, monkeypatch):
    seen, exponentials_ = set(), passes.exponentials_

    def recorded(logits_Vc: Tensor, **rest: Any) -> Tensor:
        seen.add(logits_Vc.dtype)
        return exponentials_(logits_Vc, **rest)

    monkeypatch.setattr(passes, "exponentials_", recorded)
    # Tiles of 128 classes and one of 80, so that shapes tell what a product is: neither is V or D.
    head = build(margin, 2000, matmul_dtype=torch.bfloat16)
    embeddings, labels = batch(head)
    with SixteenBits() as noted:
        head(embeddings, labels).backward()
    logits = {(NUM_CASES, 128), (NUM_CASES, 80)}
    assert noted.product_shapes == {(NUM_CASES, DIM), (128, DIM), (80, DIM)}
    assert logits <= noted.other_product_shapes
    assert noted.exponentials_seen == {torch.float32}
    assert seen == ({torch.float32} if not isinstance(margin, SphereFace2) else set())


@pytest.mark.parametrize("matmul_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_look_at_other_rows_before_backward_changes_no_step(sample_rate, matmul_dtype):
    plain, looking = (build(CosFace(), 700, sample_rate=sample_rate, matmul_dtype=matmul_dtype) for _ in range(2))
    expected_loss, expected_gradient = step(plain)
    embeddings, labels = batch(looking)
    loss = looking(embeddings, labels)
    with torch.no_grad():
        looking(*batch(looking, seed=5))
    loss.backward()
    assert torch.equal(loss.detach(), expected_loss)
    assert torch.equal(embeddings.grad, expected_gradient)
    assert torch.equal(looking.gather_class_centers(), plain.gather_class_centers())


@pytest.mark.parametrize("margin", BOTH_GRADIENTS, ids=str)
def test_the_loss_in_eval_mode_is_that_of_training(margin):
    head = build(margin, 700, dtype=torch.float64)
    for number in range(2):
        embeddings, labels = batch(head, 20, number)
        expected = head.eval()(embeddings, labels)
        assert not expected.requires_grad
        loss = head.train()(embeddings, labels)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-13, atol=0)
        loss.backward()


FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "16 and 8 bits": {"dtype": torch.float16, "optimizer": CenterSGD(momentum_dtype="int8")},
    "dense decay": {"optimizer": CenterSGD(decay="dense")},
    "adamw": {"optimizer": CenterAdamW()},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("margin", [CurricularFace(), NormFace(learned=True), Softmax(), UniFace(), AdaFace()], ids=str)
def test_a_loss_that_is_not_finite_moves_nothing(margin, options):
    head = build(margin, 700, sample_rate=0.3, **options)
    step(head)
    before = {name: value.clone() for name, value in head.state_dict().items() if isinstance(value, Tensor)}
    state = {name: value.clone() for name, value in head.margin_state.items()}
    embeddings, labels = batch(head, seed=1)
    with torch.no_grad():
        embeddings[2, 3] = math.nan
    loss = head(embeddings, labels)
    loss.backward()
    assert not bool(loss.isfinite())
    assert not bool(embeddings.grad.isfinite().all())
    after = head.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert head.margin_state == state
    assert head.step == 2
    step(head, seed=2)
    assert not torch.equal(head.state_dict()["class_centers.weight"], before["class_centers.weight"])


def test_heads_of_a_group_do_what_they_do_alone():
    def heads() -> dict[str, PartialFC]:
        return {
            "faces": build(ArcFace(), 700, sample_rate=0.3, loss_weight=0.5),
            "products": build(CurricularFace(), 300, matmul_dtype=torch.bfloat16),
        }

    alone, together = heads(), HeadGroup(heads())
    for number in range(3):
        rows = {name: batch(head, 20 + number, number) for name, head in alone.items()}
        embeddings = torch.cat([own.detach() for own, _ in rows.values()]).requires_grad_()
        loss = together(embeddings, {name: labels for name, (_, labels) in rows.items()})
        loss.backward()
        losses = [head(*rows[name]) for name, head in alone.items()]
        sum(losses).backward()
        torch.testing.assert_close(loss.detach(), sum(losses).detach(), rtol=1e-6, atol=0)
        assert torch.equal(embeddings.grad, torch.cat([own.grad for own, _ in rows.values()]))
    for name, head in alone.items():
        assert torch.equal(together[name].gather_class_centers(), head.gather_class_centers())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_centers_train_on_embeddings_that_want_no_gradient(sample_rate, fused):
    frozen, trained = (build(CurricularFace(), 700, sample_rate=sample_rate, fused=fused) for _ in range(2))
    before = frozen.gather_class_centers()
    for number in range(2):
        embeddings, labels = batch(frozen, seed=number)
        loss = frozen(embeddings.detach(), labels)
        loss.backward()
        expected, _ = step(trained, number)
        assert torch.equal(loss.detach(), expected)
    assert torch.equal(frozen.gather_class_centers(), trained.gather_class_centers())
    assert float((frozen.gather_class_centers() - before).abs().max()) > 1e-3
