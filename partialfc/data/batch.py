"""A batch of images, and how it is read from the data shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from partialfc.data.decode import decode_image
from partialfc.data.index import ShardIndex

__all__ = ["MASKED_LABEL", "Batch", "normalize_images", "read_batch"]

MASKED_LABEL = -1
"""Label of a sample that could not be read: it keeps its slot, and counts nowhere."""


@dataclass(frozen=True)
class Batch:
    """Samples of one rank in one step.

    Attributes:
        images: uint8 [b, 3, H, W], RGB; zero where the sample could not be read.
        labels: int64 [b]; -1 where the sample could not be read.
        ids: int64 [b], sample ids.
        failures: one line for each sample that could not be read: data shard, id, byte offset and reason.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    failures: tuple[str, ...] = ()


def normalize_images(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1], on the device of the images."""
    return images.float().div_(127.5).sub_(1.0)


def read_batch(index: ShardIndex, ids: Tensor, *, image_size: int, flips: Tensor | None = None) -> Batch:
    """Reads and decodes some samples. A sample that fails keeps its slot, with a zero image and label -1.

    Args:
        index: the split to read from.
        ids: int64 [b], sample ids.
        image_size: height and width of the images in pixels.
        flips: bool [b], which images to mirror; none if left out.
    """
    images = np.zeros((len(ids), 3, image_size, image_size), dtype=np.uint8)
    labels = np.full(len(ids), MASKED_LABEL, dtype=np.int64)
    failures = []
    for slot, sample_id in enumerate(ids.tolist()):
        try:
            pixels = _read_image(index, sample_id, image_size)
        except (OSError, ValueError) as error:
            failures.append(str(error))
            continue
        if flips is not None and flips[slot]:
            pixels = pixels[:, ::-1]
        images[slot] = pixels.transpose(2, 0, 1)
        labels[slot] = index.labels[sample_id]
    return Batch(torch.from_numpy(images), torch.from_numpy(labels), ids, tuple(failures))


def _read_image(index: ShardIndex, sample_id: int, image_size: int) -> np.ndarray:
    data = index.read(sample_id)
    try:
        return decode_image(data, image_size=image_size)
    except ValueError as error:
        raise ValueError(f"{index.describe(sample_id)}: {error}") from error
