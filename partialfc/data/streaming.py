"""Data shards read from their beginning to their end, for stores that cannot send parts of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from partialfc.data.augment import Augmentation
from partialfc.data.batch import MASKED_LABEL, BadSample, Batch, decode_sample, new_images
from partialfc.data.errors import SampleError
from partialfc.data.loader import WholeBatchLoader
from partialfc.data.piece_cache import CacheSettings
from partialfc.data.plan import Draws, rank_slice
from partialfc.data.shard_stream import StreamedSample, StreamedShards
from partialfc.keyed import KeyedPermutation, hash64, randint, uniform

__all__ = ["StreamingLoader"]

# Number what is drawn; each takes another number.
_STREAM, _SHARD_ORDER, _VISIT, _BUFFER_SLOT = 401, 402, 403, 404


class StreamingLoader(WholeBatchLoader):
    """Training batches of one rank, from data shards that are read as streams and mixed in a buffer.

    What it promises: every rank makes the same number of steps, of full batches, however uneven the data shards are
    and even if there are fewer of them than workers; nothing waits for another rank; the same seed, consumed samples,
    ranks and workers give the same batches.

    What it does not promise: each sample once an epoch (some come twice before others come), nor the same order on
    another number of ranks or workers. After an interruption it begins anew, with draws keyed by `consumed`. Use an
    exact loader wherever the store can send parts of files.

    All workers of all ranks take turns in one endless keyed order of the data shards, in which each shard comes once
    before any comes again. A worker keeps `shuffle_buffer` samples and hands out one of them drawn by key.

    A bad sample takes a slot, with a zero image and the label -1. So does, once, a tar that ends early or holds fewer
    samples than were indexed; the rest of it is passed over. A tar that cannot be opened, or a connection that
    breaks, is tried again, after a break from where it was.

    Ids count the samples through the data shards: they are those of the index where all samples of the tars are in it.

    Args:
        directory: the folder of a split; of its index only the manifest is used.
        global_batch: samples of a step over all ranks.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        consumed: samples consumed before the first step.
        num_batches: number of steps.
        image_size: height and width of the images in pixels; others are resized.
        augmentation: random changes of the images.
        num_workers: worker processes; 0 reads in the calling process.
        seed: key of all draws.
        shuffle_buffer: samples that each worker keeps, as files; at most as many as there are.
        cache: number of tries, first wait, and time limit of reads; nothing is kept on disk.
        timeout_seconds: how long to wait for a batch of the workers before giving up.

    Raises:
        FileNotFoundError: if the split or a local data shard is missing.
        ValueError: for a number out of its range, or a split whose tars hold other labels than its index.
        ImportError: if a library for a URL is missing.
        DataError: while iterating, if a data shard cannot be read, or holds a label that the split does not have.
    """

    def __init__(
        self,
        *,
        directory: str | Path,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed: int,
        num_batches: int,
        image_size: int,
        augmentation: Augmentation,
        num_workers: int,
        seed: int,
        shuffle_buffer: int = 4096,
        cache: CacheSettings | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        if num_batches < 0 or shuffle_buffer < 1 or global_batch < world_size:
            raise ValueError(
                f"StreamingLoader: num_batches={num_batches} must not be negative, shuffle_buffer={shuffle_buffer} at "
                f"least 1, and global_batch={global_batch} at least world_size={world_size}"
            )
        part = rank_slice(consumed, global_batch, rank=rank, world_size=world_size)
        shards = StreamedShards.of_split(Path(directory), cache or CacheSettings())
        steps = _StreamedSteps(
            _StreamSettings(shards, hash64(seed, _STREAM, consumed), rank, world_size, shuffle_buffer),
            batch_size=len(part),
            num_batches=num_batches,
            image_size=image_size,
            augmentation=augmentation,
            seed=seed,
        )
        super().__init__(steps, num_workers=num_workers, timeout_seconds=timeout_seconds)


class _StreamSettings(NamedTuple):
    """What the streams of one rank share."""

    shards: StreamedShards
    key: int
    rank: int
    world_size: int
    shuffle_buffer: int


class _Stream:
    """The endless stream of one worker.

    Args:
        settings: those of its rank.
        worker: its number.
        num_workers: number of workers of the rank.
    """

    def __init__(self, settings: _StreamSettings, worker: int, num_workers: int) -> None:
        self._shards, self._key = settings.shards, settings.key
        self._number = settings.rank * num_workers + worker
        self._streams = settings.world_size * num_workers
        self._items = self._read()
        self._buffer: list[StreamedSample] = []
        self._buffer_size = min(settings.shuffle_buffer, sum(self._shards.sizes))
        self._taken = 0

    def take(self, count: int) -> list[StreamedSample]:
        """The next samples."""
        numbers = torch.arange(self._taken, self._taken + count)
        self._taken += count
        taken = []
        for draw in uniform(self._key, _BUFFER_SLOT, self._number, numbers).tolist():
            while len(self._buffer) < self._buffer_size:
                self._buffer.append(next(self._items))
            slot = int(draw * len(self._buffer))
            taken.append(self._buffer[slot])
            self._buffer[slot] = self._buffer[-1]
            self._buffer.pop()
        return taken

    def _read(self) -> Iterator[StreamedSample]:
        order = KeyedPermutation(len(self._shards.paths))
        turn = self._number
        while True:
            passes, place = divmod(turn, order.size)
            shard = int(order(torch.tensor(place), hash64(self._key, _SHARD_ORDER, passes)))
            yield from self._shards.read(shard, int(randint(1 << 62, self._key, _VISIT, turn)))
            turn += self._streams


class _StreamedSteps:
    """Step number -> batch of one rank. Each worker goes on with its own stream, so the steps must be in order."""

    def __init__(
        self,
        settings: _StreamSettings,
        *,
        batch_size: int,
        num_batches: int,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.settings, self.batch_size, self.num_batches = settings, batch_size, num_batches
        self.image_size, self.augmentation, self.seed = image_size, augmentation, seed
        self._stream: _Stream | None = None
        self._last_step = -1

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, step: int) -> Batch:
        if self._stream is None or step <= self._last_step:
            worker = get_worker_info()
            self._stream = (
                _Stream(self.settings, worker.id, worker.num_workers) if worker else _Stream(self.settings, 0, 1)
            )
        self._last_step = step
        return self._batch(self._stream.take(self.batch_size))

    def _batch(self, items: list[StreamedSample]) -> Batch:
        ids, visits, labels = (torch.tensor(column) for column in list(zip(*items, strict=True))[:3])
        parameters = self.augmentation.draw(Draws(ids, visits), seed=self.seed)
        images = new_images(len(items), self.image_size)
        pixels_bchw = images.numpy()
        failures = []
        for slot, item in enumerate(items):
            try:
                pixels = decode_sample(item.data, image_size=self.image_size, augmentation=parameters, slot=slot)
            except SampleError as error:
                failures.append(BadSample(item.sample_id, error.reason, f"{item.where}: {error}"))
                labels[slot] = MASKED_LABEL
                continue
            pixels_bchw[slot] = pixels.transpose(2, 0, 1)
        return Batch(images, labels, ids, tuple(failures))
