"""What one step of the head sends, to the byte, and that its update does not wait for it.

b rows of each rank, W ranks, B = W b, D numbers of an embedding, e bytes of a number.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from support import SOON_SECONDS, run_distributed
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from traffic import CountCollectives

from partialfc import CenterSGD, PartialFC
from partialfc.distributed.collectives import average_over_ranks, gather_objects, gather_rows, max_over_ranks
from partialfc.distributed.mesh import ShardMesh, node_groups
from partialfc.distributed.trail import TRAIL
from partialfc.head import HeadGroup
from partialfc.head import tiles as tiles_module
from partialfc.margins import AdaFace, ArcFace, Softmax

NUM_CLASSES, DIM, BATCH = 512, 24, 5
SIMILARITY, LARGEST, SUM = "similarity to the own class", "maximum of logits", "sum over negatives"
Traffic = dict[str, tuple[int, int]]


def traffic(num_ranks: int, *, bounded: bool, gathered: int = 4) -> Traffic:
    """(calls, bytes that a rank hands in) of the collectives of a step of `num_ranks` that share the class centers."""
    batch = num_ranks * BATCH
    found = {
        # Each rank sends the size of its batch in front of its labels.
        "all_gather labels": (1, 8 * (1 + BATCH)),
        "all_gather embeddings": (1, gathered * BATCH * DIM),
        f"all_reduce {SIMILARITY}": (1, 4 * batch),
        f"all_reduce {LARGEST}": (1, 4 * batch),
        f"all_reduce {SUM}": (1, 4 * batch),
        "reduce_scatter embedding gradient": (1, gathered * batch * DIM),
    }
    if bounded:
        del found[f"all_reduce {LARGEST}"]
    return found


def noted() -> Traffic:
    return {name: (TRAIL.calls[name], TRAIL.bytes[name]) for name in TRAIL.calls}


def step(head: PartialFC, rank: int) -> Traffic:
    """What the trail has of the second step: in the first, ranks agree on the size of a batch."""
    for _ in range(2):
        embeddings = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        TRAIL.clear()
        with CountCollectives() as counting:
            head(embeddings, torch.arange(BATCH) * 7).backward()
    # Nothing goes without a note.
    assert sum(counting.counts.values()) == sum(TRAIL.calls.values())
    return noted()


def check_flat(rank: int, mesh: ShardMesh) -> None:
    for fused in (True, False):
        for margin, bounded in ((ArcFace(), True), (ArcFace(scale=100.0), False), (Softmax(), False)):
            for sample_rate in (1.0, 0.25):
                head = PartialFC(
                    NUM_CLASSES, DIM, margin=margin, sample_rate=sample_rate, fused=fused, process_group=mesh.group
                )
                assert step(head, rank) == traffic(mesh.size, bounded=bounded), (margin, sample_rate, fused)
    half = PartialFC(NUM_CLASSES, DIM, margin=ArcFace(), gather_dtype=torch.bfloat16, process_group=mesh.group)
    assert step(half, rank) == traffic(mesh.size, bounded=True, gathered=2)
    assert TRAIL.last == "reduce_scatter embedding gradient"


def check_grid(rank: int) -> None:
    """Two nodes of two ranks: in a node what two ranks alone would send, and the rest between nodes."""
    shards, replicas = node_groups(2)
    tiles_module.TILE_NUMBERS["cpu"] = 64 * (DIM + 2 * BATCH)
    for margin in (ArcFace(), AdaFace()):
        head = PartialFC(NUM_CLASSES, DIM, margin=margin, process_group=shards, replicate_over=replicas)
        between = {
            "all_gather labels of replicas": (1, 2 * 8 * (1 + BATCH)),
            # A scalar, and the gradient of each tile: 4 tiles of 64 classes on each rank.
            "all_reduce loss of replicas": (1, 4),
            "all_reduce gradient of class centers of replicas": (4, 4 * NUM_CLASSES // 2 * DIM),
        }
        if isinstance(margin, AdaFace):
            # Cosine and norm of each row, of which the margin takes averages.
            between["all_gather numbers of rows of replicas"] = (1, 2 * 4 * 2 * BATCH)
        assert step(head, rank) == traffic(2, bounded=True) | between


def check_others(rank: int, mesh: ShardMesh) -> None:
    """The collectives that no step of a head has."""
    TRAIL.clear()
    with CountCollectives() as counting:
        gather_rows(torch.zeros(2 + rank, 3), mesh, what="embeddings")
        average_over_ranks([torch.zeros(3), torch.zeros(2, 2)], mesh, what="batch statistics")
        max_over_ranks([1, 2], mesh, what="signal")
        assert TRAIL.last == "all_reduce signal"
        gather_objects(rank, mesh, what="versions")
    assert noted() == {
        "all_gather number of embeddings": (1, 8),
        "all_gather embeddings": (1, (1 + mesh.size) * 3 * 4),
        "all_reduce batch statistics": (1, 7 * 8),
        "all_reduce signal": (1, 16),
        "all_gather versions": (1, 0),
    }
    # Objects take one for their sizes and one for themselves.
    assert sum(counting.counts.values()) == sum(TRAIL.calls.values()) + 1


def check_traffic(rank: int, world_size: int) -> None:
    pair = dist.new_group([0, 1])
    check_flat(rank, ShardMesh.from_group())
    if rank < 2:
        check_flat(rank, ShardMesh.from_group(pair))
    check_grid(rank)
    check_others(rank, ShardMesh.from_group())


def test_collectives_and_bytes_of_a_step() -> None:
    run_distributed(check_traffic, 4)


def test_one_process_sends_nothing() -> None:
    TRAIL.clear()
    embeddings = torch.randn(BATCH, DIM).requires_grad_()
    PartialFC(NUM_CLASSES, DIM, margin=ArcFace())(embeddings, torch.arange(BATCH)).backward()
    assert noted() == {}


@dataclass(frozen=True)
class TellingSGD(CenterSGD):
    """Tells the other rank that centers have moved, which they do with the reduce-scatter under way."""

    key: ClassVar[str] = "moved"

    def update_(self, *arguments: Any, **options: Any) -> None:
        assert TRAIL.last == "reduce_scatter embedding gradient"
        super().update_(*arguments, **options)
        _get_default_store().set(self.key, "yes")


def _tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        return importlib.import_module("trace_step")


def check_overlap(rank: int, world_size: int, directory: Path) -> None:
    """Rank 1 comes to the reduce-scatter when rank 0 has moved its centers, which so cannot have waited for it."""
    tool = _tool()
    optimizer = TellingSGD() if rank == 0 else CenterSGD()
    heads = HeadGroup({"main": PartialFC(NUM_CLASSES, DIM, margin=ArcFace(), optimizer=optimizer)})
    embeddings = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(rank)).requires_grad_()

    def late_step() -> None:
        loss = heads(embeddings, {"main": torch.arange(BATCH)})
        if rank == 1:
            _get_default_store().wait([TellingSGD.key], timedelta(seconds=SOON_SECONDS))
        loss.backward()

    found = tool.trace(late_step, directory / f"trace{rank}.json")
    if rank == 0:
        # No more than this is sure: gloo's thread may begin late, and the span ends after the word to rank 1.
        assert found.update[0] < found.sending[1], found
    gradient = embeddings.grad
    assert isinstance(gradient, Tensor)
    assert bool(gradient.abs().sum() > 0)


def test_class_centers_move_while_the_embedding_gradient_is_on_its_way(tmp_path: Path) -> None:
    run_distributed(check_overlap, 2, tmp_path)


def test_overlap_of_a_trace() -> None:
    def event(name: str, start: float, end: float) -> dict[str, object]:
        return {"name": name, "ts": start, "dur": end - start}

    tool = _tool()
    events = [
        event("gloo:all_reduce", 0.0, 2.0),
        event(tool.SENDING, 3.0, 20.0),
        event("gloo:reduce_scatter", 5.0, 12.0),
        event(tool.UPDATE, 4.0, 9.0),
        {"name": "process_name"},
    ]
    found = tool.overlap_of(events)
    assert found == tool.Overlap(sending=(5.0, 12.0), update=(4.0, 9.0))
    assert found.microseconds == 4.0
    assert tool.Overlap(sending=(5.0, 12.0), update=(13.0, 14.0)).microseconds == 0.0
