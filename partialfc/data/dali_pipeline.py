"""The DALI pipeline: decode, resize or crop, colours, blur, occlusion, mirror, in this order, and the final layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from partialfc.data.augment import OCCLUSION_GRAY, Augmentation, AugmentationParameters

__all__ = ["DaliPipeline", "Layout", "OutputType", "PipelineSettings", "require_dali"]

Layout = Literal["CHW", "HWC"]
OutputType = Literal["uint8", "float32", "float16"]

_HALF_RANGE = 127.5  # Normalised pixels are pixel / 127.5 - 1, in [-1, 1].


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """What all batches of a loader have in common.

    Attributes:
        image_size: height and width of the images in pixels.
        augmentation: which changes can occur.
        threads: threads that decode.
        prefetch: batches in work at a time.
        device_id: the GPU that decodes; None: the CPU.
        layout: order of the dimensions of an image.
        dtype: uint8 pixels, or floating point in [-1, 1].

    Raises:
        ValueError: naming what is out of its range.
    """

    image_size: int
    augmentation: Augmentation
    threads: int
    prefetch: int
    device_id: int | None
    layout: Layout
    dtype: OutputType

    def __post_init__(self) -> None:
        for name in ("image_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"DALI loader: {name} is {getattr(self, name)}, but must be at least 1")
        for name, allowed in (("layout", get_args(Layout)), ("dtype", get_args(OutputType))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DALI loader: {name} is {getattr(self, name)!r}, but must be one of {allowed}")

    @property
    def black(self) -> float:
        """Value of a black pixel."""
        return 0.0 if self.dtype == "uint8" else -1.0

    def empty_images(self) -> Tensor:
        """The images of a batch without samples."""
        size = self.image_size
        shape = (0, 3, size, size) if self.layout == "CHW" else (0, size, size, 3)
        return torch.empty(shape, dtype=getattr(torch, self.dtype))


def require_dali() -> Any:
    """The module `nvidia.dali`, which is optional, and whose type hints do not cover what is used here.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise ImportError(
            "the DALI loader needs nvidia-dali: pip install 'partialfc[dali]', or use data.loader=torch"
        ) from error


class DaliPipeline:
    """One pipeline of DALI, which is always fed one batch for each that is taken.

    Args:
        settings: of the loader.
        batch_size: the most samples of a batch.
        depth: batches that are fed before the first is taken, and in work from then on.
        resize: whether a batch may hold images that are cropped or have another size. Without, decoding a set
            of the right size is a tenth cheaper.
        reader: makes of the module DALI the source of the encoded files, and a further output; left out, `feed` gives
            the files.
        seed: of the reader.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        *,
        batch_size: int,
        depth: int,
        resize: bool,
        reader: Callable[[Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self._resize = resize
        self._augmentation, self._image_size = settings.augmentation, settings.image_size
        self._reads_itself = reader is not None
        self._depth, self._fed = depth, 0
        dali = require_dali()
        self._tensors = dali.tensors
        define = dali.pipeline_def(
            batch_size=batch_size,
            num_threads=settings.threads,
            device_id=settings.device_id,
            prefetch_queue_depth=depth,
            seed=seed,
            enable_conditionals=True,
        )
        self._pipeline = define(_graph)(dali, settings, resize, reader)
        self._pipeline.build()

    def feed(
        self,
        parameters: AugmentationParameters,
        *,
        files: Sequence[np.ndarray] | None = None,
        resized: Tensor | None = None,
    ) -> None:
        """Gives the pipeline its next batch, and lets it work on it.

        Args:
            parameters: what is done to each image.
            files: the image files, uint8 [bytes] each; None with a reader.
            resized: bool [b], which images are to be resized; None with a reader.
        """
        inputs = _parameter_inputs(parameters, self._augmentation, self._image_size)
        if not self._reads_itself:
            assert files is not None
            assert resized is not None
            # Half as dear as a list of arrays, each of which DALI looks at from Python.
            inputs["files"] = self._tensors.TensorListCPU([self._tensors.TensorCPU(file, "") for file in files])
            if self._resize:
                inputs["resized"] = resized.numpy()
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._fed += 1
        # The first call of schedule_run starts as many batches as the pipeline is deep, each later call one.
        if self._fed >= self._depth:
            self._pipeline.schedule_run()

    def take(self) -> tuple[Tensor, list[Any]]:
        """The images of the oldest batch fed, and the further outputs of the reader."""
        images, *others = self._pipeline.share_outputs()
        taken = torch.from_dlpack(images.as_tensor())
        if taken.is_cuda:
            # DALI may use the memory again as soon as the tensor is gone, though a kernel may still be at it.
            taken = taken.clone()
            torch.cuda.current_stream(taken.device).synchronize()
        extra = [[np.array(output[number]) for number in range(len(output))] for output in others]
        self._pipeline.release_outputs()
        return taken, extra


def _parameter_inputs(
    parameters: AugmentationParameters, augmentation: Augmentation, image_size: int
) -> dict[str, Any]:
    """Name of an input of the graph -> [b, ...], what it takes for each image."""
    inputs: dict[str, Any] = {}
    if parameters.crop is not None:
        inputs["crop_start"] = parameters.crop[:, [1, 0]].contiguous().numpy()
        inputs["crop_end"] = parameters.crop[:, [3, 2]].contiguous().numpy()
    if parameters.color is not None:
        color = parameters.color
        inputs["color"] = color[:, :, :3].contiguous().numpy()
        inputs["color_offset"] = color[:, :, 3].contiguous().numpy()
        inputs["recolored"] = (color != torch.eye(3, 4)).flatten(1).any(1).numpy()
    if parameters.blur_sigma is not None:
        inputs["blurred"] = (parameters.blur_sigma > 0).numpy()
        inputs["blur_sigma"] = parameters.blur_sigma.clamp(min=augmentation.blur_sigma[0]).numpy()
    if (boxes := parameters.occlusion_pixels(image_size)) is not None:
        left, top, right, bottom = boxes.unbind(1)
        if parameters.flip is not None:  # Mirroring comes last here.
            left, right = (
                torch.where(parameters.flip, image_size - right, left),
                torch.where(parameters.flip, image_size - left, right),
            )
        inputs["occluded"] = ((left < right) & (top < bottom)).numpy()
        inputs["occlusion_start"] = torch.stack([top, left], 1).float().numpy()
        inputs["occlusion_shape"] = torch.stack([bottom - top, right - left], 1).float().numpy()
    if parameters.flip is not None:
        inputs["flip"] = parameters.flip.int().numpy()
    return inputs


def _graph(dali: Any, settings: PipelineSettings, resize: bool, reader: Callable[[Any], tuple[Any, Any]] | None) -> Any:
    """The graph. DALI turns its `if` on a batch into a choice for each image."""
    fn, types = dali.fn, dali.types
    changes, size = settings.augmentation, settings.image_size
    others: list[Any] = []
    if reader is None:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
    else:
        files, *others = reader(dali)
    images = fn.decoders.image(
        files,
        device="cpu" if settings.device_id is None else "mixed",
        output_type=types.RGB,
        # What makes the pixels those of Pillow; the last is for GPUs.
        adjust_orientation=False,
        use_fast_idct=False,
        jpeg_fancy_upsampling=True,
    )
    if resize:
        if reader is None:
            resized = fn.external_source(name="resized", dtype=types.BOOL, ndim=0)
        else:
            shape = fn.peek_image_shape(files, adjust_orientation=False)
            resized = (shape[0] != size) | (shape[1] != size)
        region = {}
        if changes.crop:
            start = fn.external_source(name="crop_start", dtype=types.FLOAT, ndim=1)
            end = fn.external_source(name="crop_end", dtype=types.FLOAT, ndim=1)
            region = {"roi_start": start, "roi_end": end, "roi_relative": True}
            if reader is not None:
                resized = True
        if resized:
            images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True, **region)
    images = _changed(dali, images, changes)
    mirror = fn.external_source(name="flip", dtype=types.INT32, ndim=0) if changes.horizontal_flip else 0
    center, spread = (0.0, 1.0) if settings.dtype == "uint8" else (_HALF_RANGE, _HALF_RANGE)
    final = fn.crop_mirror_normalize(
        images,
        dtype={"uint8": types.UINT8, "float32": types.FLOAT, "float16": types.FLOAT16}[settings.dtype],
        output_layout=settings.layout,
        mean=center,
        std=spread,
        mirror=mirror,
    )
    return (final, *others)


def _changed(dali: Any, images: Any, changes: Augmentation) -> Any:
    """Colours, blur and occlusion."""
    fn, types = dali.fn, dali.types
    if changes.color or changes.grayscale:
        recolored = fn.external_source(name="recolored", dtype=types.BOOL, ndim=0)
        matrix = fn.external_source(name="color", dtype=types.FLOAT, ndim=2)
        offset = fn.external_source(name="color_offset", dtype=types.FLOAT, ndim=1)
        if recolored:
            images = fn.coord_transform(images, M=matrix, T=offset, dtype=types.UINT8)
    if changes.blur:
        blurred = fn.external_source(name="blurred", dtype=types.BOOL, ndim=0)
        sigma = fn.external_source(name="blur_sigma", dtype=types.FLOAT, ndim=0)
        if blurred:
            images = fn.gaussian_blur(images, sigma=sigma)
    if changes.occlusion:
        occluded = fn.external_source(name="occluded", dtype=types.BOOL, ndim=0)
        start = fn.external_source(name="occlusion_start", dtype=types.FLOAT, ndim=1)
        shape = fn.external_source(name="occlusion_shape", dtype=types.FLOAT, ndim=1)
        if occluded:
            images = fn.erase(images, anchor=start, shape=shape, axis_names="HW", fill_value=float(OCCLUSION_GRAY))
    return images
