"""Several data sets as one: ids and labels laid one after the other, everything else asked of the part."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zlib

import numpy as np
import pytest
import torch

from partialfc.data.errors import SampleError
from partialfc.data.identity_plan import IdentityPlan
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedColumn, JoinedIndex
from partialfc.data.split_format import record_type, write_split_files
from partialfc.data.weighted_plan import RepeatPlan, WeightedPlan


def write_split(directory, labels, names, *, samples_per_shard=3, weights=None, quality=None):
    """A split of samples whose bytes are "FOLDER image NUMBER"."""
    directory.mkdir(parents=True)
    records = np.zeros(len(labels), dtype=record_type(weight=weights is not None, quality=quality is not None))
    shards = []
    for start in range(0, len(labels), samples_per_shard):
        name = f"shard-{len(shards):06d}.tar"
        stop = min(start + samples_per_shard, len(labels))
        with tarfile.open(directory / name, "w") as tar:
            for number in range(start, stop):
                data = f"{directory.name} image {number}".encode()
                member = tarfile.TarInfo(f"{names[labels[number]]}/{number}.jpg")
                member.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(member, io.BytesIO(data))
                fields = {"offset": offset, "label": labels[number], "size": len(data), "crc32": zlib.crc32(data)}
                for field, value in fields.items():
                    records[field][number] = value
        shards.append({"name": name, "bytes": (directory / name).stat().st_size, "num_samples": stop - start})
    for field, values in (("weight", weights), ("quality", quality)):
        if values is not None:
            records[field] = values
    write_split_files(directory, records, label_names=names, shards=shards)
    return ShardIndex.open(directory)


@pytest.fixture
def parts(tmp_path):
    return [
        write_split(tmp_path / "sets" / "a", [1, 0, 1, 1], ["Ada", "Bob"]),
        write_split(
            tmp_path / "sets" / "b", [2, 0, 1, 0, 2, 2, 2], ["Cy", "Dan", "Eve"], weights=[3, 1, 0, 1, 2, 2, 9]
        ),
        write_split(tmp_path / "c", [0, 0], ["Flo"], quality=[0.5, 0.25]),
    ]


@pytest.fixture
def joined(parts):
    return JoinedIndex(parts)


def test_counts_and_lists_are_those_of_all_parts(joined, parts, tmp_path):
    assert (joined.num_samples, joined.num_classes) == (13, 6)
    assert joined.directory == tmp_path
    assert joined.first_ids == [0, 4, 11]
    assert joined.shard_paths == [str(path) for part in parts for path in part.shard_paths]
    assert joined.shard_sizes == [3, 1, 3, 3, 1, 2]
    assert joined.shard_bytes == [size for part in parts for size in part.shard_bytes]
    assert joined.label_names == ["Ada", "Bob", "Cy", "Dan", "Eve", "Flo"]
    assert joined.image_bytes == sum(part.image_bytes for part in parts) == 13 * len("a image 0")
    assert joined.labels_in_shards is False


def test_columns_are_laid_one_after_the_other(joined):
    rows = np.array([12, 0, 4, 10, 11])
    assert joined.labels[:].tolist() == [1, 0, 1, 1, 4, 2, 3, 2, 4, 4, 4, 5, 5]
    assert joined.labels[rows].tolist() == [5, 1, 4, 4, 5]
    assert joined.labels[rows].dtype == np.int64
    assert joined.labels[7] == 2
    assert joined.labels[rows.reshape(5, 1)].shape == (5, 1)
    assert joined.labels[rows[:0]].tolist() == []
    assert joined.sizes[rows].dtype == np.uint32
    assert joined.sizes[rows].tolist() == [9] * 5
    assert joined.weights[:].tolist() == [1, 1, 1, 1, 3, 1, 0, 1, 2, 2, 9, 1, 1]
    assert np.isnan(joined.quality[:11]).all()
    assert joined.quality[11:].tolist() == [0.5, 0.25]
    assert joined.weights.dtype == joined.quality[rows].dtype == np.float32
    assert (len(joined.labels), joined.labels.shape) == (13, (13,))


def test_samples_by_label_are_those_of_the_labels(joined):
    labels = np.asarray(joined.labels)
    assert joined.by_label[:].tolist() == np.argsort(labels, kind="stable").tolist()
    assert joined.label_starts[:].tolist() == [0, *np.bincount(labels).cumsum()]
    assert len(joined.label_starts) == 7
    assert joined.label_starts[np.array([6, 2])].tolist() == [13, 4]


def test_columns_no_part_has_are_none(parts):
    assert JoinedIndex([parts[0], parts[2]]).weights is None
    assert JoinedIndex([parts[0], parts[1]]).quality is None


@pytest.mark.parametrize("rows", [13, -1, np.array([0, 13]), np.array([-1, 2])], ids=str)
def test_rows_outside_are_refused(joined, rows):
    with pytest.raises(IndexError, match=r"^row (13|-1) is outside \[0, 13\)$"):
        joined.labels[rows]


def test_a_column_reads_only_the_rows_that_are_asked_for():
    class Recorded:
        def __init__(self, values):
            self.values, self.asked = np.asarray(values), []

        def __len__(self):
            return len(self.values)

        def __getitem__(self, rows):
            self.asked.append(rows.tolist())
            return self.values[rows]

    first, second = Recorded([5, 6, 7]), Recorded([8, 9])
    column = JoinedColumn([first, second], np.int64, lengths=[3, 2], added=[0, 100])
    assert (first.asked, second.asked) == ([], [])
    assert column[np.array([4, 1, 4])].tolist() == [109, 6, 109]
    assert (first.asked, second.asked) == ([[1]], [[1, 1]])


def test_samples_are_read_from_their_part(joined):
    expected = [b"a image %d" % n for n in range(4)] + [b"b image %d" % n for n in range(7)]
    expected += [b"c image %d" % n for n in range(2)]
    assert [joined.read(sample) for sample in range(13)] == expected
    order = [12, 3, 4, 10, 0, 4]
    assert joined.read_many(np.array(order)) == [expected[sample] for sample in order]
    assert joined.read_many(np.array([], dtype=np.int64)) == []
    assert joined.key(5) == "Cy/1"


def test_samples_lie_where_their_part_says(joined, parts):
    shards, offsets, sizes = joined.locate(np.array([11, 4, 7, 3]))
    assert shards.tolist() == [5, 2, 3, 1]
    assert sizes.tolist() == [9] * 4
    assert offsets.tolist() == [512, 512, 512, 512]
    for sample, shard in zip([11, 4, 7, 3], shards, strict=True):
        with open(joined.shard_paths[shard], "rb") as file:
            file.seek(512)
            assert file.read(9) == joined.read(sample)
    assert joined.describe(5) == parts[1].describe(1)
    assert joined.describe(5).startswith(f"{parts[1].shard_paths[0]}, sample 1")


def test_the_storage_takes_the_numbers_of_all_data_shards(joined, parts):
    storage = joined.storage
    storage.check()
    assert storage.read(5, 512, 9) == b"c image 0"
    assert storage.read_many([5, 0, 3], [512, 512, 512], [9, 9, 9]) == [b"c image 0", b"a image 0", b"b image 3"]
    storage.warm(4, 0, 512)
    with open(parts[2].shard_paths[0], "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=re.escape(parts[2].shard_paths[0])):
        storage.check()


def test_a_bad_sample_keeps_its_place(joined, parts):
    with open(parts[1].shard_paths[0], "r+b") as file:
        file.seek(512)
        file.write(b"X")
    found = joined.read_many(np.array([0, 4, 5]))
    assert (found[0], found[2]) == (b"a image 0", b"b image 1")
    assert isinstance(found[1], SampleError)
    assert found[1].reason == "checksum"
    with pytest.raises(SampleError, match=r"shard-000000\.tar, sample 0 "):
        joined.read(4)


@pytest.mark.parametrize("sample", [-1, 13])
def test_samples_outside_are_refused(joined, sample):
    message = rf"sample id {sample} is outside \[0, 13\)$"
    for ask in (joined.read, joined.describe, joined.key):
        with pytest.raises(IndexError, match=message):
            ask(sample)
    for ask in (joined.read_many, joined.locate):
        with pytest.raises(IndexError, match=message):
            ask(np.array([0, sample]))


def test_names_that_parts_share_get_the_number_of_their_part(tmp_path):
    parts = [write_split(tmp_path / name, [0, 1], ["Ada", other]) for name, other in (("a", "Bob"), ("b", "Cy"))]
    assert JoinedIndex(parts).label_names == ["0/Ada", "0/Bob", "1/Ada", "1/Cy"]


def test_fingerprint_is_that_of_the_parts_in_their_order(joined, parts):
    assert joined.fingerprint == JoinedIndex(parts).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", joined.fingerprint)
    others = [parts[::-1], parts[:2], [parts[0], parts[2], parts[1]]]
    assert len({joined.fingerprint, *(JoinedIndex(other).fingerprint for other in others)}) == 4


def test_it_can_be_sent_to_another_process(joined):
    sent = pickle.loads(pickle.dumps(joined))
    assert sent.fingerprint == joined.fingerprint
    assert sent.read(12) == b"c image 1"
    assert sent.labels[:].tolist() == joined.labels[:].tolist()


def test_what_cannot_be_joined_is_refused(parts, tmp_path):
    for few in ([], parts[:1]):
        with pytest.raises(ValueError, match=f"^JoinedIndex: {len(few)} data sets given, but it joins two or more"):
            JoinedIndex(few)
    message = f"{tmp_path}/c and {tmp_path}/c are the same data set, and its identities would get two labels each"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        JoinedIndex([parts[2], parts[0], parts[2]])


def test_plans_take_the_columns_of_joined_data_sets(joined):
    labels, starts, by_label = (np.asarray(column) for column in (joined.labels, joined.label_starts, joined.by_label))
    positions = torch.arange(200)
    pairs = [
        (WeightedPlan(joined.weights, seed=1), WeightedPlan(np.asarray(joined.weights), seed=1)),
        (
            RepeatPlan(joined.labels, joined.label_starts, at_least=3, seed=1),
            RepeatPlan(labels, starts, at_least=3, seed=1),
        ),
        (IdentityPlan(joined.label_starts, joined.by_label, seed=1), IdentityPlan(starts, by_label, seed=1)),
    ]
    for lazy, whole in pairs:
        assert lazy.num_samples == whole.num_samples
        assert lazy.draw(positions).ids.equal(whole.draw(positions).ids)
    identities = torch.from_numpy(labels)[pairs[2][0].draw(positions[:198]).ids].view(-1, 6)
    assert bool((identities.sort(1).values == torch.arange(6)).all())
