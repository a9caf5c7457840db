"""The parts of a run, put together from the configuration, and what of them a checkpoint holds.

A run has one backbone and one or more tasks. A task is a data set with a head of its own; the first, "main", is that of
the sections `data` and `head`, and the others are those of `tasks`. Each takes its share of every batch.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partialfc.backbones import build_backbone
from partialfc.checkpoint import CheckpointStore
from partialfc.config import Config, HeadConfig
from partialfc.data import JoinedIndex, Loader, RankSteps, ShardIndex
from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import BackboneEngine, DDPEngine
from partialfc.evaluate import autocast_dtype, open_verification
from partialfc.feeding import TrainingData, check_stages, make_loader, open_training_data
from partialfc.head import HeadGroup, PartialFC
from partialfc.keyed import hash64
from partialfc.optim import build_optimizer

__all__ = [
    "Run",
    "Task",
    "assemble",
    "build_backbone_optimizer",
    "build_head",
    "checkpoint_facts",
    "checkpoint_state",
    "resume",
    "task_loader",
]

logger = logging.getLogger(__name__)

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


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        tasks: by name, "main" first, in the order of the heads.
        total_steps: of the whole run.
        step: steps done.
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
    step: int = 0

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


def assemble(config: Config, mesh: ShardMesh, device: torch.device) -> Run:
    """Opens the data and builds backbone, heads and the rest; nothing is written.

    Raises:
        ValueError, OSError: if the configuration or the data cannot be used.
    """
    tasks = _open_tasks(config)
    check_stages(config.data)
    verification_index = open_verification(config) if config.evaluation.enabled else None
    if config.training.global_batch_size < 2 * mesh.size:
        raise ValueError(
            f"training.global_batch_size is {config.training.global_batch_size}, but must be at least 2 for each of "
            f"the {mesh.size} ranks: batch norm needs two images"
        )
    torch.manual_seed(config.run.seed)
    backbone = build_backbone(
        config.backbone.name,
        embedding_dim=config.backbone.embedding_dim,
        image_size=config.data.image_size,
        **config.backbone.options,
    ).to(device)
    heads = HeadGroup({name: build_head(name, task, config, mesh, device) for name, task in tasks.items()})
    main = tasks["main"]
    total_steps = math.ceil(config.training.epochs * main.data.plan.num_samples / main.global_batch_size)
    store = CheckpointStore(config.run.directory / "checkpoints", mesh=mesh, keep_last=config.checkpoint.keep_last)
    engine = _build_engine(config, backbone, mesh)
    return Run(config, mesh, device, tasks, verification_index, engine, heads, store, total_steps)


def _open_tasks(config: Config) -> dict[str, Task]:
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
            process_group=mesh.group,
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
    return DDPEngine(
        backbone,
        build_backbone_optimizer(config, backbone),
        mesh=mesh,
        autocast_dtype=autocast_dtype(config),
        max_gradient_norm=config.optimizer.max_gradient_norm,
    )


def checkpoint_facts(run: Run) -> dict[str, Any]:
    """What must be the same when a run goes on: with another value the checkpoint means something else."""
    facts: dict[str, Any] = {"seed": run.config.run.seed, "tasks": list(run.tasks)}
    for name, task in run.tasks.items():
        prefix, head = "" if name == "main" else f"{name}/", run.heads[name]
        task_facts = {
            "global_batch_size": task.global_batch_size,
            "num_classes": head.partition.num_classes,
            "data_fingerprint": task.index.fingerprint,
            "data_order": task.data.order,
            # A margin that remembers nothing may be exchanged for another one of that kind.
            "margin_with_memory": type(head.margin).__name__ if head.margin_remembers else None,
            "num_subcenters": task.head.num_subcenters,
            "auxiliaries": [type(term).__name__ for term in task.head.auxiliaries],
            "variational": task.head.variational is not None,
            "center_optimizer": type(task.head.center_optimizer).__name__,
            "center_storage": head.class_centers.storage,
        }
        facts |= {f"{prefix}{key}": value for key, value in task_facts.items()}
    return facts


def checkpoint_state(run: Run) -> dict[str, Any]:
    """Everything that changes in a run. Collective."""
    return {**run.engine.state_dict(), "head": run.heads.state_dict(), "progress": {"step": run.step}}


def resume(run: Run) -> None:
    """Goes on from the newest good checkpoint, if there is one. Collective.

    Raises:
        ValueError: if the checkpoint is that of another run, or past the end of this one.
        CheckpointError: if there are checkpoints, but none that can be loaded.
    """
    path = run.store.latest()
    if path is None:
        return
    metadata = run.store.metadata(path)
    for name, value in checkpoint_facts(run).items():
        if metadata.get(name) != value:
            raise ValueError(
                f"{path} was saved with {name} {metadata.get(name)!r}, but this run has {value!r}; "
                "give the run the old value, or another run.directory"
            )
    state = checkpoint_state(run)
    run.store.load(path, state)
    step = int(state["progress"]["step"])
    if step > run.total_steps:
        raise ValueError(
            f"{path} is at step {step}, but training.epochs={run.config.training.epochs:g} ends at step "
            f"{run.total_steps}; train for longer, or choose another run.directory"
        )
    run.engine.load_state_dict(state)
    run.heads.load_state_dict(state["head"])
    run.step = step
    if run.is_first_rank:
        logger.info("going on from %s, step %d of %d", path, run.step, run.total_steps)


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
