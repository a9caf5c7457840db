"""The parts of a run, put together from the configuration, and what of them a checkpoint holds.

A run has one backbone and one or more tasks. A task is a data set with a head of its own; the first, "main", is that of
the sections `data` and `head`, and the others are those of `tasks`. Each takes its share of every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from partialfc.backbones import build_backbone
from partialfc.checkpoint import CheckpointStore
from partialfc.config import Config, EngineConfig, HeadConfig
from partialfc.data import JoinedIndex, Loader, RankSteps, ShardIndex
from partialfc.distributed.launch import node_mesh
from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import BackboneEngine, EngineSettings, build_engine
from partialfc.feeding import TrainingData, check_stages, make_loader, open_training_data, open_verification
from partialfc.head import HeadGroup, PartialFC
from partialfc.keyed import hash64
from partialfc.optim import build_optimizer, learning_rate_at

__all__ = [
    "Inputs",
    "Progress",
    "Run",
    "Task",
    "assemble",
    "build_backbone_optimizer",
    "build_head",
    "configured_backbone",
    "open_inputs",
    "open_tasks",
    "task_loader",
]

_TASK_STREAM = 5  # keeps these hashes apart from those of other parts that use the same seed

# Settings of a head that `PartialFC` takes under the same name.
_SAME_ARGUMENTS = (
    "margin",
    "sample_rate",
    "sampling",
    "sampling_correction",
    "num_subcenters",
    "interclass_filtering_threshold",
    "variational",
    "auxiliaries",
    "loss_weight",
    "fused",
    "offload",
    "init_std",
)


@dataclass(frozen=True)
class Task:
    """One stream of samples and its head.

    Attributes:
        data: the samples, and their order.
        head: its settings.
        global_batch_size: its images of a step over all ranks.
        seed: of its head and of the order of its data.
    """

    data: TrainingData
    head: HeadConfig
    global_batch_size: int
    seed: int

    @property
    def index(self) -> ShardIndex | JoinedIndex:
        """Of its training split, or of several as one."""
        return self.data.index


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        tasks: by name, "main" first, in the order of the heads.
        verification_index: of its verification split; None if it is not to be evaluated.
    """

    tasks: dict[str, Task]
    verification_index: ShardIndex | None


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        unwritten_losses: of the last steps, whose mean is to be written.
        skipped_steps: how many of the last steps were not finite, in a row.
    """

    step: int = 0
    unwritten_losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        tasks: by name, "main" first, in the order of the heads.
        total_steps: of the whole run.
    """

    config: Config
    mesh: ShardMesh
    device: torch.device
    tasks: dict[str, Task]
    verification_index: ShardIndex | None
    engine: BackboneEngine
    heads: HeadGroup
    store: CheckpointStore
    total_steps: int
    progress: Progress = field(default_factory=Progress)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def directory(self) -> Path:
        """Where the run lives."""
        return self.config.run.directory

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.mesh.rank == 0

    @property
    def global_batch_size(self) -> int:
        """Images of a step over all ranks and tasks."""
        return sum(task.global_batch_size for task in self.tasks.values())

    def learning_rate(self, base: float, step: int) -> float:
        """That of step number `step`, counted from 0, where the schedule is at 1 for `base`."""
        main = self.tasks["main"]
        steps_an_epoch = main.data.plan.num_samples / main.global_batch_size
        return learning_rate_at(
            step,
            base=base,
            total_steps=self.total_steps,
            warmup_steps=min(round(self.config.training.warmup_epochs * steps_an_epoch), self.total_steps),
            schedule=self.config.training.schedule,
        )


def assemble(config: Config, inputs: Inputs, mesh: ShardMesh, device: torch.device) -> Run:
    """Builds backbone, heads and the rest; nothing is written. Collective.

    Raises:
        ValueError: if the configuration cannot be used.
    """
    tasks = inputs.tasks
    torch.manual_seed(config.run.seed)
    backbone = configured_backbone(config).to(device)
    head_meshes = _head_meshes(config, tasks, mesh)
    heads = HeadGroup(
        {
            name: build_head(name, task, config, head_meshes[task.head.shard_over], device)
            for name, task in tasks.items()
        }
    )
    main = tasks["main"]
    total_steps = math.ceil(config.training.epochs * main.data.plan.num_samples / main.global_batch_size)
    store = CheckpointStore(
        config.run.directory / "checkpoints",
        mesh=mesh,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
    )
    engine = _build_engine(config, backbone, mesh)
    heads.defers_updates = config.training.precision == "fp16"
    return Run(config, mesh, device, tasks, inputs.verification_index, engine, heads, store, total_steps)


def open_inputs(config: Config, *, num_ranks: int) -> Inputs:
    """Opens what a run reads, and checks that so many ranks can. No rank waits for another in here.

    Raises:
        ValueError, OSError, ImportError: if the configuration or the data cannot be used.
    """
    tasks = open_tasks(config)
    check_stages(config.data)
    _check_portions(config, num_ranks)
    return Inputs(tasks, open_verification(config) if config.evaluation.enabled else None)


def _check_portions(config: Config, num_ranks: int) -> None:
    batch, portions = config.training.global_batch_size, config.training.accumulation_steps
    if batch < 2 * num_ranks * portions:
        each = f" and training.accumulation_steps={portions} portions" if portions > 1 else ""
        raise ValueError(
            f"training.global_batch_size is {batch}, but must be at least 2 for each of the {num_ranks} ranks{each}: "
            "batch norm needs two images"
        )


def open_tasks(config: Config) -> dict[str, Task]:
    """The training data of a run, "main" first.

    Raises:
        ValueError, OSError: if the configuration or the data cannot be used.
    """
    opened = {"main": (config.data.directory, config.head, config.training.global_batch_size, config.run.seed)}
    for number, (name, task) in enumerate(config.tasks.items(), start=1):
        seed = hash64(config.run.seed, _TASK_STREAM, number)
        opened[name] = (task.data_directory, task.head, task.global_batch_size, seed)
    tasks = {}
    for name, (directory, head, global_batch, seed) in opened.items():
        path = "data.directory" if name == "main" else f"tasks.{name}.data_directory"
        data = open_training_data(config.data, directory, seed=seed, global_batch=global_batch, path=path)
        tasks[name] = Task(data, head, global_batch, seed)
    return tasks


def _head_meshes(config: Config, tasks: dict[str, Task], mesh: ShardMesh) -> dict[str, ShardMesh]:
    """By what class centers are sharded over."""
    if all(task.head.shard_over == "all" for task in tasks.values()):
        return {"all": mesh}
    return {"all": mesh, "node": node_mesh(timeout_seconds=config.supervision.collective_timeout_seconds)}


def build_head(name: str, task: Task, config: Config, mesh: ShardMesh, device: torch.device) -> PartialFC:
    """The head of one task.

    Raises:
        ValueError: with the path of the setting, if one does not go with the data or with another.
    """
    settings, path = task.head, "head" if name == "main" else f"tasks.{name}.head"
    num_classes = _num_classes(task, path)
    try:
        return PartialFC(
            num_classes,
            config.backbone.embedding_dim,
            optimizer=settings.center_optimizer,
            dtype=getattr(torch, settings.dtype),
            matmul_dtype=None if settings.matmul_dtype == "float32" else getattr(torch, settings.matmul_dtype),
            device=device,
            seed=task.seed,
            gather_dtype=None if settings.gather_dtype == "float32" else getattr(torch, settings.gather_dtype),
            process_group=mesh.group,
            replicate_over=mesh.replicate_over,
            **{name: getattr(settings, name) for name in _SAME_ARGUMENTS},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _num_classes(task: Task, path: str) -> int:
    given, index = task.head.num_classes, task.index
    if given is not None and given < index.num_classes:
        raise ValueError(
            f"{path}.num_classes is {given}, but {index.directory} has labels up to "
            f"{index.num_classes - 1}; set it to at least {index.num_classes}, or to null to take it from the data"
        )
    return index.num_classes if given is None else given


def configured_backbone(config: Config) -> nn.Module:
    """A new network, as the section `backbone` has it, for images of `data.image_size`.

    Raises:
        ValueError: if it cannot be built so.
    """
    settings = config.backbone
    try:
        return build_backbone(
            settings.name,
            embedding_dim=settings.embedding_dim,
            image_size=config.data.image_size,
            **settings.options,
        )
    except ValueError as error:
        places = {"embedding_dim": "backbone.", "options": "backbone.", "image_size": "data."}
        places |= dict.fromkeys(settings.options, "backbone.options.")
        raise ValueError(places.get(_subject(error), "backbone: ") + str(error)) from error


def _subject(error: ValueError) -> str:
    """What a message is about, which is its first word: a setting, where there is one to blame."""
    return str(error).split(" ", 1)[0]


def build_backbone_optimizer(config: Config, backbone: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a backbone, as the section `optimizer` has it."""
    settings = config.optimizer
    return build_optimizer(
        backbone,
        name=settings.name,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        decay_norms=settings.decay_norms,
    )


def _build_engine(config: Config, backbone: nn.Module, mesh: ShardMesh) -> BackboneEngine:
    settings = EngineSettings(
        precision=config.training.precision,
        max_gradient_norm=config.optimizer.max_gradient_norm,
        portions=config.training.accumulation_steps,
        activation_checkpointing=config.engine.activation_checkpointing,
        compile=config.engine.compile,
        sync_batch_norm=config.engine.sync_batch_norm,
        ema_decay=config.engine.ema_decay,
        zero_stage=config.engine.zero_stage,
        deepspeed_json=config.engine.deepspeed_json,
    )
    make_optimizer = partial(build_backbone_optimizer, config)
    try:
        return build_engine(config.engine.name, backbone, make_optimizer=make_optimizer, mesh=mesh, settings=settings)
    except ValueError as error:
        place = "engine." if _subject(error) in EngineConfig.model_fields else "engine: "
        raise ValueError(f"{place}{error}") from error


def task_loader(run: Run, task: Task) -> Loader:
    """The batches of one task from the present step on."""
    steps = RankSteps(
        plan=task.data.plan,
        global_batch=task.global_batch_size,
        rank=run.mesh.rank,
        world_size=run.mesh.size,
        consumed=run.step * task.global_batch_size,
        num_batches=run.total_steps - run.step,
    )
    return make_loader(run.config.data, task.data, steps, device=run.device)
