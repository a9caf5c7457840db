"""Python that README and CONTRIBUTING show runs, with fewer classes than they have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import Case, check_case
from torch import nn

ROOT = Path(__file__).parents[2]


def snippets(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(source: str, namespace: dict[str, Any]) -> dict[str, Any]:
    exec(
        compile(source.replace("1_000_000", "10_000").replace("50_000", "500"), "snippet", "exec", dont_inherit=True),
        namespace,
    )
    return namespace


HEADS = [snippet for snippet in snippets("README.md") if "loss.backward()" in snippet]


@pytest.mark.parametrize("snippet", HEADS)
def test_a_head_of_the_readme_trains(snippet: str) -> None:
    namespace = run(snippet, {})
    assert bool(namespace["loss"].isfinite())
    assert bool(namespace["embeddings"].grad.any(1).all())


def test_the_readme_shows_heads() -> None:
    assert len(HEADS) == 2


def test_the_margin_of_contributing_equals_the_reference() -> None:
    (snippet,) = [snippet for snippet in snippets("CONTRIBUTING.md") if "GrowingCosFace" in snippet]
    names = "Need, Parameters, Row, ScaledMargin, State"
    imports = (
        "import torch\nfrom dataclasses import dataclass\nfrom typing import ClassVar\nfrom torch import Tensor\n"
        f"from partialfc.margins import {names}\n"
    )
    margin = run(imports + snippet, {"__name__": "snippet"})["GrowingCosFace"](scale=8.0, rise=3.0)
    for sample_rate in (1.0, 0.3):
        check_case(Case("even batches", margin, 130, sample_rate, [[3, 4, -1, 129]]), 0)


def test_the_backbone_of_contributing_runs() -> None:
    (snippet,) = [snippet for snippet in snippets("CONTRIBUTING.md") if "class ConvNet" in snippet]
    imports = (
        "from torch import Tensor, nn\n"
        "from partialfc.backbones.embedding import check_images, check_sizes, embedding_norm, features_to_embedding\n"
    )
    backbone = run(imports + snippet, {"__name__": "snippet"})["ConvNet"](embedding_dim=8, image_size=32)
    assert isinstance(backbone, nn.Module)
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 8)
