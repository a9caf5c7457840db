"""Data shards and their index: written in one pass, read back whole, damage found."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from partialfc.data import SampleError, ShardIndex, decode_image, synthesize
from partialfc.data.split_format import (
    BY_LABEL,
    INDEX,
    LABEL_NAMES,
    LABEL_STARTS,
    MANIFEST,
    compute_fingerprint,
    record_type,
    write_split_files,
)
from partialfc.data.writer import SplitWriter, staged_directory


@pytest.fixture
def split(tmp_path):
    """Five samples of two identities in shards of two."""
    directory = tmp_path / "set" / "train"
    directory.mkdir(parents=True)
    with SplitWriter(directory, samples_per_shard=2) as writer:
        writer.label_names = ["ada", "grace"]
        for number in range(5):
            writer.add(
                f"id.{number % 2}/é-{number}", bytes([number]) * (500 + 7 * number), extension="png", label=number % 2
            )
    return directory


def rewrite(split, **changes):
    """Changes the manifest, with a fingerprint that fits."""
    manifest = json.loads((split / MANIFEST).read_text()) | changes
    manifest["fingerprint"] = compute_fingerprint(split, manifest)
    (split / MANIFEST).write_text(json.dumps(manifest))


def test_index_describes_what_was_written(split):
    index = ShardIndex.open(split)
    assert (index.num_samples, index.num_classes) == (5, 2)
    assert index.label_names == ["ada", "grace"]
    assert index.labels.tolist() == [0, 1, 0, 1, 0]
    assert index.labels.dtype == np.int64
    assert index.shard_sizes == [2, 2, 1]
    assert index.shard_bytes == [os.path.getsize(path) for path in index.shard_paths]
    assert [index.read(number) for number in range(5)] == [bytes([number]) * (500 + 7 * number) for number in range(5)]
    assert index.image_bytes == sum(500 + 7 * number for number in range(5))
    assert index.by_label.tolist() == [0, 2, 4, 1, 3]
    assert index.by_label.dtype == np.uint32
    assert index.label_starts.tolist() == [0, 3, 5]
    assert (index.weights, index.quality) == (None, None)
    assert index.labels_in_shards is True


def test_weights_and_quality_are_optional_columns(split):
    records = np.load(split / INDEX)
    wider = np.zeros(5, dtype=record_type(weight=True, quality=True))
    for name in records.dtype.names:
        wider[name] = records[name]
    wider["weight"], wider["quality"] = [1, 2, 3, 4, 0.5], [0.1] * 5
    manifest = json.loads((split / MANIFEST).read_text())
    write_split_files(split, wider, label_names=["ada", "grace"], shards=manifest["shards"])
    index = ShardIndex.open(split)
    assert index.weights.tolist() == [1, 2, 3, 4, 0.5]
    assert index.quality.dtype == np.float32
    assert index.read(3)[0] == 3
    wider["weight"][2] = np.nan
    with pytest.raises(ValueError, match="weight of sample 2 is nan, but must be finite"):
        write_split_files(split, wider, label_names=["ada", "grace"], shards=manifest["shards"])


def test_many_are_read_at_once_with_errors_in_their_place(split):
    index = ShardIndex.open(split)
    shard = split / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(bytes([2]) * 514)] ^= 1
    shard.write_bytes(data)
    found = index.read_many(np.array([4, 2, 0, 2]))
    assert [bytes([4]) * 528, bytes(500)] == [found[0], found[2]]
    assert all(isinstance(error, SampleError) and error.reason == "checksum" for error in (found[1], found[3]))


def test_the_fingerprint_is_that_of_the_content(split, tmp_path):
    manifest = json.loads((split / MANIFEST).read_text())
    shards = [shard | {"name": str(split / shard["name"])} for shard in manifest["shards"]]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_split_files(elsewhere, np.load(split / INDEX), label_names=["ada", "grace"], shards=shards)
    index = ShardIndex.open(elsewhere)
    assert index.fingerprint == ShardIndex.open(split).fingerprint
    assert index.read(2) == bytes([2]) * 514
    write_split_files(elsewhere, np.load(split / INDEX), label_names=["ada", "alan"], shards=shards)
    assert ShardIndex.open(elsewhere).fingerprint != index.fingerprint


def test_keys_come_from_the_headers_of_the_tar(split):
    index = ShardIndex.open(split)
    assert [index.key(number) for number in range(5)] == [f"id.{number % 2}/é-{number}" for number in range(5)]
    assert (
        index.describe(3)
        == f"{index.shard_paths[1]}, sample 3 (key id.1/é-3) at byte {index.locate(np.array([3]))[1][0]}"
    )


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (tarfile.USTAR_FORMAT, 20),
        (tarfile.GNU_FORMAT, 20),
        (tarfile.GNU_FORMAT, 99),
        (tarfile.GNU_FORMAT, 400),
        (tarfile.PAX_FORMAT, 99),
        (tarfile.PAX_FORMAT, 400),
    ],
)
def test_keys_in_every_kind_of_tar(tmp_path, kind, length):
    name, image = "n" * length, b"image"
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}{name[1:]}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    with tarfile.open(tmp_path / "a.tar") as tar:
        offsets = [member.offset_data for member in tar]
    records = np.zeros(2, dtype=record_type())
    records["offset"], records["size"], records["crc32"] = offsets, len(image), zlib.crc32(image)
    shard = {"name": "a.tar", "bytes": os.path.getsize(tmp_path / "a.tar"), "num_samples": 2}
    write_split_files(tmp_path, records, label_names=["a"], shards=[shard])
    index = ShardIndex.open(tmp_path)
    assert [index.key(number) for number in range(2)] == [f"{number}{name[1:]}" for number in range(2)]


def test_webdataset_reads_the_shards(split):
    index = ShardIndex.open(split)
    samples = list(webdataset.WebDataset(index.shard_paths, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"id.{number % 2}/é-{number}" for number in range(5)]
    assert [sample["png"] for sample in samples] == [index.read(number) for number in range(5)]
    assert [int(sample["cls"]) for sample in samples] == index.labels.tolist()


def test_long_keys_keep_offsets_right(tmp_path):
    with SplitWriter(tmp_path, samples_per_shard=10) as writer:
        writer.label_names = ["a"]
        for number in range(3):
            writer.add("x" * 300 + str(number), bytes([number]) * 512, extension="jpg", label=0)
    index = ShardIndex.open(tmp_path)
    assert [index.read(number)[0] for number in range(3)] == [0, 1, 2]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        synthesize(
            tmp_path / name, identities=3, images_per_identity=2, seed=1, image_size=16, verification_identities=1
        )
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 12
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    with tarfile.open(tmp_path / "a" / "train" / "shard-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}


def test_index_travels_to_other_processes(split):
    index = ShardIndex.open(split)
    index.read(0)
    assert pickle.loads(pickle.dumps(index)).read(3) == index.read(3)


def test_more_shards_than_open_files(split, monkeypatch):
    monkeypatch.setattr("partialfc.data.storage._MAX_OPEN_SHARDS", 1)
    index = ShardIndex.open(split)
    before = open_tars()
    assert [index.read(number)[0] for number in (0, 4, 1, 2, 3)] == [0, 4, 1, 2, 3]
    assert open_tars() == before + 1
    del index
    assert open_tars() == before


def open_tars():
    """How many files of data shards this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this listing
            links.append(link.readlink())
    return sum(target.suffix == ".tar" for target in links)


def test_ids_outside_are_refused(split):
    index = ShardIndex.open(split)
    for sample_id in (-1, 5):
        with pytest.raises(IndexError, match=rf"sample id {sample_id} is outside \[0, 5\)"):
            index.read(sample_id)


def test_cut_shard_is_found_at_open(split):
    shard = split / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(
        ValueError, match=r"shard-000001.tar: the data shard has 1024 bytes, but manifest.json says 10240"
    ):
        ShardIndex.open(split)


def test_missing_shard_is_found_at_open(split):
    (split / "shard-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000002.tar: the data shard is missing"):
        ShardIndex.open(split)


def test_bit_rot_is_found_at_read(split):
    index = ShardIndex.open(split)
    shard = split / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(bytes([1]) * 507) + 100] ^= 1
    shard.write_bytes(data)
    assert index.read(0) == bytes(500)
    with pytest.raises(ValueError, match=r"shard-000000.tar, sample 1 \(key id.1/é-1\) at byte \d+: .* crc32"):
        index.read(1)


def test_shard_cut_after_open_is_found_at_read(split):
    index = ShardIndex.open(split)
    with open(split / "shard-000002.tar", "r+b") as file:
        file.truncate(1536 + 100)
    with pytest.raises(
        ValueError, match=r"shard-000002.tar, sample 4 \(key id.0/é-4\) at byte \d+: 528 bytes expected, .* holds \d+"
    ):
        index.read(4)


@pytest.mark.parametrize("name", [INDEX, BY_LABEL, LABEL_STARTS, LABEL_NAMES, MANIFEST])
def test_missing_index_file_is_named(split, name):
    (split / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"train: {name} is missing"):
        ShardIndex.open(split)


def test_changed_index_is_found(split):
    data = bytearray((split / INDEX).read_bytes())
    data[-20] ^= 1
    (split / INDEX).write_bytes(data)
    with pytest.raises(ValueError, match="a file was changed or damaged"):
        ShardIndex.open(split)


def test_label_gap_is_refused(split):
    np.save(split / LABEL_STARTS, np.array([0, 3, 3, 5]))
    rewrite(split, num_classes=3)
    with pytest.raises(ValueError, match=r"1 of 3 labels have no sample, first 1; labels must cover \[0, 3\)"):
        ShardIndex.open(split)
    rewrite(split, num_classes=2)
    with pytest.raises(ValueError, match=r"label_starts.npy: 5 samples of 3 labels, but manifest.json says 5 of 2"):
        ShardIndex.open(split)


def test_labels_must_fit_the_names(tmp_path):
    writer = SplitWriter(tmp_path, samples_per_shard=1)
    writer.label_names = ["a", "b", "c"]
    writer.add("0", b"x", extension="jpg", label=0)
    writer.add("1", b"x", extension="jpg", label=2)
    with pytest.raises(ValueError, match="1 of 3 labels have no sample, first 1"):
        writer.__exit__(None, None, None)
    writer.label_names = ["a", "b"]
    with pytest.raises(ValueError, match=r"label 2 is outside \[0, 2\)"):
        writer.__exit__(None, None, None)


def test_other_formats_and_folders_are_refused(split, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"this is not a split; it holds the splits \['train'\]"):
        ShardIndex.open(split.parent)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ShardIndex.open(tmp_path / "nothing")
    rewrite(split, version=1)
    with pytest.raises(ValueError, match=r"format \('partialfc-split', 1\), but this version reads .* data index '"):
        ShardIndex.open(split)
    (split / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not a manifest of a split"):
        ShardIndex.open(split)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_on_an_error(tmp_path, error):
    def write():
        with staged_directory(tmp_path / "set") as staging:
            (staging / "train").mkdir()
            (staging / "train" / "file").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    synthesize(target, identities=1, images_per_identity=1, seed=0, image_size=16)
    before = (target / "train" / MANIFEST).read_text()
    with pytest.raises(FileExistsError, match="set: already there and not an empty folder"):
        synthesize(target, identities=2, images_per_identity=1, seed=0, image_size=16)
    assert (target / "train" / MANIFEST).read_text() == before


def test_synthesize_writes_both_splits(tmp_path):
    calls = []
    synthesize(
        tmp_path / "set",
        identities=30,
        images_per_identity=10,
        seed=0,
        image_size=24,
        verification_identities=5,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    train, verification = (ShardIndex.open(tmp_path / "set" / name) for name in ("train", "verification"))
    assert (train.num_samples, train.num_classes, verification.num_classes) == (300, 30, 5)
    assert np.bincount(train.labels).tolist() == [10] * 30
    assert np.bincount(verification.labels).tolist() == [10] * 5
    assert not set(train.label_names) & set(verification.label_names)
    assert len(np.unique(train.labels[:40])) > 15  # Written in mixed order.
    assert decode_image(train.read(7)).shape == (24, 24, 3)
    assert calls == [(256, 350), (300, 350), (350, 350)]


def test_interrupted_synthesis_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "set", identities=2, images_per_identity=1, seed=0, image_size=16, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_synthesize_refuses_impossible_numbers(tmp_path):
    with pytest.raises(ValueError, match="identities=0"):
        synthesize(tmp_path / "set", identities=0, images_per_identity=1, seed=0, image_size=16)
    assert list(tmp_path.iterdir()) == []


def test_checksum_is_that_of_the_image(split):
    records = np.load(split / INDEX)
    assert records["crc32"].tolist() == [zlib.crc32(bytes([number]) * (500 + 7 * number)) for number in range(5)]
