"""A batch of images, and how it is read from the data shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from partialfc.data.augment import AugmentationParameters, apply_augmentation
from partialfc.data.decode import decode_image
from partialfc.data.errors import SampleError

if TYPE_CHECKING:
    from partialfc.data.index import ShardIndex
    from partialfc.data.joined import JoinedIndex

__all__ = [
    "MASKED_LABEL",
    "BadSample",
    "Batch",
    "bad_sample",
    "decode_sample",
    "new_images",
    "normalize_images",
    "read_batch",
]

MASKED_LABEL = -1
"""Label of a sample that could not be read: it keeps its slot, and counts nowhere."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used.

    Attributes:
        sample_id: its id.
        reason: one of `partialfc.data.errors.REASONS`.
        message: one line with data shard, id, key, byte offset and what was found.
    """

    sample_id: int
    reason: str
    message: str


@dataclass(frozen=True)
class Batch:
    """Samples of one rank in one step.

    Attributes:
        images: uint8 [b, 3, H, W], RGB; zero where the sample could not be read.
        labels: int64 [b]; -1 where the sample could not be read.
        ids: int64 [b], sample ids.
        failures: the samples that could not be read.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    failures: tuple[BadSample, ...] = ()

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which is copied to a GPU while it computes."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.ids, self.failures)


def normalize_images(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1], on the device of the images."""
    return images.float().div_(127.5).sub_(1.0)


def read_batch(
    index: ShardIndex | JoinedIndex,
    ids: Tensor,
    *,
    image_size: int,
    augmentation: AugmentationParameters | None = None,
) -> Batch:
    """Reads, decodes and augments some samples. A bad one keeps its slot, with a zero image and the label -1.

    Args:
        index: the split to read from.
        ids: int64 [b], sample ids.
        image_size: height and width of the images in pixels.
        augmentation: what to do with each of them; left out, nothing.

    Raises:
        DataError: if a data shard cannot be used.
    """
    images = new_images(len(ids), image_size)
    pixels_bchw = images.numpy()
    sample_ids = ids.numpy()
    labels = np.array(index.labels[sample_ids], dtype=np.int64)
    failures = []
    for slot, data in enumerate(index.read_many(sample_ids)):
        try:
            pixels = decode_sample(data, image_size=image_size, augmentation=augmentation, slot=slot)
        except SampleError as error:
            failures.append(bad_sample(index, int(sample_ids[slot]), error))
            labels[slot] = MASKED_LABEL
            continue
        pixels_bchw[slot] = pixels.transpose(2, 0, 1)
    return Batch(images, torch.from_numpy(labels), ids, tuple(failures))


def new_images(count: int, image_size: int) -> Tensor:
    """Zeros, uint8 [count, 3, image_size, image_size]; in a loader process in memory that the parent can read.

    Elsewhere torch would copy the images into such memory when they are sent, which costs as much as reading them.
    """
    shape = (count, 3, image_size, image_size)
    if torch.utils.data.get_worker_info() is None or count == 0:
        return torch.zeros(shape, dtype=torch.uint8)
    # Fresh from the kernel, and so zero.
    shared = torch.UntypedStorage._new_shared(count * 3 * image_size * image_size)
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def decode_sample(
    data: bytes | SampleError, *, image_size: int, augmentation: AugmentationParameters | None, slot: int
) -> np.ndarray:
    """The pixels of one sample of a batch, uint8 [H, W, 3], decoded and augmented.

    Args:
        data: its image file, or what is wrong with it.
        image_size: H and W.
        augmentation: what to do with each sample of the batch.
        slot: the place of the sample in the batch.

    Raises:
        SampleError: if the sample is bad.
    """
    if isinstance(data, SampleError):
        raise data
    if augmentation is None:
        return decode_image(data, image_size=image_size)
    return apply_augmentation(decode_image(data), augmentation, slot=slot, image_size=image_size)


def bad_sample(index: ShardIndex | JoinedIndex, sample_id: int, error: SampleError) -> BadSample:
    """What is recorded of a bad sample; the message says where it lies."""
    message, where = str(error), index.describe(sample_id)
    return BadSample(sample_id, error.reason, message if message.startswith(where) else f"{where}: {message}")
