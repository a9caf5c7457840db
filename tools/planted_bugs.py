"""Trains with a loss bug planted on purpose, to see that the embedded data tells a broken loss from a right one.

    torchrun --standalone --nproc-per-node=2 tools/planted_bugs.py shifted-labels configs/quickstart.yaml \
        run.directory=runs/shifted-labels

A run with a bug ends near the accuracy of an untrained network, or the data would be too easy to be a check.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partialfc.cli import main
from partialfc.head import step
from partialfc.head.class_centers import ClassCenters
from partialfc.head.class_table import Rows
from partialfc.head.partial_fc import PartialFC


def _with_labels(change: Callable[[Tensor, int], Tensor]) -> None:
    forward = PartialFC.forward

    def changed(self: PartialFC, embeddings: Tensor, labels: Tensor) -> Tensor:
        return forward(self, embeddings, change(labels, self.partition.num_classes))

    PartialFC.forward = changed  # type: ignore[method-assign]


def shift_labels() -> None:
    """Each image gets the label of the image before it."""
    _with_labels(lambda labels, _: labels.roll(1))


def shift_half_of_the_classes() -> None:
    """Every other image gets the next class. Milder: what is learnt about a class is half right."""
    _with_labels(lambda labels, count: (labels + torch.arange(len(labels), device=labels.device) % 2) % count)


def freeze_centers() -> None:
    """Class centers never move."""
    ClassCenters.step_ = lambda *_, **__: None  # type: ignore[method-assign]


def flip_center_gradient() -> None:
    """Class centers climb the loss."""
    step_: Callable[..., None] = ClassCenters.step_

    def flipped(self: ClassCenters, rows: Rows, weight_nKD: Tensor, gradient_nKD: Tensor, **rest: Any) -> None:
        step_(self, rows, weight_nKD, gradient_nKD.neg_(), **rest)

    ClassCenters.step_ = flipped  # type: ignore[method-assign]


def flip_embedding_gradient() -> None:
    """Embeddings climb the loss."""
    hand_out = step._hand_out
    step._hand_out = lambda head, pending: -hand_out(head, pending)


BUGS: dict[str, Callable[[], None]] = {
    "shifted-labels": shift_labels,
    "half-shifted-classes": shift_half_of_the_classes,
    "frozen-centers": freeze_centers,
    "flipped-center-gradient": flip_center_gradient,
    "flipped-embedding-gradient": flip_embedding_gradient,
}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in BUGS:
        sys.exit(f"usage: planted_bugs.py {{{','.join(BUGS)}}} CONFIG [key.sub=value ...]")
    BUGS[sys.argv[1]]()
    sys.exit(main(["train", *sys.argv[2:]]))
