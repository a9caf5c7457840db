"""What a head is not built with, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from partialfc.head.optimizers import CenterOptimizer
from partialfc.head.sampling import SAMPLING_LAWS
from partialfc.head.variational import VariationalPrototypes
from partialfc.margins.auxiliary import Auxiliary
from partialfc.margins.base import Margin

__all__ = [
    "check_dtypes",
    "check_learning_rate",
    "check_margin",
    "check_numbers",
    "check_offload",
    "check_options",
    "check_replicas",
    "check_sampling",
]

_STORED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_numbers(
    *,
    embedding_dim: int,
    sample_rate: float,
    num_subcenters: int,
    labels_per_row: int,
    init_std: float,
    loss_weight: float,
) -> None:
    """Raises a ValueError if a number is out of its range."""
    for name, count in (
        ("embedding_dim", embedding_dim),
        ("num_subcenters", num_subcenters),
        ("labels_per_row", labels_per_row),
    ):
        if count < 1:
            raise ValueError(f"{name} is {count}, but must be at least 1")
    if not 0 < sample_rate <= 1:
        raise ValueError(
            f"sample_rate is {sample_rate}, but must be in (0, 1]: the share of classes drawn at each step"
        )
    for name, value in (("init_std", init_std), ("loss_weight", loss_weight)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, but must be positive and finite")


def check_learning_rate(rate: float) -> None:
    """Raises a ValueError unless class centers can move at that rate."""
    if not 0 <= rate < math.inf:
        raise ValueError(f"learning_rate of the head is {rate}, but must be finite and not negative; see its schedule")


def check_dtypes(stored: torch.dtype, operands: torch.dtype | None, gathered: torch.dtype | None) -> None:
    """Raises a ValueError unless class centers can be stored and multiplied, and embeddings gathered, so."""
    if gathered not in (None, torch.bfloat16):
        raise ValueError(f"gather_dtype is {gathered}, but must be torch.bfloat16, or None for that of the sums")
    if stored not in _STORED:
        raise ValueError(
            f"dtype is {stored}, but class centers are stored in torch.float32 or torch.float64, or with stochastic "
            "rounding in torch.float16 or torch.bfloat16"
        )
    if operands not in (None, torch.bfloat16):
        raise ValueError(f"matmul_dtype is {operands}, but must be torch.bfloat16, or None for that of the sums")
    if operands is not None and stored == torch.float64:
        raise ValueError(f"matmul_dtype is {operands}, but class centers in torch.float64 are for exact comparisons")


def check_sampling(sampling: str) -> None:
    """Raises a ValueError unless there is such a law; also where nothing is sampled."""
    if sampling not in SAMPLING_LAWS:
        raise ValueError(f"sampling is {sampling!r}, but must be one of {', '.join(SAMPLING_LAWS)}")


def check_offload(offload: bool, sample_rate: float, optimizer: CenterOptimizer) -> None:
    """Raises a ValueError if class centers cannot be in host memory."""
    if offload and sample_rate == 1:
        raise ValueError(
            "offload is True, but sample_rate is 1: all class centers would be brought to the device in each step; "
            "lower the rate, or keep them there"
        )
    if offload and optimizer.moves_idle_rows:
        raise ValueError("offload is True, but the optimizer's decay is dense; rows in host memory need decay: lazy")


def check_replicas(
    *, fused: bool, offload: bool, auxiliaries: Sequence[Auxiliary], variational: VariationalPrototypes | None
) -> None:
    """Raises a ValueError if class centers with these options cannot be replicated."""
    for name, given, remedy in (
        ("fused", not fused, "set it to True"),
        ("offload", offload, "set it to False"),
        ("auxiliaries", bool(auxiliaries), "leave them out"),
        ("variational", variational is not None, "set it to None"),
    ):
        if given:
            raise ValueError(
                f"class centers that are replicated over nodes (replicate_over) do not go with {name}; {remedy}, or "
                "shard them over all ranks"
            )


def check_margin(margin: Margin, sampling_correction: bool | None, labels_per_row: int) -> None:
    """Raises a ValueError if the margin does not go with these options."""
    if not isinstance(margin, Margin):
        raise ValueError(f"margin is {margin!r}, but must be a margin of partialfc.margins, such as ArcFace()")
    name = type(margin).__name__
    if margin.needs_sampling_correction and sampling_correction is False:
        raise ValueError(
            f"sampling_correction is False, but {name} depends on the level of the sum over all classes and needs it; "
            "leave it at None"
        )
    if labels_per_row > 1 and not margin.allows_several_labels:
        raise ValueError(
            f"labels_per_row is {labels_per_row}, but {name} is not a softmax, and would count the negatives of a row "
            "once for each label; it takes 1"
        )


def check_options(
    margin: Margin,
    threshold: float | None,
    variational: VariationalPrototypes | None,
    auxiliaries: Sequence[Auxiliary],
    num_subcenters: int,
    labels_per_row: int,
) -> None:
    """Raises a ValueError if an option does not go with another."""
    if threshold is not None and not (margin.compares_cosines and -1 < threshold < 1):
        allowed = "in (-1, 1)" if margin.compares_cosines else f"None: {type(margin).__name__} compares no cosines"
        raise ValueError(f"interclass_filtering_threshold is {threshold}, but must be {allowed}")
    if not isinstance(variational, VariationalPrototypes | None):
        raise ValueError(f"variational is {variational!r}, but must be VariationalPrototypes or None")
    if variational is not None and num_subcenters > 1:
        raise ValueError(
            f"variational prototypes take one center for each class, but num_subcenters is {num_subcenters}"
        )
    if variational is not None and not margin.compares_cosines:
        raise ValueError(f"variational prototypes are unit vectors, but {type(margin).__name__} compares no cosines")
    for term in auxiliaries:
        if not isinstance(term, Auxiliary):
            raise ValueError(
                f"auxiliaries has {term!r}, but must have terms of partialfc.margins, such as CenterLoss()"
            )
    if auxiliaries and labels_per_row > 1:
        raise ValueError(f"auxiliaries take one label for each row, but labels_per_row is {labels_per_row}")
