"""Random changes of training images, keyed by (seed, epoch, sample id, operation).

So a picture does not depend on the rank, the worker or a restart, and each epoch sees another one.
"""

from __future__ import annotations

from torch import Tensor

from partialfc.keyed import uniform

__all__ = ["horizontal_flips"]

_HORIZONTAL_FLIP = 101  # Numbers the operation; another operation of the same sample takes another number.


def horizontal_flips(epochs: Tensor, sample_ids: Tensor, *, seed: int) -> Tensor:
    """Which samples are mirrored: each with probability 1/2.

    Args:
        epochs: int64, the epoch of each sample.
        sample_ids: int64, of the same shape.
        seed: key of the draw.

    Returns:
        bool tensor of the same shape.
    """
    return uniform(seed, _HORIZONTAL_FLIP, epochs, sample_ids) < 0.5
