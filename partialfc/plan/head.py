"""What a head costs: its tables counted on a real head that has no values, its steps on a real one of small size.

Shapes: B rows of the global batch, K sub-centers, D embedding dimension.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialfc.assembly import Task, build_head
from partialfc.config import Config, HeadConfig
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.feeding import TrainingData
from partialfc.head import PartialFC
from partialfc.head.checks import check_replicas
from partialfc.head.offload import OffloadedCenters
from partialfc.head.tiles import TILE_NUMBERS

__all__ = ["BLOCK", "HeadCost", "StepMemory", "TablePart", "count_head", "local_rows", "lone_head", "peak_bytes"]

BLOCK = 256  # classes; multiples of it are whole blocks, however large these are
_SMALLEST_DIM, _SMALLEST_BATCH = 128, 16  # of steps without tiles
_LEAST_RATE = 0.2


@dataclass(frozen=True)
class TablePart:
    """One quantity that is stored for each class.

    Attributes:
        name: for people.
        dtype: in which it is stored.
        bytes_per_class: of all its numbers, sub-centers included.
        passes: how often a step reads or writes it, of a class in play.
        on_host: whether it lies in host memory, and the device has the rows of a step only.
    """

    name: str
    dtype: str
    bytes_per_class: int
    passes: int
    on_host: bool


@dataclass(frozen=True)
class StepMemory:
    """What a step takes on a rank besides what stays.

    Attributes:
        fixed_bytes: whatever the number of classes: of the batch.
        bytes_per_row: for each class of the rank.
        most_bytes: it grows no further, since the classes come in tiles; infinity without tiles.
    """

    fixed_bytes: float
    bytes_per_row: float
    most_bytes: float

    def bytes_for(self, rows: int) -> int:
        """With that many classes on the rank."""
        return round(min(self.fixed_bytes + rows * self.bytes_per_row, self.most_bytes))


@dataclass(frozen=True)
class HeadCost:
    """Of one head.

    Attributes:
        settings: as configured.
        parts: what is stored for each class.
        replicated_bytes: what every rank stores whatever the number of classes.
        step: memory of a step.
        num_reductions: all-reduces of [B] numbers in a step.
        element_bytes: of numbers between ranks.
        sent_bytes: of numbers of embeddings and their gradient between ranks.
        global_batch_size: B.
        embedding_dim: D.
        num_replicas: how many nodes have all class centers each; 1 if they are sharded over all ranks.
    """

    settings: HeadConfig
    parts: tuple[TablePart, ...]
    replicated_bytes: int
    step: StepMemory
    num_reductions: int
    element_bytes: int
    sent_bytes: int
    global_batch_size: int
    embedding_dim: int
    num_replicas: int = 1

    @property
    def batch_rows(self) -> int:
        """Rows that meet the class centers of a rank: of the global batch, or of its node's share."""
        return -(-self.global_batch_size // self.num_replicas)

    @property
    def bytes_per_class(self) -> int:
        """Of everything that is stored for each class."""
        return sum(part.bytes_per_class for part in self.parts)

    @property
    def half(self) -> bool:
        """Whether 16-bit numbers are multiplied."""
        return self.settings.matmul_dtype != "float32"

    def rows_in_play(self, rows: int, num_shards: int) -> int:
        """Classes of a rank that take part in a step: those drawn, and its share of those of the batch."""
        drawn = round(self.settings.sample_rate * rows)
        return min(rows, drawn + -(-self.global_batch_size // num_shards))

    def table_bytes(self, rows: int, *, on_host: bool) -> int:
        """Of what a rank stores for that many classes, in host memory or on the device."""
        per_class = sum(part.bytes_per_class for part in self.parts if part.on_host == on_host)
        return rows * per_class + (0 if on_host else self.replicated_bytes)

    def staged_bytes(self, rows: int, num_shards: int) -> int:
        """Of rows that are in host memory, and on the device while they are in play."""
        return self.table_bytes(self.rows_in_play(rows, num_shards), on_host=True)

    def device_bytes(self, rows: int, num_shards: int) -> int:
        """On the device: tables, staged rows, and the memory of a step."""
        stored = self.table_bytes(rows, on_host=False) + self.staged_bytes(rows, num_shards)
        return stored + self.step.bytes_for(rows)

    def flop(self, rows_in_play: int) -> int:
        """Of a step: products of embeddings and class centers, twice, and of each with the gradient of the logits."""
        return 8 * self.batch_rows * rows_in_play * self.embedding_dim * self.settings.num_subcenters

    def traffic_bytes(self, rows_in_play: int) -> int:
        """Read and written of the tables in a step."""
        return rows_in_play * sum(part.passes * part.bytes_per_class for part in self.parts)


def local_rows(num_classes: int, num_shards: int) -> int:
    """Of the rank that has the most, with the empty rows of its last block."""
    partition = ClassPartition(num_classes, 0, num_shards)
    return len(partition.local_blocks) * partition.block_size


def count_head(
    config: Config,
    settings: HeadConfig,
    *,
    rows: int,
    global_batch_size: int,
    path: str,
    num_replicas: int = 1,
    device: str = "cuda",
) -> HeadCost:
    """Counts one head.

    Args:
        config: for what is not of the head.
        settings: of the head.
        rows: of its classes on the rank.
        global_batch_size: of its data set.
        path: of its section, for messages.
        num_replicas: how many nodes have all class centers each.
        device: "cuda" or "cpu": where it will run, which decides the size of tiles.

    Raises:
        ValueError: if the head cannot be built as configured.
    """
    dim, batch_rows = config.backbone.embedding_dim, -(-global_batch_size // num_replicas)
    if num_replicas > 1:
        _check_replicas(settings, path)
    small, large = (lone_head(config, settings, size, dim, path=path) for size in (BLOCK, 2 * BLOCK))
    before, after = _buffer_bytes(small), _buffer_bytes(large)
    growth = {name: (after[name] - before[name]) // BLOCK for name in after}
    dtypes = {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in large.named_buffers()}
    parts = [
        TablePart(_part_name(name, large), dtypes[name], size, _passes(name), _is_on_host(name, large))
        for name, size in growth.items()
        if size
    ]
    # The arithmetic is the same wherever the rows lie; what is staged is added elsewhere.
    resident = settings.model_copy(update={"offload": False})
    return HeadCost(
        settings=settings,
        parts=tuple(parts),
        replicated_bytes=sum(before.values()) - BLOCK * sum(growth.values()),
        step=_step_memory(_ScaledSteps(config, resident, batch_rows, path=path, device=device), rows),
        num_reductions=2 if large.bounded else 3,
        element_bytes=large.dtype.itemsize,
        sent_bytes=(large.gather_dtype or large.dtype).itemsize,
        global_batch_size=global_batch_size,
        embedding_dim=dim,
        num_replicas=num_replicas,
    )


def _check_replicas(settings: HeadConfig, path: str) -> None:
    try:
        check_replicas(
            fused=settings.fused,
            offload=settings.offload,
            auxiliaries=settings.auxiliaries,
            variational=settings.variational,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _buffer_bytes(head: PartialFC) -> dict[str, int]:
    return {name: buffer.nbytes for name, buffer in head.named_buffers()}


def _part_name(name: str, head: PartialFC) -> str:
    """A buffer in words."""
    owner, _, field = name.rpartition(".")
    if owner.startswith("auxiliaries."):
        return f"{head.auxiliary_terms[int(owner.split('.')[1])].name}: centers"
    if owner == "prototypes":
        return "variational prototypes" if field == "embedding" else f"variational prototypes: {field}"
    words = {"class_centers": "class centers", "class_bias": "class bias"}.get(owner, owner)
    if field == "weight":
        return words
    if field == "current_n":
        return f"{words}: step stamps of dense decay"
    if field.endswith("_scale"):
        return f"{words}: {field.removesuffix('_scale')}, scales of 8-bit blocks"
    return f"{words}: {field}"


def _passes(name: str) -> int:
    """Class centers are read in both passes and written in the second; the state of the optimizer is updated once."""
    owner, _, field = name.rpartition(".")
    if owner not in ("class_centers", "class_bias"):
        return 0
    return 3 if field == "weight" else 2


def _is_on_host(name: str, head: PartialFC) -> bool:
    return name.startswith("class_centers.") and isinstance(head.class_centers, OffloadedCenters)


@dataclass(frozen=True)
class _Identities:
    """All that building a head asks of an index."""

    num_classes: int
    directory: Path


@dataclass(frozen=True)
class _Data:
    """All that building a head asks of training data."""

    index: _Identities


def lone_head(
    config: Config, settings: HeadConfig, num_classes: int, embedding_dim: int, *, path: str, device: str = "meta"
) -> PartialFC:
    """A head on a process of its own, built as for training; on the device "meta" it has shapes and no values.

    Raises:
        ValueError: if it cannot be built as configured; `path` is that of its section, for the message.
    """
    backbone = config.backbone.model_copy(update={"embedding_dim": embedding_dim})
    config = config.model_copy(update={"backbone": backbone})
    settings = settings.model_copy(update={"num_classes": num_classes})
    data = cast(TrainingData, _Data(_Identities(num_classes, config.data.directory)))
    task = Task(data, settings, global_batch_size=1, seed=0)
    name = "main" if path == "head" else path.split(".")[1]
    return build_head(name, task, config, ShardMesh.single(), torch.device(device))


def _step_memory(steps: _ScaledSteps, rows: int) -> StepMemory:
    """Of a head with so many rows on the rank, and, between and beyond what is measured, of others."""
    factor, rate = steps.factor, steps.settings.sample_rate
    if not steps.fused:
        # So many that what has a row for each of them is larger than all else.
        small = max(2048, 4 * (steps.embedding_dim + steps.batch_size))
        before, after = steps.peak_bytes(small), steps.peak_bytes(2 * small)
        slope = (after - before) / small
        return StepMemory(before - slope * small, rate * slope / factor, math.inf)
    full, own = steps.full_tiles, round(rate * rows / factor)
    most = steps.peak_bytes(full)
    if own >= full:
        return StepMemory(most, 0.0, most)
    own_bytes = steps.peak_bytes(own)
    slope = (most - own_bytes) / (full - own)
    return StepMemory(own_bytes - slope * own, rate * slope / factor, most)


class _ScaledSteps:
    """Real steps on the CPU that are smaller by `factor` in batch, dimension, rows and tiles alike.

    Whatever is large has two of these as its shape, so it is smaller by the factor squared. Vectors are smaller by the
    factor only, and what has a constant size count for too much: 1 or 2 % of the whole, or a quarter where kernels of
    the CPU have buffers of their own, for 8-bit momentum.
    """

    def __init__(self, config: Config, settings: HeadConfig, batch_rows: int, *, path: str, device: str) -> None:
        self.config, self.settings, self.path, self.fused = config, settings, path, settings.fused
        dim = config.backbone.embedding_dim
        if self.fused:
            # So the tiles of the CPU are what those of the device are at full size.
            self.factor = math.sqrt(TILE_NUMBERS[device] / TILE_NUMBERS["cpu"])
        else:
            smallest = min(dim // _SMALLEST_DIM, batch_rows // _SMALLEST_BATCH)
            self.factor = 2.0 ** max(0, smallest.bit_length() - 1)
        self.embedding_dim = max(1, round(dim / self.factor))
        self.batch_size = max(1, round(batch_rows / self.factor))

    @property
    def full_tiles(self) -> int:
        """So many classes in play that there is more than one tile, and more of them take no more memory."""
        settings, size = self.settings, self.embedding_dim + self.batch_size
        if settings.sample_rate < 1 and settings.center_optimizer.moves_idle_rows:
            size = self.embedding_dim  # tiles of rows that are brought up to date have no logits
        # Of the first tile something is still there when the second is read.
        return self.batch_size + 2 * max(1, TILE_NUMBERS["cpu"] // (settings.num_subcenters * size))

    def peak_bytes(self, num_in_play: int) -> float:
        """At full size, with `factor` times as many classes in play; the workspace included."""
        settings, num_classes = self.settings, max(1, num_in_play)
        if settings.sample_rate < 1:
            # The share has no part in what a step takes, and a small one would need many classes.
            settings = settings.model_copy(update={"sample_rate": max(settings.sample_rate, _LEAST_RATE)})
            num_classes = max(self.batch_size, round(num_in_play / settings.sample_rate))
        head = lone_head(self.config, settings, num_classes, self.embedding_dim, path=self.path, device="cpu")
        if head.prototypes is not None:
            head.step = head.prototypes.settings.start_step
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(self.batch_size, self.embedding_dim, generator=generator, requires_grad=True)
        labels = torch.randint(num_classes, (self.batch_size,), generator=generator)

        def steps() -> None:
            # Rows that were idle in the first step are brought up to date in the second.
            for _ in range(2 if head.class_centers.idle is not None else 1):
                embeddings.grad = None
                head(embeddings, labels).backward()

        return self.factor**2 * peak_bytes(steps, standing=[embeddings, labels, *head.buffers()])


def peak_bytes(step: Callable[[], Any], *, standing: list[torch.Tensor]) -> int:
    """The most bytes that tensors made in `step` hold at once. What kernels allocate inside is not seen.

    Args:
        step: is run once.
        standing: tensors from before, which do not count.
    """
    with _Allocations(standing) as allocations:
        step()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Follows the memory of tensors from the operation that makes it to its release."""

    def __init__(self, standing: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in standing)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self._now -= size
