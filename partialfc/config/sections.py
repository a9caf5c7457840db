"""The whole configuration tree: what can be set, its defaults, and the errors for what cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from partialfc.backbones import BACKBONES
from partialfc.config.choices import choice, suggestion
from partialfc.data.augment import Augmentation
from partialfc.data.remote import CacheSettings
from partialfc.data.sampling import SAMPLINGS, IdentityGroups, Sampling, Shuffled
from partialfc.head import VariationalPrototypes
from partialfc.head.optimizers import CenterAdagrad, CenterAdamW, CenterOptimizer, CenterSGD
from partialfc.margins import AUXILIARIES, MARGINS, Auxiliary, Margin
from partialfc.optim import SCHEDULES, Cosine, MultiStep, Polynomial

__all__ = ["CENTER_OPTIMIZERS", "Config", "DataConfig", "EngineConfig", "HeadConfig", "TaskConfig"]

CENTER_OPTIMIZERS: dict[str, type] = {"sgd": CenterSGD, "adamw": CenterAdamW, "adagrad": CenterAdagrad}

MarginChoice = Annotated[Margin, *choice(MARGINS, "margin")]
CenterOptimizerChoice = Annotated[Any, *choice(CENTER_OPTIMIZERS, "center optimizer", "sgd")]
AuxiliaryChoice = Annotated[Auxiliary, *choice(AUXILIARIES, "term")]
SamplingChoice = Annotated[Sampling, *choice(SAMPLINGS, "sampling", "shuffled")]
ScheduleChoice = Annotated[Polynomial | Cosine | MultiStep, *choice(SCHEDULES, "schedule", "polynomial")]


def _known_backbone(name: str) -> str:
    if name not in BACKBONES and not name.startswith("timm:"):
        raise ValueError(f"must be one of {', '.join(BACKBONES)}, or timm:NAME{suggestion(name, list(BACKBONES))}")
    return name


def _task_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name == "main":
        raise ValueError(
            "the name of a task must be letters, digits, _ and -, begin with a letter, and not be main, which is that "
            "of the sections data and head"
        )
    return name


def _not_sizes(options: dict[str, Any]) -> dict[str, Any]:
    for name, place in (("embedding_dim", "backbone.embedding_dim"), ("image_size", "data.image_size")):
        if name in options:
            raise ValueError(f"{name} is not an option of a backbone; set {place}")
    return options


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class RunConfig(_Section):
    """Where the run lives, and what it starts from."""

    directory: Path = Field(description="everything the run writes; given again, the run goes on where it stopped")
    seed: int = Field(default=0, ge=-(2**63), lt=2**63, description="of everything random; the same on all ranks")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    log_every_steps: int = Field(default=10, ge=1)


class MixedSetConfig(_Section):
    """A further data set in the stream of the main one. Its identities are others, and get the labels behind those."""

    directory: Path = Field(description="a folder with train/, as `partialfc data` writes it")
    share: float | None = Field(
        default=None, gt=0, lt=1, description="of the samples of the stream; null, for all sets: by their sizes"
    )


def _consistent_shares(mix: tuple[MixedSetConfig, ...]) -> tuple[MixedSetConfig, ...]:
    shares = [part.share for part in mix if part.share is not None]
    if shares and (len(shares) < len(mix) or sum(shares) >= 1):
        raise ValueError(
            f"shares are {[part.share for part in mix]}, but must be given for all sets or for none, and their sum be "
            "below 1: the rest is the share of data.directory"
        )
    return mix


class DaliConfig(_Section):
    """What only the DALI loader has."""

    device: Literal["cpu", "gpu"] = Field(default="cpu", description="where images are decoded")
    threads: int = Field(default=2, ge=1, description="that decode, of each rank")
    prefetch_batches: int = Field(default=2, ge=1, description="batches under way")


class DataConfig(_Section):
    """A data set as `partialfc data` writes it. The number of classes and of images comes from its index."""

    directory: Path = Field(description="a folder with train/ and, for evaluation, verification/")
    mix: Annotated[tuple[MixedSetConfig, ...], AfterValidator(_consistent_shares)] = Field(
        default=(), description="further data sets in the same stream"
    )
    sampling: SamplingChoice = Field(
        default_factory=Shuffled, description="how often samples are seen, and in what order"
    )
    image_size: int = Field(default=112, ge=16, le=4096, description="in pixels; images of another size are resized")
    augmentation: Augmentation = Field(default_factory=Augmentation, description="random changes of training images")
    loader: Literal["torch", "webdataset", "dali"] = Field(default="torch", description="all give the same batches")
    exact: bool = Field(default=True, description="false: plain streaming, for stores that cannot read parts of files")
    stages: str | None = Field(
        default=None, description="package.module:function that returns webdataset stages; loader webdataset only"
    )
    num_workers: int = Field(default=2, ge=0, description="loader processes of each rank; 0 loads in the rank itself")
    timeout_seconds: float = Field(
        default=240.0, gt=0, description="to wait for a batch before the run stops; supervision has limits too"
    )
    read_ahead: bool = Field(
        default=False, description="read the next windows in large pieces: for slow disks and URLs"
    )
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, description="of samples that cannot be used; above it the run stops with their list"
    )
    dali: DaliConfig = Field(default_factory=DaliConfig)
    remote: CacheSettings = Field(default_factory=CacheSettings, description="how data shards at a URL are read")

    @model_validator(mode="after")
    def _loader_can_do_it(self) -> DataConfig:
        if self.stages is not None and (self.loader != "webdataset" or not self.exact):
            raise ValueError("data.stages needs data.loader=webdataset and data.exact=true")
        if not self.exact and self.loader == "torch":
            raise ValueError("data.exact=false is plain streaming, which data.loader=webdataset and dali can do")
        if not self.exact and (self.mix or not isinstance(self.sampling, Shuffled) or self.read_ahead):
            raise ValueError("data.exact=false goes without data.mix, data.read_ahead, and samplings but shuffled")
        if self.mix and self.mix[0].share is not None and isinstance(self.sampling, IdentityGroups):
            raise ValueError("data.mix with shares would tear the groups of data.sampling=identity_groups apart")
        return self


class BackboneConfig(_Section):
    """The embedding network."""

    name: Annotated[str, AfterValidator(_known_backbone)] = "iresnet50"
    embedding_dim: int = Field(default=512, ge=1, le=65536)
    options: Annotated[dict[str, Any], AfterValidator(_not_sizes)] = Field(
        default_factory=dict, description="settings of that network, such as dropout"
    )


class HeadConfig(_Section):
    """The class centers and the loss over them."""

    margin: MarginChoice
    sample_rate: float = Field(default=1.0, gt=0, le=1, description="share of the classes in play at each step")
    sampling: Literal["uniform", "cyclic"] = Field(
        default="uniform", description="uniform: drawn anew at each step; cyclic: each class equally often"
    )
    sampling_correction: bool | None = Field(
        default=None, description="count a drawn class by the inverse of its probability; null: if the margin needs it"
    )
    num_subcenters: int = Field(default=1, ge=1, le=1000, description="centers of each class; the nearest counts")
    interclass_filtering_threshold: float | None = Field(
        default=None, gt=-1, lt=1, description="negatives with a larger cosine are left out; null: none"
    )
    variational: VariationalPrototypes | None = Field(
        default=None, description="mix class centers with the last embeddings of their class; null: no"
    )
    auxiliaries: tuple[AuxiliaryChoice, ...] = Field(default=(), description="terms added to the loss")
    optimizer: CenterOptimizerChoice = Field(default_factory=CenterSGD)
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="in which class centers are stored; 16 bits are rounded stochastically"
    )
    matmul_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of operands; logits are float32"
    )
    gather_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="in which embeddings and their gradients travel between ranks"
    )
    shard_over: Literal["all", "node"] = Field(
        default="all",
        description="node: each node holds all class centers, sharded over its ranks, in step with the others",
    )
    fused: bool = Field(default=True, description="false: autograd over all logits; the same results, slower")
    offload: bool = Field(default=False, description="class centers in host memory, rows of a step on the device")
    init_std: float = Field(default=0.01, gt=0, description="standard deviation of initial class-center elements")
    num_classes: int | None = Field(default=None, ge=1, le=10**10, description="null: as many as the data has")
    loss_weight: float = Field(default=1.0, gt=0, description="factor on the loss of this head")

    @property
    def center_optimizer(self) -> CenterOptimizer:
        """`optimizer`, with its type."""
        optimizer: CenterOptimizer = self.optimizer
        return optimizer


class TaskConfig(_Section):
    """A further data set with identities and a head of its own, on the same backbone in the same steps."""

    data_directory: Path = Field(description="a folder with train/, as `partialfc data` writes it")
    head: HeadConfig
    global_batch_size: int = Field(
        ge=1, le=10**7, description="its images of a step over all ranks, besides the others"
    )


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(_Section):
    """The optimizer of the backbone."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.1, ge=0, description="at the given global batch size; nothing rescales it")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.999), description="adamw only")
    weight_decay: float = Field(default=5e-4, ge=0)
    decay_norms: bool = Field(default=True, description="whether weight decay acts on norms and biases too")
    max_gradient_norm: float | None = Field(default=5.0, gt=0, description="clipping of the backbone; null: none")

    @model_validator(mode="after")
    def _of_this_name(self) -> OptimizerConfig:
        # Their defaults may be spelt out, as they are in the resolved configuration of a run.
        for setting, name in (("momentum", "sgd"), ("betas", "adamw")):
            given, default = getattr(self, setting), OptimizerConfig.model_fields[setting].default
            if given != default and self.name != name:
                raise ValueError(
                    f"optimizer.{setting} is {given}, but needs optimizer.name={name}, and that is {self.name}; leave "
                    f"it out, or set it to {default}"
                )
        return self


class TrainingConfig(_Section):
    """How long, in what portions, and at what rate."""

    epochs: float = Field(gt=0, le=1e6, description="passes over the data; may be a fraction")
    warmup_epochs: float = Field(default=0.0, ge=0, le=1e6, description="linear rise of the learning rate at the start")
    global_batch_size: int = Field(ge=1, le=10**7, description="images of a step over all ranks")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="of the backbone; the head is fp32")
    accumulation_steps: int = Field(
        default=1, ge=1, le=10**4, description="portions of a batch that the backbone sees one after the other"
    )
    schedule: ScheduleChoice = Field(default_factory=Polynomial, description="of backbone and class centers alike")


class EvaluationConfig(_Section):
    """Verification on the identities that training never sees."""

    enabled: bool = Field(default=True, description="false for data without a verification split")
    at_start: bool = Field(default=False, description="also evaluate raw pixels and the untrained network")
    every_steps: int | None = Field(default=None, ge=1, description="null: at the end only")
    num_pairs: int = Field(default=6000, ge=20, multiple_of=20, description="of the ten-fold protocol")
    far: float = Field(default=0.01, gt=0, lt=1, description="false accept rate at which TAR is reported")
    batch_size: int = Field(default=128, ge=1, description="images of a step of one rank")


class EngineConfig(_Section):
    """What runs the backbone on many ranks. Checkpoints of one engine go on in another."""

    name: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    zero_stage: Literal[1, 2, 3] = Field(
        default=2, description="deepspeed only: what is sharded, see its documentation"
    )
    deepspeed_json: Path | None = Field(
        default=None, description="deepspeed only: a file of settings that are added to those made from this section"
    )
    activation_checkpointing: bool = Field(
        default=False, description="blocks of the backbone are computed again in backward, for less memory"
    )
    compile: bool = Field(default=False, description="torch.compile of the backbone")
    sync_batch_norm: bool = Field(default=False, description="batch statistics over all ranks; CUDA only")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="moving average of the weights, for evaluation; null: none"
    )

    @model_validator(mode="after")
    def _for_deepspeed(self) -> EngineConfig:
        for name, default in (("deepspeed_json", None), ("zero_stage", 2)):
            given = getattr(self, name)
            if given != default and self.name != "deepspeed":
                raise ValueError(
                    f"engine.{name} is {given}, but needs engine.name=deepspeed, and that is {self.name}; leave it "
                    f"out, or set it to {'null' if default is None else default}"
                )
        return self


class CheckpointConfig(_Section):
    """When the run is saved. It always is at the end, and when it is told to stop."""

    every_steps: int | None = Field(default=1000, ge=1, description="null: at the end only")
    keep_last: int = Field(default=3, ge=1)
    keep_best: bool = Field(
        default=False, description="also keep that of the best verification; needs evaluation.every_steps"
    )
    asynchronous: bool = Field(default=True, description="training goes on while a copy is written")
    max_failures: int = Field(default=3, ge=1, description="saves in a row that may fail before the run stops")


class SupervisionConfig(_Section):
    """What notices that a run no longer goes on as it should."""

    preflight: bool = Field(default=True, description="compare all ranks before the first step")
    collective_timeout_seconds: float = Field(default=600.0, ge=1, le=86400, description="to wait for other ranks")
    hang_timeout_seconds: float = Field(
        default=300.0, ge=1, le=86400, description="without a step of some rank; then that is named and the run stopped"
    )
    grace_seconds: float = Field(
        default=20.0,
        gt=0,
        le=86400,
        description="from SIGTERM to the end of a step, else no save",
    )
    max_skipped_steps: int = Field(
        default=20, ge=1, description="in a row, whose loss or gradient is not finite, before the run stops"
    )


class Config(_Section):
    """A whole run."""

    run: RunConfig
    data: DataConfig
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    head: HeadConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig
    tasks: dict[Annotated[str, AfterValidator(_task_name)], TaskConfig] = Field(
        default_factory=dict, description="further data sets with heads of their own, by name"
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = Field(default_factory=SupervisionConfig)

    @model_validator(mode="after")
    def _best_of_something(self) -> Config:
        if self.checkpoint.keep_best and not (self.evaluation.enabled and self.evaluation.every_steps):
            raise ValueError("checkpoint.keep_best needs evaluation.enabled and evaluation.every_steps")
        return self
