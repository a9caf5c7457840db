"""The plan of a run: costs of backbone, heads and saves added up.

Shapes: B rows of the global batch, b of a rank's, D embedding dimension, N ranks.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache

from partialfc.config import Config, HeadConfig
from partialfc.data import ShardIndex
from partialfc.plan.backbone import BackboneCost, count_backbone
from partialfc.plan.head import BLOCK, HeadCost, count_head, local_rows
from partialfc.plan.saves import SaveCost, SavedState, count_saved_state
from partialfc.plan.traffic import Collective, head_collectives, network_bytes

__all__ = ["Machine", "Plan", "make_plan"]


@dataclass(frozen=True)
class Machine:
    """A GPU, and how many of them. Rates are assumptions: those of the data sheet of an H100 SXM, if not set.

    Attributes:
        num_gpus: N, at least 1.
        memory_bytes: of each.
        tflops: 10^12 operations a second of matrix products of 16-bit numbers.
        tflops_fp32: the same, of float32 numbers.
        bandwidth_gb: 10^9 bytes a second between the GPU and its memory.
        gpus_per_node: how many are in one machine, close to each other; None for all of them.

    Raises:
        ValueError: if one of them is not positive, or nodes are not full.
    """

    num_gpus: int
    memory_bytes: int
    tflops: float = 989.0
    tflops_fp32: float = 67.0
    bandwidth_gb: float = 3350.0
    gpus_per_node: int | None = None

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"--gpus is {self.num_gpus}, but must be at least 1")
        if self.gpus_per_node is not None and (self.gpus_per_node < 1 or self.num_gpus % self.gpus_per_node):
            raise ValueError(
                f"--gpus-per-node is {self.gpus_per_node}, but must be at least 1, and --gpus, {self.num_gpus}, a "
                "multiple of it"
            )
        assert self.memory_bytes > 0
        for option, rate in (
            ("--tflops", self.tflops),
            ("--tflops-fp32", self.tflops_fp32),
            ("--bandwidth", self.bandwidth_gb),
        ):
            if not 0 < rate < float("inf"):
                raise ValueError(f"{option} is {rate}, but must be positive and finite")

    @property
    def node_size(self) -> int:
        """GPUs of a node."""
        return self.gpus_per_node or self.num_gpus

    @property
    def num_nodes(self) -> int:
        """How many nodes."""
        return self.num_gpus // self.node_size

    def flops(self, *, half: bool) -> float:
        """Operations a second."""
        return 1e12 * (self.tflops if half else self.tflops_fp32)


@dataclass(frozen=True)
class Plan:
    """Of one rank, that which has the most classes.

    Attributes:
        machine: what it is made for.
        heads: by task, "main" first.
        identities: of each head.
        backbone: its costs.
        local_batch_size: b, of all tasks.
        half: whether the backbone multiplies 16-bit numbers.
        saved: what a checkpoint holds.
        layouts: on several nodes, the same run for each `head.shard_over` that goes with its options.
    """

    machine: Machine
    heads: dict[str, HeadCost]
    identities: dict[str, int]
    backbone: BackboneCost
    local_batch_size: int
    half: bool
    saved: SavedState
    layouts: dict[str, Plan] = field(default_factory=dict)

    def num_shards(self, name: str) -> int:
        """Ranks over which the classes of a head are sharded."""
        return self.machine.num_gpus // self.heads[name].num_replicas

    def rows_in_play(self, name: str) -> int:
        """Classes of a head on the rank that take part in a step."""
        return self.heads[name].rows_in_play(self.rows(name), self.num_shards(name))

    def rows(self, name: str) -> int:
        """Classes of a head on the rank."""
        return local_rows(self.identities[name], self.num_shards(name))

    @property
    def backbone_bytes(self) -> int:
        """Parameters, gradients, optimizer state and activations."""
        cost = self.backbone
        standing = cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes
        return standing + cost.activation_bytes(self.local_batch_size)

    def head_bytes(self, name: str) -> int:
        """On the GPU, with the memory of a step."""
        return self.heads[name].device_bytes(self.rows(name), self.num_shards(name))

    @property
    def gpu_bytes(self) -> int:
        """Of everything that is counted."""
        return self.backbone_bytes + sum(self.head_bytes(name) for name in self.heads)

    @property
    def host_bytes(self) -> int:
        """Tables in the memory of the host, of this rank."""
        return sum(head.table_bytes(self.rows(name), on_host=True) for name, head in self.heads.items())

    @property
    def save(self) -> SaveCost:
        """Host memory and storage that checkpoints take."""
        num_shards = {name: self.num_shards(name) for name in self.heads}
        return self.saved.cost(identities=self.identities, num_shards=num_shards, num_ranks=self.machine.num_gpus)

    @property
    def most_identities(self) -> int:
        """The largest number of identities of the main head that fits, beside backbone and other heads; 0 if none."""
        num_shards, head = self.num_shards("main"), self.heads["main"]
        room = self.machine.memory_bytes - self.gpu_bytes + self.head_bytes("main")

        def fits(blocks: int) -> bool:
            return head.device_bytes(blocks * BLOCK, num_shards) <= room

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * BLOCK * num_shards

    @property
    def head_seconds(self) -> float:
        """The least time of a step of all heads: of its operations or of its memory traffic, whichever is longer."""
        seconds = 0.0
        for name, head in self.heads.items():
            in_play = self.rows_in_play(name)
            compute = head.flop(in_play) / self.machine.flops(half=head.half)
            seconds += max(compute, head.traffic_bytes(in_play) / (1e9 * self.machine.bandwidth_gb))
        return seconds

    @property
    def backbone_seconds(self) -> float:
        """The least time of forward and backward pass; the latter counted as twice the former."""
        return 3 * self.local_batch_size * self.backbone.forward_flop / self.machine.flops(half=self.half)

    def collectives(self, name: str) -> list[Collective]:
        """Those of a head in a step; none on one GPU."""
        rows = self.rows_in_play(name)
        return head_collectives(self.heads[name], num_ranks=self.machine.num_gpus, rows_in_play=rows)

    @property
    def communication(self) -> list[tuple[str, int, float]]:
        """(collective, its bytes, bytes that a rank sends in a ring) of a step; nothing on one GPU."""
        num = self.machine.num_gpus
        if num == 1:
            return []
        rows = []
        for name in self.heads:
            prefix = "" if len(self.heads) == 1 else f"{name}: "
            rows += [(f"{prefix}{each.name}", each.size_bytes, each.sent_bytes) for each in self.collectives(name)]
        gradient = self.backbone.gradient_bytes
        return [*rows, ("backbone: all-reduce of gradient", gradient, 2 * (num - 1) / num * gradient)]

    @property
    def network_bytes(self) -> float:
        """What a node sends to other nodes in a step for its heads."""
        return sum(
            network_bytes(
                self.collectives(name), ranks_per_node=self.machine.node_size, replicated=head.num_replicas > 1
            )
            for name, head in self.heads.items()
        )

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU is enough for what is counted."""
        return self.gpu_bytes <= self.machine.memory_bytes


def make_plan(config: Config, machine: Machine, *, identities: int | None = None) -> Plan:
    """Counts the parts of a run.

    Args:
        config: of the run.
        machine: to run on.
        identities: classes of the main head; None for `head.num_classes`, or those of the data.

    Raises:
        ValueError: if the number of classes is not known, or a part cannot be built.
    """
    if identities is not None and identities < 1:
        raise ValueError(f"--identities is {identities}, but must be at least 1")
    batch_sizes = {"main": config.training.global_batch_size}
    settings, directories = {"main": config.head}, {"main": config.data.directory}
    for name, task in config.tasks.items():
        settings[name], directories[name] = task.head, task.data_directory
        batch_sizes[name] = task.global_batch_size
    counts = {}
    for name, head in settings.items():
        if name == "main" and identities is not None:
            counts[name] = identities
        else:
            counts[name] = _num_classes(head, directories[name] / "train", _path(name))

    @cache
    def cost(name: str, shard_over: str) -> HeadCost:
        replicas = machine.num_nodes if shard_over == "node" else 1
        return count_head(
            config,
            settings[name],
            rows=local_rows(counts[name], machine.num_gpus // replicas),
            global_batch_size=batch_sizes[name],
            path=_path(name),
            num_replicas=replicas,
        )

    local_batch_size = sum(-(-size // machine.num_gpus) for size in batch_sizes.values())
    half = config.training.precision != "fp32"
    heads = {name: cost(name, head.shard_over) for name, head in settings.items()}
    saved = count_saved_state(config, settings)
    plan = Plan(machine, heads, counts, count_backbone(config), local_batch_size, half, saved)
    if machine.num_nodes == 1:
        return plan
    layouts = {"all": replace(plan, heads={name: cost(name, "all") for name in settings})}
    # Not with every option.
    with suppress(ValueError):
        layouts["node"] = replace(plan, heads={name: cost(name, "node") for name in settings})
    return replace(plan, layouts=layouts)


def _path(name: str) -> str:
    return "head" if name == "main" else f"tasks.{name}.head"


def _num_classes(head: HeadConfig, directory: object, path: str) -> int:
    if head.num_classes is not None:
        return head.num_classes
    try:
        return ShardIndex.open(str(directory)).num_classes
    except FileNotFoundError:
        allowed = f"--identities, or {path}.num_classes=..." if path == "head" else f"{path}.num_classes=..."
        raise ValueError(
            f"{path}.num_classes is null and there is no data in {directory}, so the number of identities is not "
            f"known; set {allowed}"
        ) from None
