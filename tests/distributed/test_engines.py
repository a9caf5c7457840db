"""Every engine equals one process, skips alike on all ranks, and goes on from the state of every other engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from engine_cases import (
    ENGINES,
    STEPS,
    Case,
    build_heads,
    flattened,
    global_batch,
    largest_difference,
    train_step,
    trained,
)
from support import run_distributed
from torch import Tensor

from partialfc.distributed.mesh import ShardMesh
from partialfc.engine.portioned import whole

TOLERANCE = 1e-6
# The state of an optimizer is a sum of gradients, whose largest element is smaller than what they are computed from.
STATE_TOLERANCE = 3e-6
# bf16 has 8 bits, and activations are rounded to it.
BF16_TOLERANCE = 0.03

EVERYTHING = [
    (engine, {"optimizer": optimizer, "settings": {"portions": portions, "ema_decay": 0.9}})
    for engine, optimizer, portions in itertools.product(ENGINES, ("sgd", "adamw"), (1, 4))
]
# Each engine with each optimizer, with and without portions, at one of the world sizes; at one of them, blocks of the
# network are computed again.
SAMPLE = {
    2: [case for case in EVERYTHING if (case[1]["optimizer"] == "sgd") == (case[1]["settings"]["portions"] == 1)],
    3: [
        (engine, {**case, "settings": {**case["settings"], "activation_checkpointing": True}})
        for engine, case in EVERYTHING
        if (case["optimizer"] == "adamw") == (case["settings"]["portions"] == 1)
    ],
}


def same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    exact = [name for name in expected if not name.startswith("optimizer/")]
    difference, name = largest_difference({n: results[n] for n in exact}, {n: expected[n] for n in exact})
    assert difference < TOLERANCE, f"{what}: {name} differs by {difference:.1e}"
    difference, name = largest_difference(results, expected)
    assert difference < STATE_TOLERANCE, f"{what}: {name} differs by {difference:.1e}"


def moved_state(engine: Any, heads: Any) -> dict[str, Any]:
    """All that an update moves."""
    state = flattened(engine.state_dict())
    return {
        "centers": heads["main"].gather_class_centers(),
        **{name: value for name, value in state.items() if not name.startswith("loss_scale")},
    }


def compare_with_one_process(
    rank: int, world_size: int, cases: list[tuple[str, dict[str, Any]]], expected: dict[str, dict[str, Tensor]]
) -> None:
    mesh = ShardMesh.from_group()
    for engine, case in cases:
        assert_close(trained(Case(engine, **case), mesh), expected[case["optimizer"]], f"{engine} {case}")
    bf16 = {"settings": {"precision": "bf16", "portions": 2}}
    for engine in ENGINES:
        results = trained(Case(engine, **bf16), mesh)
        difference, name = largest_difference({"losses": results["losses"]}, {"losses": expected["sgd"]["losses"]})
        assert 1e-5 < difference < BF16_TOLERANCE, f"{engine} in bf16: {name} differs by {difference:.1e}"
        assert all(value.dtype != torch.bfloat16 for value in results.values())


def expected_of_one_process() -> dict[str, dict[str, Tensor]]:
    alone = ShardMesh.single()
    return {name: trained(Case(optimizer=name, settings={"ema_decay": 0.9}), alone) for name in ("sgd", "adamw")}


@pytest.mark.parametrize("world_size", [2, 3])
def test_engines_equal_one_process(world_size: int) -> None:
    run_distributed(compare_with_one_process, world_size, SAMPLE[world_size], expected_of_one_process())


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_engines_equal_one_process_in_all_settings(world_size: int) -> None:
    run_distributed(compare_with_one_process, world_size, EVERYTHING, expected_of_one_process())


def go_on(pairs: Iterable[tuple[str, str]]) -> None:
    mesh = ShardMesh.from_group()
    for first, second in pairs:
        case = Case(first, "adamw", settings={"ema_decay": 0.9, "portions": 2, "precision": "bf16"})
        engine, heads = case.build(mesh), build_heads(mesh)
        for step in range(3):
            train_step(engine, heads, mesh, step, rate=0.003)
        saved, saved_heads = engine.state_dict(), heads.state_dict()
        if first != second:
            # As a checkpoint has it: DTensors belong to a mesh of the engine that made them.
            saved = {section: {name: whole(v) for name, v in values.items()} for section, values in saved.items()}
        before = {name: v for name, v in flattened(saved).items() if "num_batches" not in name}
        other = Case(second, "adamw", network=case.network, settings=case.settings).build(mesh)
        other_heads = build_heads(mesh)
        train_step(other, other_heads, mesh, 7, rate=0.003)
        other.load_state_dict(saved)
        other_heads.load_state_dict(saved_heads)
        same(flattened(other.state_dict()), before)
        expected = [train_step(engine, heads, mesh, step, rate=0.003) for step in (3, 4)]
        found = [train_step(other, other_heads, mesh, step, rate=0.003) for step in (3, 4)]
        if first == second:
            assert found == expected, f"{first} -> {second}"
            same(flattened(other.state_dict()), flattened(engine.state_dict()))
        else:
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-3), f"{first} -> {second}"


def state_goes_round_and_on(rank: int, world_size: int, pairs: list[tuple[str, str]]) -> None:
    go_on(pairs)


def test_state_comes_back_bit_for_bit_and_goes_on_in_another_engine() -> None:
    ring = list(zip(ENGINES, [*list(ENGINES)[1:], "ddp"], strict=True))
    run_distributed(state_goes_round_and_on, 2, [(engine, engine) for engine in ENGINES] + ring)


@pytest.mark.soak
def test_state_of_every_engine_goes_on_in_every_engine() -> None:
    run_distributed(state_goes_round_and_on, 3, list(itertools.product(ENGINES, ENGINES)))


def check_nan_on_one_rank(mesh: ShardMesh, expected: dict[str, Tensor]) -> None:
    """Nobody moves, and training goes on as it does in one process."""
    for name in ENGINES:
        assert_close(with_nan_in_step_2(Case(name), mesh), expected, name)
        # Batch statistics have seen the NaN, and must forget it on the rank that saw it.
        network = {"batch_norm": True}
        results = with_nan_in_step_2(Case(name, network=network, settings={"ema_decay": 0.9, "portions": 2}), mesh)
        assert all(bool(value.isfinite().all()) for value in results.values()), name


def with_nan_in_step_2(case: Case, mesh: ShardMesh) -> dict[str, Tensor]:
    engine, heads = case.build(mesh), build_heads(mesh)
    records = []
    for step in range(4):
        before = moved_state(engine, heads)
        loss, norm, updated = train_step(
            engine, heads, mesh, step, rate=0.1, poison=float("nan") if step == 2 else None
        )
        assert updated == (step != 2)
        if step == 2:
            assert not torch.tensor([loss, norm]).isfinite().any()
            same(moved_state(engine, heads), before)
        else:
            records.append(loss)
    return {"losses": torch.tensor(records), **moved_state(engine, heads)}


def check_overflow_on_one_rank(mesh: ShardMesh) -> None:
    """Nobody moves, and the loss scale of all halves."""
    for name in ENGINES:
        case = Case(name, settings={"precision": "fp16", "portions": 2, "ema_decay": 0.9})
        engine, heads = case.build(mesh), build_heads(mesh, defers_updates=True)
        assert engine.state_dict()["loss_scale"] == {"value": 2.0**16, "good_steps": 0}
        # So large a gradient overflows at the scale that one starts from.
        tries = [train_step(engine, heads, mesh, 0, rate=0.1)[2] for _ in range(6)]
        assert tries == sorted(tries), name
        assert tries[-1], name
        scale = engine.state_dict()["loss_scale"]["value"]
        assert scale == 2.0 ** (16 - tries.count(False))
        before = moved_state(engine, heads)

        images, labels = (part.tensor_split(mesh.size)[mesh.rank] for part in global_batch(1))
        embeddings = engine.forward(images)
        if mesh.rank == 1:
            embeddings.register_hook(lambda gradient: gradient * float("inf"))
        loss = heads(embeddings, {"main": labels})
        assert bool(loss.isfinite())
        engine.backward(loss)
        outcome = engine.step(learning_rate=0.1)
        heads.finish_update(outcome.updated)
        assert not outcome.updated, name
        same(moved_state(engine, heads), before)
        assert engine.state_dict()["loss_scale"] == {"value": scale / 2, "good_steps": 0}

        assert train_step(engine, heads, mesh, 2, rate=0.1)[2]
        after = moved_state(engine, heads)
        assert not torch.equal(after["centers"], before["centers"])
        assert engine.state_dict()["loss_scale"] == {"value": scale / 2, "good_steps": 1}
        # Equal on all ranks.
        for what, value in after.items():
            copy = value.clone()
            torch.distributed.broadcast(copy, 0)
            assert torch.equal(copy, value), (name, what)
        restored = case.build(mesh)
        restored.load_state_dict(engine.state_dict())
        assert restored.state_dict()["loss_scale"] == {"value": scale / 2, "good_steps": 1}


def check_flipped_bit(mesh: ShardMesh) -> None:
    """Nobody moves if a gradient is not finite on one rank alone, after ranks have exchanged theirs."""
    for name in ("ddp", "fsdp2"):
        engine, heads = Case(name).build(mesh), build_heads(mesh)
        images, labels = (part.tensor_split(mesh.size)[mesh.rank] for part in global_batch(0))
        engine.backward(heads(engine.forward(images), {"main": labels}))
        before = flattened(engine.state_dict())
        if mesh.rank == 1:
            gradient: Any = engine._backbone.last.weight.grad
            (gradient.to_local() if name == "fsdp2" else gradient)[0, 0] = float("inf")
        assert not engine.step(learning_rate=0.1).updated
        same(flattened(engine.state_dict()), before)


def check_average_of_weights(mesh: ShardMesh) -> None:
    """It is what it should be, stays in skipped steps, and is what is evaluated."""
    decay = 0.8
    images = global_batch(99)[0]
    for name in ENGINES:
        case = Case(name, network={"batch_norm": True}, settings={"ema_decay": decay})
        engine, heads = case.build(mesh), build_heads(mesh)
        expected = {n: v for n, v in flattened(engine.state_dict()["backbone"]).items() if v.is_floating_point()}
        for step in range(4):
            train_step(engine, heads, mesh, step, rate=0.1, poison=float("inf") if step == 1 else None)
            state = flattened(engine.state_dict()["backbone"])
            if step != 1:
                expected = {n: decay * value + (1 - decay) * state[n] for n, value in expected.items()}
        average = flattened(engine.state_dict()["ema"])
        assert average.keys() == expected.keys()
        for what, value in expected.items():
            assert torch.allclose(average[what], value, rtol=1e-5, atol=1e-6), (name, what)

        evaluated = engine.evaluation_backbone().eval()
        own = {n: v for n, v in evaluated.state_dict().items() if v.is_floating_point()}
        same(own, average)
        embeddings = evaluated(images)
        trains_on = [train_step(engine, heads, mesh, step, rate=0.1) for step in (4, 5)]
        assert all(updated for _, _, updated in trains_on)
        gathered = embeddings.detach().clone()
        torch.distributed.broadcast(gathered, 0)
        assert torch.equal(gathered, embeddings), name


def run_checks(rank: int, world_size: int, expected_with_nan: dict[str, Tensor]) -> None:
    mesh = ShardMesh.from_group()
    check_nan_on_one_rank(mesh, expected_with_nan)
    check_overflow_on_one_rank(mesh)
    check_flipped_bit(mesh)
    check_average_of_weights(mesh)


def test_ranks_move_and_skip_alike() -> None:
    run_distributed(run_checks, 2, with_nan_in_step_2(Case(), ShardMesh.single()))


def test_steps_are_enough_to_see_a_difference() -> None:
    results = trained(Case(), ShardMesh.single())
    assert len(results["losses"]) == STEPS
    assert results["norms"].min() > 2.0  # clipping is active throughout
