"""Verifying a split: every byte is looked at, and each damage named."""

import io
import os
import random
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from partialfc.data.index import ShardIndex
from partialfc.data.indexing import index_tars
from partialfc.data.verifying import verify
from partialfc.data.writer import SplitWriter


def picture(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "train"
    directory.mkdir()
    with SplitWriter(directory, samples_per_shard=5) as writer:
        for number in range(12):
            # A long name is stored in a PAX header.
            key = f"a/{number}" if number else "n" * 150
            writer.add(key, picture(number), extension="jpg", label=number % 3)
        writer.label_names += ["a", "b", "c"]
    return directory


@pytest.fixture
def split(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "train")
    return tmp_path / "train"


def place(split, sample_id):
    index = ShardIndex.open(split)
    shards, offsets, sizes = index.locate(np.array([sample_id]))
    return index.shard_paths[int(shards[0])], int(offsets[0]), int(sizes[0])


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_intact_split(split, num_threads):
    calls = []
    report = verify(
        split, num_threads=num_threads, decode=True, on_progress=lambda done, total: calls.append((done, total))
    )
    assert report.ok
    assert report.reasons == {}
    assert calls == [(1, 3), (2, 3), (3, 3)]
    num_bytes = sum(path.stat().st_size for path in split.glob("*.tar"))
    assert str(report) == f"12 samples in 3 data shards, {num_bytes:,} bytes: all as it was written"


def test_bit_rot_is_named_with_shard_key_and_byte(split):
    path, offset, size = place(split, 7)
    overwrite(path, offset + size // 2, b"\xaa\xbb\xcc")
    report = verify(split, num_threads=2)
    assert not report.ok
    (damage,) = report.damages
    assert damage[:5] == (path, 7, "a/7", offset, "checksum")
    line = f"{path}, sample 7 (key a/7) at byte {offset}: checksum: the bytes do not match their crc32 checksum"
    assert line in str(report)
    assert "1 damages, 1 samples damaged\n  1 x checksum" in str(report)


def damage_label(split, *, text=b"2"):
    with tarfile.open(split / "shard-000000.tar") as tar:
        offset = tar.getmember("a/4.cls").offset_data
    overwrite(split / "shard-000000.tar", offset, text)


def damage_label_to_text(split):
    damage_label(split, text=b"x")


def damage_header(split):
    path, offset, _ = place(split, 6)
    overwrite(path, offset - 512, b"z")


def damage_padding(split):
    path, offset, size = place(split, 6)
    overwrite(path, offset + size, b"z")


def cut_in_a_member(split):
    path, offset, size = place(split, 8)
    os.truncate(path, offset + size - 10)


def cut_between_members(split):
    path, offset, _ = place(split, 8)
    os.truncate(path, offset - 512)


def remove_shard(split):
    os.remove(split / "shard-000001.tar")


def append_bytes(split):
    with open(split / "shard-000002.tar", "ab") as file:
        file.write(b"x" * 512)


@pytest.mark.parametrize(
    ("damage", "reasons", "samples", "message"),
    [
        (damage_label, {"label": 1}, {4}, "the .cls holds 2, but the index has 1"),
        (damage_label_to_text, {"label": 1}, {4}, "the .cls holds b'x', but the index has 1"),
        (damage_header, {"archive": 1}, {None}, "does not match its checksum"),
        (damage_padding, {"padding": 1}, {None}, "what fills the blocks of 'a/6.jpg' is not zero"),
        (
            cut_in_a_member,
            {"truncated": 2, "size": 1, "archive": 1},
            {None, 8, 9},
            "expected, but the file holds",
        ),
        (cut_between_members, {"truncated": 2, "size": 1, "archive": 1}, {None, 8, 9}, "without an end-of-archive"),
        (remove_shard, {"missing": 1}, {None}, "the data shard is missing, with 5 samples"),
        (append_bytes, {"size": 1, "archive": 1}, {None}, "behind the end-of-archive marker"),
    ],
)
def test_each_damage_has_its_reason(split, damage, reasons, samples, message):
    damage(split)
    report = verify(split, num_threads=2)
    assert report.reasons == reasons
    assert {damage.sample_id for damage in report.damages} == samples
    assert message in str(report)


def test_an_image_is_still_checked_behind_a_damaged_header(split):
    damage_header(split)
    path, offset, _ = place(split, 9)
    overwrite(path, offset + 30, b"\x01\x02\x03")
    report = verify(split, num_threads=1)
    assert report.reasons == {"archive": 1, "checksum": 1}
    assert report.damages[1].sample_id == 9


def test_decoding_finds_what_was_broken_before_it_was_indexed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("0.jpg", picture(0)), ("0.cls", b"0"), ("1.jpg", picture(1)[:300]), ("1.cls", b"0")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index_tars(str(tmp_path / "a.tar"), tmp_path / "out", decode=False)
    assert verify(tmp_path / "out", num_threads=1).ok
    (damage,) = verify(tmp_path / "out", num_threads=1, decode=True).damages
    assert (damage.sample_id, damage.key, damage.reason) == (1, "1", "damaged image")


def test_labels_that_were_renumbered_are_not_compared(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("0.jpg", picture(0)), ("0.cls", b"ada")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index_tars(str(tmp_path / "a.tar"), tmp_path / "out", remap=True)
    assert verify(tmp_path / "out", num_threads=1).ok


def test_a_changed_index_leaves_nothing_to_compare_with(split):
    overwrite(split / "index.npy", 200, b"\xff")
    with pytest.raises(ValueError, match="the index has fingerprint"):
        verify(split, num_threads=1)


def test_arguments(split):
    with pytest.raises(ValueError, match="num_threads is 0, but must be at least 1"):
        verify(split, num_threads=0)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        verify(split / "nothing", num_threads=1)


def flips_are_found(split, count, seed):
    """How many of some changes of single bytes of any file of the split are found."""
    files = sorted(split.iterdir())
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(seed)
    unfound = []
    for _ in range(count):
        (path,) = draw.choices(files, sizes)
        offset, change = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        with open(path, "r+b") as file:
            file.seek(offset)
            (before,) = file.read(1)
            file.seek(offset)
            file.write(bytes([before ^ change]))
            file.flush()
            try:
                if verify(split, num_threads=1).ok:
                    unfound.append((path.name, offset, before, change))
            except (OSError, ValueError):
                pass
            file.seek(offset)
            file.write(bytes([before]))
    assert verify(split, num_threads=1).ok
    return unfound


def test_single_changed_bytes_are_found(split):
    assert flips_are_found(split, 200, seed=0) == []


@pytest.mark.soak
def test_a_thousand_single_changed_bytes_are_found(split):
    assert flips_are_found(split, 1000, seed=1) == []
