"""What the plan says of checkpoints against what real saves copy, hold and write."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import make_faces, write_config
from support import run_distributed

from partialfc.assembly import Run, assemble, open_inputs
from partialfc.checkpoint import parts, store
from partialfc.checkpoint.manifest import MANIFEST_NAME, FileRecord
from partialfc.checkpoint.parts import FlatState, Part
from partialfc.checkpoint.reading import StoredState
from partialfc.checkpoint.staging import Staging
from partialfc.cli import main
from partialfc.config import Config, load_config
from partialfc.distributed.mesh import ShardMesh
from partialfc.plan import Machine, format_bytes, make_plan
from partialfc.plan.head import peak_bytes
from partialfc.plan.saves import SaveCost, count_saved_state
from partialfc.saving import Saver

# So many that what a file has besides numbers, 1 KiB for each tensor, is below 5 %.
C = 200_000
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all there is": {
        "engine": {"ema_decay": 0.9},
        "optimizer": {"name": "adamw"},
        "training": {"precision": "fp16"},
        "head": {
            "margin": {"name": "SphereFace2"},
            "num_subcenters": 2,
            "optimizer": {"momentum_dtype": "int8"},
            "dtype": "float16",
        },
    },
    "terms": {"head": {"auxiliaries": [{"name": "CenterLoss"}], "variational": {}}},
    "offload": {"head": {"offload": True}},
    "dense decay, no momentum": {"head": {"optimizer": {"decay": "dense"}}, "optimizer": {"momentum": 0.0}},
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("data") / "faces")


def config_of(directory: Path, faces: Path, num_classes: int = C, **sections: dict[str, Any]) -> Config:
    head = {"num_classes": num_classes, **sections.pop("head", {})}
    options = {"evaluation": {"enabled": False}, "head": head, **sections}
    return load_config(write_config(directory, faces, steps=1, **options), [])


def assembled(config: Config, mesh: ShardMesh | None = None) -> Run:
    mesh = mesh or ShardMesh.single()
    return assemble(config, open_inputs(config, num_ranks=mesh.size), mesh, torch.device("cpu"))


def cost_of(config: Config, *, num_ranks: int = 1, device: str = "cpu") -> SaveCost:
    heads = {"main": config.head, **{name: task.head for name, task in config.tasks.items()}}
    identities = {name: head.num_classes or 0 for name, head in heads.items()}
    saved = count_saved_state(config, heads, device=device)
    return saved.cost(identities=identities, num_shards=dict.fromkeys(heads, num_ranks), num_ranks=num_ranks)


def save(run: Run) -> tuple[dict[str, Part], Path]:
    """What a save in the background copies, by name, and what it leaves."""
    copies: list[FlatState] = []
    copy = Staging.copy

    def noted(self: Staging, state: FlatState) -> FlatState:
        copies.append(copy(self, state))
        return copies[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "copy", noted)
        saver = Saver(run, saved_step=None)
        saver.save()
        saver.wait()
    (state,) = copies
    (path,) = run.store.directory.glob("step-*")
    return {name: value for name, value in state.values.items() if isinstance(value, Part)}, path


def held_by_the_writer(run: Run, *, on_device: bool = False) -> int:
    """The most bytes that this rank's writer holds in a save that blocks.

    Args:
        run: on a CPU.
        on_device: every piece is a tensor of its own when the writer gets it, as if it came from a GPU.
    """
    held, write = [], store.write_state

    def copying(part: Part) -> Part:
        return replace(part, read=lambda start, stop: part.read(start, stop).clone())

    def measured(directory: Path, state: FlatState, group: Any) -> dict[str, FileRecord]:
        own = {name: value for name, value in state.values.items() if isinstance(value, Part)}
        standing, records = [part.read(0, part.num_rows) for part in own.values()], {}
        if on_device:
            state = replace(state, values=state.values | {name: copying(part) for name, part in own.items()})
        held.append(peak_bytes(lambda: records.update(write(directory, state, group)), standing=standing))
        return records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write_state", measured)
        Saver(run, saved_step=None).save_last()
    return held[0]


def bytes_in(path: Path) -> int:
    """Of all tensors of a checkpoint."""
    stored = StoredState(path).tensors.values()
    return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in stored)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_files_are_those_of_a_real_save(tmp_path: Path, faces: Path, name: str) -> None:
    config = config_of(tmp_path, faces, **CASES[name])
    copied, path = save(assembled(config))
    cost = cost_of(config)
    assert cost.copy_bytes == sum(part.num_bytes for part in copied.values())
    assert cost.disk_bytes == bytes_in(path)
    size = sum(file.stat().st_size for file in path.iterdir() if file.name not in (MANIFEST_NAME, ".metadata"))
    assert cost.disk_bytes < size < 1.05 * cost.disk_bytes
    # From a GPU to pinned memory, of which torch takes powers of two; what is on the host anyway is copied as it is.
    offloaded = [part.num_bytes for key, part in copied.items() if config.head.offload and "class_centers" in key]
    pinned = [part.num_bytes for part in copied.values()]
    for size in offloaded:
        pinned.remove(size)
    expected = sum(offloaded) + sum(2 ** math.ceil(math.log2(size)) for size in pinned)
    assert cost_of(config, device="cuda").copy_bytes == expected
    assert (len(offloaded) > 0) == (name == "offload")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_writer_holds(tmp_path: Path, faces: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Of large tensors one piece, and the next with it; of what comes from a device all others too, to the end."""
    config = config_of(tmp_path, faces)
    run = assembled(config)
    assert cost_of(config).writer_bytes == held_by_the_writer(run) == 0
    monkeypatch.setattr(parts, "PIECE_BYTES", 2**20 + 2**18)
    run.progress.step = 1
    assert held_by_the_writer(run, on_device=device == "cuda") == cost_of(config, device=device).writer_bytes > 2**21


ENGINES = ("ddp", "fsdp2")


def save_on_a_rank(rank: int, _: int, configs: dict[str, Config], results: Path) -> None:
    for engine, config in configs.items():
        run = assembled(config, ShardMesh.from_group())
        copied, path = save(run)
        run.progress.step = 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "PIECE_BYTES", 2**20)
            held = held_by_the_writer(run, on_device=True)
        numbers = [sum(part.num_bytes for part in copied.values()), held, bytes_in(path)]
        (results / f"{engine}-{rank}.json").write_text(json.dumps(numbers), encoding="utf-8")


def test_of_several_ranks_that_with_most_counts(tmp_path: Path, faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {"optimizer": {"name": "adamw"}}
    configs = {
        # An odd number of blocks of classes.
        name: config_of(
            tmp_path / name, faces, num_classes=199_900, engine={"name": name, "ema_decay": 0.9}, **sections
        )
        for name in ENGINES
    }
    run_distributed(save_on_a_rank, 2, configs, tmp_path)
    costs = {name: cost_of(config, num_ranks=2) for name, config in configs.items()}
    assert costs["fsdp2"].copy_bytes < costs["ddp"].copy_bytes
    monkeypatch.setattr(parts, "PIECE_BYTES", 2**20)
    for name, config in configs.items():
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
        copied, held, written = zip(*ranks, strict=True)
        assert costs[name].copy_bytes == copied[0] > copied[1]
        assert cost_of(config, num_ranks=2, device="cuda").writer_bytes == max(held)
        assert {costs[name].disk_bytes} == set(written)


def test_on_each_node_the_same_centers_are_written_once(tmp_path: Path, faces: Path) -> None:
    plan = make_plan(config_of(tmp_path, faces), Machine(4, 2**30, gpus_per_node=2))
    everywhere, node = plan.layouts["all"].save, plan.layouts["node"].save
    assert everywhere.disk_bytes == node.disk_bytes
    # Two tables of 16 float32 numbers a class, which are 4 MiB of 782 / 4 blocks, and 8 MiB of 782 / 2, when pinned.
    assert node.copy_bytes - everywhere.copy_bytes == 2 * 2**22


def test_saves_that_block_keep_no_copy(tmp_path: Path, faces: Path) -> None:
    costs = [cost_of(config_of(tmp_path, faces, checkpoint={"asynchronous": value})) for value in (True, False)]
    assert [cost.copy_bytes > 0 for cost in costs] == [True, False]
    assert costs[1] == replace(costs[0], copy_bytes=0)
    assert [cost.host_bytes for cost in costs] == [cost.copy_bytes + cost.writer_bytes for cost in costs]


def test_other_heads_are_saved_too(tmp_path: Path, faces: Path) -> None:
    task = {"data_directory": str(faces), "global_batch_size": 16, "head": {"margin": {"name": "CosFace"}}}
    task["head"] |= {"num_classes": 1000}
    alone, both = config_of(tmp_path, faces), config_of(tmp_path, faces, tasks={"other": task})
    # 1000 classes are 125 blocks of 8; beside the tables each head has none but Python numbers.
    assert cost_of(both).disk_bytes - cost_of(alone).disk_bytes == 2 * 1000 * 16 * 4
    _, path = save(assembled(both))
    assert bytes_in(path) == cost_of(both).disk_bytes


@pytest.mark.parametrize(
    ("settings", "num_kept"),
    [({}, 4), ({"keep_last": 1}, 2), ({"keep_last": 1, "keep_best": True}, 3)],
    ids=["default", "one", "one and the best"],
)
def test_how_many_checkpoints_there_are_at_most(
    tmp_path: Path, faces: Path, settings: dict[str, Any], num_kept: int
) -> None:
    """Counted while the last of some is being written."""
    config = config_of(
        tmp_path, faces, num_classes=24, checkpoint=settings, evaluation={"enabled": True, "every_steps": 1}
    )
    assert cost_of(config).num_kept == num_kept
    run, counts, write = assembled(config), [], store.write_state

    def counted(directory: Path, *arguments: Any) -> Any:
        counts.append(len(list(directory.parent.iterdir())))
        return write(directory, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write_state", counted)
        for step in range(6):
            run.progress.step = step
            Saver(run, saved_step=None).save(score=-step)
            run.store.wait()
    assert max(counts) == num_kept


def test_what_is_printed(tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(tmp_path, faces)
    options = ["--gpus", "4", "--gpu-memory", "1GiB"]
    for asynchronous in ("true", "false"):
        override = f"checkpoint.asynchronous={asynchronous}"
        assert main(["plan", str(tmp_path / "config.yaml"), *options, override]) == 0
        plan = make_plan(load_config(tmp_path / "config.yaml", [override]), Machine(4, 2**30))
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        start = lines.index(f"checkpoints with checkpoint.asynchronous={asynchronous} (counted)")
        save_, disk = plan.save, plan.save.disk_bytes
        copy = f"host memory: copy of a rank's state, kept from the first save on {format_bytes(save_.copy_bytes)}"
        assert lines[start + 1 : lines.index("", start)] == [
            *([copy] if asynchronous == "true" else []),
            f"host memory: held by the writer of a rank, at most {format_bytes(save_.writer_bytes)}",
            f"host memory for a save, on the rank with most {format_bytes(save_.copy_bytes + save_.writer_bytes)}",
            f"storage of one checkpoint, all ranks together {format_bytes(disk)}",
            f"storage of 4 of them, that being written included {format_bytes(4 * disk)}",
        ]
