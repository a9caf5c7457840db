"""Nearest neighbours against a brute force over all pairs."""

from __future__ import annotations

import pytest
import torch

from partialfc.evaluation import identification, nearest_neighbor_accuracy


def _brute_force(embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    hits = 0
    for row in range(len(labels)):
        others = [other for other in range(len(labels)) if other != row]
        best = max(others, key=lambda other: float(torch.cosine_similarity(embeddings[row], embeddings[other], dim=0)))
        hits += int(labels[best] == labels[row])
    return hits / len(labels)


@pytest.mark.parametrize("chunk", [7, 2**22])
def test_equals_brute_force(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "_SCORES_PER_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 8
    embeddings = torch.randn(8, 5, generator=generator)[labels] + torch.randn(40, 5, generator=generator)
    expected = _brute_force(embeddings, labels)
    assert 0.1 < expected < 0.9
    assert nearest_neighbor_accuracy(embeddings, labels) == expected


def test_masked_rows_neither_ask_nor_answer() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert nearest_neighbor_accuracy(embeddings, torch.tensor([0, -1, 0, 1, 1])) == 1.0


def test_one_image_has_no_neighbour() -> None:
    with pytest.raises(ValueError, match="1 labelled images have no nearest neighbours"):
        nearest_neighbor_accuracy(torch.ones(2, 3), torch.tensor([0, -1]))
