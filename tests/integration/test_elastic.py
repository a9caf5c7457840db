"""Runs that go on: with every engine bit for bit, in another engine, and on other numbers of ranks."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import losses_of, set_back
from support import checkpoint_tensors, run_distributed

from partialfc.backbones import BACKBONES, VisionTransformer
from partialfc.cli import main
from partialfc.data import synthesize

IDENTITIES = 70
IMAGES = IDENTITIES * 4
GLOBAL_BATCH = 24
STEPS = 8  # of an epoch of 11.7

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}

# Every way to store class centers and what their optimizer remembers.
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32-dense-decay": {"optimizer": {"decay": "dense"}},
    "float16": {"dtype": "float16", "optimizer": {"momentum_dtype": "bfloat16"}},
    "bfloat16": {"dtype": "bfloat16", "optimizer": {"momentum_dtype": "int8"}},
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 0.001}},
    "adagrad": {"dtype": "float16", "optimizer": {"name": "adagrad", "learning_rate": 0.01}},
}
# Each with all classes and a margin without state, and with drawn classes and one that remembers norms.
FULL = {"sample_rate": 1.0, "margin": {"name": "CosFace", "scale": 16.0}}
SAMPLED = {"sample_rate": 0.3, "margin": {"name": "AdaFace", "scale": 16.0}}
HEADS: dict[str, dict[str, Any]] = {
    f"{name}-{classes}": {**storage, **options}
    for name, storage in STORAGES.items()
    for classes, options in (("full", FULL), ("sampled", SAMPLED))
}
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"head": head} for name, head in HEADS.items()},
    **{name: {"head": SAMPLED, "engine": {**engine, "ema_decay": 0.9}} for name, engine in ENGINES.items()},
    **{
        f"nodes-{name}": {"head": {**SAMPLED, "shard_over": "node"}, "engine": ENGINES[name]}
        for name in ("ddp", "fsdp2", "zero3")
    },
}
# Each storage and engine once.
SOME_RUNS = [
    *("float32-sampled", "float32-dense-decay-sampled", "float16-sampled", "bfloat16-full"),
    *("adamw-sampled", "adagrad-full", "fsdp2", "zero1", "zero2", "nodes-ddp", "zero3"),
]
# By the step from which on they train: ranks, and how many of them are on a node. The parameters of FSDP2 and ZeRO do
# not divide by 3.
STAGES = {0: (4, 2), 2: (3, 3), 4: (1, 1), 6: (2, 1)}
TOLERANCE = 1e-6
# Sums are rounded otherwise on another number of ranks. Now and then that takes an element of a class center over the
# bound at which it is rounded to the next number of 16 bits, which is 1/2048 (float16) or 1/256 (bfloat16) away. In one
# of the 16 elements of one class of 24 images, that moves the mean loss by some millionths.
TOLERANCE_16_BITS = 1e-4


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "faces"
    synthesize(directory, identities=IDENTITIES, images_per_identity=4, seed=1, image_size=32)
    return directory


def config_file(tmp_path: Path, faces: Path, name: str, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "run": {"directory": str(tmp_path / name), "log_every_steps": 1, "device": "cpu"},
        "data": {"directory": str(faces), "image_size": 32, "num_workers": 0},
        "backbone": {"name": "vit_for_tests", "embedding_dim": 16, "options": {"final_norm": "none", "patch_size": 16}},
        "head": FULL,
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "max_gradient_norm": 1.0},
        "training": {"epochs": STEPS * GLOBAL_BATCH / IMAGES, "global_batch_size": GLOBAL_BATCH},
        "evaluation": {"enabled": False},
        "checkpoint": {"every_steps": 2, "keep_last": 10},
    }
    for section, settings in sections.items():
        values[section] = {**values.get(section, {}), **settings}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _train_all(rank: int, world_size: int, configs: list[str]) -> None:
    # Without batch norm and dropout, so that it does not matter to it which images a rank has.
    BACKBONES["vit_for_tests"] = partial(VisionTransformer, 64, 2)
    for config in configs:
        assert main(["train", config]) == 0, config


def _train_twice(rank: int, world_size: int, configs: list[str]) -> None:
    import torch.distributed as dist

    _train_all(rank, world_size, configs)
    if rank == 0:
        for config in configs:
            run = Path(config).with_suffix("")
            shutil.copytree(run, run.with_name(f"{run.name}-straight"))
            set_back(run, 4)
    dist.barrier()
    _train_all(rank, world_size, configs)


def _assert_same_tensors(first: Path, second: Path) -> None:
    ours, theirs = (checkpoint_tensors(run, f"step-{STEPS:08d}") for run in (first, second))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = value.equal(theirs[name]) if hasattr(value, "equal") else value == theirs[name]
        assert same, f"{name} differs between {first.name} and {second.name}"


def test_every_engine_goes_on_bit_for_bit_in_mid_epoch(tmp_path: Path, faces: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "head": SAMPLED,
        "training": {"accumulation_steps": 2, "global_batch_size": GLOBAL_BATCH},
    }
    options["training"]["epochs"] = STEPS * GLOBAL_BATCH / IMAGES
    configs = [
        config_file(tmp_path, faces, name, engine={**engine, "ema_decay": 0.9}, **options)
        for name, engine in ENGINES.items()
    ]
    # ZeRO-3 exchanges torch's linear function for the rest of the process, which rounds otherwise.
    *others, zero3 = [str(path) for path in configs]
    run_distributed(_train_twice, 2, others)
    run_distributed(_train_twice, 2, [zero3])
    for name in ENGINES:
        run, straight = tmp_path / name, tmp_path / f"{name}-straight"
        assert losses_of(run) == losses_of(straight)
        assert len(losses_of(run)) == STEPS
        _assert_same_tensors(run, straight)
        # Another engine rounds otherwise, no more.
        assert losses_of(run) == pytest.approx(losses_of(tmp_path / "ddp"), rel=1e-5)


def test_a_run_goes_on_in_another_engine(tmp_path: Path, faces: Path) -> None:
    """DDP -> ZeRO-3 -> FSDP2 -> ZeRO-1: one run, two steps in each."""
    straight = config_file(tmp_path, faces, "straight")
    run_distributed(_train_all, 2, [str(straight), str(config_file(tmp_path, faces, "run"))])
    for step, name in ((2, "zero3"), (4, "fsdp2"), (6, "zero1")):
        set_back(tmp_path / "run", step)
        run_distributed(_train_all, 2, [str(config_file(tmp_path, faces, "run", engine=ENGINES[name]))])
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "straight"), rel=1e-6)


def _train_on_nodes(rank: int, world_size: int, ranks_per_node: int, configs: list[str]) -> None:
    os.environ.update(LOCAL_RANK=str(rank % ranks_per_node), LOCAL_WORLD_SIZE=str(ranks_per_node))
    _train_all(rank, world_size, configs)


def _check_stages(tmp_path: Path, faces: Path, names: list[str]) -> None:
    """4 -> 3 -> 1 -> 2 ranks, two steps on each; against one process with DDP."""
    # ZeRO-3 changes its process, and so is the last.
    names = sorted(names, key=lambda name: "zero3" in name)
    configs = [str(config_file(tmp_path, faces, name, **RUNS[name])) for name in names]
    heads = [name for name in names if name in HEADS]
    straight = [str(config_file(tmp_path, faces, f"{name}-straight", **RUNS[name])) for name in heads]
    for step, (ranks, ranks_per_node) in STAGES.items():
        for name in names:
            set_back(tmp_path / name, step)
        run_distributed(_train_on_nodes, ranks, ranks_per_node, [*(straight if ranks == 1 else []), *configs])
    for name in names:
        losses = losses_of(tmp_path / name)
        expected = losses_of(tmp_path / f"{name if name in HEADS else 'float32-sampled'}-straight")
        tolerance = TOLERANCE_16_BITS if "dtype" in RUNS[name]["head"] else TOLERANCE
        assert len(losses) == STEPS
        assert losses == pytest.approx(expected, rel=tolerance), name


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path, faces: Path) -> None:
    """Every engine, every storage of class centers, and centers that each node has whole."""
    _check_stages(tmp_path, faces, SOME_RUNS)


@pytest.mark.soak
def test_all_runs_go_on_with_any_number_of_ranks(tmp_path: Path, faces: Path) -> None:
    """Every storage of class centers with all and with drawn classes, and each engine that shards beside nodes too."""
    _check_stages(tmp_path, faces, list(RUNS))
