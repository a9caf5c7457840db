"""Fields of the configuration that are one of several dataclasses: {name: CosFace, margin: 0.4}."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, WithJsonSchema

__all__ = ["choice", "suggestion"]

Entry = TypeVar("Entry")


def suggestion(given: str, known: Sequence[str]) -> str:
    """What to add to a message about an unknown name: the known one it resembles, if any."""
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
                f"name is {name!r}, but must be one of {', '.join(table)}{suggestion(str(name), list(table))}"
            )
        allowed = [field.name for field in dataclasses.fields(table[name])]  # type: ignore[arg-type]
        for key in value:
            if key != "name" and key not in allowed:
                settings = ", ".join(allowed) or "none"
                raise ValueError(f"{name} has no setting {key!r}{suggestion(str(key), allowed)}; it has {settings}")
        entry = TypeAdapter(table[name]).validate_python({key: value[key] for key in value if key != "name"})
        for key in allowed:
            number = getattr(entry, key)
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}.{key} is {number}, but must be finite")
        return entry

    return build


def choice(
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
