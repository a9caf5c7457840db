"""docs/losses.md keeps up with the code: sections, pictures, snippets and stated defaults."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from partialfc import PartialFC
from partialfc.config import load_config
from partialfc.head import VariationalPrototypes
from partialfc.margins import AUXILIARIES, MARGINS

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "losses.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
HEADINGS = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
PARTS: dict[str, Any] = {**MARGINS, **AUXILIARIES}


def section(name: str) -> str:
    parts = re.split(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    return parts[parts.index(name) + 1]


def table(first_column: str) -> dict[str, list[str]]:
    """The cells after the first one, by the name in the first one."""
    lines = TEXT.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[re.search(r"`(\w+)`", cells[0]).group(1)] = cells[1:]
    return rows


def settings(text: str) -> dict[str, Any]:
    """Those of a cell such as "scale 64, margin 0.35"."""
    pairs = (entry.split(" ", 1) for entry in text.split(", "))
    return {name: yaml.safe_load(value) for name, value in pairs}


@pytest.mark.parametrize("name", PARTS)
def test_every_loss_has_a_section_of_its_own(name):
    assert HEADINGS.count(name) == 1
    assert "Defaults: " in section(name)
    assert "Sharded: " in section(name)
    assert "```yaml\nhead:\n" in section(name)
    assert f"name: {name}" in section(name)


@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_has_a_picture(name):
    assert f"![{name}](images/losses/{name}.png)" in section(name)


def test_every_picture_exists_and_is_small():
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)
    assert len(links) == len(MARGINS)
    for link in links:
        assert (DOCS / link).stat().st_size < 40_000, link
        with Image.open(DOCS / link) as picture:
            assert (picture.format, picture.size) == ("PNG", (900, 340)), link


@pytest.mark.parametrize(("parts", "column"), [(MARGINS, "margin"), (AUXILIARIES, "auxiliary")])
def test_the_stated_defaults_are_those_of_the_code(parts, column):
    stated = {name: settings(cells[1]) for name, cells in table(column).items()}
    # `gradient` is the same for all, and stated once.
    expected = {
        name: {field.name: field.default for field in dataclasses.fields(part) if field.name != "gradient"}
        for name, part in parts.items()
    }
    assert stated == expected
    assert all(part().gradient == "exact" for part in MARGINS.values())
    for name, defaults in stated.items():
        # In the section, further words may follow a value.
        line = " ".join(section(name).partition("Defaults: ")[2].split())
        for setting in defaults:
            assert re.match(rf"(.*?\W)?{setting} ", line), f"{name}: {setting} is not among its defaults"


def test_stated_defaults_are_compared_as_values():
    assert settings("scale 64, margin null, sort false, tail linear") == {
        "scale": 64.0,
        "margin": None,
        "sort": False,
        "tail": "linear",
    }


def test_every_option_of_the_head_has_a_row_with_its_default():
    parameters = inspect.signature(PartialFC).parameters
    for name, cells in table("option").items():
        assert yaml.safe_load(cells[1].partition(":")[0]) == parameters[name].default, name
    assert table("option").keys() >= {"num_subcenters", "interclass_filtering_threshold", "variational"}
    prototypes = dataclasses.asdict(VariationalPrototypes())
    assert ", ".join(f"{name} {value}" for name, value in prototypes.items()) in section("Variational prototypes")


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_are_configurations_that_build(snippet, tmp_path):
    rest = "run: {directory: r}\ndata: {directory: d}\ntraining: {epochs: 1, global_batch_size: 8}\n"
    path = tmp_path / "snippet.yaml"
    path.write_text(rest + snippet)
    config = load_config(path)
    for head in (config.head, *(task.head for task in config.tasks.values())):
        # Options that do not go together are refused here.
        PartialFC(
            10,
            4,
            margin=head.margin,
            sample_rate=head.sample_rate,
            sampling_correction=head.sampling_correction,
            num_subcenters=head.num_subcenters,
            interclass_filtering_threshold=head.interclass_filtering_threshold,
            variational=head.variational,
            auxiliaries=head.auxiliaries,
            loss_weight=head.loss_weight,
        )


def test_links_within_the_page_lead_somewhere():
    # As GitHub makes them: lower case, hyphens for blanks, no punctuation.
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in HEADINGS}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert links
    assert set(links) <= anchors
