"""Exports: folders that pack to the same set, and what cannot be exported. Records: see test_data_record_io."""

import io

import numpy as np
import pytest
from PIL import Image

from partialfc.data import ShardIndex
from partialfc.data.export import export_folder, export_records
from partialfc.data.packing import pack
from partialfc.data.sources import open_source
from partialfc.data.writer import SplitWriter


def encoded(seed, kind):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


@pytest.fixture
def split(tmp_path):
    """Four identities of four images, one of each kind."""
    for identity in ("ada", "bob b.", "é", "zoe"):
        for number, (kind, extension) in enumerate(EXTENSIONS.items()):
            path = tmp_path / "in" / identity / "sub" / f"{number}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(len(identity) * 10 + number, kind))
    pack(tmp_path / "in", tmp_path / "set", verification_share=0.0, seed=0, samples_per_shard=5)
    return tmp_path / "set" / "train"


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_folders_are_what_was_packed(split, tmp_path):
    calls = []
    report = export_folder(split, tmp_path / "out", on_progress=lambda *call: calls.append(call))
    assert files(tmp_path / "out") == files(tmp_path / "in")
    assert (report.num_images, report.num_identities, report.skipped) == (16, 4, ())
    assert calls == [(16, 16)]


def damage(split, sample_id):
    index = ShardIndex.open(split)
    shards, offsets, _ = index.locate(np.array([sample_id]))
    with open(index.shard_paths[int(shards[0])], "r+b") as file:
        file.seek(int(offsets[0]) + 40)
        byte = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_damaged_samples_are_left_out_and_named(split, tmp_path):
    for sample_id in (0, 7):
        damage(split, sample_id)
    report = export_folder(split, tmp_path / "folder")
    assert (report.num_images, [file.reason for file in report.skipped]) == (14, ["checksum", "checksum"])
    assert "shard-000001.tar, sample 7 (key bob b./sub/3)" in str(report)
    report = export_records(split, tmp_path / "records")
    assert report.num_images == 14
    source = open_source(tmp_path / "records")
    assert np.bincount(source.identities).tolist() == [3, 3, 4, 4]
    assert (tmp_path / "records" / "property").read_text() == "4,12,16\n"


def test_names_that_lead_out_are_refused(tmp_path):
    for name, key, message in (("../up", "a/0", "cannot name an identity"), ("ok", "ok/../../0", "leads out of its")):
        directory = tmp_path / name.strip("./")
        directory.mkdir()
        with SplitWriter(directory, samples_per_shard=4) as writer:
            writer.label_names = [name]
            writer.add(key, encoded(0, "PNG"), extension="png", label=0)
        with pytest.raises(ValueError, match=message):
            export_folder(directory, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ok", "up"]


def test_sets_larger_than_float32_counts(split, tmp_path, monkeypatch):
    monkeypatch.setattr("partialfc.data.export.MAX_EXACT_LABEL", 15)
    export_records(split, tmp_path / "many")
    lines = (tmp_path / "many" / "train.idx").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(key) for key in range(16)]
    source, index = open_source(tmp_path / "many"), ShardIndex.open(split)
    assert source.identities.tolist() == index.labels.tolist()
    assert [source.read(place) for place in range(16)] == [index.read(place) for place in range(16)]
    monkeypatch.setattr("partialfc.data.export.MAX_EXACT_LABEL", 3)
    with pytest.raises(ValueError, match=r"4 identities, but labels of this format are float32"):
        export_records(split, tmp_path / "more")
    assert not (tmp_path / "more").exists()
