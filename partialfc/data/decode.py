"""Image files to pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

__all__ = ["decode_image"]

JPEG_MAGIC = b"\xff\xd8\xff"


def decode_image(data: bytes, *, image_size: int | None = None) -> np.ndarray:
    """Decodes an image file to RGB.

    JPEGs are decoded with the exact inverse transform and smooth upsampling, so their pixels equal those of Pillow.
    An alpha channel is dropped.

    Args:
        data: the bytes of a JPEG, PNG, WebP or BMP file.
        image_size: side of the square in pixels that other sizes are resized to (bilinear, antialiased).

    Returns:
        uint8 array [H, W, 3].

    Raises:
        ValueError: if the bytes are not an image or are damaged.
    """
    if data.startswith(JPEG_MAGIC):
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)
    else:
        pixels = _decode_with_pillow(data)
    if image_size is not None and pixels.shape[:2] != (image_size, image_size):
        image = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    return pixels


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    # Broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error, DecompressionBombError.
    except Exception as error:
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error
