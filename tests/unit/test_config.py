"""Configuration files: what they may say, how they join, and the message for everything they may not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from partialfc.config import CENTER_OPTIMIZERS, Config, dump_config, json_schema, load_config, write_config
from partialfc.head import CenterAdamW, CenterSGD, VariationalPrototypes
from partialfc.margins import AUXILIARIES, MARGINS, ArcFace, CenterLoss, CosFace, MagFace
from partialfc.optim import SCHEDULES, Cosine, Polynomial
from partialfc.supervision.agreement import exit_code_of
from partialfc.supervision.exit_codes import EXIT_RETRY, EXIT_USER_ERROR

MINIMAL = """\
run: {directory: runs/one}
data: {directory: data/one}
head: {margin: {name: ArcFace}}
training: {epochs: 2, global_batch_size: 64}
"""
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def write(tmp_path):
    """Writes a file into the test's folder, and returns its path."""

    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without its heading."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path, overrides)
    heading, *lines = str(error.value).splitlines()
    assert heading == f"{path} is not a valid configuration:"
    return [line.removeprefix("  ") for line in lines]


def test_a_minimal_file_and_its_defaults(write):
    config = load_config(write(MINIMAL))
    assert config.run.directory == Path("runs/one")
    assert config.head.margin == ArcFace()
    assert config.head.center_optimizer == CenterSGD()
    assert config.head.sample_rate == 1.0
    assert config.training.schedule == Polynomial()
    assert config.backbone.name == "iresnet50"
    assert config.checkpoint.every_steps == 1000


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("optimizer", CENTER_OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_dumped_loads_to_the_same(write, margin, optimizer, schedule):
    settings = " milestones: [0.5, 0.75]" if schedule == "multistep" else ""
    gradient = "exact" if margin == "CircleLoss" else "detached"
    text = MINIMAL.replace("{name: ArcFace}", f"{{name: {margin}, gradient: {gradient}}}")
    overrides = (f"head.optimizer.name={optimizer}", f"training.schedule={{name: {schedule},{settings}}}")
    config = load_config(write(text), (*overrides, "backbone.options={dropout: 0.1}"))
    again = load_config(write(dump_config(config), "dump.yaml"))
    assert again == config
    assert type(again.head.margin) is MARGINS[margin]
    assert again.head.margin == MARGINS[margin](gradient=gradient)
    assert type(again.head.center_optimizer) is CENTER_OPTIMIZERS[optimizer]
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_head_options_and_tasks_are_dumped_and_loaded(write, name):
    overrides = (
        f"head.auxiliaries=[{{name: {name}, weight: 0.25}}, {{name: CenterLoss}}]",
        "head.variational.max_age=7",
        "head.sampling_correction=true",
        "head.num_subcenters=3",
        "head.interclass_filtering_threshold=0.4",
        "head.loss_weight=0.5",
        "tasks.products={data_directory: goods, global_batch_size: 8, head: {margin: {name: CosFace, margin: 0.1}}}",
        "tasks.products.head.margin={name: MagFace}",
        "tasks.products.head.sample_rate=0.1",
    )
    config = load_config(write(MINIMAL), overrides)
    assert config.head.auxiliaries == (AUXILIARIES[name](weight=0.25), CenterLoss())
    assert config.head.variational == VariationalPrototypes(max_age=7)
    assert config.tasks["products"].head.margin == MagFace()
    assert config.tasks["products"].head.sample_rate == 0.1
    again = load_config(write(dump_config(config), "dump.yaml"))
    assert again == config


def test_the_dump_spells_out_every_value(write):
    text = dump_config(load_config(write(MINIMAL)))
    for line in ("sample_rate: 1.0", "momentum: 0.9", "tail: linear", "power: 2.0", "every_steps: null"):
        assert line in text


def test_the_quickstart_is_valid():
    assert isinstance(load_config(QUICKSTART), Config)


@pytest.mark.parametrize(
    "given",
    ["{name: sgd, momentum: 0.5}", "{name: adamw, betas: [0.8, 0.9]}", "{name: adamw, momentum: 0.9}"],
)
def test_what_another_optimizer_has_may_stand_there_by_its_default(write, given):
    # As in the configuration that a run writes, which has every value.
    config = load_config(write(MINIMAL), [f"optimizer={given}"])
    assert load_config(write(dump_config(config), "dump.yaml")) == config


def test_extends_joins_files_and_later_values_win(write):
    write(MINIMAL + "optimizer: {learning_rate: 0.4, momentum: 0.8}\n", "base/base.yaml")
    write("extends: ../base/base.yaml\noptimizer: {learning_rate: 0.2}\n", "middle/middle.yaml")
    config = load_config(write("extends: middle/middle.yaml\ntraining: {epochs: 5}\n"), ["optimizer.weight_decay=0"])
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == (0.2, 0.8)
    assert config.optimizer.weight_decay == 0.0
    assert (config.training.epochs, config.training.global_batch_size) == (5.0, 64)


def test_a_file_that_extends_itself_is_refused(write):
    first = write("extends: second.yaml\n", "first.yaml")
    second = write("extends: first.yaml\n", "second.yaml")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(first)
    assert str(error.value) == f"{first} extends itself, by way of {first} -> {second}"


def test_a_new_name_replaces_the_settings_and_the_old_name_keeps_them(write):
    base = MINIMAL.replace("{name: ArcFace}", "{name: ArcFace, scale: 32, tail: easy}")
    write(base + "optimizer: {name: adamw, weight_decay: 0.1}\n", "base.yaml")
    other = load_config(write("extends: base.yaml\nhead: {margin: {name: CosFace, margin: 0.4}}\n"))
    assert other.head.margin == CosFace(margin=0.4)
    same = load_config(write("extends: base.yaml\nhead: {margin: {name: ArcFace, margin: 0.4}}\n"))
    assert same.head.margin == ArcFace(scale=32.0, margin=0.4, tail="easy")
    unnamed = load_config(write("extends: base.yaml\nhead: {margin: {margin: 0.4}}\n"))
    assert unnamed.head.margin == same.head.margin


def test_naming_the_default_is_no_change_of_name(write):
    text = MINIMAL.replace("}}\n", "}, optimizer: {learning_rate: 0.7}}\n", 1)
    path = write(text.replace("global_batch_size: 64", "global_batch_size: 64, schedule: {power: 1}"))
    config = load_config(path, ["head.optimizer.name=sgd", "training.schedule.name=polynomial"])
    assert config.head.center_optimizer == CenterSGD(learning_rate=0.7)
    assert config.training.schedule == Polynomial(power=1.0)
    config = load_config(path, ["head.optimizer.name=adamw", "training.schedule.name=cosine"])
    assert config.head.center_optimizer == CenterAdamW()
    assert config.training.schedule == Cosine()


def test_overrides_are_yaml_and_apply_in_order(write):
    config = load_config(
        write(MINIMAL),
        [
            "head.sample_rate=0.5",
            "head.sample_rate=0.1",
            "run.seed=7",
            "data.augmentation.horizontal_flip=0",
            "optimizer.max_gradient_norm=null",
            "optimizer.name=adamw",
            "optimizer.betas=[0.8, 0.9]",
            "backbone.options.dropout=0.2",
            "run.directory=a=b",
        ],
    )
    assert config.head.sample_rate == 0.1
    assert config.run.seed == 7
    assert config.data.augmentation.horizontal_flip == 0
    assert config.optimizer.max_gradient_norm is None
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.backbone.options == {"dropout": 0.2}
    assert config.run.directory == Path("a=b")


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("5E-4", 5e-4), ("1.e+1", 10.0), (".5e0", 0.5), ("2", 2)])
def test_scientific_notation_is_a_number(write, text, number):
    assert load_config(write(MINIMAL), [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == number
    assert load_config(write(MINIMAL + f"backbone: {{options: {{x: {text}}}}}")).backbone.options["x"] == number


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "head.smaple_rate=0.1",
            "head.smaple_rate: unknown key; did you mean 'sample_rate'?; allowed are margin, sample_rate, "
            "sampling, sampling_correction, num_subcenters, interclass_filtering_threshold, variational, auxiliaries, "
            "optimizer, dtype, matmul_dtype, gather_dtype, shard_over, fused, offload, init_std, num_classes, "
            "loss_weight",
        ),
        (
            "bakbone.name=vit_tiny",
            "bakbone: unknown key; did you mean 'backbone'?; allowed are run, data, backbone, head, optimizer, "
            "training, tasks, evaluation, engine, checkpoint, supervision",
        ),
        ("head.sample_rate=0", "head.sample_rate: 0 given; must be greater than 0"),
        ("head.sample_rate=1.5", "head.sample_rate: 1.5 given; must be less than or equal to 1"),
        ("run.seed=x", "run.seed: 'x' given; must be a valid integer, unable to parse string as an integer"),
        ("head.sample_rate.x=1", "head.sample_rate: {'x': 1} given; must be a valid number"),
        ("training.precision=fp8", "training.precision: 'fp8' given; must be 'fp32', 'bf16' or 'fp16'"),
        (
            "engine.zero_stage=3",
            "engine.zero_stage is 3, but needs engine.name=deepspeed, and that is ddp; leave it out, or set it to 2",
        ),
        (
            "optimizer={name: adamw, momentum: 0.5}",
            "optimizer.momentum is 0.5, but needs optimizer.name=sgd, and that is adamw; "
            "leave it out, or set it to 0.9",
        ),
        (
            "optimizer.betas=[0.8, 0.9]",
            "optimizer.betas is (0.8, 0.9), but needs optimizer.name=adamw, and that is sgd; "
            "leave it out, or set it to (0.9, 0.999)",
        ),
        ("optimizer={name: adamw, betas: [2, 0.9]}", "optimizer.betas.0: 2 given; must be less than 1"),
        (
            "optimizer={name: adamw, betas: [0.9, -0.1]}",
            "optimizer.betas.1: -0.1 given; must be greater than or equal to 0",
        ),
        ("checkpoint.keep_best=true", "checkpoint.keep_best needs evaluation.enabled and evaluation.every_steps"),
        ("data.stages=a:b", "data.stages needs data.loader=webdataset and data.exact=true"),
        (
            "supervision.hang_timeout_seconds=0",
            "supervision.hang_timeout_seconds: 0 given; must be greater than or equal to 1",
        ),
        ("evaluation.num_pairs=30", "evaluation.num_pairs: 30 given; must be a multiple of 20"),
        ("optimizer.name=lamb", "optimizer.name: 'lamb' given; must be 'sgd' or 'adamw'"),
        (
            "head.margin.name=ArcFac",
            f"head.margin: {{'name': 'ArcFac'}} given; name is 'ArcFac', but must be one of {', '.join(MARGINS)}; "
            "did you mean 'ArcFace'?",
        ),
        ("head.margin=64", "head.margin: 64 given; must be a mapping with the name of a margin and its settings"),
        (
            "head.margin.margn=0.4",
            "head.margin: {'name': 'ArcFace', 'margn': 0.4} given; ArcFace has no setting 'margn'; did you mean "
            "'margin'?; it has gradient, scale, margin, tail",
        ),
        (
            "head.margin.scale=big",
            "head.margin.scale: 'big' given; must be a valid number, unable to parse string as a number",
        ),
        (
            "head.variational.wieght=0.2",
            "head.variational.wieght: unknown key; did you mean 'weight'?; allowed are weight, max_age, start_step",
        ),
        (
            "head.variational.weight=1",
            "head.variational: {'weight': 1} given; VariationalPrototypes.weight is 1.0, but must be in [0, 1)",
        ),
        (
            "head.auxiliaries=[{name: CenterLos}]",
            "head.auxiliaries.0: {'name': 'CenterLos'} given; name is 'CenterLos', but must be one of CenterLoss, "
            "ContrastiveLoss, TripletLoss; did you mean 'CenterLoss'?",
        ),
        (
            "head.auxiliaries=[{name: TripletLoss, weight: 0}]",
            "head.auxiliaries.0: {'weight': 0} given; TripletLoss.weight is 0.0, but must be a positive number",
        ),
        ("head.num_subcenters=0", "head.num_subcenters: 0 given; must be greater than or equal to 1"),
        (
            "head.margin={name: SphereFace, margin: 2.5}",
            "head.margin.margin: 2.5 given; must be a valid integer, got a number with a fractional part",
        ),
        (
            "tasks.main={data_directory: x, global_batch_size: 1, head: {margin: {name: CosFace}}}",
            "tasks.main.[key]: 'main' given; the name of a task must be letters, digits, _ and -, begin with a letter, "
            "and not be main, which is that of the sections data and head",
        ),
        (
            "tasks.products={data_directory: x, global_batch_size: 1, global_batch: 2, head: {margin: {name: AdaCos}}}",
            "tasks.products.global_batch: unknown key; did you mean 'global_batch_size'?; allowed are data_directory, "
            "head, global_batch_size",
        ),
        ("head.margin.tail=flat", "head.margin.tail: 'flat' given; must be 'linear', 'none' or 'easy'"),
        (
            "head.margin.margin=28.6",
            "head.margin: {'margin': 28.6} given; ArcFace.margin is 28.6, but must be in [0, pi), in radians",
        ),
        (
            "head.optimizer.name=sgdd",
            "head.optimizer: {'name': 'sgdd'} given; name is 'sgdd', but must be one of sgd, adamw, adagrad; did "
            "you mean 'sgd'?",
        ),
        (
            "head.optimizer.learning_rate=-1",
            "head.optimizer: {'learning_rate': -1} given; CenterSGD.learning_rate is -1.0, but must not be negative",
        ),
        (
            "backbone.name=iresnet5",
            "backbone.name: 'iresnet5' given; must be one of iresnet10, iresnet18, iresnet34, iresnet50, iresnet100, "
            "iresnet200, mobilefacenet, vit_tiny, vit_small, vit_base, vit_large, or timm:NAME; did you mean "
            "'iresnet50'?",
        ),
        (
            "training.schedule.name=cosin",
            "training.schedule: {'name': 'cosin'} given; name is 'cosin', but must be one of "
            + ", ".join(SCHEDULES)
            + "; did you mean 'cosine'?",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(write, override, problem):
    assert problems(write(MINIMAL), override) == [problem]


def test_everything_wrong_is_reported_at_once(write):
    assert problems(write("run: {seed: 1.5}\nhead: {sample_rate: 2}\n")) == [
        "run.directory: is missing; set it in the file, or as run.directory=... on the command line",
        "run.seed: 1.5 given; must be a valid integer, got a number with a fractional part",
        "data: is missing; set it in the file, or as data=... on the command line",
        "head.margin: is missing; set it in the file, or as head.margin=... on the command line",
        "head.sample_rate: 2 given; must be less than or equal to 1",
        "training: is missing; set it in the file, or as training=... on the command line",
    ]


@pytest.mark.parametrize("override", ["head.sample_rate", "=1", "head..sample_rate=1", ".seed=1"])
def test_an_override_without_key_or_value_is_refused(write, override):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(write(MINIMAL), [override])
    assert str(error.value) == f"override {override!r} must look like key.sub=value"


def test_an_override_that_is_not_yaml_is_refused(write):
    with pytest.raises(ValueError, match=r"^override 'run.seed=\[1': the value is not YAML: while parsing"):
        load_config(write(MINIMAL), ["run.seed=[1"])


def test_a_file_that_is_not_yaml_is_refused(write):
    path = write("run: [\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path)
    assert str(error.value).startswith(f"{path} is not YAML: ")
    path.write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path)
    assert str(error.value).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- run\n", "list"), ("run\n", "str")])
def test_a_file_without_sections_is_refused(write, text, kind):
    path = write(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path)
    assert str(error.value) == f"{path} must hold a mapping of sections, but holds {kind}"


def test_extends_takes_one_path(write):
    path = write("extends: [a.yaml, b.yaml]\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(path)
    assert str(error.value) == f"{path}: extends is ['a.yaml', 'b.yaml'], but must be the path of one file"


def test_a_missing_file_is_named(write, tmp_path):
    for path, missing in (
        (tmp_path / "none.yaml", tmp_path / "none.yaml"),
        (write("extends: base.yaml\n"), tmp_path / "base.yaml"),
        (tmp_path, tmp_path),
    ):
        with pytest.raises(FileNotFoundError) as error:
            load_config(path)
        assert str(error.value) == f"there is no configuration file {missing}"


def test_the_schema_is_json_and_lists_every_choice():
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == {*Config.model_fields, "extends"}
    sections = schema["$defs"]
    for section, key, table in (
        ("HeadConfig", "margin", MARGINS),
        ("HeadConfig", "optimizer", CENTER_OPTIMIZERS),
        ("TrainingConfig", "schedule", SCHEDULES),
    ):
        entries = {
            entry["properties"]["name"]["const"]: entry for entry in sections[section]["properties"][key]["anyOf"]
        }
        assert set(entries) == set(table)
        assert all(entry["additionalProperties"] is False for entry in entries.values())
    margins = {
        entry["properties"]["name"]["const"]: entry for entry in sections["HeadConfig"]["properties"]["margin"]["anyOf"]
    }
    assert margins["ArcFace"]["properties"]["tail"]["enum"] == ["linear", "none", "easy"]
    assert margins["ArcFace"]["required"] == ["name"]
    terms = sections["HeadConfig"]["properties"]["auxiliaries"]["items"]["anyOf"]
    assert {entry["properties"]["name"]["const"] for entry in terms} == set(AUXILIARIES)


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("run: {directory: a}\nrun: {directory: b}\n")
    with pytest.raises(ValueError, match="the key 'run' comes twice"):
        load_config(path)


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, EXIT_RETRY), (errno.EROFS, EXIT_USER_ERROR)])
def test_a_full_disk_may_have_room_at_the_next_start(tmp_path, monkeypatch, number, code):
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    config = load_config(QUICKSTART, [f"run.directory={tmp_path}"])
    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="cannot be written") as caught:
        write_config(config, first_rank=True)
    told = f"run.directory {tmp_path} cannot be written: {os.strerror(number)}"
    assert str(caught.value) == f"[Errno {number}] {told}"
    assert exit_code_of(caught.value) == code
