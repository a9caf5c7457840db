"""The plan as the source of ordinary webdataset stages: what users wrote for webdataset, on exact epochs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from partialfc.data.augment import Augmentation, AugmentationParameters, apply_augmentation
from partialfc.data.batch import MASKED_LABEL, Batch, bad_sample, new_images
from partialfc.data.decode import JPEG_MAGIC, decode_image
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedIndex
from partialfc.data.loader import AugmentedSteps, WholeBatchLoader
from partialfc.data.plan import RankSteps
from partialfc.data.read_ahead import WarmSteps
from partialfc.data.webdataset_stages import STREAMING_HINT, Stage, check_stage, describe_error, stage_name

__all__ = ["PlanSource", "WebDatasetLoader"]

_EXTENSIONS = ((JPEG_MAGIC, "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"GIF8", "gif"))


class WebDatasetLoader(WholeBatchLoader):
    """The training batches of one rank, with webdataset stages between the plan and the batch.

    Without stages, batches equal those of `TorchLoader` bit for bit. With stages, ids, labels, order and number of
    steps still do, and workers, ranks and restarts change nothing, as long as the stages draw nothing at random by
    themselves: the keys to draw from are in the sample.

    The stages get ordinary samples of webdataset: dicts with `__key__`, `__url__`, the image file under its extension
    as bytes ("jpg", "png", "webp", ...), "cls" (the label as decimal text, as bytes), and further `__position__` (of
    the stream), `__id__` and `__visit__` (how often the sample was drawn before). They are started anew for each
    batch. They may change a sample in any way, but must hand on each one, once, in order, as a dict that still has
    `__position__` (or `__key__`, which `wds.map` keeps by itself). The image is then taken from "image", or else from
    the extension it had: bytes still to be decoded, a uint8 array or tensor [H, W, 3] or [3, H, W], or a PIL image.
    Augmentation and resizing follow.

    Stages that drop, repeat or reorder samples are refused: those of webdataset that do so by nature at once, others
    in the first batch where it happens. A sample that cannot be read or decoded keeps its slot, with a zero image and
    the label -1, whichever stage finds it; so does one for which a stage raises `SampleError`.

    Args:
        index: the data to read.
        steps: which samples each step of this rank holds.
        image_size: height and width of the images in pixels; others are resized.
        augmentation: random changes of the images.
        num_workers: worker processes; 0 reads in the calling process.
        seed: key of the augmentation.
        stages: what samples pass through.
        timeout_seconds: how long to wait for a batch of the workers before giving up.
        read_ahead: whether to read the windows of the plan in large pieces before they are needed; see `ReadAhead`.

    Raises:
        ValueError: for a number out of its range, a refused stage, or a plan without windows to read ahead; while
            iterating, if a stage fails, or loses, repeats or reorders samples.
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
        stages: Sequence[Stage] = (),
        timeout_seconds: float = 600.0,
        read_ahead: bool = False,
    ) -> None:
        for number, stage in enumerate(stages, 1):
            check_stage(stage, f"stage {number} ({stage_name(stage)})")
        staged = _StagedSteps(index, steps, image_size=image_size, augmentation=augmentation, seed=seed, stages=stages)
        super().__init__(
            staged,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            order=WarmSteps(index, steps) if read_ahead else None,
        )


class PlanSource(IterableDataset[dict[str, Any]]):
    """The first stage of a pipeline: samples of one step, read already, as webdataset has them.

    Args:
        samples: those of the step.
        slots: which of them.

    Attributes:
        pulled: how many were handed out.
    """

    def __init__(self, samples: _StepSamples, slots: Sequence[int]) -> None:
        self._samples, self._slots = samples, slots
        self.pulled = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for slot in self._slots:
            self.pulled += 1
            yield self._samples.sample(slot)


class _StepSamples:
    """What one rank holds in one step, as stored."""

    def __init__(self, index: ShardIndex | JoinedIndex, steps: RankSteps, step: int) -> None:
        self.index = index
        self.positions = steps.positions(step)
        self.draws = steps.plan.draw(self.positions)
        self.sample_ids = self.draws.ids.numpy()
        self.labels = np.array(index.labels[self.sample_ids], dtype=np.int64)
        self.stored = index.read_many(self.sample_ids)

    def sample(self, slot: int) -> dict[str, Any]:
        """A new dict each time, as stages change theirs."""
        data, sample_id = self.stored[slot], int(self.sample_ids[slot])
        assert isinstance(data, bytes)
        shards, _, _ = self.index.locate(self.sample_ids[slot : slot + 1])
        return {
            "__key__": self.key(slot),
            "__url__": self.index.shard_paths[int(shards[0])],
            "__position__": int(self.positions[slot]),
            "__id__": sample_id,
            "__visit__": int(self.draws.visits[slot]),
            extension_of(data): data,
            "cls": str(self.labels[slot]).encode(),
        }

    def key(self, slot: int) -> str:
        sample_id = int(self.sample_ids[slot])
        return self.index.key(sample_id) or str(sample_id)

    def describe(self, slots: Sequence[int]) -> str:
        where = self.index.describe(int(self.sample_ids[slots[0]]))
        return where if len(slots) == 1 else f"{where}, or one of the {len(slots) - 1} samples drawn next"


class _StagedSteps(AugmentedSteps):
    """Step number -> batch of one rank."""

    def __init__(self, *arguments: Any, stages: Sequence[Stage], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stages = list(stages)

    def __getitem__(self, step: int) -> Batch:
        samples = _StepSamples(self.index, self.steps, step)
        parameters = self.augmentation.draw(samples.draws, seed=self.seed)
        images = new_images(len(samples.labels), self.image_size)
        pixels_bchw = images.numpy()
        labels, bad = samples.labels.copy(), {}
        for slot, made in self._made(samples):
            try:
                pixels_bchw[slot] = self._finish(samples, slot, made, parameters).transpose(2, 0, 1)
            except SampleError as error:
                bad[slot] = bad_sample(self.index, int(samples.sample_ids[slot]), error)
                labels[slot] = MASKED_LABEL
        failures = tuple(bad[slot] for slot in sorted(bad))
        return Batch(images, torch.from_numpy(labels), samples.draws.ids, failures)

    def _made(self, samples: _StepSamples) -> Iterator[tuple[int, Any]]:
        """Of each slot what came out of the stages: a sample, or the error that makes it a bad one."""
        if not self.stages:
            yield from enumerate(samples.stored)
            return
        unread = [slot for slot, data in enumerate(samples.stored) if isinstance(data, SampleError)]
        yield from ((slot, samples.stored[slot]) for slot in unread)
        slots = [slot for slot in range(len(samples.stored)) if slot not in set(unread)]
        while slots:
            count, held, error = yield from self._run(samples, slots)
            if error is None:
                return
            if len(held) == 1:
                yield held[0], self._as_bad_sample(samples, held[0], error)
            else:
                yield from self._run_singly(samples, held, error)
            slots = slots[count + len(held) :]

    def _run(
        self, samples: _StepSamples, slots: list[int]
    ) -> Generator[tuple[int, Any], None, tuple[int, list[int], Exception | None]]:
        """Sends samples through the stages; returns how many came out, which were under way, and the error if any."""
        source, count = PlanSource(samples, slots), 0
        pipeline = iter(wds.DataPipeline(source, *self.stages))
        while True:
            try:
                made = next(pipeline)
            except StopIteration:
                if count < len(slots):
                    raise self._lost(samples, slots, count) from None
                return count, [], None
            except Exception as error:  # Stages of users may raise anything.
                return count, slots[count : source.pulled], error
            if count == len(slots) or not _is_from(made, samples, slots[count]):
                raise self._lost(samples, slots, count)
            yield slots[count], made
            count += 1

    def _run_singly(self, samples: _StepSamples, held: list[int], error: Exception) -> Iterator[tuple[int, Any]]:
        """Finds out which sample it was that stages failed on while they held several."""
        failed = False
        for slot in held:
            _, _, own_error = yield from self._run(samples, [slot])
            if own_error is not None:
                failed = True
                yield slot, self._as_bad_sample(samples, slot, own_error)
        if not failed:
            where = samples.describe(held) if held else "before the first sample"
            raise ValueError(f"{where}: a webdataset stage failed: {describe_error(error)}") from error

    def _as_bad_sample(self, samples: _StepSamples, slot: int, error: Exception) -> SampleError:
        cause: BaseException | None = error
        while cause is not None:  # wds.decode wraps what its decoders raise.
            if isinstance(cause, SampleError):
                return cause
            cause = cause.__cause__ or cause.__context__
        stored = samples.stored[slot]
        assert isinstance(stored, bytes)
        try:
            decode_image(stored)
        except SampleError as fault:
            return fault
        raise ValueError(
            f"{samples.describe([slot])}: {self._blamed(samples, [slot])} failed: {describe_error(error)}"
        ) from error

    def _lost(self, samples: _StepSamples, slots: list[int], count: int) -> ValueError:
        where = samples.describe([slots[min(count, len(slots) - 1)]])
        what = "did not come out next" if count < len(slots) else "was the last, but more came out"
        return ValueError(
            f"{where}: the sample {what} of {self._blamed(samples, slots)}; a stage may change samples, but must hand "
            f"on each one once and in order, as a dict with its __position__ or __key__; {STREAMING_HINT}"
        )

    def _blamed(self, samples: _StepSamples, slots: list[int]) -> str:
        """The first stage that does not let these samples through, found by sending them through fewer stages."""
        for number, stage in enumerate(self.stages, 1):
            try:
                made = list(islice(wds.DataPipeline(PlanSource(samples, slots), *self.stages[:number]), len(slots) + 1))
                through = len(made) == len(slots) and all(map(_is_from, made, [samples] * len(slots), slots))
            except Exception:  # It was raised before, and is told there.
                through = False
            if not through:
                return f"stage {number} ({stage_name(stage)})"
        return "one of the stages"

    def _finish(self, samples: _StepSamples, slot: int, made: Any, parameters: AugmentationParameters) -> np.ndarray:
        """The pixels of a sample that came out of the stages, uint8 [H, W, 3]."""
        if isinstance(made, SampleError):
            raise made
        image = made
        if self.stages:
            stored = samples.stored[slot]
            assert isinstance(stored, bytes)
            _check_label(made, samples, slot)
            names = ("image", extension_of(stored))
            image = next((made[name] for name in names if name in made), None)
            if image is None:
                raise ValueError(
                    f"{samples.describe([slot])}: the stages gave {sorted(made)}, but the image must be under "
                    f"{names[0]!r} or {names[1]!r}"
                )
        pixels = decode_image(image) if isinstance(image, bytes) else _as_pixels(image, samples, slot)
        return apply_augmentation(pixels, parameters, slot=slot, image_size=self.image_size)


def extension_of(data: bytes) -> str:
    """The extension of an image file by what it is in fact; "jpg" if that is unknown."""
    return next((extension for magic, extension in _EXTENSIONS if data.startswith(magic)), "jpg")


def _is_from(made: Any, samples: _StepSamples, slot: int) -> bool:
    """Whether this is what became of the sample in a slot."""
    if not isinstance(made, dict):
        return False
    if "__position__" in made:
        return bool(made["__position__"] == int(samples.positions[slot]))
    return bool(made.get("__key__") == samples.key(slot))


def _check_label(made: dict[str, Any], samples: _StepSamples, slot: int) -> None:
    label = made.get("cls", samples.labels[slot])
    try:
        same = int(label) == samples.labels[slot]
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{samples.describe([slot])}: the stages changed 'cls' from {samples.labels[slot]} to {label!r}, but "
            "labels come from the index; put other labels into the index"
        )


def _as_pixels(image: Any, samples: _StepSamples, slot: int) -> np.ndarray:
    """What a stage made of an image, as uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    pixels = image.numpy() if isinstance(image, Tensor) else image
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size:
        if pixels.shape[2] == 3:
            return np.ascontiguousarray(pixels)
        if pixels.shape[0] == 3:
            return np.ascontiguousarray(pixels.transpose(1, 2, 0))
    kind = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else ""
    raise ValueError(
        f"{samples.describe([slot])}: the stages gave {type(image).__name__} {kind} as the image, but it must be "
        "bytes, a PIL image, or uint8 [H, W, 3] or [3, H, W], as wds.decode('rgb8') makes it"
    )
