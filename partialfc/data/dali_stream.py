"""Plain streaming with DALI's own WebDataset reader: cheap sequential reads, without the promises of the plan."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partialfc.data.augment import Augmentation, AugmentationParameters
from partialfc.data.batch import Batch
from partialfc.data.dali_pipeline import DaliPipeline, Layout, OutputType, PipelineSettings, require_dali
from partialfc.data.errors import DataError
from partialfc.data.index import ShardIndex
from partialfc.data.plan import Draws, RankSteps, rank_slice
from partialfc.keyed import hash64

__all__ = ["DaliStream", "write_dali_indexes"]

_COMPONENT = "image"  # What the index files call the image of a sample; the names inside of the tars do not matter.


class DaliStream:
    """Training batches of one rank in the order of DALI's own reader, `readers.webdataset`.

    It keeps these promises: every rank makes the same number of steps; every batch is full; labels are those of the
    index; two runs with the same arguments give the same batches; while a run is not interrupted, each sample comes
    once in a pass over the data, and passes follow each other without a gap.

    It does not keep these: another number of ranks or another batch size gives another order. A run that goes on after
    an interruption starts a new pass, in an order keyed by `consumed`: what the broken pass had not shown may come
    late, and what it had shown may come again. Samples are mixed only within the `shuffle_buffer` of a rank, so tars
    sorted by identity stay sorted. Checksums are not compared. A file that DALI cannot decode ends the run.
    `DaliLoader` is no dearer, and has none of these limits.

    Args:
        index: the data to read; its data shards must be local files.
        steps: how many samples each step of this rank holds; its plan is not used.
        image_size: height and width of the images in pixels; others are resized.
        augmentation: random changes of the images, keyed by their place in the stream.
        seed: key of the order and of the augmentation.
        threads: threads that decode.
        prefetch: batches in work at a time.
        shuffle_buffer: samples of a rank that are shuffled together.
        device_id: the GPU that decodes, and on which the images then are; None: the CPU.
        layout: order of the dimensions of an image.
        dtype: uint8 pixels, or floating point in [-1, 1].

    Raises:
        ImportError: if DALI is not installed.
        ValueError: for remote data shards, fewer samples than ranks, or a number out of its range.
    """

    def __init__(
        self,
        *,
        index: ShardIndex,
        steps: RankSteps,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
        threads: int = 2,
        prefetch: int = 2,
        shuffle_buffer: int = 4096,
        device_id: int | None = None,
        layout: Layout = "CHW",
        dtype: OutputType = "uint8",
    ) -> None:
        require_dali()
        if remote := [path for path in index.shard_paths if "://" in path]:
            raise ValueError(
                f"{remote[0]}: DALI's reader needs local files; use data.loader=torch or webdataset for remote shards"
            )
        if index.num_samples < steps.world_size or shuffle_buffer < 1:
            raise ValueError(
                f"DaliStream: {index.num_samples} samples for {steps.world_size} ranks, shuffle_buffer="
                f"{shuffle_buffer}; needed: a sample for each rank, and a buffer of at least 1"
            )
        self._settings = PipelineSettings(
            image_size=image_size,
            augmentation=augmentation,
            threads=threads,
            prefetch=prefetch,
            device_id=device_id,
            layout=layout,
            dtype=dtype,
        )
        self._index, self._steps, self._seed = index, steps, seed
        self._shuffle_buffer = shuffle_buffer
        self._batch_size = len(rank_slice(0, steps.global_batch, rank=steps.rank, world_size=steps.world_size))

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            DataError: if DALI cannot read or decode something.
        """
        if self._batch_size == 0:
            nothing = torch.zeros(0, dtype=torch.int64)
            yield from (Batch(self._settings.empty_images(), nothing, nothing) for _ in range(len(self)))
            return
        with tempfile.TemporaryDirectory(prefix="partialfc-dali-") as folder:
            indexes = write_dali_indexes(self._index, Path(folder))
            try:
                yield from self._batches(indexes)
            except RuntimeError as error:
                raise DataError(
                    f"{self._index.directory}: DALI's reader failed, and cannot go on: {error}\n"
                    "`partialfc data verify --decode` names damaged samples; data.exact=true masks them"
                ) from error

    def _batches(self, indexes: dict[str, str]) -> Iterator[Batch]:
        images, ids = self._settings.empty_images(), torch.zeros(0, dtype=torch.int64)
        parts = self._real_samples(indexes)
        for _ in range(len(self)):
            while len(ids) < self._batch_size:
                more_images, more_ids = next(parts)
                images = torch.cat([images.to(more_images.device), more_images]) if len(ids) else more_images
                ids = torch.cat([ids, more_ids])
            batch_images, images = images[: self._batch_size], images[self._batch_size :]
            batch_ids, ids = ids[: self._batch_size], ids[self._batch_size :]
            labels = torch.from_numpy(np.array(self._index.labels[batch_ids.numpy()], dtype=np.int64))
            yield Batch(batch_images, labels, batch_ids)

    def _real_samples(self, indexes: dict[str, str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and ids as DALI gives them, endlessly, without what it repeats to fill the end of a pass."""
        steps, size = self._steps, self._batch_size
        pipeline = DaliPipeline(
            self._settings,
            batch_size=size,
            depth=self._settings.prefetch,
            resize=True,
            reader=lambda dali: self._reader(dali, indexes),
            seed=hash64(self._seed, steps.consumed) & 0x7FFFFFFFFFFFFFFF,
        )
        number = 0
        for number in range(self._settings.prefetch):
            pipeline.feed(self._parameters(number))
        # Every rank reads the longest part; a rank takes the next part at each pass.
        rounds = math.ceil(math.ceil(self._index.num_samples / steps.world_size) / size)
        turn = 0
        while True:
            part = (steps.rank + turn) % steps.world_size
            left = len(rank_slice(0, self._index.num_samples, rank=part, world_size=steps.world_size))
            for _ in range(rounds):
                images, (sources,) = pipeline.take()
                number += 1
                pipeline.feed(self._parameters(number))
                real = min(left, size)
                left -= real
                ids = [int(source.tobytes().rpartition(b":")[2]) for source in sources[:real]]
                yield images[:real], torch.tensor(ids, dtype=torch.int64)
            turn += 1

    def _parameters(self, number: int) -> AugmentationParameters:
        """The augmentation of a batch of the reader: keyed by rank and place, as the ids are not known before."""
        places = torch.arange(number * self._batch_size, (number + 1) * self._batch_size)
        turns = torch.full_like(places, hash64(self._steps.consumed, self._steps.rank))
        return self._settings.augmentation.draw(Draws(places, turns), seed=self._seed)

    def _reader(self, dali: Any, indexes: dict[str, str]) -> tuple[Any, Any]:
        files = dali.fn.readers.webdataset(
            paths=list(indexes),
            index_paths=list(indexes.values()),
            ext=[_COMPONENT],
            shard_id=self._steps.rank,
            num_shards=self._steps.world_size,
            random_shuffle=True,
            initial_fill=self._shuffle_buffer,
            pad_last_batch=True,
            missing_component_behavior="error",
        )
        return files, dali.fn.get_property(files, key="source_info")


def write_dali_indexes(index: ShardIndex, folder: Path) -> dict[str, str]:
    """Writes index files as DALI's `wds2idx` does, version v1.2, with the sample id as the name of each file.

    Args:
        index: of the data shards.
        folder: an existing folder.

    Returns:
        Path of a data shard -> path of its index file, for all shards that are not empty.
    """
    written, first = {}, 0
    for number, (path, count) in enumerate(zip(index.shard_paths, index.shard_sizes, strict=True)):
        ids = np.arange(first, first + count)
        first += count
        if not count:
            continue
        _, offsets, sizes = index.locate(ids)
        lines = [
            f"{_COMPONENT} {offset} {size} {sample_id}\n"
            for sample_id, offset, size in zip(ids.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        ]
        file = folder / f"{number:06d}.idx"
        file.write_text(f"v1.2 {count}\n" + "".join(lines), encoding="ascii")
        written[path] = str(file)
    return written
