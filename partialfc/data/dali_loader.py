"""A loader on DALI: the same samples in the same order as the torch loader, decoded by DALI's threads or a GPU."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from partialfc.data.augment import Augmentation
from partialfc.data.batch import Batch
from partialfc.data.dali_pipeline import DaliPipeline, Layout, OutputType, PipelineSettings, require_dali
from partialfc.data.dali_source import FedBatch, FedSteps, decode_all
from partialfc.data.errors import DataError
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedIndex
from partialfc.data.loader import WholeBatchLoader
from partialfc.data.plan import RankSteps, rank_slice
from partialfc.data.read_ahead import WarmSteps

__all__ = ["DaliLoader"]

logger = logging.getLogger(__name__)


class DaliLoader:
    """The training batches of one rank, decoded by NVIDIA DALI.

    Ids, labels, order and bad samples are those of `TorchLoader`. On the CPU so are uint8 pixels, bit for bit, of JPEGs
    and of all other files: those are decoded by Python where they are read, and handed to DALI uncompressed, so give a
    set of PNGs some workers. Where an image is resized, cropped, recoloured or blurred, a pixel differs from that of
    `TorchLoader` by 1 at most, and by a few where several of these follow each other. On a GPU, nvJPEG decodes,
    whose pixels differ slightly from those of the CPU; this was written without a GPU at hand to try it on.

    A file that makes DALI fail does not end the run: Python decodes the batches in work, masks the culprits, and a new
    pipeline goes on. One thing differs from `TorchLoader`: a JPEG with sound markers whose pixels were damaged
    before it was indexed is masked there, while DALI shows what it could decode. `partialfc data pack` leaves such
    files out.

    Args:
        index: the data to read.
        steps: which samples each step of this rank holds.
        image_size: height and width of the images in pixels; others are resized.
        augmentation: random changes of the images.
        num_workers: processes that read the files; 0 reads in the calling process, which is cheap on a local disk.
        seed: key of the augmentation.
        threads: threads that decode.
        prefetch: batches in work at a time.
        device_id: the GPU that decodes, and on which the images then are; None: the CPU.
        layout: order of the dimensions of an image.
        dtype: uint8 pixels, or floating point in [-1, 1].
        timeout_seconds: how long to wait for a batch of the workers before giving up.
        read_ahead: whether to read the windows of the plan in large pieces before they are needed; see `ReadAhead`.

    Raises:
        ImportError: if DALI is not installed.
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        index: ShardIndex | JoinedIndex,
        steps: RankSteps,
        image_size: int,
        augmentation: Augmentation,
        num_workers: int,
        seed: int,
        threads: int = 2,
        prefetch: int = 2,
        device_id: int | None = None,
        layout: Layout = "CHW",
        dtype: OutputType = "uint8",
        timeout_seconds: float = 600.0,
        read_ahead: bool = False,
    ) -> None:
        require_dali()
        self._settings = PipelineSettings(
            image_size=image_size,
            augmentation=augmentation,
            threads=threads,
            prefetch=prefetch,
            device_id=device_id,
            layout=layout,
            dtype=dtype,
        )
        self._index = index
        self._batch_size = len(rank_slice(0, steps.global_batch, rank=steps.rank, world_size=steps.world_size))
        fed = FedSteps(index, steps, image_size=image_size, augmentation=augmentation, seed=seed)
        self._files = WholeBatchLoader(
            cast(Any, fed),
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            order=WarmSteps(index, steps) if read_ahead else None,
        )

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            DataError: if a data shard cannot be used, a worker process died or no longer answers, or DALI fails on
                images that are not to blame.
        """
        files = cast(Iterator[FedBatch], iter(self._files))
        if self._batch_size == 0:
            return (Batch(self._settings.empty_images(), fed.labels, fed.ids) for fed in files)
        return self._decoded(files)

    def _decoded(self, files: Iterator[FedBatch]) -> Iterator[Batch]:
        work = _InWork(self._settings, self._index, self._batch_size)
        try:
            while True:
                for fed in islice(files, self._settings.prefetch - len(work)):
                    work.add(fed)
                if not len(work):
                    return
                yield work.take()
        finally:
            work.stop()


class _InWork:
    """The batches that DALI has, and their pipeline, which is built anew when it died or cannot do what is asked."""

    def __init__(self, settings: PipelineSettings, index: ShardIndex | JoinedIndex, batch_size: int) -> None:
        self._settings, self._index, self._batch_size = settings, index, batch_size
        self._batches: deque[FedBatch] = deque()
        self._pipeline: DaliPipeline | None = None
        self._resize = bool(settings.augmentation.crop)

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, fed: FedBatch) -> None:
        self._batches.append(fed)
        if not self._resize and bool(fed.resized.any()):
            # Most sets have one size. At the first image of another, what is in work is done again.
            self._resize = True
            self.stop()
        if self._pipeline is not None:
            try:
                _feed(self._pipeline, fed)
            except RuntimeError as error:
                self._repair(error)

    def take(self) -> Batch:
        """The oldest batch."""
        while True:
            try:
                if self._pipeline is None:
                    self._pipeline = self._start()
                images, _ = self._pipeline.take()
                break
            except RuntimeError as error:
                self._repair(error)
        fed = self._batches.popleft()
        if fed.failures:
            images[(fed.labels < 0).to(images.device)] = self._settings.black
        return Batch(images, fed.labels, fed.ids, fed.failures)

    def stop(self) -> None:
        self._pipeline = None

    def _start(self) -> DaliPipeline:
        pipeline = DaliPipeline(
            self._settings, batch_size=self._batch_size, depth=len(self._batches), resize=self._resize
        )
        for fed in self._batches:
            _feed(pipeline, fed)
        return pipeline

    def _repair(self, error: RuntimeError) -> None:
        """Decodes what is in work here, to find out on what DALI failed; the next pipeline gets it uncompressed.

        Raises:
            DataError: if it already was uncompressed.
        """
        self.stop()
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        if all(fed.all_decoded for fed in self._batches):
            raise DataError(f"DALI failed, though all images were decoded before: {error}") from error
        decoded = [decode_all(fed, self._index, image_size=self._settings.image_size) for fed in self._batches]
        found = [
            failure.message
            for before, after in zip(self._batches, decoded, strict=True)
            for failure in after.failures[len(before.failures) :]
        ]
        self._batches = deque(decoded)
        logger.warning(
            "DALI failed (%s); %s. Its pipeline is built anew.",
            reason,
            f"masked: {'; '.join(found)}" if found else "Python decodes these images well, and feeds them to DALI",
        )


def _feed(pipeline: DaliPipeline, fed: FedBatch) -> None:
    pipeline.feed(fed.parameters, files=fed.split_files(), resized=fed.resized)
