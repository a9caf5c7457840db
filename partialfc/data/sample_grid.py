"""A picture of some identities and their images, for people to look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from partialfc.data.augment import Augmentation
from partialfc.data.batch import BadSample, bad_sample, decode_sample
from partialfc.data.decode import MAX_PIXELS
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.plan import Draws
from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["sample_grid"]

_IDENTITIES, _IMAGES = 501, 502  # Number what is drawn.
_MARK = ("Software", "partialfc data sample-grid")
_GAP, _TITLE_HEIGHT, _FONT_SIZE, _LEAST_WIDTH = 4, 18, 12, 240
_PAPER, _INK, _EMPTY, _BAD, _BAD_INK = (255, 255, 255), (0, 0, 0), (235, 235, 235), (120, 0, 0), (255, 220, 220)


class _Row(NamedTuple):
    """An identity: its title, and of each image the pixels, uint8 [H, W, 3], or what is wrong with it."""

    title: str
    tiles: list[np.ndarray | SampleError]


def sample_grid(
    split: str | Path,
    out_png: str | Path,
    *,
    identities: int = 8,
    images_per_identity: int = 8,
    seed: int = 0,
    image_size: int = 112,
    augmentation: Augmentation | None = None,
) -> tuple[BadSample, ...]:
    """Draws identities of a split and images of each by key, and lays them out in a PNG, one identity a row.

    The name, label and number of images of each identity stand above its row. A sample that cannot be read is a red
    tile with the reason; where an identity has fewer images than columns, tiles stay gray. An earlier picture made by
    this function is replaced; any other file is left alone.

    Args:
        split: the folder of a split.
        out_png: the picture to write; folders that are missing are made.
        identities: number of rows; at most all.
        images_per_identity: number of columns.
        seed: key of the draw.
        image_size: height and width of each image in pixels; others are resized.
        augmentation: shown on each image, as it would be in the first epoch with this seed; left out, none.

    Returns:
        The drawn samples that cannot be read.

    Raises:
        FileNotFoundError: if the split is missing.
        FileExistsError: if `out_png` is there and not a picture of this function.
        ValueError: for a number out of its range, a name that does not end in .png, or a damaged split.
        DataError: if a data shard cannot be used.
    """
    out_png = Path(out_png)
    width, row_height = _layout(identities, images_per_identity, image_size)
    _check_target(out_png)
    index = ShardIndex.open(split)
    order = KeyedPermutation(index.num_classes)
    labels = order(torch.arange(min(identities, order.size)), hash64(seed, _IDENTITIES)).tolist()
    failures: list[BadSample] = []
    picture = Image.new("RGB", (width, row_height * len(labels) + _GAP), _PAPER)
    for number, label in enumerate(labels):
        ids = _drawn_images(index, label, images_per_identity, seed)
        parameters = None if augmentation is None else augmentation.draw(Draws(ids, torch.zeros_like(ids)), seed=seed)
        tiles: list[np.ndarray | SampleError] = []
        for slot, data in enumerate(index.read_many(ids.numpy())):
            try:
                tiles.append(decode_sample(data, image_size=image_size, augmentation=parameters, slot=slot))
            except SampleError as error:
                tiles.append(error)
                failures.append(bad_sample(index, int(ids[slot]), error))
        row = _Row(_title(index, label), tiles)
        _draw_row(picture, row, top=number * row_height + _GAP, columns=images_per_identity, image_size=image_size)
    _save(picture, out_png)
    return tuple(failures)


def _layout(identities: int, images_per_identity: int, image_size: int) -> tuple[int, int]:
    """Width of the picture and height of a row, in pixels."""
    if min(identities, images_per_identity, image_size) < 1:
        raise ValueError(
            f"sample_grid: identities={identities}, images_per_identity={images_per_identity} and "
            f"image_size={image_size} must be at least 1"
        )
    width = max(_LEAST_WIDTH, images_per_identity * (image_size + _GAP) + _GAP)
    row_height = _TITLE_HEIGHT + image_size + _GAP
    if width * row_height * identities > MAX_PIXELS:
        raise ValueError(
            f"sample_grid: {identities} rows of {images_per_identity} images of {image_size} pixels make more than "
            f"{MAX_PIXELS:,} pixels; take fewer or smaller ones"
        )
    return width, row_height


def _title(index: ShardIndex, label: int) -> str:
    count = int(index.label_starts[label + 1] - index.label_starts[label])
    return f"{index.label_names[label]} (label {label}, {count} image{'s' if count > 1 else ''})"


def _drawn_images(index: ShardIndex, label: int, most: int, seed: int) -> torch.Tensor:
    """int64, ids of some images of an identity."""
    start, stop = (int(end) for end in index.label_starts[label : label + 2])
    order = KeyedPermutation(stop - start)
    places = order(torch.arange(min(most, order.size)), hash64(seed, _IMAGES, label))
    return torch.from_numpy(index.by_label[start + places.numpy()].astype(np.int64))


def _draw_row(picture: Image.Image, row: _Row, *, top: int, columns: int, image_size: int) -> None:
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text((_GAP, top), row.title, fill=_INK, font=font)
    top += _TITLE_HEIGHT
    for column in range(columns):
        left = _GAP + column * (image_size + _GAP)
        box = (left, top, left + image_size - 1, top + image_size - 1)
        tile = row.tiles[column] if column < len(row.tiles) else None
        if isinstance(tile, np.ndarray):
            picture.paste(Image.fromarray(tile), (left, top))
        elif tile is None:
            draw.rectangle(box, fill=_EMPTY)
        else:
            draw.rectangle(box, fill=_BAD)
            draw.line(box, fill=_BAD_INK)
            draw.multiline_text((left + 2, top + 2), tile.reason.replace(" ", "\n"), fill=_BAD_INK, font=font)


def _check_target(out_png: Path) -> None:
    if out_png.suffix.lower() != ".png":
        raise ValueError(f"{out_png}: the name of the picture must end in .png")
    if not out_png.exists():
        return
    try:
        with Image.open(out_png) as picture:
            made_here = picture.info.get(_MARK[0]) == _MARK[1]
    except OSError:  # A folder, or no picture at all.
        made_here = False
    if not made_here:
        raise FileExistsError(f"{out_png}: already there, and not a sample grid; remove it or choose another name")


def _save(picture: Image.Image, out_png: Path) -> None:
    """Writes beside the target and renames, so that a picture is there whole or not at all."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*_MARK)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    staging = out_png.with_name(f".{out_png.name}.partial-{os.getpid()}")
    try:
        picture.save(staging, "PNG", pnginfo=mark)
        staging.replace(out_png)
    finally:
        staging.unlink(missing_ok=True)
