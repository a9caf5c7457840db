"""Configuration files: reading, extending, overriding, checking, writing."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from partialfc.config.choices import suggestion
from partialfc.config.sections import Config

__all__ = ["dump_config", "flat_settings", "json_schema", "load_config", "write_config"]

# What is replaced when its name changes (see `_merge`), and the name it has when none is given.
_CHOICES = {
    ("head", "margin"): None,
    ("head", "optimizer"): "sgd",
    ("training", "schedule"): "polynomial",
    ("data", "sampling"): "shuffled",
}


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


def flat_settings(config: Config) -> dict[str, Any]:
    """Every value by its dotted path, as JSON has it: to compare configurations. Tuples are single values."""

    def walk(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {path: value}
        inner = (walk(entry, f"{path}.{key}" if path else key) for key, entry in value.items())
        return {name: leaf for leaves in inner for name, leaf in leaves.items()}

    return walk(config.model_dump(mode="json"), "")


def write_config(config: Config, *, first_rank: bool) -> None:
    """Makes `run.directory` and, on the first rank, writes the resolved configuration into it as config.yaml.

    Raises:
        OSError: if the directory cannot be written.
    """
    directory = config.run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if first_rank:
            # In one rename: a run that is killed in here must still be one that can be evaluated.
            partial = directory / "config.yaml.tmp"
            partial.write_text(dump_config(config), encoding="utf-8")
            partial.replace(directory / "config.yaml")
    except OSError as error:
        text = f"run.directory {directory} cannot be written: {error.strerror}"
        raise OSError(error.errno, text) from error  # its number says whether another start may do better
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
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = _keys_at(problem["loc"][:-1])
        return f"{path}: unknown key{suggestion(str(problem['loc'][-1]), allowed)}; allowed are {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{path}: is missing; set it in the file, or as {path}=... on the command line"
    message: str = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    # What settings do not go together says so itself. What was given is a whole section there, or all of them.
    if not path or message.startswith(f"{path}."):
        return message
    return f"{path}: {problem['input']!r} given; {message}"


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """What may stand at a place of the tree: keys of a section, or settings of a part that has no name."""
    section: Any = Config
    for part in location:
        if get_origin(section) in (dict, tuple):
            section = get_args(section)[1 if get_origin(section) is dict else 0]
            continue
        section = section.model_fields[str(part)].annotation
        if type(None) in get_args(section):
            section = next(entry for entry in get_args(section) if entry is not type(None))
    if dataclasses.is_dataclass(section):
        return [entry.name for entry in dataclasses.fields(section)]
    return list(section.model_fields)
