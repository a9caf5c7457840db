"""Runs that go on: with every engine bit for bit, in another engine, and on other numbers of ranks."""

from __future__ import annotations

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

# Every way to store class centers and what their optimizer remembers, sampled or not.
HEADS: dict[str, dict[str, Any]] = {
    "float32": {"sample_rate": 1.0},
    "float32-sampled-dense": {"sample_rate": 0.3, "optimizer": {"decay": "dense"}},
    "float16": {"sample_rate": 0.3, "dtype": "float16", "optimizer": {"momentum_dtype": "bfloat16"}},
    "bfloat16": {"sample_rate": 1.0, "dtype": "bfloat16", "optimizer": {"momentum_dtype": "int8"}},
    "adamw": {"sample_rate": 0.3, "optimizer": {"name": "adamw", "learning_rate": 0.001}},
    "adagrad": {"sample_rate": 1.0, "dtype": "float16", "optimizer": {"name": "adagrad", "learning_rate": 0.01}},
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "faces"
    synthesize(directory, identities=IDENTITIES, images_per_identity=4, seed=1, image_size=32)
    return directory


def config_file(tmp_path: Path, faces: Path, name: str, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "run": {"directory": str(tmp_path / name), "log_every_steps": 3, "device": "cpu"},
        "data": {"directory": str(faces), "image_size": 32, "num_workers": 0},
        "backbone": {"name": "vit_for_tests", "embedding_dim": 16, "options": {"final_norm": "none", "patch_size": 16}},
        "head": {"margin": {"name": "CosFace", "scale": 16.0}},
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
        "head": {"margin": {"name": "AdaFace", "scale": 16.0}, "sample_rate": 0.3},
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
        assert len(losses_of(run)) == 3
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


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path, faces: Path) -> None:
    """4 -> 3 -> 1 -> 2 ranks, two steps on each, for every storage of class centers; against one process."""
    configs, straight = [], []
    for name, head in HEADS.items():
        settings = {"margin": {"name": "CosFace", "scale": 16.0}, **head}
        configs.append(str(config_file(tmp_path, faces, name, head=settings)))
        straight.append(str(config_file(tmp_path, faces, f"{name}-straight", head=settings)))
    run_distributed(_train_all, 4, configs)
    for ranks, step in ((3, 2), (1, 4), (2, 6)):
        for name in HEADS:
            set_back(tmp_path / name, step)
        run_distributed(_train_all, ranks, [*configs, *(straight if ranks == 1 else [])])
    for name in HEADS:
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / f"{name}-straight"), rel=1e-6), name
