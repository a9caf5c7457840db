"""Image files that are broken, or only strange, and data sets that hold them: used by several tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from partialfc.data.writer import SplitWriter

SIDE = 32


def pixels(number: int) -> np.ndarray:
    """A smooth picture, each number another, [SIDE, SIDE, 3]."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([(x * 7 + 31 * number) % 256, (y * 5 + 17 * number) % 256, (x + y + number) * 3 % 256], 2).astype(
        np.uint8
    )


def encoded(number: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    """The picture of a number as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(3)[:, :, 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that asks for any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    chunks = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + chunks


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(1, "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


_JPEG, _PNG = encoded(1, "JPEG", quality=95), encoded(2, "PNG")

BROKEN: dict[str, tuple[bytes, str, str]] = {
    "no bytes": (b"", "jpg", "not an image"),
    "zero bytes": (bytes(4000), "jpg", "not an image"),
    "random bytes": (np.random.default_rng(0).bytes(4000), "jpg", "not an image"),
    "a web page": (b"<!DOCTYPE html><html>404 not found</html>" * 20, "jpg", "not an image"),
    "a program for another program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "jpg", "not an image"),
    "half a JPEG": (_JPEG[: len(_JPEG) // 2], "jpg", "damaged image"),
    "a JPEG without its last bytes": (_JPEG[:-40], "jpg", "damaged image"),
    "a JPEG of its first bytes": (_JPEG[:8], "jpg", "damaged image"),
    "half a PNG": (_PNG[: len(_PNG) // 2], "png", "damaged image"),
    "a PNG of its first bytes": (_PNG[:60], "png", "damaged image"),
    "a PNG bomb": (_png_of_size(60_000, 60_000), "png", "too large"),
    "a JPEG bomb": (_jpeg_of_size(65_000, 65_000), "jpg", "too large"),
}
"""What cannot be used: file, extension, reason."""

STRANGE: dict[str, tuple[bytes, str]] = {
    "gray JPEG": (encoded(4, "JPEG", "L"), "jpg"),
    "progressive JPEG": (encoded(5, "JPEG", progressive=True), "jpg"),
    "CMYK JPEG": (encoded(6, "JPEG", "CMYK"), "jpg"),
    "PNG of 16 bits": (_sixteen_bits(), "png"),
    "PNG called jpg": (encoded(7, "PNG"), "jpg"),
    "JPEG called png": (encoded(8, "JPEG"), "png"),
    "PNG with a palette": (encoded(9, "PNG", "P"), "png"),
    "PNG with alpha": (encoded(10, "PNG", "RGBA"), "png"),
    "GIF": (encoded(11, "GIF", "P"), "gif"),
    "WebP": (encoded(12, "WEBP", lossless=True), "webp"),
    "BMP": (encoded(13, "BMP"), "bmp"),
    "TIFF": (encoded(14, "TIFF"), "tif"),
}
"""What every loader converts: file, extension."""


def write_split(directory: Path, files: list[tuple[bytes, str]], *, per_identity: int = 4, per_shard: int = 10) -> None:
    """A split of these files as they are; neighbours are of one identity."""
    directory.mkdir(parents=True)
    with SplitWriter(directory, samples_per_shard=per_shard) as writer:
        writer.label_names = [f"person-{label}" for label in range(-(-len(files) // per_identity))]
        for number, (data, extension) in enumerate(files):
            writer.add(f"sample-{number}", data, extension=extension, label=number // per_identity)


def good_files(count: int) -> list[tuple[bytes, str]]:
    """JPEGs, each another picture."""
    return [(encoded(number, "JPEG", quality=95), "jpg") for number in range(count)]
