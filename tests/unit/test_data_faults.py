"""Broken and strange files: every loader does the same with them, with exact counts, and says where they lie."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_faults import BROKEN, SIDE, STRANGE, good_files, pixels, write_split

from partialfc.data import (
    Augmentation,
    DaliLoader,
    DataError,
    RankSteps,
    SamplePlan,
    ShardIndex,
    TorchLoader,
    WebDatasetLoader,
    decode_image,
    verify,
)

LOADERS = {"torch": TorchLoader, "webdataset": WebDatasetLoader, "dali": DaliLoader}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Good files, every broken one, every strange one, and one that rotted after it was indexed."""
    split = tmp_path_factory.mktemp("faults") / "train"
    files = [(data, extension) for data, extension, _ in BROKEN.values()] + list(STRANGE.values())
    write_split(split, good_files(15) + files + good_files(1))
    opened = ShardIndex.open(split)
    rotten = opened.num_samples - 1
    shards, offsets, sizes = opened.locate(np.array([rotten]))
    path = Path(opened.shard_paths[int(shards[0])])
    data = bytearray(path.read_bytes())
    data[int(offsets[0]) + int(sizes[0]) // 2] ^= 64
    path.write_bytes(data)
    return ShardIndex.open(split)


def batches(index, name, *, num_workers=0, rank=0, world_size=1, num_batches=None, **options):
    plan = SamplePlan(index.shard_sizes, seed=0, lanes=3, window=9)
    steps = RankSteps(
        plan=plan,
        global_batch=8,
        rank=rank,
        world_size=world_size,
        consumed=0,
        num_batches=num_batches or index.num_samples // 8,
    )
    return LOADERS[name](
        index=index,
        steps=steps,
        image_size=SIDE,
        augmentation=Augmentation(horizontal_flip=0.5),
        num_workers=num_workers,
        seed=5,
        **options,
    )


def test_the_set_is_one_epoch(index):
    assert index.num_samples == 15 + 12 + 12 + 1
    assert index.num_samples % 8 == 0


@pytest.mark.parametrize("name", LOADERS)
def test_each_fault_is_masked_and_counted_under_its_reason(index, name):
    found = list(batches(index, name))
    failures = {bad.sample_id: bad for batch in found for bad in batch.failures}
    expected = {15 + number: reason for number, (_, _, reason) in enumerate(BROKEN.values())}
    expected[index.num_samples - 1] = "checksum"
    assert {sample: bad.reason for sample, bad in failures.items()} == expected
    for sample, bad in failures.items():
        assert bad.message.startswith(f"{index.describe(sample)}: ")
        assert f"(key sample-{sample}) at byte" in bad.message
    for batch in found:
        for image, label, sample in zip(batch.images, batch.labels.tolist(), batch.ids.tolist(), strict=True):
            assert label == (-1 if sample in expected else sample // 4)
            assert bool(image.any()) == (sample not in expected)


@pytest.mark.parametrize("name", ["webdataset", "dali"])
def test_all_loaders_give_the_same_batches(index, name):
    for ours, others in zip(batches(index, "torch"), batches(index, name), strict=True):
        assert ours.images.equal(others.images)
        assert ours.labels.equal(others.labels)
        assert ours.ids.equal(others.ids)
        assert ours.failures == others.failures


def test_the_same_faults_on_any_number_of_ranks_and_workers(index):
    def counted(world_size, num_workers):
        count = Counter()
        for rank in range(world_size):
            for batch in batches(index, "torch", rank=rank, world_size=world_size, num_workers=num_workers):
                count.update(bad.reason for bad in batch.failures)
        return count

    expected = Counter(reason for _, _, reason in BROKEN.values()) + Counter(["checksum"])
    assert counted(1, 0) == counted(3, 0) == counted(2, 2) == expected
    assert expected.total() == 13


def test_strange_files_show_what_they_are():
    numbers = dict(zip(STRANGE, (4, 5, 6, 3, 7, 8, 9, 10, 11, 12, 13, 14), strict=True))
    exact = {"PNG called jpg", "PNG with alpha", "WebP", "BMP", "TIFF"}
    for name, (data, _) in STRANGE.items():
        shown, meant = decode_image(data).astype(int), pixels(numbers[name]).astype(int)
        if name == "PNG of 16 bits":
            np.testing.assert_array_equal(shown, np.repeat(meant[:, :, :1], 3, 2))
        elif name in exact:
            np.testing.assert_array_equal(shown, meant)
        else:
            reference = meant.mean(2, keepdims=True) if name == "gray JPEG" else meant
            assert np.abs(shown - reference).mean() < 30, name


def test_verify_finds_the_rotten_one_and_with_decoding_all(index):
    report = verify(index.directory, num_threads=2)
    assert [damage.reason for damage in report.damages] == ["checksum"]
    assert "(key sample-39)" in str(report)
    decoded = verify(index.directory, num_threads=2, decode=True)
    reasons = Counter(damage.reason for damage in decoded.damages)
    assert reasons == Counter(reason for _, _, reason in BROKEN.values()) + Counter(["checksum"])


@pytest.mark.parametrize("name", LOADERS)
def test_a_set_of_nothing_but_faults_still_gives_batches(tmp_path, name):
    split = tmp_path / "train"
    write_split(split, [(b"nothing", "jpg")] * 16)
    found = list(batches(ShardIndex.open(split), name))
    assert [batch.labels.tolist() for batch in found] == [[-1] * 8] * 2
    assert not any(bool(batch.images.any()) for batch in found)
    assert sum(len(batch.failures) for batch in found) == 16


@pytest.mark.parametrize("name", LOADERS)
def test_a_shard_that_shrinks_in_mid_run_is_truncated_samples(tmp_path, name):
    split = tmp_path / "train"
    write_split(split, good_files(16), per_shard=16)
    index = ShardIndex.open(split)
    _, offsets, _ = index.locate(np.array([10]))
    with open(index.shard_paths[0], "r+b") as file:
        file.truncate(int(offsets[0]) + 5)
    found = list(batches(index, name))
    reasons = {bad.sample_id: bad.reason for batch in found for bad in batch.failures}
    assert reasons == dict.fromkeys(range(10, 16), "truncated")
    assert any("bytes expected, but the file holds" in bad.message for batch in found for bad in batch.failures)


@pytest.mark.parametrize("name", LOADERS)
def test_a_shard_that_vanishes_in_mid_run_ends_it(tmp_path, name):
    split = tmp_path / "train"
    write_split(split, good_files(16))
    index = ShardIndex.open(split)
    for path in split.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"shard-00000\d.tar: the data shard cannot be opened: No such file"):
        list(batches(index, name))


def test_masked_images_are_zero_in_every_epoch(index):
    first = torch.cat([batch.labels for batch in batches(index, "torch", num_batches=10)])
    assert int((first == -1).sum()) == 26
