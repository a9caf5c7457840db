"""Packing image folders: labels, odd files, broken files."""

import io

import numpy as np
import pytest
from PIL import Image

from partialfc.data import ShardIndex, decode_image, pack


def pixels(seed, height=20, width=20, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def source(tmp_path):
    for identity in range(10):
        for number in range(identity % 3 + 1):
            save(tmp_path / "in" / f"person {identity}" / f"{number}.jpg", Image.fromarray(pixels(identity)))
    return tmp_path / "in"


def packed(source, tmp_path, **options):
    report = pack(source, tmp_path / "out", verification_share=0.0, seed=0, **options)
    return report, ShardIndex.open(tmp_path / "out" / "train")


def test_labels_are_the_sorted_names_and_jpegs_stay_as_they_are(source, tmp_path):
    calls = []
    report, index = packed(source, tmp_path, samples_per_shard=4, on_progress=lambda *call: calls.append(call))
    paths = sorted(source.rglob("*.jpg"))
    assert index.label_names == [f"person {identity}" for identity in range(10)]
    assert [index.label_names[label] for label in index.labels] == [path.parent.name for path in paths]
    assert [index.read(number) for number in range(len(paths))] == [path.read_bytes() for path in paths]
    assert (report.train_identities, report.train_images) == (10, 19)
    assert (report.verification_identities, report.skipped, report.empty_identities) == (0, (), ())
    assert index.shard_sizes == [4, 4, 4, 4, 3]
    assert not (tmp_path / "out" / "verification").exists()
    assert calls == [(19, 19)]


def test_a_share_of_identities_is_set_aside(source, tmp_path):
    reserved = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        report = pack(source, out, verification_share=0.3, seed=seed)
        train, verification = ShardIndex.open(out / "train"), ShardIndex.open(out / "verification")
        assert (report.train_identities, report.verification_identities) == (7, 3)
        assert sorted(train.label_names + verification.label_names) == [f"person {number}" for number in range(10)]
        assert verification.label_names == sorted(verification.label_names)
        assert report.train_images + report.verification_images == 19
        reserved.setdefault(seed, set()).add(tuple(verification.label_names))
    assert len(reserved[0]) == 1
    assert reserved[0] != reserved[1]


def test_broken_files_are_listed_and_labels_stay_contiguous(source, tmp_path):
    good = (source / "person 0" / "0.jpg").read_bytes()
    broken = {
        "person 1/0.jpg": b"",
        "person 2/0.jpg": good[: len(good) // 2],
        "person 2/1.jpg": b"<html>404</html>",
        "person 2/2.jpg": bytes(100),
        "person 3/note.txt": b"hello",
        "stray.jpg": good,
    }
    for name, data in broken.items():
        (source / name).write_bytes(data)
    (source / "person 35").mkdir()
    (source / ".cache").mkdir()
    report, index = packed(source, tmp_path)
    assert {str(file.path.relative_to(source)) for file in report.skipped} == {*broken, ".cache"}
    assert report.empty_identities == ("person 2", "person 35")
    assert index.label_names == [f"person {number}" for number in (0, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert (report.train_identities, report.train_images) == (9, index.num_samples) == (9, 15)
    reasons = {file.path.name: file.reason for file in report.skipped}
    assert reasons["note.txt"] == "not a jpeg, png, bmp or webp file: '.txt'"
    assert reasons["stray.jpg"] == "not an identity folder"
    assert "not a readable image (100 bytes)" in reasons["2.jpg"]
    assert f"{source}/person 2/1.jpg: not a readable image" in str(report)
    assert "left out: 2" in str(report)


def test_modes_that_decoders_agree_on_are_stored_as_they_are(tmp_path):
    images = {
        "gray.png": Image.fromarray(pixels(1, channels=1)),
        "palette.png": Image.fromarray(pixels(2)).quantize(16),
        "rgba.png": Image.fromarray(pixels(3, channels=4)),
        "gray.jpg": Image.fromarray(pixels(4, channels=1)),
        "rgb.bmp": Image.fromarray(pixels(5)),
        "rgb.webp": Image.fromarray(pixels(6)),
    }
    paths = [save(tmp_path / "in" / "a" / f"{n}{name}", image) for n, (name, image) in enumerate(images.items())]
    _, index = packed(tmp_path / "in", tmp_path)
    for number, (path, image) in enumerate(zip(paths, images.values(), strict=True)):
        assert index.read(number) == path.read_bytes()
        with Image.open(path) as again:
            np.testing.assert_array_equal(decode_image(index.read(number)), np.asarray(again.convert("RGB")))
        if path.suffix in (".png", ".bmp"):
            np.testing.assert_array_equal(decode_image(index.read(number)), np.asarray(image.convert("RGB")))


def test_sixteen_bit_gray_is_scaled(tmp_path):
    wide = np.arange(400, dtype=np.uint16).reshape(20, 20) * 164
    save(tmp_path / "in" / "a" / "0.png", Image.fromarray(wide))
    _, index = packed(tmp_path / "in", tmp_path)
    expected = np.round(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(index.read(0)), np.repeat(expected[..., None], 3, 2))


def test_cmyk_becomes_rgb(tmp_path):
    path = save(tmp_path / "in" / "a" / "0.jpg", Image.new("CMYK", (20, 20), (0, 200, 200, 0)), quality=95)
    _, index = packed(tmp_path / "in", tmp_path)
    with Image.open(io.BytesIO(index.read(0))) as stored, Image.open(path) as original:
        assert (stored.mode, stored.format) == ("RGB", "JPEG")
        np.testing.assert_allclose(np.asarray(stored), np.asarray(original.convert("RGB")), atol=3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied_once(tmp_path, suffix):
    left_dark = np.full((20, 30, 3), 220, np.uint8)
    left_dark[:, :15] = 20
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90 degrees clockwise: left becomes top.
    save(tmp_path / "in" / "a" / f"0.{suffix}", Image.fromarray(left_dark), exif=exif)
    _, index = packed(tmp_path / "in", tmp_path)
    stored = decode_image(index.read(0))
    assert stored.shape == (30, 20, 3)
    assert stored[:12].mean() < 40 < 200 < stored[18:].mean()
    with Image.open(io.BytesIO(index.read(0))) as again:
        assert not again.getexif()


def test_names_may_lie_about_the_format(tmp_path):
    path = tmp_path / "in" / "a" / "0.jpg"
    save(path, Image.fromarray(pixels(0)), format="PNG")
    _, index = packed(tmp_path / "in", tmp_path)
    np.testing.assert_array_equal(decode_image(index.read(0)), pixels(0))
    assert b"a/0.png" in index.shard_paths[0].read_bytes()


def test_images_are_resized_when_asked(tmp_path):
    image = Image.fromarray(pixels(0, height=40, width=60))
    same = save(tmp_path / "in" / "a" / "same.jpg", Image.fromarray(pixels(1, height=24, width=24)))
    save(tmp_path / "in" / "a" / "large.png", image)
    _, index = packed(tmp_path / "in", tmp_path, image_size=24)
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(index.read(0)), expected)
    assert index.read(1) == same.read_bytes()


def test_duplicate_keys_are_an_error(source, tmp_path):
    save(source / "person 1" / "0.png", Image.fromarray(pixels(0)))
    with pytest.raises(ValueError, match=r"person 1/0.png and .*person 1/0.jpg both have the key 'person 1/0'"):
        packed(source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_impossible_sources_are_refused(source, tmp_path):
    out, options = tmp_path / "out", {"verification_share": 0.1, "seed": 0}
    with pytest.raises(FileNotFoundError, match="nothing: no such folder"):
        pack(tmp_path / "nothing", out, **options)
    with pytest.raises(NotADirectoryError, match=r"0.jpg: not a folder"):
        pack(source / "person 0" / "0.jpg", out, **options)
    with pytest.raises(ValueError, match="no identity folder in it"):
        pack(source / "person 0", out, **options)
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no usable image for training in 1 identity folders"):
        pack(tmp_path / "hollow", out, **options)
    with pytest.raises(ValueError, match="lies in the source"):
        pack(source, source / "out", **options)
    with pytest.raises(ValueError, match=r"verification_share is 1.0, but must be in \[0, 1\)"):
        pack(source, out, verification_share=1.0, seed=0)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(FileExistsError, match="out: already there and not an empty folder"):
        pack(source, out, **options)
    assert [path.name for path in out.iterdir()] == ["mine"]
