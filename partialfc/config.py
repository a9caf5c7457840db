"""The whole configuration tree: what can be set, its defaults, and the errors for what cannot.

A configuration is YAML. `extends: other.yaml` starts from another file; later values win. A margin, a center optimizer
and a schedule are replaced, not merged, when their name changes: the settings of one mean nothing to another. On the
command line, `head.sample_rate=0.1` overrides one value.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from partialfc.backbones import BACKBONES
from partialfc.head import VariationalPrototypes
from partialfc.head.optimizers import CenterAdagrad, CenterAdamW, CenterOptimizer, CenterSGD
from partialfc.margins import AUXILIARIES, MARGINS, Auxiliary, Margin
from partialfc.optim import SCHEDULES, Cosine, MultiStep, Polynomial

__all__ = ["Config", "dump_config", "json_schema", "load_config", "write_config"]

CENTER_OPTIMIZERS: dict[str, type] = {"sgd": CenterSGD, "adamw": CenterAdamW, "adagrad": CenterAdagrad}

Entry = TypeVar("Entry")


def _suggestion(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _from_table(table: Mapping[str, type[Entry]], kind: str, default: str | None) -> Callable[[Any], Entry]:
    """A validator that turns {name: ..., setting: ...} into the dataclass of that name."""

    def build(value: Any) -> Entry:
        if not isinstance(value, Mapping):
            if type(value) in table.values():
                return value
            raise ValueError(f"must be a mapping with the name of a {kind} and its settings")
        name = value.get("name", default)
        if not isinstance(name, str) or name not in table:
            raise ValueError(
                f"name is {name!r}, but must be one of {', '.join(table)}{_suggestion(str(name), list(table))}"
            )
        allowed = [field.name for field in dataclasses.fields(table[name])]  # type: ignore[arg-type]
        for key in value:
            if key != "name" and key not in allowed:
                raise ValueError(
                    f"{name} has no setting {key!r}{_suggestion(str(key), allowed)}; it has {', '.join(allowed)}"
                )
        entry = TypeAdapter(table[name]).validate_python({key: value[key] for key in value if key != "name"})
        for key in allowed:
            number = getattr(entry, key)
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}.{key} is {number}, but must be finite")
        return entry

    return build


def _choice(
    table: Mapping[str, type], kind: str, default: str | None = None
) -> tuple[BeforeValidator, PlainSerializer, WithJsonSchema]:
    """What makes a field one of the dataclasses in `table`, written as {name: ..., setting: ...}."""
    names = {entry: name for name, entry in table.items()}

    def dump(value: Any) -> dict[str, Any]:
        return {"name": names[type(value)], **dataclasses.asdict(value)}

    schemas = []
    for name, entry in table.items():
        schema = TypeAdapter(entry).json_schema()
        schema["properties"] = {"name": {"const": name}, **schema.get("properties", {})}
        required = [] if name == default else ["name"]
        schemas.append({**schema, "required": required, "additionalProperties": False})
    return BeforeValidator(_from_table(table, kind, default)), PlainSerializer(dump), WithJsonSchema({"anyOf": schemas})


MarginChoice = Annotated[Margin, *_choice(MARGINS, "margin")]
CenterOptimizerChoice = Annotated[Any, *_choice(CENTER_OPTIMIZERS, "center optimizer", "sgd")]
AuxiliaryChoice = Annotated[Auxiliary, *_choice(AUXILIARIES, "term")]
ScheduleChoice = Annotated[Polynomial | Cosine | MultiStep, *_choice(SCHEDULES, "schedule", "polynomial")]


def _known_backbone(name: str) -> str:
    if name not in BACKBONES and not name.startswith("timm:"):
        raise ValueError(f"must be one of {', '.join(BACKBONES)}, or timm:NAME{_suggestion(name, list(BACKBONES))}")
    return name


def _task_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name == "main":
        raise ValueError(
            "the name of a task must be letters, digits, _ and -, begin with a letter, and not be main, which is that "
            "of the sections data and head"
        )
    return name


# What is replaced when its name changes (see `_merge`), and the name it has when none is given.
_CHOICES = {("head", "margin"): None, ("head", "optimizer"): "sgd", ("training", "schedule"): "polynomial"}


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


class DataConfig(_Section):
    """A data set as `partialfc data` writes it. The number of classes and of images comes from its index."""

    directory: Path = Field(description="a folder with train/ and, for evaluation, verification/")
    image_size: int = Field(default=112, ge=16, le=4096, description="in pixels; images of another size are resized")
    horizontal_flip: bool = Field(default=True, description="mirror half of the training images")
    num_workers: int = Field(default=2, ge=0, description="loader processes of each rank; 0 loads in the rank itself")


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


class OptimizerConfig(_Section):
    """The optimizer of the backbone."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.1, ge=0, description="at the given global batch size; nothing rescales it")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="adamw only")
    weight_decay: float = Field(default=5e-4, ge=0)
    decay_norms: bool = Field(default=True, description="whether weight decay acts on norms and biases too")
    max_gradient_norm: float | None = Field(default=5.0, gt=0, description="clipping of the backbone; null: none")


class TrainingConfig(_Section):
    """How long, in what portions, and at what rate."""

    epochs: float = Field(gt=0, le=1e6, description="passes over the data; may be a fraction")
    warmup_epochs: float = Field(default=0.0, ge=0, le=1e6, description="linear rise of the learning rate at the start")
    global_batch_size: int = Field(ge=1, le=10**7, description="images of a step over all ranks")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the backbone; the head is fp32")
    schedule: ScheduleChoice = Field(default_factory=Polynomial, description="of backbone and class centers alike")


class EvaluationConfig(_Section):
    """Verification on the identities that training never sees."""

    enabled: bool = Field(default=True, description="false for data without a verification split")
    at_start: bool = Field(default=False, description="also evaluate raw pixels and the untrained network")
    every_steps: int | None = Field(default=None, ge=1, description="null: at the end only")
    num_pairs: int = Field(default=6000, ge=20, multiple_of=20, description="of the ten-fold protocol")
    far: float = Field(default=0.01, gt=0, lt=1, description="false accept rate at which TAR is reported")
    batch_size: int = Field(default=128, ge=1, description="images of a step of one rank")


class CheckpointConfig(_Section):
    """When the run is saved. It always is at the end."""

    every_steps: int | None = Field(default=1000, ge=1, description="null: at the end only")
    keep_last: int = Field(default=3, ge=1)


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
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text, where everybody means the number, and lets a later key hide an earlier one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file and the files it extends, applies overrides, and checks the whole.

    Args:
        path: the YAML file.
        overrides: "key.sub=value" strings; the value is read as YAML.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if anything is wrong; the message names each key, what was given, and what is allowed.
    """
    values = _read(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {override!r} must look like key.sub=value")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not YAML: {error}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        values = _merge(values, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ValueError(f"{path} is not a valid configuration:\n{lines}") from None


def dump_config(config: Config) -> str:
    """The configuration as YAML with every value spelt out; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write_config(config: Config, *, first_rank: bool) -> None:
    """Makes `run.directory` and, on the first rank, writes the resolved configuration into it as config.yaml.

    Raises:
        OSError: if the directory cannot be written.
    """
    directory = config.run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if first_rank:
            (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise OSError(f"run.directory {directory} cannot be written: {error}") from error
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"run.directory {directory} cannot be written by this user")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "path of a file to start from"}
    return schema


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself, by way of {' -> '.join(str(file) for file in seen)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of sections, but holds {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: extends is {base!r}, but must be the path of one file")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], over: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    place = path[2:] if path[:1] == ("tasks",) else path
    if place in _CHOICES and "name" in over and over["name"] != base.get("name", _CHOICES[place]):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value, (*path, key)) if both else value
    return merged


def _explain(problem: Any) -> str:
    """One pydantic error as: dotted path, what was given, what is allowed."""
    path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = _keys_at(problem["loc"][:-1])
        return f"{path}: unknown key{_suggestion(str(problem['loc'][-1]), allowed)}; allowed are {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{path}: is missing; set it in the file, or as {path}=... on the command line"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{path}: {problem['input']!r} given; {message}"


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """What may stand at a place of the tree: keys of a section, or settings of a part that has no name."""
    section: Any = Config
    for part in location:
        if get_origin(section) is dict:
            section = get_args(section)[1]
            continue
        section = section.model_fields[str(part)].annotation
        if type(None) in get_args(section):
            section = next(entry for entry in get_args(section) if entry is not type(None))
    if dataclasses.is_dataclass(section):
        return [entry.name for entry in dataclasses.fields(section)]
    return list(section.model_fields)
