"""What DALI is fed with: files that it decodes exactly as `decode_image` does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from partialfc.data.augment import AugmentationParameters
from partialfc.data.batch import MASKED_LABEL, BadSample, bad_sample
from partialfc.data.decode import JPEG_MAGIC, MAX_PIXELS, decode_image
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedIndex
from partialfc.data.loader import AugmentedSteps

__all__ = ["FedBatch", "FedSteps", "decode_all", "jpeg_size"]

_PNM_HEADER = b"P6\n%d %d\n255\n"  # width, height
_END_OF_IMAGE = b"\xff\xd9"
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive; the other kinds of JPEG are rare
_START_OF_SCAN = 0xDA


@dataclass(frozen=True)
class FedBatch:
    """The files of one step, as they go to DALI: JPEGs as they are, all else as uncompressed PNM.

    Attributes:
        files: uint8, one file after the other.
        ends: int64 [b], where each file ends.
        resized: bool [b], which images are cropped, or have another size than asked for.
        parameters: what is done to each image.
        labels: int64 [b]; -1 where the sample is bad; in its place a black image is fed.
        ids: int64 [b].
        failures: the bad samples.
        all_decoded: whether there is no JPEG among the files.
    """

    files: Tensor
    ends: Tensor
    resized: Tensor
    parameters: AugmentationParameters
    labels: Tensor
    ids: Tensor
    failures: tuple[BadSample, ...]
    all_decoded: bool = False

    def split_files(self) -> list[np.ndarray]:
        """The files, uint8 [bytes] each: views."""
        files, ends = self.files.numpy(), self.ends.tolist()
        return [files[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []


class FedSteps(AugmentedSteps):
    """Step number -> the files of one rank."""

    def __getitem__(self, step: int) -> FedBatch:
        draws = self.steps.draws(step)
        ids = draws.ids.numpy()
        collected = _Collected(self.index, self.image_size)
        for sample_id, data in zip(ids.tolist(), self.index.read_many(ids), strict=True):
            collected.add(sample_id, data)
        parameters = self.augmentation.draw(draws, seed=self.seed)
        labels = torch.from_numpy(np.array(self.index.labels[ids], dtype=np.int64))
        return collected.batch(parameters, labels, draws.ids, failures=())


def decode_all(fed: FedBatch, index: ShardIndex | JoinedIndex, *, image_size: int) -> FedBatch:
    """The same batch without JPEGs: decoded here, so that what cannot be decoded is found and masked."""
    collected = _Collected(index, image_size)
    for sample_id, file in zip(fed.ids.tolist(), fed.split_files(), strict=True):
        data = file.tobytes()
        try:
            collected.add_pixels(decode_image(data))
        except SampleError as error:
            collected.add_bad(sample_id, error)
    batch = collected.batch(fed.parameters, fed.labels, fed.ids, failures=fed.failures)
    return replace(batch, all_decoded=True)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that all decoders agree on; None for any other file.

    That is: 8 bits, gray or three colours, Huffman coded, not cut off. Only the markers are read, not the pixels.
    """
    if not (data.startswith(JPEG_MAGIC) and data.endswith(_END_OF_IMAGE)):
        return None
    place = 2
    try:
        while data[place] == 0xFF:
            marker = data[place + 1]
            if marker in _FRAMES:
                plain = data[place + 4] == 8 and data[place + 9] in (1, 3)
                height = (data[place + 5] << 8) | data[place + 6]
                width = (data[place + 7] << 8) | data[place + 8]
                return (height, width) if plain and height and width else None
            if marker == _START_OF_SCAN:
                return None
            place += 2 + ((data[place + 2] << 8) | data[place + 3])
    except IndexError:
        pass
    return None


class _Collected:
    """The files of a batch, one by one."""

    def __init__(self, index: ShardIndex | JoinedIndex, image_size: int) -> None:
        self._index, self._size = index, (image_size, image_size)
        self._files: list[bytes] = []
        self._resized: list[bool] = []
        self._bad_slots: list[int] = []
        self._failures: list[BadSample] = []

    def add(self, sample_id: int, data: bytes | SampleError) -> None:
        try:
            if isinstance(data, SampleError):
                raise data
            size = jpeg_size(data)
            if size is not None and size[0] * size[1] <= MAX_PIXELS:
                self._files.append(data)
                self._resized.append(size != self._size)
            else:
                self.add_pixels(decode_image(data))
        except SampleError as error:
            self.add_bad(sample_id, error)

    def add_pixels(self, pixels: np.ndarray) -> None:
        height, width = pixels.shape[:2]
        self._files.append(_PNM_HEADER % (width, height) + pixels.tobytes())
        self._resized.append((height, width) != self._size)

    def add_bad(self, sample_id: int, error: SampleError) -> None:
        self._bad_slots.append(len(self._files))
        self._failures.append(bad_sample(self._index, sample_id, error))
        self.add_pixels(np.zeros((*self._size, 3), dtype=np.uint8))

    def batch(
        self, parameters: AugmentationParameters, labels: Tensor, ids: Tensor, *, failures: tuple[BadSample, ...]
    ) -> FedBatch:
        labels = labels.clone()
        labels[self._bad_slots] = MASKED_LABEL
        resized = torch.tensor(self._resized, dtype=torch.bool)
        if parameters.crop is not None:
            resized |= (parameters.crop != torch.tensor([0.0, 0.0, 1.0, 1.0])).any(1)
        return FedBatch(
            files=torch.from_numpy(np.frombuffer(bytearray().join(self._files), dtype=np.uint8)),
            ends=torch.tensor([len(file) for file in self._files], dtype=torch.int64).cumsum(0),
            resized=resized,
            parameters=parameters,
            labels=labels,
            ids=ids,
            failures=failures + tuple(self._failures),
        )
