"""The plan's bytes against those that the allocator hands out to a real head of 200,000 classes, in a fresh process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from partialfc.config import load_config
from partialfc.head import CenterAdamW, CenterSGD, PartialFC, VariationalPrototypes
from partialfc.head.optimizers import CenterAdagrad
from partialfc.margins import ArcFace, CenterLoss, CurricularFace
from partialfc.plan.head import count_head, local_rows

C, D, B = 200_000, 64, 128
TOLERANCE = 0.05


@dataclass(frozen=True)
class Format:
    """One way to keep class centers: as the configuration says it, and as the constructor does."""

    overrides: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    first_step: int = 0


FORMATS = {
    "all classes": Format([]),
    "autograd": Format(["head.sample_rate=0.1", "head.fused=false"], {"sample_rate": 0.1, "fused": False}),
    "16 bits": Format(
        [
            "head.sample_rate=0.1",
            "head.dtype=float16",
            "head.matmul_dtype=bfloat16",
            "head.optimizer.momentum_dtype=bfloat16",
        ],
        {
            "sample_rate": 0.1,
            "dtype": torch.float16,
            "matmul_dtype": torch.bfloat16,
            "optimizer": CenterSGD(momentum_dtype="bfloat16"),
        },
    ),
    "adagrad": Format(["head.optimizer={name: adagrad}"], {"optimizer": CenterAdagrad()}),
    "int8 momentum": Format(["head.optimizer.momentum_dtype=int8"], {"optimizer": CenterSGD(momentum_dtype="int8")}),
    "dense decay": Format(
        ["head.sample_rate=0.3", "head.optimizer.decay=dense"],
        {"sample_rate": 0.3, "optimizer": CenterSGD(decay="dense")},
        steps=2,
    ),
    "adamw": Format(["head.optimizer={name: adamw}"], {"optimizer": CenterAdamW()}),
    "sub-centers": Format(["head.sample_rate=0.1", "head.num_subcenters=2"], {"sample_rate": 0.1, "num_subcenters": 2}),
    "transformed negatives": Format(["head.margin={name: CurricularFace}"], {"margin": CurricularFace()}),
    "center loss and prototypes": Format(
        ["head.auxiliaries=[{name: CenterLoss}]", "head.variational={start_step: 5}"],
        {"auxiliaries": [CenterLoss()], "variational": VariationalPrototypes(start_step=5)},
        first_step=5,
    ),
}


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """(bytes that are alive after `work`, the most while it ran), by the events of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = work()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del held
    return now, peak


def measure(name: str, results: Any) -> None:
    """To be called in a fresh process."""
    torch.set_num_threads(1)
    chosen = FORMATS[name]
    arguments = {"margin": ArcFace(), **chosen.arguments}
    state, _ = allocations(lambda: arguments.setdefault("head", PartialFC(C, D, **arguments)))
    head = arguments["head"]
    head.step = chosen.first_step
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(B, D, generator=generator, requires_grad=True)
    labels = torch.randint(C, (B,), generator=generator)

    def steps() -> None:
        for _ in range(chosen.steps):
            embeddings.grad = None
            head(embeddings, labels).backward()

    results.put((state, allocations(steps)[1]))


@pytest.mark.parametrize("name", FORMATS)
def test_tables_and_steps_take_what_was_planned(tmp_path: Path, name: str) -> None:
    values = {
        "run": {"directory": "none"},
        "data": {"directory": "none"},
        "backbone": {"embedding_dim": D},
        "head": {"margin": {"name": "ArcFace"}},
        "training": {"epochs": 1, "global_batch_size": B},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    config = load_config(path, FORMATS[name].overrides)
    rows = local_rows(C, 1)
    planned = count_head(config, config.head, rows=rows, global_batch_size=B, path="head", device="cpu")

    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=measure, args=(name, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    state, step = results.get()
    assert planned.table_bytes(rows, on_host=False) == pytest.approx(state, rel=TOLERANCE)
    assert planned.step.bytes_for(rows) == pytest.approx(step, rel=TOLERANCE)
    assert planned.device_bytes(rows, 1) == pytest.approx(state + step, rel=TOLERANCE)
