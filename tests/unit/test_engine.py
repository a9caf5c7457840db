"""Engines in one process: portions, checkpointing, compiling, the loss scale, settings and their messages."""

from __future__ import annotations

import importlib
import multiprocessing
from functools import partial
from typing import Any

import pytest
import torch
from engine_cases import (
    DIM,
    ENGINES,
    SIZE,
    Block,
    Case,
    Network,
    build_heads,
    global_batch,
    largest_difference,
    trained,
)
from torch import Tensor, nn

from partialfc.backbones import build_backbone
from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import EngineSettings, LossScale, build_engine
from partialfc.engine.prepare import blocks_of
from partialfc.optim import build_optimizer, fill_state

ALONE = ShardMesh.single()
MESSY = {"dropout": 0.3, "batch_norm": True}


def gradients_of_one_step(settings: dict[str, Any], *, network: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients after backward, and buffers."""
    engine: Any = Case(network=network, settings={"max_gradient_norm": None, **settings}).build(ALONE)
    images, labels = global_batch(0)
    torch.manual_seed(3)
    engine.backward(build_heads(ALONE)(engine.forward(images), {"main": labels}))
    gradients = {name: p.grad for name, p in engine._backbone.named_parameters() if p.requires_grad}
    return gradients | dict(engine._backbone.named_buffers())


# Portions


def test_portions_equal_one_graph_over_the_same_portions_to_the_last_bit() -> None:
    torch.manual_seed(0)
    network = Network(**MESSY)
    images, labels = global_batch(0)
    torch.manual_seed(3)
    outputs = [network(portion.contiguous()) for portion in images.tensor_split(3)]
    embeddings = torch.cat(outputs).detach().requires_grad_()
    build_heads(ALONE)(embeddings, {"main": labels}).backward()
    assert embeddings.grad is not None
    # In the order in which portions give their gradient: the last first.
    order = [2, 0, 1]
    for number in order:
        outputs[number].backward(embeddings.grad.tensor_split(3)[number])
    expected = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    expected |= dict(network.named_buffers())

    found = gradients_of_one_step({"portions": 3}, network=MESSY)
    assert found.keys() == expected.keys()
    assert int(found["blocks.0.norm.num_batches_tracked"]) == 3
    for name, value in expected.items():
        assert value is not None
        assert torch.equal(found[name], value), name


def test_one_portion_at_a_time_has_a_graph_and_random_numbers_go_on() -> None:
    engine: Any = Case(network=MESSY, settings={"portions": 4}).build(ALONE)
    images, labels = global_batch(0)
    seen: list[tuple[int, bool]] = []
    engine._network.register_forward_hook(lambda _, inputs, __: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    embeddings = engine.forward(images[:23])
    assert seen == [(6, False), (6, False), (6, False), (5, True)]
    after_forward = torch.get_rng_state()
    engine.backward(build_heads(ALONE)(embeddings, {"main": labels[:23]}))
    assert seen[4:] == [(6, True)] * 3
    assert torch.equal(torch.get_rng_state(), after_forward)


def test_embeddings_are_a_leaf_in_float32_whatever_the_precision() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        embeddings = Case(settings={"precision": precision, "portions": 2}).build(ALONE).forward(global_batch(0)[0])
        assert embeddings.dtype == torch.float32
        assert embeddings.is_leaf
        assert embeddings.requires_grad


def test_fewer_images_than_portions_are_refused() -> None:
    engine = Case(settings={"portions": 4}).build(ALONE)
    with pytest.raises(ValueError, match="batch of 3 images cannot go through the backbone in 4 portions"):
        engine.forward(global_batch(0)[0][:3])


def test_a_loss_that_is_not_finite_moves_nothing_even_if_its_gradient_is() -> None:
    engine: Any = Case().build(ALONE)
    embeddings = engine.forward(global_batch(0)[0])
    before = [parameter.detach().clone() for parameter in engine._backbone.parameters()]
    engine.backward(embeddings.sum() + float("inf"))
    assert not engine.step(learning_rate=0.1).updated
    assert all(torch.equal(p, old) for p, old in zip(engine._backbone.parameters(), before, strict=True))


# What is done to a backbone


@pytest.mark.parametrize("portions", [1, 2])
def test_blocks_computed_again_give_the_same_gradient_and_move_batch_statistics_once(portions: int) -> None:
    expected = gradients_of_one_step({"portions": portions}, network=MESSY)
    found = gradients_of_one_step({"portions": portions, "activation_checkpointing": True}, network=MESSY)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_checkpointing_computes_blocks_twice() -> None:
    calls = []
    torch.manual_seed(0)
    network = Network()
    for block in network.blocks:
        block.first.register_forward_hook(lambda *_: calls.append(1))
    settings = EngineSettings(activation_checkpointing=True)
    make_optimizer = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)  # noqa: E731
    engine = build_engine("ddp", network, make_optimizer=make_optimizer, mesh=ALONE, settings=settings)
    engine.forward(global_batch(0)[0])
    assert len(calls) == 2
    engine = build_engine("ddp", network, make_optimizer=make_optimizer, mesh=ALONE, settings=settings)
    embeddings = engine.forward(global_batch(0)[0])
    engine.backward(embeddings.sum())
    assert len(calls) == 6
    assert set(engine.state_dict()["backbone"]) == set(Network().state_dict())


EXPECTED_BLOCKS = {
    "iresnet10": ("IBasicBlock", 4),
    "iresnet18": ("IBasicBlock", 8),
    "mobilefacenet": ("Bottleneck", 15),
    "iresnet50": ("IBasicBlock", 24),
    "vit_tiny": ("TransformerBlock", 12),
    "vit_large": ("TransformerBlock", 24),
}


@pytest.mark.parametrize("name", EXPECTED_BLOCKS)
def test_blocks_of_backbones_are_found(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, embedding_dim=8, image_size=32)
    kind, number = EXPECTED_BLOCKS[name]
    found = [type(block).__name__ for block in blocks_of(backbone)]
    assert found == [kind] * number
    assert len(set(map(id, blocks_of(backbone)))) == number


def test_stages_of_blocks_are_not_blocks() -> None:
    # As in the hierarchical transformers and convolutional networks of timm.
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.downsample = nn.Sequential(nn.LayerNorm(22), nn.Linear(22, 22))
            self.blocks = nn.Sequential(*(Block(dropout=0.0, batch_norm=False) for _ in range(2)))

    stages = nn.Sequential(Stage(), nn.Sequential(Stage()), nn.Linear(22, 22))
    assert [type(block) for block in blocks_of(stages)] == [Block] * 4


def test_a_network_without_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(ValueError, match="activation_checkpointing works on repeated blocks, and Sequential has none"):
        build_engine(
            "ddp",
            nn.Sequential(nn.Flatten(), nn.Linear(48, DIM)),
            make_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
            mesh=ALONE,
            settings=EngineSettings(activation_checkpointing=True),
        )


def test_sync_batch_norm_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"sync_batch_norm needs CUDA.*backbone is on cpu; set it to false"):
        Case(settings={"sync_batch_norm": True}).build(ALONE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_backbone_gives_the_same_under_the_same_names(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    # All of torch.compile but the C++ compiler, which takes long.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"compile": True, "activation_checkpointing": checkpointing}
    found, expected = trained(Case(settings=settings), ALONE, steps=2), trained(Case(), ALONE, steps=2)
    assert largest_difference(found, expected)[0] < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()


def test_a_copy_for_evaluation_is_apart_from_the_backbone() -> None:
    engine: Any = Case(
        network=MESSY, settings={"ema_decay": 0.9, "activation_checkpointing": True, "portions": 2}
    ).build(ALONE)
    evaluated = engine.evaluation_backbone()
    assert type(evaluated) is Network
    images = global_batch(0)[0]
    expected = evaluated.eval()(images)
    with torch.no_grad():
        for parameter in engine._backbone.parameters():
            parameter.add_(1.0)
    assert torch.equal(evaluated(images), expected)
    assert [p.requires_grad for p in evaluated.parameters()] == [p.requires_grad for p in Network(**MESSY).parameters()]
    assert all("forward" not in vars(block) for block in evaluated.blocks)
    assert isinstance(evaluated.blocks[0], Block)


# Loss scale


def test_the_loss_scale_doubles_after_2000_good_steps_and_halves_down_to_one() -> None:
    scale = LossScale()
    assert scale.value == 2.0**16
    for _ in range(1999):
        scale.update(finite=True)
    other = LossScale()
    other.load_state_dict(scale.state_dict())
    for each in (scale, other):
        assert each.value == 2.0**16
        each.update(finite=True)
        assert each.value == 2.0**17
    scale.update(finite=True)
    scale.update(finite=False)
    assert scale.state_dict() == {"value": 2.0**16, "good_steps": 0}
    for _ in range(20):
        scale.update(finite=False)
    assert scale.value == 1.0


# Optimizer state


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_filled_state_is_what_the_first_step_would_start_from(name: str) -> None:
    results = []
    for fill in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(4, 3)
        optimizer = build_optimizer(module, name=name, learning_rate=0.1, weight_decay=0.3)
        if fill:
            fill_state(optimizer)
            assert optimizer.param_groups[0]["lr"] == 0.1
            assert all(not value.any() for state in optimizer.state.values() for value in state.values())
            assert all(p.grad is None for p in module.parameters())
        for step in range(3):
            module(torch.ones(2, 4) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([module.weight.detach(), *optimizer.state[module.weight].values()])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_settings_of_the_optimizer_stay_those_of_the_run() -> None:
    def build(weight_decay: float, rate: float) -> Any:
        torch.manual_seed(0)
        make = lambda module: build_optimizer(  # noqa: E731
            module, name="adamw", learning_rate=rate, weight_decay=weight_decay
        )
        return build_engine("ddp", Network(), make_optimizer=make, mesh=ALONE, settings=EngineSettings())

    engine, other = build(0.1, 0.2), build(0.3, 0.4)
    other.load_state_dict(engine.state_dict())
    assert other._optimizer.param_groups[0]["weight_decay"] == 0.3


# Names and settings


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ValueError, match='unknown engine "fsdp"; known are ddp, fsdp2, deepspeed'):
        build_engine(
            "fsdp",
            Network(),
            make_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
            mesh=ALONE,
            settings=EngineSettings(),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, 'precision is "fp8", but must be one of fp32, bf16, fp16'),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm is 0.0, but must be above 0"),
        ({"portions": 0}, "portions is 0, but must be at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0, but must be in \(0, 1\)"),
        ({"zero_stage": 0}, "zero_stage is 0, but must be 1, 2 or 3"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**settings)


def test_deepspeed_does_not_compile_in_stage_3() -> None:
    with pytest.raises(ValueError, match="compile does not go with zero_stage 3"):
        Case("zero3", settings={"compile": True}).build(ALONE)


def test_a_missing_library_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(ImportError, match=r'engine deepspeed needs.*pip install "partialfc\[deepspeed\]"'):
        Case("zero2").build(ALONE)


# A process without a launcher and without a process group


def _norm_of_tiny_gradient(engine: str, precision: str) -> float:
    built = Case(engine, settings={"precision": precision, "max_gradient_norm": None}).build(ALONE)
    built.backward(built.forward(global_batch(0)[0]).sum() * 1e-9)
    return built.step(learning_rate=0.0).gradient_norm


def _all_engines_alone(results: Any) -> None:
    torch.set_num_threads(1)
    expected_norm = _norm_of_tiny_gradient("ddp", "fp32")
    # In float16 it would be 0 without a loss scale.
    assert 1e-9 < expected_norm < 1e-6
    for name in ENGINES:
        assert abs(_norm_of_tiny_gradient(name, "fp16") / expected_norm - 1) < 0.01, name
    expected = trained(Case(), ALONE, steps=3)
    for name in ENGINES:
        found = trained(Case(name, settings={"portions": 2}), ALONE, steps=3)
        results.put((name, *largest_difference(found, expected)))
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    compiled = trained(Case("fsdp2", settings={"compile": True}), ALONE, steps=2)
    results.put(("fsdp2 compiled", *largest_difference(compiled, trained(Case(), ALONE, steps=2))))


def test_every_engine_runs_in_a_process_on_its_own() -> None:
    # In one of its own, as the group of one rank that fsdp2 and deepspeed need would stay behind in this one.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_all_engines_alone, args=(results,))
    process.start()
    found = [results.get(timeout=200) for _ in range(len(ENGINES) + 1)]
    process.join(timeout=60)
    assert process.exitcode == 0
    assert [name for name, _, _ in found] == [*ENGINES, "fsdp2 compiled"]
    assert all(difference < 3e-6 for _, difference, _ in found), found


def test_the_images_of_the_cases_are_what_the_network_takes() -> None:
    assert global_batch(0)[0].shape[1:] == (3, SIZE, SIZE)
