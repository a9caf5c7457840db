"""insightface's records: written here by hand in the published layout, read without mxnet."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image

from partialfc.data import ShardIndex
from partialfc.data.errors import SampleError
from partialfc.data.export import export_records
from partialfc.data.packing import pack
from partialfc.data.sources import open_source
from partialfc.data.sources.record_io import read_record, scan_records, write_record

MAGIC = struct.pack("<I", 0xCED7230A)


def framed(payload):
    """dmlc's RecordIO, part by part: cut where the magic stands at a multiple of 4 bytes."""
    parts, start = [], 0
    for place in range(0, len(payload) // 4 * 4, 4):
        if payload[place : place + 4] == MAGIC and place >= start:
            parts.append(payload[start:place])
            start = place + 4
    parts.append(payload[start:])
    kinds = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
        for kind, part in zip(kinds, parts, strict=True)
    )


def image_record(label, key, image):
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def labels_record(labels, key, image=b""):
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0.0, key, 0, *labels) + image


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_set(folder, payloads, *, index=True, properties="3,20,20"):
    """Writes train.rec with the payloads under the keys 0, 1 ..., and what lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    offset, lines = 0, []
    with open(folder / "train.rec", "wb") as file:
        for key, payload in enumerate(payloads):
            lines.append(f"{key}\t{offset}\n")
            offset += file.write(framed(payload))
    if index:
        (folder / "train.idx").write_text("".join(lines))
    if properties:
        (folder / "property").write_text(properties)
    return folder


def insightface_payloads(labels, images):
    """Header record, images under 1 ... n, one range record for each identity after them."""
    end, identities = len(images) + 1, sorted(set(labels))
    payloads = [labels_record([end, end + len(identities)], 0)]
    payloads += [
        image_record(label, key, image) for key, (label, image) in enumerate(zip(labels, images, strict=True), start=1)
    ]
    for number, identity in enumerate(identities):
        first = labels.index(identity) + 1
        payloads.append(labels_record([first, first + labels.count(identity)], end + number))
    return payloads


@pytest.fixture
def images():
    return [jpeg(seed) for seed in range(7)]


LABELS = [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("index", [True, False])
def test_images_and_labels_are_read(tmp_path, images, index):
    source = open_source(write_set(tmp_path / "faces", insightface_payloads(LABELS, images), index=index))
    assert source.num_entries == 7
    assert source.identity_names == ["0", "1", "2"]
    assert source.identities.tolist() == LABELS
    assert [source.read(position) for position in range(7)] == images
    assert [source.key(position) for position in range(3)] == ["0/1", "0/2", "1/3"]
    assert source.describe(0) == f"{tmp_path}/faces/train.rec, record 1 at byte 40"
    assert source.notes == ()
    part = source.part(np.array([4, 6]))
    assert (part.read(0), part.read(1), part.key(0), part.key(1)) == (images[4], images[6], "1/5", "2/7")


def test_payloads_that_hold_the_magic_are_joined(tmp_path, images):
    # At multiples of 4 of the payload: right at the start of the image, twice in a row, and at the very end.
    marked = [MAGIC + images[0], images[1] + b"\0" * (-len(images[1]) % 4) + MAGIC * 2 + b"xyz", b"ab" + MAGIC]
    marked.append(b"1234" + MAGIC)
    payloads = [image_record(0, key, image) for key, image in enumerate(marked)]
    folder = write_set(tmp_path / "faces", payloads, properties=None)
    assert (folder / "train.rec").read_bytes().count(MAGIC) > len(payloads)
    for index in (True, False):
        if not index:
            (folder / "train.idx").unlink()
        source = open_source(folder / "train.rec")
        assert [source.read(position) for position in range(4)] == marked


def test_our_framing_is_the_published_one(tmp_path):
    payloads = [b"", b"abc", MAGIC, MAGIC * 3, b"abcd" + MAGIC + b"e", b"ab" + MAGIC + b"cd" + MAGIC, b"z" * 999]
    buffer = io.BytesIO()
    for payload in payloads:
        write_record(buffer, payload)
    assert buffer.getvalue() == b"".join(framed(payload) for payload in payloads)
    (tmp_path / "a.rec").write_bytes(buffer.getvalue())
    with open(tmp_path / "a.rec", "rb") as file:
        offsets = list(scan_records(file.fileno(), path="a.rec"))
        assert [read_record(file.fileno(), offset, path="a.rec") for offset in offsets] == payloads


def test_first_of_several_labels_counts(tmp_path, images):
    payloads = [labels_record([2.0, 0.5, 0.25], 0, images[0]), image_record(0, 1, images[1]), image_record(1, 2, b"x")]
    source = open_source(write_set(tmp_path / "faces", payloads))
    assert source.identities.tolist() == [2, 0, 1]
    assert source.read(0) == images[0]


def test_gaps_in_labels_are_closed_and_said(tmp_path, images):
    payloads = insightface_payloads([5, 5, 700, 9, 9, 10, 10], images)
    folder = write_set(tmp_path / "faces", payloads, properties="1000,20,20")
    source = open_source(folder)
    assert source.identity_names == ["5", "9", "10", "700"]
    assert source.identities.tolist() == [0, 0, 3, 1, 1, 2, 2]
    assert "996 of 1,000 labels have no image, so the identities get new numbers" in source.notes[0]
    report = pack(source, tmp_path / "out", verification_share=0.0, seed=0)
    assert "get new numbers" in str(report)
    assert ShardIndex.open(tmp_path / "out" / "train").label_names == ["5", "9", "10", "700"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2.0**24, r"the label 16777216 is not below 2\^24 = 16777216.*float32"),
        (1.5, r"record 1 has the label 1.5, but labels are whole numbers"),
        (-1.0, r"record 1 has the label -1.0"),
        (float("nan"), r"record 1 has the label nan"),
    ],
)
def test_impossible_labels_are_refused(tmp_path, images, label, message):
    payloads = [image_record(0, 0, images[0]), image_record(label, 1, images[1])]
    with pytest.raises(ValueError, match=message):
        open_source(write_set(tmp_path / "faces", payloads, properties=None))


def test_highest_exact_label_is_taken(tmp_path, images):
    payloads = [image_record(2**24 - 1, 0, images[0])]
    source = open_source(write_set(tmp_path / "faces", payloads, properties=None))
    assert source.identity_names == ["16777215"]


def test_property_is_checked(tmp_path, images):
    payloads = insightface_payloads(LABELS, images)
    with pytest.raises(ValueError, match=r"property: 2 identities, but train.rec has the label 2"):
        open_source(write_set(tmp_path / "few", payloads, properties="2,20,20"))
    with pytest.raises(ValueError, match=r"property: 'many' does not begin with the number"):
        open_source(write_set(tmp_path / "odd", payloads, properties="many"))


def test_damaged_framing_is_named(tmp_path, images):
    folder = write_set(tmp_path / "faces", insightface_payloads(LABELS, images))
    lines = (folder / "train.idx").read_text().splitlines()
    third, whole = int(lines[3].split()[1]), (folder / "train.rec").read_bytes()
    damaged = bytearray(whole)
    damaged[third] ^= 1
    (folder / "train.rec").write_bytes(damaged)
    message = rf"train.rec: no record part at byte {third}: 0xced7230b stands there, not 0xced7230a"
    with pytest.raises(ValueError, match=message):
        open_source(folder)
    (folder / "train.idx").unlink()
    with pytest.raises(ValueError, match=message):
        open_source(folder)
    (folder / "train.rec").write_bytes(whole[: third + 100])
    with pytest.raises(ValueError, match=rf"train.rec: the record at byte {third} needs more bytes than the file has"):
        open_source(folder)
    (folder / "train.rec").write_bytes(whole[: third + 3])
    with pytest.raises(ValueError, match=rf"train.rec: the file ends at byte {third + 3}, within a record"):
        open_source(folder)


def test_last_record_cut_off_is_named(tmp_path, images):
    folder = write_set(tmp_path / "faces", [image_record(0, key, image) for key, image in enumerate(images)])
    last = int((folder / "train.idx").read_text().splitlines()[-1].split()[1])
    os.truncate(folder / "train.rec", last + 100)
    with pytest.raises(ValueError, match=rf"the record at byte {last} needs \d+ bytes, but the file ends after 100"):
        open_source(folder)


def test_record_without_an_image_header_is_named(tmp_path, images):
    folder = write_set(tmp_path / "faces", [image_record(0, 0, images[0]), b"short"])
    with pytest.raises(ValueError, match=r"train.rec, record 1 at byte \d+: a record of 5 bytes has no image header"):
        open_source(folder)
    folder = write_set(tmp_path / "other", [struct.pack("<IfQQ", 9, 0.0, 0, 0)])
    with pytest.raises(ValueError, match="a record of 24 bytes cannot hold the 9 labels it claims"):
        open_source(folder)


def test_index_of_another_set_is_refused(tmp_path, images):
    folder = write_set(tmp_path / "faces", insightface_payloads(LABELS, images))
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    size = (folder / "train.rec").stat().st_size
    (folder / "train.idx").write_text("".join(lines) + f"99\t{size + 4}\n")
    with pytest.raises(ValueError, match=rf"lists the byte offsets 0 to {size + 4}, but train.rec has {size}"):
        open_source(folder)
    (folder / "train.idx").write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(ValueError, match=r"the record at byte \d+ ends at byte \d+, but the .idx file lists"):
        open_source(folder)
    (folder / "train.idx").write_text("".join(lines) + lines[2])
    with pytest.raises(ValueError, match=r"train.idx: the key 2 is listed twice"):
        open_source(folder)
    (folder / "train.idx").write_text("1\tx\n")
    with pytest.raises(ValueError, match=r"train.idx: not lines of key<TAB>byte offset"):
        open_source(folder)


def test_record_cut_off_after_listing_is_a_bad_sample(tmp_path, images):
    folder = write_set(tmp_path / "faces", insightface_payloads(LABELS, images))
    source = open_source(folder)
    os.truncate(folder / "train.rec", int(source.locators["offset"][5]) + 50)
    assert source.read(4) == images[4]
    with pytest.raises(SampleError, match="needs more bytes than the file has") as caught:
        source.read(5)
    assert caught.value.reason == "truncated"


def test_blank_image_is_skipped_and_counted(tmp_path, images):
    images[3] = b""
    folder = write_set(tmp_path / "faces", insightface_payloads(LABELS, images))
    report = pack(folder, tmp_path / "out", verification_share=0.0, seed=0)
    assert (report.train_images, report.train_identities) == (6, 3)
    assert report.skipped_by_reason == {"not an image": 1}
    assert "train.rec, record 4 at byte" in report.skipped[0].path


def test_records_packed_and_exported_are_equal(tmp_path, images):
    folder = write_set(tmp_path / "faces", insightface_payloads(LABELS, images))
    pack(folder, tmp_path / "set", verification_share=0.0, seed=0, samples_per_shard=3)
    report = export_records(tmp_path / "set" / "train", tmp_path / "again")
    assert (report.num_images, report.num_identities, report.skipped) == (7, 3, ())
    # The labels of header records differ in the second number alone where insightface writes none; here they are equal.
    assert (tmp_path / "again" / "train.rec").read_bytes() == (folder / "train.rec").read_bytes()
    assert (tmp_path / "again" / "train.idx").read_text() == (folder / "train.idx").read_text()
    assert (tmp_path / "again" / "property").read_text() == "3,20,20\n"


def test_shuffled_records_are_exported_identity_by_identity(tmp_path, images):
    labels = [2, 0, 1, 0, 2, 1, 1]
    payloads = [image_record(label, key, image) for key, (label, image) in enumerate(zip(labels, images, strict=True))]
    pack(write_set(tmp_path / "faces", payloads), tmp_path / "set", verification_share=0.0, seed=0)
    export_records(tmp_path / "set" / "train", tmp_path / "again")
    source = open_source(tmp_path / "again")
    assert source.identities.tolist() == sorted(labels)
    found = sorted((label, source.read(place)) for place, label in enumerate(source.identities.tolist()))
    assert found == sorted(zip(labels, images, strict=True))
