"""What of an image file is stored: its own bytes wherever possible."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from partialfc.data.decode import JPEG_MAGIC, decode_image

__all__ = ["store_image"]

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
_EXIF_ORIENTATION = 0x0112
_JPEG_QUALITY = 95


def store_image(data: bytes, *, image_size: int | None = None) -> tuple[bytes, str]:
    """The bytes to store for an image file, after making sure that it can be decoded, and their extension.

    Files stay as they are, under the extension of what they are in fact. Only what decoders disagree on is settled
    here: 16-bit gray becomes 8-bit, CMYK becomes RGB, an EXIF orientation is applied. Those files, and files of
    another size than asked for, are encoded anew: a JPEG as JPEG, others as PNG.

    Args:
        data: the bytes of a JPEG, PNG, WebP or BMP file.
        image_size: height and width to resize to (bilinear, antialiased); left out, the size stays.

    Raises:
        ValueError: if the bytes are not such an image, or are damaged.
    """
    # Broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error, DecompressionBombError.
    try:
        with Image.open(io.BytesIO(data), formats=list(_EXTENSIONS)) as image:
            settled = _settle(image, image_size)
            # Pillow calls the JPEGs of some cameras, which hold further pictures, MPO.
            kind = "JPEG" if data.startswith(JPEG_MAGIC) else str(image.format)
    except Exception as error:
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error
    if settled is None:
        decode_image(data)
        return data, _EXTENSIONS[kind]
    kind = "JPEG" if kind == "JPEG" else "PNG"
    buffer = io.BytesIO()
    settled.save(buffer, kind, quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), _EXTENSIONS[kind]


def _settle(image: Image.Image, image_size: int | None) -> Image.Image | None:
    """The image as 8-bit RGB, upright and of the right size; None if the file already is all that to any decoder."""
    wide = image.mode.startswith("I")
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    resized = image_size is not None and image.size != (image_size, image_size)
    if not (wide or turned or resized or image.mode == "CMYK"):
        return None
    upright = ImageOps.exif_transpose(image)
    if wide:  # Pillow's own conversion clips at 255.
        upright = Image.fromarray(((np.asarray(upright).astype(np.int64) + 128) // 257).astype(np.uint8))
    upright = upright.convert("RGB")
    if image_size is not None and resized:
        upright = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
    upright.info.clear()  # Neither EXIF nor a colour profile of what it was.
    return upright
