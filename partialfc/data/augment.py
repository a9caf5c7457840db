"""Random changes of training images, keyed by (seed, operation, visit, sample id).

So a picture does not depend on the rank, the worker, the loader or a restart, and each epoch sees another one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from partialfc.data.plan import Draws
from partialfc.keyed import uniform

__all__ = ["Augmentation", "AugmentationParameters", "apply_augmentation", "gaussian_window", "horizontal_flips"]

# Numbers the operation; another operation of the same sample takes another number.
_HORIZONTAL_FLIP, _CROP, _COLOR, _GRAYSCALE, _BLUR, _OCCLUSION = 101, 102, 103, 104, 105, 106

_MIDDLE_GRAY = 127.5
OCCLUSION_GRAY = 128
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]).double()
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are changed at random. Each kind of change has a probability; 0 turns it off.

    The changes follow each other in the order of the fields. Sizes are shares of the image, so they hold for any
    image size, but for blur_sigma.

    Attributes:
        horizontal_flip: probability of mirroring.
        crop: probability of cutting out a part, of the shape of the image, and enlarging it to the whole.
        crop_area: least and greatest share of the area that is kept; uniform in between, as is the place.
        color: probability of changed colours.
        brightness: colours are multiplied by a factor in [1 - brightness, 1 + brightness],
        contrast: their distance from middle gray by one in [1 - contrast, 1 + contrast],
        saturation: their distance from the gray of the same luma by one in [1 - saturation, 1 + saturation],
        hue_degrees: and their hue is turned by up to so much to either side.
        grayscale: probability of taking the colours away.
        blur: probability of a Gaussian blur.
        blur_sigma: least and greatest standard deviation of the blur in pixels.
        occlusion: probability of a gray rectangle.
        occlusion_area: least and greatest share of the area that it covers, with sides in a ratio from 1:2 to 2:1.

    Raises:
        ValueError: naming the field that is out of its range.
    """

    horizontal_flip: float = 0.5
    crop: float = 0.0
    crop_area: tuple[float, float] = (0.7, 1.0)
    color: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue_degrees: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 1.5)
    occlusion: float = 0.0
    occlusion_area: tuple[float, float] = (0.02, 0.2)

    def __post_init__(self) -> None:
        spans = {"crop_area": (0.01, 1.0), "blur_sigma": (0.1, 20.0), "occlusion_area": (0.0, 0.5)}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in spans:
                least, most = spans[field.name]
                if len(value) != 2 or not least <= value[0] <= value[1] <= most:
                    raise ValueError(
                        f"{field.name} is {tuple(value)}, but must be (lowest, highest) within [{least}, {most}]"
                    )
                continue
            most = 180.0 if field.name == "hue_degrees" else 1.0
            if not 0.0 <= value <= most:
                raise ValueError(f"{field.name} is {value}, but must be in [0, {most:g}]")

    def draw(self, draws: Draws, *, seed: int) -> AugmentationParameters:
        """What is done to each sample of a batch.

        Args:
            draws: the samples [b], and how often each was drawn before.
            seed: key of the draws.
        """
        draw = _KeyedDraws(seed, draws)
        return AugmentationParameters(
            flip=draw.uniform(_HORIZONTAL_FLIP) < self.horizontal_flip if self.horizontal_flip else None,
            crop=self._draw_crops(draw) if self.crop else None,
            color=self._draw_colors(draw) if self.color or self.grayscale else None,
            blur_sigma=self._draw_blurs(draw) if self.blur else None,
            occlusion=self._draw_occlusions(draw) if self.occlusion else None,
        )

    def _draw_crops(self, draw: _KeyedDraws) -> Tensor:
        low, high = self.crop_area
        side = (low + (high - low) * draw.uniform(_CROP, 1)).sqrt()
        side = torch.where(draw.uniform(_CROP, 0) < self.crop, side, 1.0)
        left, top = ((1.0 - side) * draw.uniform(_CROP, number) for number in (2, 3))
        return torch.stack([left, top, left + side, top + side], 1).clamp_(max=1.0).float()

    def _draw_colors(self, draw: _KeyedDraws) -> Tensor:
        """Brightness, contrast, saturation, hue and gray are all affine: so they are one map, rounded once."""
        brightness, contrast, saturation = (
            1.0 + strength * (2.0 * draw.uniform(_COLOR, number) - 1.0)
            for number, strength in ((1, self.brightness), (2, self.contrast), (3, self.saturation))
        )
        hue = math.radians(self.hue_degrees) * (2.0 * draw.uniform(_COLOR, 4) - 1.0)
        change = draw.uniform(_COLOR, 0) < self.color
        yiq = torch.zeros(len(hue), 3, 3, dtype=torch.float64)
        yiq[:, 0, 0] = 1.0
        yiq[:, 1, 1] = yiq[:, 2, 2] = saturation * hue.cos()
        yiq[:, 1, 2], yiq[:, 2, 1] = -saturation * hue.sin(), saturation * hue.sin()
        gain = (brightness * contrast)[:, None, None]
        matrix = torch.where(change[:, None, None], gain * (_YIQ_TO_RGB @ yiq @ _RGB_TO_YIQ), torch.eye(3).double())
        gray = draw.uniform(_GRAYSCALE) < self.grayscale
        matrix = torch.where(gray[:, None, None], (_LUMA @ matrix)[:, None, :].expand(-1, 3, -1), matrix)
        # Middle gray stays where it is under contrast; hue, saturation and luma leave every gray as it is.
        offset = torch.where(change, _MIDDLE_GRAY * (1.0 - contrast), 0.0)
        return torch.cat([matrix, offset[:, None, None].expand(-1, 3, 1)], 2).float()

    def _draw_blurs(self, draw: _KeyedDraws) -> Tensor:
        low, high = self.blur_sigma
        sigma = low + (high - low) * draw.uniform(_BLUR, 1)
        return torch.where(draw.uniform(_BLUR, 0) < self.blur, sigma, 0.0).float()

    def _draw_occlusions(self, draw: _KeyedDraws) -> Tensor:
        low, high = self.occlusion_area
        area = low + (high - low) * draw.uniform(_OCCLUSION, 1)
        area = torch.where(draw.uniform(_OCCLUSION, 0) < self.occlusion, area, 0.0)
        ratio = torch.exp2(2.0 * draw.uniform(_OCCLUSION, 2) - 1.0)
        width = (area * ratio).sqrt().clamp_(max=1.0)
        height = (area / ratio).sqrt().clamp_(max=1.0)
        left, top = (1.0 - width) * draw.uniform(_OCCLUSION, 3), (1.0 - height) * draw.uniform(_OCCLUSION, 4)
        return torch.stack([left, top, left + width, top + height], 1).float()


@dataclass(frozen=True)
class AugmentationParameters:
    """What is done to each of b samples; None for what is off.

    Attributes:
        flip: bool [b].
        crop: float32 [b, 4], left, top, right and bottom of what is kept, as shares of width and height; (0, 0, 1, 1)
            keeps all.
        color: float32 [b, 3, 4]: new RGB = color[:, :3] @ RGB + color[:, 3].
        blur_sigma: float32 [b], in pixels; 0 for none.
        occlusion: float32 [b, 4], left, top, right and bottom of the rectangle as shares, after mirroring; empty for
            none.
    """

    flip: Tensor | None = None
    crop: Tensor | None = None
    color: Tensor | None = None
    blur_sigma: Tensor | None = None
    occlusion: Tensor | None = None

    def occlusion_pixels(self, image_size: int) -> Tensor | None:
        """int64 [b, 4], the occlusions in whole pixels: left, top, right, bottom; None if they are off."""
        return None if self.occlusion is None else (self.occlusion * image_size).round().long()


class _KeyedDraws:
    """Uniform numbers for the samples of a batch."""

    def __init__(self, seed: int, draws: Draws) -> None:
        self._seed, self._draws = seed, draws

    def uniform(self, operation: int, *number: int) -> Tensor:
        return uniform(self._seed, operation, self._draws.visits, self._draws.ids, *number)


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


def apply_augmentation(
    pixels: np.ndarray, parameters: AugmentationParameters, *, slot: int, image_size: int
) -> np.ndarray:
    """Changes one image of a batch, and brings it to its size.

    Args:
        pixels: uint8 [h, w, 3], as decoded, of any size. It is not changed.
        parameters: of the batch.
        slot: the place of the image in the batch.
        image_size: height and width of the result in pixels; other sizes are resized (bilinear, antialiased).

    Returns:
        uint8 [image_size, image_size, 3]; a view of `pixels` where nothing but mirroring was to be done.
    """
    box = None if parameters.crop is None else parameters.crop[slot].tolist()
    if box is not None and box != [0.0, 0.0, 1.0, 1.0]:
        height, width = pixels.shape[:2]
        region = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        pixels = _resize(pixels, image_size, region)
    elif pixels.shape[:2] != (image_size, image_size):
        pixels = _resize(pixels, image_size, None)
    if parameters.flip is not None and parameters.flip[slot]:
        pixels = pixels[:, ::-1]
    if parameters.color is not None:
        pixels = _recolor(pixels, parameters.color[slot].numpy())
    if parameters.blur_sigma is not None and (sigma := float(parameters.blur_sigma[slot])) > 0.0:
        pixels = _blur(pixels, gaussian_window(sigma))
    if (occlusions := parameters.occlusion_pixels(image_size)) is not None:
        left, top, right, bottom = occlusions[slot].tolist()
        if left < right and top < bottom:
            pixels = pixels.copy()
            pixels[top:bottom, left:right] = OCCLUSION_GRAY
    return pixels


def gaussian_window(sigma: float) -> np.ndarray:
    """float32 [2 * ceil(3 sigma) + 1], the weights of a Gaussian blur; they sum to 1."""
    radius = math.ceil(3.0 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _resize(pixels: np.ndarray, image_size: int, region: tuple[float, float, float, float] | None) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=region))


def _recolor(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    if np.array_equal(color, np.eye(3, 4, dtype=np.float32)):
        return pixels
    changed = pixels.reshape(-1, 3).astype(np.float32) @ color[:, :3].T + color[:, 3]
    return np.rint(changed).clip(0.0, 255.0).astype(np.uint8).reshape(pixels.shape)


def _blur(pixels: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Along rows, then along columns; beyond the edges the image is mirrored, without the edge itself."""
    blurred = pixels.astype(np.float32)
    radius = len(window) // 2
    for axis in (1, 0):
        padding = [(radius, radius) if dimension == axis else (0, 0) for dimension in range(3)]
        padded = np.pad(blurred, padding, mode="reflect")
        size = blurred.shape[axis]
        blurred = sum(
            weight * padded.take(range(shift, shift + size), axis) for shift, weight in enumerate(window.tolist())
        )
    return np.rint(blurred).clip(0.0, 255.0).astype(np.uint8)
