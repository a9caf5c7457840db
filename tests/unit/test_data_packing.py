"""Packing image folders: labels, odd files, broken files."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from partialfc.data import ShardIndex, decode_image, pack
from partialfc.data.errors import DataError
from partialfc.data.parallel import run_tasks
from partialfc.data.writer import ShardWriter, relabel_shard


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
    assert calls == [(4, 19), (8, 19), (12, 19), (16, 19), (19, 19)]


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
    assert {os.path.relpath(file.path, source) for file in report.skipped} == {*broken, ".cache"}
    assert report.empty_identities == ("person 2", "person 35")
    assert index.label_names == [f"person {number}" for number in (0, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert (report.train_identities, report.train_images) == (9, index.num_samples) == (9, 15)
    messages = {os.path.basename(file.path): file.message for file in report.skipped}
    assert messages["note.txt"] == "not an image file: '.txt'"
    assert messages["stray.jpg"] == "not an identity folder"
    assert "not a readable image (100 bytes)" in messages["2.jpg"]
    assert report.skipped_by_reason == {
        "not an image": 3,
        "damaged image": 1,
        "not an identity folder": 2,
        "other file": 1,
    }
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
    assert b"a/0.png" in Path(index.shard_paths[0]).read_bytes()


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
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder; expected a folder with"):
        pack(tmp_path / "nothing", out, **options)
    with pytest.raises(ValueError, match=r"a file that ends with '.jpg' cannot be imported"):
        pack(source / "person 0" / "0.jpg", out, **options)
    with pytest.raises(ValueError, match="no identity folder in it"):
        pack(source / "person 0", out, **options)
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no usable image for training of 1 identities, 0 files skipped"):
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


def test_other_formats_are_encoded_anew(tmp_path):
    images = [Image.fromarray(pixels(seed)) for seed in range(3)]
    save(tmp_path / "in" / "a" / "0.gif", images[0], save_all=True, append_images=images[1:])
    save(tmp_path / "in" / "a" / "1.tiff", images[1])
    save(tmp_path / "in" / "a" / "2.png", images[2], save_all=True, append_images=images[:2])
    _, index = packed(tmp_path / "in", tmp_path)
    expected = [images[0].quantize().convert("RGB"), images[1], images[2]]
    for number in range(3):
        data = index.read(number)
        with Image.open(io.BytesIO(data)) as stored:
            assert (stored.format, getattr(stored, "n_frames", 1)) == ("PNG", 1)
        if number:
            np.testing.assert_array_equal(decode_image(data), np.asarray(expected[number]))
    with Image.open(tmp_path / "in" / "a" / "0.gif") as animation:
        np.testing.assert_array_equal(decode_image(index.read(0)), np.asarray(animation.convert("RGB")))


def test_bombs_and_unwanted_formats_are_skipped(source, tmp_path):
    Image.new("1", (10_000, 6_000)).save(source / "person 1" / "bomb.png")
    Image.new("RGB", (8, 8)).save(source / "person 1" / "odd.jpg", format="PPM")
    break_image(source / "person 1" / "cut.jpg")
    report, _ = packed(source, tmp_path)
    assert {os.path.basename(file.path): file.reason for file in report.skipped} == {
        "bomb.png": "too large",
        "odd.jpg": "not an image",
        "cut.jpg": "damaged image",
    }
    assert "PPM files are not taken" in str(report)
    assert "skipped: 3 (" in str(report)


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


OPTIONS = {"verification_share": 0.3, "seed": 0, "samples_per_shard": 3}


class InterruptionError(Exception):
    pass


def break_image(path):
    data = save(path, Image.fromarray(pixels(0, height=200, width=200)), quality=95).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def interrupt_after(count):
    calls = []

    def on_progress(done, total):
        calls.append(done)
        if len(calls) == count:
            raise InterruptionError

    return on_progress


def test_workers_change_nothing(source, tmp_path):
    break_image(source / "person 2" / "0.jpg")
    reports = [pack(source, tmp_path / f"out{workers}", **OPTIONS, num_workers=workers) for workers in (0, 2)]
    assert reports[0] == reports[1]
    assert files(tmp_path / "out0") == files(tmp_path / "out2")
    assert ShardIndex.open(tmp_path / "out2" / "train").shard_sizes[0] in (2, 3)


def test_goes_on_after_an_interruption(source, tmp_path, caplog):
    break_image(source / "person 2" / "0.jpg")
    whole = pack(source, tmp_path / "whole", **OPTIONS)
    for count in (1, 2):
        with pytest.raises(InterruptionError):
            pack(source, tmp_path / "out", **OPTIONS, on_progress=interrupt_after(count))
    staging = tmp_path / ".out.partial"
    assert caplog.messages[-1] == (
        f"3 of 7 data shards are finished and kept in {staging}; the same command goes on after them"
    )
    kept = {path: path.stat().st_mtime_ns for path in staging.glob("*/*.tar")}
    assert len(kept) == 3
    # A data shard that was written in part, and one that lost bytes since.
    (staging / "parts" / "train-000004.tar").write_bytes(b"half")
    os.truncate(min(kept), 512)
    calls = []
    report = pack(source, tmp_path / "out", **OPTIONS, num_workers=2, on_progress=lambda *call: calls.append(call))
    assert calls[0][0] > 3
    assert calls[-1] == (19, 19)
    assert report == whole
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not staging.exists()


def test_another_job_is_not_gone_on_with(source, tmp_path):
    with pytest.raises(InterruptionError):
        pack(source, tmp_path / "out", **OPTIONS, on_progress=interrupt_after(1))
    with pytest.raises(ValueError, match=r"\.out\.partial: holds what .* of another job: seed was 0 and now is 1"):
        pack(source, tmp_path / "out", **OPTIONS | {"seed": 1})
    save(source / "person 3" / "new.jpg", Image.fromarray(pixels(9)))
    with pytest.raises(ValueError, match="another job: content of the source was"):
        pack(source, tmp_path / "out", **OPTIONS)
    (source / "person 3" / "new.jpg").unlink()
    assert pack(source, tmp_path / "out", **OPTIONS).train_images > 0


def test_two_at_once_are_refused(source, tmp_path):
    errors = []

    def pack_again(done, total):
        with pytest.raises(BlockingIOError, match=r"another process is at work on .*out") as caught:
            pack(source, tmp_path / "out", **OPTIONS)
        errors.append(caught.value)

    pack(source, tmp_path / "out", **OPTIONS, on_progress=pack_again)
    assert len(errors) == 7


def test_labels_close_gaps_in_the_data_shards_too(tmp_path):
    names = [f"{'long ' * 30}é {number:02d}" for number in range(12)]
    for number, name in enumerate(names):
        save(tmp_path / "in" / name / "0.png", Image.fromarray(pixels(number)))
    for number in (0, 5):
        (tmp_path / "in" / names[number] / "0.png").write_bytes(b"broken")
    report, index = packed(tmp_path / "in", tmp_path, samples_per_shard=4)
    assert report.train_identities == 10
    texts = [
        sample["cls"]
        for path in index.shard_paths
        for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
    ]
    assert texts == [str(number).encode() for number in range(10)]
    assert index.labels.tolist() == list(range(10))


def test_data_shards_without_a_sample_are_not_there(tmp_path):
    for number in range(6):
        save(tmp_path / "in" / f"{number}" / "0.png", Image.fromarray(pixels(number)))
    for number in (2, 3):
        (tmp_path / "in" / f"{number}" / "0.png").write_bytes(b"broken")
    _, index = packed(tmp_path / "in", tmp_path, samples_per_shard=2)
    assert index.shard_sizes == [2, 2]
    assert index.labels.tolist() == [0, 1, 2, 3]
    assert [Path(path).name for path in index.shard_paths] == ["shard-000000.tar", "shard-000002.tar"]
    assert sorted(path.name for path in (tmp_path / "out" / "train").glob("*.tar")) == [
        "shard-000000.tar",
        "shard-000002.tar",
    ]


def test_dry_run_counts_and_writes_nothing(source, tmp_path):
    (source / "person 2" / "0.jpg").write_bytes(b"broken")
    (source / "person 35").mkdir()
    report = pack(source, tmp_path / "out", **OPTIONS, dry_run=True)
    assert (report.train_identities + report.verification_identities, report.dry_run) == (10, True)
    assert report.train_images + report.verification_images == 19
    assert report.image_bytes == sum(path.stat().st_size for path in source.rglob("*.jpg"))
    assert report.empty_identities == ("person 35",)
    assert "dry run: no image was decoded, nothing was written" in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_dead_worker_is_an_error():
    with pytest.raises(DataError, match="a worker process died"):
        list(run_tasks(os._exit, [3, 3], num_workers=1))


def test_relabelled_shard_is_as_if_written_so(tmp_path):
    keys = ["a/0", "b" * 150 + "/é", "c" * 300 + "/1"]
    for name, labels in (("before.tar", [99, 100, 12345]), ("after.tar", [9, 99, 0])):
        writer = ShardWriter(tmp_path / name)
        for number, (key, label) in enumerate(zip(keys, labels, strict=True)):
            writer.add(key, bytes(500 + 12 * number), extension="jpg", label=label)
        records, _ = writer.close()
    for _ in range(2):
        relabel_shard(tmp_path / "before.tar", records, np.array([9, 99, 0]))
        assert (tmp_path / "before.tar").read_bytes() == (tmp_path / "after.tar").read_bytes()
