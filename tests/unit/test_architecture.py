"""Imports go down only, and files and functions stay small."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import partialfc

PACKAGE = Path(partialfc.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower levels know nothing of higher ones; folders of one level know nothing of each other.
LEVELS = {
    "keyed": -1,
    **dict.fromkeys(["margins", "distributed", "kernels", "data", "backbones", "optim", "telemetry"], 0),
    "head": 1,
    **dict.fromkeys(["engine", "checkpoint", "evaluation", "supervision"], 2),
    "config": 3,
    **dict.fromkeys(["assembly", "bad_samples", "checkpoint_commands", "data_commands", "feeding"], 4),
    **dict.fromkeys(["recording", "saving", "train", "evaluate", "plan", "cli"], 4),
}
ENTRY_POINTS = 4  # these may call each other
MAY_IMPORT_TORCH_DISTRIBUTED = {"distributed", "engine", "checkpoint", "supervision"}


def part_of(file: Path) -> str:
    """The folder or top-level file of the package that a file belongs to; "" for the package's own __init__."""
    first = file.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def test_every_part_has_its_level():
    assert {part_of(file) for file in FILES} - {""} <= set(LEVELS)


@pytest.mark.parametrize(
    "file", [file for file in FILES if part_of(file)], ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_imports_go_down_only(file):
    own = part_of(file)
    for line, name in imports_of(file):
        target = name.split(".")[1] if name.startswith("partialfc.") else None
        # The package itself offers its version to all.
        if target in (None, own, "__version__"):
            continue
        assert target in LEVELS, f"{file}:{line}: imports {name}"
        both_entry_points = LEVELS[own] == LEVELS[target] == ENTRY_POINTS
        assert LEVELS[target] < LEVELS[own] or both_entry_points, f"{file}:{line}: {own} imports {name}"


def test_torch_distributed_stays_where_it_belongs():
    for file in FILES:
        for line, name in imports_of(file):
            if name == "torch.distributed" or name.startswith("torch.distributed."):
                assert part_of(file) in MAY_IMPORT_TORCH_DISTRIBUTED, f"{file}:{line}: imports {name}"


def test_margins_need_torch_alone():
    for file in (PACKAGE / "margins").rglob("*.py"):
        for line, name in imports_of(file):
            top = name.split(".")[0]
            allowed = (
                top == "torch"
                or top in sys.stdlib_module_names
                or name.startswith(("partialfc.margins", "partialfc.keyed"))
            )
            assert allowed, f"{file}:{line}: imports {name}"


def test_files_have_400_lines_at_most():
    sizes = {str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_functions_have_60_lines_at_most():
    too_long = {}
    for file, node in itertools.chain.from_iterable(
        ((file, node) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))) for file in FILES
    ):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            size = node.end_lineno - node.lineno + 1
            if size > 60:
                too_long[f"{file.relative_to(PACKAGE)}:{node.name}"] = size
    assert too_long == {}
