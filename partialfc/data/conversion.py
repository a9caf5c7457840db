"""What of an image file is stored: its own bytes wherever possible."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from partialfc.data.decode import JPEG_MAGIC, decode_image, eight_bits, open_image
from partialfc.data.errors import SampleError

__all__ = ["image_extension", "store_image"]

_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
_ENCODED_ANEW = ("GIF", "TIFF", "AVIF")
_EXIF_ORIENTATION = 0x0112
_JPEG_QUALITY = 95


def store_image(data: bytes, *, image_size: int | None = None) -> tuple[bytes, str]:
    """The bytes to store for an image file, after making sure that it can be decoded, and their extension.

    Files stay as they are, under the extension of what they are in fact. Only what decoders disagree on is settled
    here: 16-bit gray becomes 8-bit, CMYK becomes RGB, an EXIF orientation is applied, of an animation the first picture
    is taken. Those files, GIF, TIFF and AVIF, and files of another size than asked for, are encoded anew: a JPEG as
    JPEG, others as PNG.

    Args:
        data: the bytes of a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF file.
        image_size: height and width to resize to (bilinear, antialiased); left out, the size stays.

    Raises:
        SampleError: if the bytes are not such an image, are damaged, or are a decompression bomb.
    """
    with open_image(data) as image:
        if image.format not in (*_STORED, *_ENCODED_ANEW):
            allowed = "JPEG, PNG, WebP, BMP, GIF, TIFF and AVIF are"
            raise SampleError("not an image", f"not a readable image: {image.format} files are not taken, {allowed}")
        # Pillow calls the JPEGs of some cameras, which hold further pictures, MPO.
        is_jpeg = data.startswith(JPEG_MAGIC)
        extension = "jpg" if is_jpeg else _STORED.get(str(image.format))
        # Broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error.
        try:
            settled = _settle(image, image_size, keep=extension is not None)
        except Exception as error:
            raise SampleError("damaged image", f"not a readable image ({len(data)} bytes): {error}") from error
    if settled is None:
        assert extension is not None
        decode_image(data)
        return data, extension
    buffer = io.BytesIO()
    settled.save(buffer, "JPEG" if is_jpeg else "PNG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), "jpg" if is_jpeg else "png"


def image_extension(data: bytes) -> str:
    """The extension, without a dot, of a stored image file.

    Raises:
        SampleError: if the bytes are not such an image.
    """
    if data.startswith(JPEG_MAGIC):
        return "jpg"
    with open_image(data) as image:
        kind = str(image.format)
    if kind not in _STORED:
        raise SampleError("not an image", f"not an image of a kind that is stored: {kind}")
    return _STORED[kind]


def _settle(image: Image.Image, image_size: int | None, *, keep: bool) -> Image.Image | None:
    """The image as 8-bit RGB, upright and of the right size; None if the file already is all that to any decoder."""
    wide = image.mode.startswith("I")
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    resized = image_size is not None and image.size != (image_size, image_size)
    moving = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    if keep and not (wide or turned or resized or moving or image.mode == "CMYK"):
        return None
    upright = eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    if image_size is not None and resized:
        upright = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
    upright.info.clear()  # Neither EXIF nor a colour profile of what it was.
    return upright
