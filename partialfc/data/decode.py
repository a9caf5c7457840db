"""Image files to pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from partialfc.data.errors import SampleError

__all__ = ["FORMATS", "JPEG_MAGIC", "MAX_PIXELS", "check_pixels", "decode_image", "eight_bits", "open_image"]

JPEG_MAGIC = b"\xff\xd8\xff"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
"""As Pillow calls them. Others are refused: some would start another program, such as EPS does."""

MAX_PIXELS = 50_000_000
"""Larger images are refused: files of a few kilobytes can ask for gigabytes of memory."""


def decode_image(data: bytes, *, image_size: int | None = None) -> np.ndarray:
    """Decodes an image file to RGB, whatever its extension says.

    JPEGs are decoded with the exact inverse transform and smooth upsampling, so their pixels equal those of Pillow.
    Gray of 16 bits is scaled to 8, CMYK converted, an alpha channel dropped, of an animation the first picture taken.
    An EXIF orientation is not applied here: packing settles it.

    Args:
        data: the bytes of a JPEG, PNG, WebP, BMP, or another file that Pillow reads.
        image_size: side of the square in pixels that other sizes are resized to (bilinear, antialiased).

    Returns:
        uint8 array [H, W, 3].

    Raises:
        SampleError: if the bytes are not an image, are damaged, or ask for more than `MAX_PIXELS`.
    """
    pixels = _decode_jpeg(data) if data.startswith(JPEG_MAGIC) else _decode_with_pillow(data)
    if image_size is not None and pixels.shape[:2] != (image_size, image_size):
        image = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    return pixels


def open_image(data: bytes) -> Image.Image:
    """Opens an image file with Pillow, and checks its size before any pixel is decoded.

    Raises:
        SampleError: if the bytes are not an image, or ask for more than `MAX_PIXELS`.
    """
    if not data:
        raise SampleError("not an image", "not a readable image: it has no bytes")
    try:
        with warnings.catch_warnings():
            # A limit of our own is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("too large", f"{error}; at most {MAX_PIXELS:,} pixels are decoded") from error
    except UnidentifiedImageError as error:  # Its own message holds an address in memory.
        kinds = ", ".join(FORMATS)
        raise SampleError("not an image", f"not a readable image ({len(data)} bytes): none of {kinds}") from error
    # Broken files make Pillow raise nearly anything else: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise SampleError("damaged image", f"not a readable image ({len(data)} bytes): {error}") from error
    check_pixels(*image.size)
    return image


def check_pixels(width: int, height: int) -> None:
    """Refuses decompression bombs.

    Raises:
        SampleError: for more than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise SampleError("too large", f"{width} x {height} pixels, but at most {MAX_PIXELS:,} are decoded")


def eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits scaled to 8 bits, where Pillow's own conversion clips at 255; other images as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError as error:
        raise SampleError("damaged image", f"not a readable image ({len(data)} bytes): {error}") from error
    check_pixels(width, height)
    if colorspace in ("CMYK", "YCCK"):
        return _decode_with_pillow(data)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError as error:
        raise SampleError("damaged image", f"not a readable image ({len(data)} bytes): {error}") from error


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with open_image(data) as image:
        try:
            return np.asarray(eight_bits(image).convert("RGB"))
        except Exception as error:
            raise SampleError("damaged image", f"not a readable image ({len(data)} bytes): {error}") from error
