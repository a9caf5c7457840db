"""The plug for the side-by-side benchmark: that it trains what it says, and finds the peer's rows."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from partialfc.head import CenterAdamW, CenterSGD, reference_loss
from partialfc.head.optimizers import CenterAdagrad
from partialfc.margins import ArcFace, CosFace

TOOLS = Path(__file__).parents[2] / "tools"
NUM_CLASSES, DIM, BATCH = 700, 12, 9


@pytest.fixture(scope="module")
def plug() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return importlib.import_module("peer_plug")


def config(**changes):
    settings = {
        "num_classes": NUM_CLASSES,
        "embedding_size": DIM,
        "sample_rate": 1.0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "margin": (1.0, 0.5, 0.0),
        "scale": 64.0,
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "dtype": "fp32",
        "seed": 3,
        "class_start": 0,
        "num_local": NUM_CLASSES,
    }
    return SimpleNamespace(**(settings | changes))


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, DIM, generator=generator).requires_grad_()
    return embeddings, torch.randint(NUM_CLASSES, (BATCH,), generator=generator)


@pytest.mark.parametrize("gradient", [None, "exact"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_it_trains_as_torch_does_with_the_gradient_times_the_ranks(plug, world_size, gradient):
    head = plug.Plug(config(world_size=world_size), {} if gradient is None else {"gradient": gradient})
    full = 0.1 * torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    head.load_full_weight(full)
    weight = full.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
    margin = ArcFace(scale=64.0, margin=0.5, tail="none", gradient=gradient or "detached")
    for step in range(3):
        (ours, labels), (theirs, _) = draw(step), draw(step)
        expected, _ = reference_loss(theirs, labels, weight, margin)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(head.step(ours, labels), expected.detach())
        torch.testing.assert_close(ours.grad, world_size * theirs.grad)
        torch.testing.assert_close(head.local_weight(), weight.detach())
    assert list(head.phases()) == ["forward", "backward"]


def test_local_weight_is_that_of_the_peers_range(plug):
    # The first of two ranks would have 384 classes here and 350 there.
    head = plug.Plug(config(class_start=350, num_local=350), {})
    full = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    head.load_full_weight(full)
    assert torch.equal(head.local_weight(), full[350:])


def test_margin_is_what_the_peer_makes_of_the_three_numbers(plug):
    assert plug.Plug(config(), {}).head.margin == ArcFace(scale=64.0, margin=0.5, tail="none", gradient="detached")
    cosface = CosFace(scale=30.0, margin=0.2, gradient="detached")
    assert plug.Plug(config(scale=30.0, margin=(1.0, 0.3, 0.2)), {}).head.margin == cosface
    with pytest.raises(ValueError, match=r"margin is \(2.0, 0.3, 0.0\), but must be \(1, m2, 0\) or have m3 > 0"):
        plug.Plug(config(margin=(2.0, 0.3, 0.0)), {})


def optimizer_of(plug, overrides, **changes):
    return plug.Plug(config(**changes), overrides).head.class_centers.optimizer


def test_overrides_choose_the_optimizer(plug):
    common = {"learning_rate": 0.1, "weight_decay": 5e-4}
    assert optimizer_of(plug, {}) == CenterSGD(momentum=0.9, decay="lazy", **common)
    sgd = CenterSGD(momentum=0.9, decay="dense", momentum_dtype="int8", **common)
    assert optimizer_of(plug, {"decay": "dense", "momentum_dtype": "int8"}, sample_rate=0.5) == sgd
    assert optimizer_of(plug, {"optimizer": "adagrad"}) == CenterAdagrad(**common)
    assert optimizer_of(plug, {"learning_rate": 0.01}) == CenterSGD(learning_rate=0.01)
    assert optimizer_of(plug, {}, optimizer="adamw") == CenterAdamW(**common)


def test_overrides_choose_dtypes_and_path(plug):
    plain = plug.Plug(config(), {}).head
    assert (plain.class_centers.weight.dtype, plain.matmul_dtype, plain.fused) == (torch.float32, None, True)
    head = plug.Plug(config(), {"dtype": "float16", "matmul_dtype": "bfloat16"}).head
    assert (head.class_centers.weight.dtype, head.matmul_dtype) == (torch.float16, torch.bfloat16)
    assert plug.Plug(config(dtype="bf16"), {}).head.matmul_dtype == torch.bfloat16
    assert plug.Plug(config(dtype="bf16"), {"matmul_dtype": "float32"}).head.matmul_dtype is None
    assert plug.Plug(config(), {"fused": False}).head.fused is False


def test_overrides_come_from_the_environment(plug, monkeypatch):
    monkeypatch.setenv("PARTIALFC_PLUG", '{"optimizer": "adagrad"}')
    assert isinstance(plug.factory(config()).head.class_centers.optimizer, CenterAdagrad)
    monkeypatch.setenv("PARTIALFC_PLUG", "")
    assert isinstance(plug.factory(config()).head.class_centers.optimizer, CenterSGD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decay=dense", "PARTIALFC_PLUG is 'decay=dense', but must be a JSON object"),
        ('["dense"]', "must be a JSON object such as"),
        ('{"decays": "dense"}', "PARTIALFC_PLUG has 'decays', but may have fused, dtype, matmul_dtype"),
        ('{"dtype": "half"}', "dtype is 'half', but must be one of float32, float16, bfloat16"),
        ('{"decay": "dense", "optimizer": "adagrad"}', "has decay, but that goes with the optimizer sgd, not adagrad"),
        ('{"optimizer": "lion"}', "optimizer is 'lion', but must be one of sgd, adamw, adagrad"),
    ],
)
def test_bad_overrides_are_named(plug, monkeypatch, text, message):
    monkeypatch.setenv("PARTIALFC_PLUG", text)
    with pytest.raises(ValueError, match=re.escape(message)):
        plug.factory(config())


def test_state_bytes_are_those_of_centers_and_momentum(plug):
    # 700 classes make 88 blocks of 8: 4 classes are nobody's.
    assert plug.Plug(config(), {}).state_bytes() == 2 * 704 * DIM * 4
    assert plug.Plug(config(), {"optimizer": "adagrad", "dtype": "float16"}).state_bytes() == 704 * (DIM * 2 + 4)
