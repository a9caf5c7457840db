"""What `stats` tells of a data set."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from partialfc.data.report import stats
from partialfc.data.split_format import RECORD, record_type, write_split_files
from partialfc.data.writer import SplitWriter


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def write(directory, files, labels, **columns):
    directory.mkdir(parents=True)
    with SplitWriter(directory, samples_per_shard=4) as writer:
        writer.label_names = [f"name {label}" for label in range(max(labels) + 1)]
        for number, (data, label) in enumerate(zip(files, labels, strict=True)):
            extra = {name: values[number] for name, values in columns.items()}
            writer.add(str(number), data, extension="png", label=label, **extra)


def test_counts(tmp_path):
    small, large = png(20, 30), png(20, 30) + bytes(100)
    write(tmp_path / "set" / "train", [small] * 8 + [large], [0, 1, 1, 2, 2, 2, 2, 2, 2])
    report = stats(tmp_path / "set")
    (split,) = report.splits
    assert (split.name, split.num_samples, split.num_classes, split.num_shards) == ("train", 9, 3, 3)
    assert split.samples_per_shard == (1, 4)
    assert split.image_sizes == {(20, 30): 9}
    assert split.images_per_identity == (1, 2.0, 6)
    assert split.few_images == ((1, 1), (4, 2), (9, 3))
    assert split.histogram == ((1, 1, 1), (2, 2, 1), (3, 3, 0), (4, 4, 0), (5, 5, 0), (6, 6, 1))
    assert split.image_bytes == 9 * len(small) + 100
    assert split.bytes_per_image == (len(small), pytest.approx(len(small) + 100 / 9), len(large))
    assert (split.weights, split.quality, split.bad_images) == (None, None, ())
    assert stats(tmp_path / "set" / "train").splits == (split,)
    text = str(report)
    for line in (
        f"{tmp_path / 'set'}\ntrain\n",
        "  images        9 of 3 identities\n",
        f"  bytes each    {len(small)} to {len(large)}, mean {split.bytes_per_image[1]:.0f}\n",
        "  image sizes   20x30 (9) of 9 looked at\n",
        f"  data shards   3 of 1 to 4 samples, {split.shard_bytes:,} bytes, of them {split.image_bytes:,} of images\n",
        "  per identity  1 to 6 images, median 2\n",
        "  few images    identities with at most 1: 1, at most 4: 2, at most 9: 3\n",
        f"  fingerprint   {split.fingerprint}",
    ):
        assert line in text
    assert "weights" not in text
    assert "bad images" not in text


def test_several_splits_and_image_sizes(tmp_path):
    write(tmp_path / "set" / "train", [png(8, 8)] * 3 + [png(9, 8)], [0, 0, 1, 1])
    write(tmp_path / "set" / "verification", [png(8, 8)] * 2, [0, 0])
    report = stats(tmp_path / "set")
    assert [split.name for split in report.splits] == ["train", "verification"]
    assert report.splits[0].image_sizes == {(8, 8): 3, (9, 8): 1}
    assert "image sizes   8x8 (3), 9x8 (1) of 4 looked at" in str(report)
    assert "data shards   1 of 2 samples, " in str(report.splits[1])


def test_weights_and_quality(tmp_path):
    write(tmp_path / "train", [png(8, 8)] * 3, [0, 0, 0], weight=[0.5, 2.0, 1.0], quality=[-1.5, 0.25, 9.0])
    (split,) = stats(tmp_path / "train").splits
    assert (split.weights, split.quality) == ((0.5, 2.0), (-1.5, 9.0))
    assert "  weights       0.5 to 2\n  quality       -1.5 to 9\n" in str(split)


def test_bad_images_are_told(tmp_path):
    write(tmp_path / "train", [png(8, 8), b"nothing", png(8, 8)], [0, 0, 0])
    shard = tmp_path / "train" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.rindex(b"IDAT")] ^= 1
    shard.write_bytes(data)
    (split,) = stats(tmp_path / "train").splits
    assert split.image_sizes == {(8, 8): 1}
    assert len(split.bad_images) == 2
    assert split.bad_images[0].startswith(f"{shard}, sample 1 (key 1) at byte ")
    assert "checksum" in split.bad_images[1]
    assert f"  bad images    2 of 3 looked at, the first: {shard}, sample 1 (key 1) at byte " in str(split)


def test_a_hundred_images_are_looked_at(tmp_path):
    write(tmp_path / "train", [png(8 + number // 100, 8) for number in range(300)], [0] * 300)
    (split,) = stats(tmp_path / "train").splits
    assert sum(split.image_sizes.values()) == 100
    assert all(30 <= count <= 37 for count in split.image_sizes.values())
    assert len(split.image_sizes) == 3


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a data set nor a split"):
        stats(tmp_path)


def write_large(directory, num_samples):
    """A split whose images are all the same bytes of one tar: the index alone is large."""
    directory.mkdir()
    with SplitWriter(directory, samples_per_shard=4) as writer:
        writer.label_names = ["a"]
        writer.add("0", png(8, 8), extension="png", label=0)
    record = np.load(directory / "index.npy")[0]
    num_classes = num_samples // 10
    records = np.zeros(num_samples, dtype=record_type(weight=True))
    for name in RECORD.names:
        records[name] = record[name]
    records["label"] = np.arange(num_samples) // 10
    records["weight"] = np.linspace(0.5, 1.5, num_samples)
    size = (directory / "shard-000000.tar").stat().st_size
    shards = [{"name": "shard-000000.tar", "bytes": size, "num_samples": num_samples}]
    write_split_files(directory, records, label_names=[str(n) for n in range(num_classes)], shards=shards)


def measured(tmp_path, num_samples):
    """MiB that `stats` allocates at most; pages of memory maps belong to the system."""
    write_large(tmp_path / "train", num_samples)
    tracemalloc.start()
    try:
        (split,) = stats(tmp_path / "train").splits
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (split.num_samples, split.weights, split.images_per_identity) == (num_samples, (0.5, 1.5), (10, 10.0, 10))
    return most / 2**20


def test_memory_does_not_grow_with_the_samples(tmp_path):
    assert measured(tmp_path, 1_000_000) < 12  # The index has 27 MiB.


@pytest.mark.soak
def test_ten_million_samples(tmp_path):
    assert measured(tmp_path, 10_000_000) < 30  # The index has 267 MiB.
