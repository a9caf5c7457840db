"""Merging, cutting and de-duplicating splits."""

import io

import numpy as np
import pytest
from PIL import Image

from partialfc.data import ShardIndex, decode_image
from partialfc.data.combine import _close_pairs, dedup, merge, split
from partialfc.data.writer import SplitWriter


def smooth(seed, size=24):
    """A picture whose neighbouring pixels are alike, as those of photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_split(directory, samples, **columns):
    """samples: (identity, image file) each."""
    directory.mkdir(parents=True)
    names = sorted({name for name, _ in samples})
    with SplitWriter(directory, samples_per_shard=4) as writer:
        writer.label_names = names
        for number, (name, data) in enumerate(samples):
            extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
            extra = {key: values[number] for key, values in columns.items()}
            writer.add(f"{name}/{number}", data, extension=extension, label=names.index(name), **extra)
    return directory


def contents(directory):
    index = ShardIndex.open(directory)
    return [
        (index.label_names[index.labels[number]], index.key(number), index.read(number))
        for number in range(index.num_samples)
    ]


@pytest.fixture
def two(tmp_path):
    pictures = [encoded(smooth(seed)) for seed in range(8)]
    first = write_split(tmp_path / "a" / "train", list(zip(["ada", "bob", "ada", "zoe"], pictures[:4], strict=True)))
    second = write_split(tmp_path / "b" / "train", list(zip(["bob", "eve", "bob", "ada"], pictures[4:], strict=True)))
    return first, second, pictures


def test_merged_splits_share_names(two, tmp_path):
    first, second, pictures = two
    report = merge([first, second], tmp_path / "out", samples_per_shard=3)
    assert (report.train_images, report.train_identities) == (8, 4)
    found = contents(tmp_path / "out" / "train")
    assert [name for name, _, _ in found] == ["ada", "bob", "ada", "zoe", "bob", "eve", "bob", "ada"]
    assert [key for _, key, _ in found[3:5]] == ["0/zoe/3", "1/bob/0"]
    assert [data for _, _, data in found] == pictures


def test_merged_splits_may_be_kept_apart(two, tmp_path):
    first, second, _ = two
    report = merge([first, second], tmp_path / "out", disjoint=True)
    assert report.train_identities == 6
    index = ShardIndex.open(tmp_path / "out" / "train")
    assert index.label_names == ["0/ada", "0/bob", "0/zoe", "1/ada", "1/bob", "1/eve"]


def test_merging_needs_two_and_like_columns(two, tmp_path):
    first, _, pictures = two
    with pytest.raises(ValueError, match="1 split given, but at least two are needed"):
        merge([first], tmp_path / "out")
    heavy = write_split(tmp_path / "c", [("ada", pictures[0])], weight=[0.5])
    merge([first, heavy], tmp_path / "weighted")
    assert ShardIndex.open(tmp_path / "weighted" / "train").weights.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]
    good = write_split(tmp_path / "d", [("ada", pictures[0])], quality=[0.5])
    with pytest.raises(ValueError, match="some of the splits have quality and some have not"):
        merge([first, good], tmp_path / "out")


def test_damaged_samples_are_left_out_of_a_merge(two, tmp_path):
    first, second, pictures = two
    tar = first / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(pictures[1]) + 50] ^= 1
    tar.write_bytes(data)
    report = merge([first, second], tmp_path / "out")
    assert (report.train_images, report.skipped_by_reason) == (7, {"checksum": 1})
    assert "a/train/shard-000000.tar, sample 1 (key bob/1)" in report.skipped[0].path


def test_identities_are_set_aside(two, tmp_path):
    first, _, pictures = two
    report = split(first, tmp_path / "out", share=0.34, seed=3)
    assert (report.train_identities, report.verification_identities) == (2, 1)
    parts = [contents(tmp_path / "out" / name) for name in ("train", "verification")]
    assert not {name for name, _, _ in parts[0]} & {name for name, _, _ in parts[1]}
    assert sorted(data for part in parts for _, _, data in part) == sorted(pictures[:4])
    with pytest.raises(ValueError, match=r"share is 0.0, but must be in \(0, 1\)"):
        split(first, tmp_path / "none", share=0.0, seed=0)


def test_equal_files_are_found(tmp_path):
    pictures = [encoded(smooth(seed)) for seed in range(4)]
    order = [0, 1, 0, 2, 1, 0, 3]
    names = ["ada", "bob", "ada", "ada", "zoe", "ada", "eve"]
    source = write_split(tmp_path / "in", [(name, pictures[n]) for name, n in zip(names, order, strict=True)])
    report = dedup(source, tmp_path / "out")
    assert [(group.kept, group.duplicates, group.identities) for group in report.within] == [(0, (2, 5), ("ada",))]
    assert [(group.kept, group.duplicates, group.identities) for group in report.across] == [(1, (4,), ("bob", "zoe"))]
    assert contents(tmp_path / "out" / "train") == [
        ("ada", "ada/0", pictures[0]),
        ("bob", "bob/1", pictures[1]),
        ("ada", "ada/3", pictures[2]),
        ("eve", "eve/6", pictures[3]),
    ]
    assert "duplicates across identities: 1 left out, in 1 groups\n  sample 1 is kept, left out: 4 (bob, zoe)" in str(
        report
    )


def test_pictures_that_look_alike_are_found(tmp_path):
    images = [smooth(seed) for seed in range(6)]
    samples = [
        ("ada", encoded(images[0])),
        ("ada", encoded(images[0], "JPEG", quality=60)),
        ("bob", encoded(images[1])),
    ]
    samples += [("eve", encoded(images[1].resize((40, 40)))), *(("zoe", encoded(image)) for image in images[2:])]
    source = write_split(tmp_path / "in", samples)
    for workers in (0, 2):
        report = dedup(source, tmp_path / f"out{workers}", method="perceptual", num_workers=workers)
        assert [(group.kept, group.duplicates) for group in report.within] == [(0, (1,))]
        assert [(group.kept, group.duplicates) for group in report.across] == [(2, (3,))]
        assert report.pack.train_images == 6
    assert dedup(source, tmp_path / "bytes", dry_run=True).within == ()
    assert not (tmp_path / "bytes").exists()


def test_samples_that_cannot_be_decoded_have_no_duplicates(tmp_path):
    samples = [("ada", encoded(smooth(0))), ("ada", b"no image"), ("bob", b"no picture"), ("bob", encoded(smooth(0)))]
    report = dedup(write_split(tmp_path / "in", samples), tmp_path / "out", method="perceptual")
    assert [(group.kept, group.duplicates) for group in report.across] == [(0, (3,))]
    assert report.pack.skipped_by_reason == {"not an image": 2}
    assert report.pack.empty_identities == ("bob",)


@pytest.mark.parametrize("distance", [0, 1, 3, 7])
def test_close_pairs_are_those_of_all_against_all(distance):
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**63, 150).astype(np.uint64)
    for _ in range(5):
        flipped = hashes[generator.integers(0, len(hashes), 60)]
        hashes = np.concatenate([hashes, flipped ^ (np.uint64(1) << generator.integers(0, 64, 60).astype(np.uint64))])
    hashes = np.unique(hashes)
    expected = {
        (one, other)
        for one in range(len(hashes))
        for other in range(one)
        if bin(int(hashes[one]) ^ int(hashes[other])).count("1") <= distance
    }
    found = {
        (max(pair), min(pair))
        for left, right in _close_pairs(hashes, distance)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    }
    assert found == expected
    assert len(expected) > 100 or distance == 0


def test_dedup_refuses_what_it_does_not_know(two, tmp_path):
    with pytest.raises(ValueError, match="method is 'magic', but must be 'bytes' or 'perceptual'"):
        dedup(two[0], tmp_path / "out", method="magic")
    with pytest.raises(ValueError, match=r"max_distance is 8, but must be in \[0, 7\]"):
        dedup(two[0], tmp_path / "out", method="perceptual", max_distance=8)
    assert decode_image(two[2][0]).shape == (24, 24, 3)
