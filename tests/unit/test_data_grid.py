"""The picture of identities and their images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.data.augment import Augmentation, apply_augmentation
from partialfc.data.decode import decode_image
from partialfc.data.index import ShardIndex
from partialfc.data.plan import Draws
from partialfc.data.sample_grid import sample_grid
from partialfc.data.writer import SplitWriter

GAP, TITLE = 4, 18


def picture_of(red, green, blue):
    """A PNG file of one colour, 10 x 10."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (red, green, blue)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def split(tmp_path):
    """Identity n has n + 2 images, of red 10 * (n + 1), with different green."""
    directory = tmp_path / "train"
    directory.mkdir()
    with SplitWriter(directory, samples_per_shard=4) as writer:
        writer.label_names = ["ada", "björn", "grace"]
        for label in range(3):
            for number in range(label + 2):
                data = picture_of(10 * (label + 1), 10 * (number + 1), 0)
                writer.add(f"{label}/{number}", data, extension="png", label=label)
    return directory


def tiles(path, columns, image_size=10):
    """uint8 [rows, columns, H, W, 3]."""
    pixels = np.asarray(Image.open(path))
    row_height = TITLE + image_size + GAP
    rows = (len(pixels) - GAP) // row_height
    assert len(pixels) == rows * row_height + GAP
    return np.stack(
        [
            [
                pixels[
                    row * row_height + GAP + TITLE :,
                    GAP + column * (image_size + GAP) :,
                ][:image_size, :image_size]
                for column in range(columns)
            ]
            for row in range(rows)
        ]
    )


def test_a_row_for_each_identity(split, tmp_path):
    out = tmp_path / "new" / "grid.png"
    assert sample_grid(split, out, images_per_identity=3, image_size=10) == ()
    found = tiles(out, columns=3)
    assert found.shape == (3, 3, 10, 10, 3)
    assert (found == found[:, :, :1, :1]).all()
    rows = {int(row[0, 0, 0, 0]): [tuple(map(int, tile[0, 0])) for tile in row] for row in found}
    assert set(rows) == {10, 20, 30}
    assert sorted(rows[10][:2]) == [(10, 10, 0), (10, 20, 0)]
    assert rows[10][2] == (235, 235, 235)
    assert sorted(rows[20]) == [(20, 10, 0), (20, 20, 0), (20, 30, 0)]
    assert len(set(rows[30])) == 3
    assert {color[0] for color in rows[30]} == {30}
    assert list(out.parent.iterdir()) == [out]


def test_titles_stand_above_the_rows(split, tmp_path):
    sample_grid(split, tmp_path / "grid.png", image_size=10)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    dark = (pixels.max(axis=2) < 100).sum(axis=1)
    row_height = TITLE + 10 + GAP
    titles = [dark[row * row_height + GAP :][:TITLE].sum() for row in range(3)]
    assert min(titles) > 50
    assert dark[:GAP].sum() == 0


def test_the_draw_is_keyed(split, tmp_path):
    pictures = []
    for number, seed in enumerate((0, 0, 1, 2, 3)):
        sample_grid(split, tmp_path / f"{number}.png", images_per_identity=2, image_size=10, identities=2, seed=seed)
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) > 2
    assert len(tiles(tmp_path / "0.png", columns=2)) == 2


def test_other_sizes_are_resized(split, tmp_path):
    sample_grid(split, tmp_path / "grid.png", images_per_identity=1, image_size=24)
    found = tiles(tmp_path / "grid.png", columns=1, image_size=24)
    assert sorted(found[:, 0, 12, 12, 0].tolist()) == [10, 20, 30]


def test_augmentation_is_that_of_the_first_epoch(split, tmp_path):
    changes = Augmentation(color=1.0, occlusion=1.0)
    sample_grid(split, tmp_path / "grid.png", images_per_identity=4, image_size=10, seed=5, augmentation=changes)
    found = {tile.tobytes() for row in tiles(tmp_path / "grid.png", columns=4) for tile in row}
    index = ShardIndex.open(split)
    ids = torch.arange(index.num_samples)
    parameters = changes.draw(Draws(ids, torch.zeros_like(ids)), seed=5)
    expected = set()
    for sample in ids.tolist():
        pixels = decode_image(index.read(sample))
        expected.add(apply_augmentation(pixels, parameters, slot=sample, image_size=10).tobytes())
    assert len(expected) == 9
    assert expected < found
    assert len(found) == 10  # and the gray of missing images


def test_bad_samples_are_marked_and_told(split, tmp_path):
    index = ShardIndex.open(split)
    (sample,) = [int(number) for number in index.by_label[:1]]
    _, (offset,), _ = index.locate(np.array([sample]))
    with open(index.shard_paths[0], "r+b") as file:
        file.seek(int(offset) + 40)
        file.write(b"?")
    (bad,) = sample_grid(split, tmp_path / "grid.png", images_per_identity=3, image_size=40)
    assert (bad.sample_id, bad.reason) == (sample, "checksum")
    assert bad.message.startswith(f"{index.shard_paths[0]}, sample {sample} (key 0/0) at byte {offset}: ")
    found = tiles(tmp_path / "grid.png", columns=3, image_size=40)
    red = [(tile[2, 35] == (120, 0, 0)).all() for row in found for tile in row]
    assert sum(red) == 1


def test_only_its_own_pictures_are_replaced(split, tmp_path):
    out = tmp_path / "grid.png"
    sample_grid(split, out, image_size=10)
    first = out.read_bytes()
    sample_grid(split, out, image_size=10, seed=1, identities=1)
    assert out.read_bytes() != first
    for name, data in {"photo.png": picture_of(1, 2, 3), "text.png": b"not a picture"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileExistsError, match=rf"{name}: already there, and not a sample grid"):
            sample_grid(split, tmp_path / name)
        assert (tmp_path / name).read_bytes() == data
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileExistsError, match=r"folder.png: already there"):
        sample_grid(split, tmp_path / "folder.png")


def test_impossible_arguments_are_refused(split, tmp_path):
    with pytest.raises(ValueError, match=r"grid.jpg: the name of the picture must end in .png"):
        sample_grid(split, tmp_path / "grid.jpg")
    for name in ("identities", "images_per_identity", "image_size"):
        with pytest.raises(ValueError, match=rf"{name}=0 .*must be at least 1|{name}=0.* must be at least 1"):
            sample_grid(split, tmp_path / "grid.png", **{name: 0})
    with pytest.raises(ValueError, match="1000 rows of 1000 images of 112 pixels make more than 50,000,000 pixels"):
        sample_grid(split, tmp_path / "grid.png", identities=1000, images_per_identity=1000)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        sample_grid(tmp_path / "nowhere", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()
