"""The commands `partialfc data ...`, end to end on small sets."""

import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_faults import BROKEN, encoded, good_files, write_split
from PIL import Image

from partialfc.cli import main
from partialfc.data import ShardIndex


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five identities with four photos each, and a file that is none."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    for number in range(20):
        path = root / f"person-{number // 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, "JPEG", quality=95))
    (root / "person-0" / "broken.jpg").write_bytes(BROKEN["half a JPEG"][0])
    return root


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "set"
    assert main(["data", "pack", str(photos), "--out", str(out), "--samples-per-shard", "6"]) == 0
    return out / "train"


def run(capsys, *arguments, code=0):
    assert main(["data", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def contents(split):
    """What a split holds, wherever it lies and in whatever order."""
    index = ShardIndex.open(split)
    return sorted((index.label_names[index.labels[number]], index.read(number)) for number in range(index.num_samples))


def test_pack_says_what_was_left_out(photos, tmp_path, capsys):
    text = run(capsys, "pack", photos, "--out", tmp_path / "set", "--verification-share", "0.2")
    assert "train: 4 identities, 16 images" in text
    assert "verification: 1 identities, 4 images" in text
    assert "skipped: 1 (1 damaged image)" in text
    assert "broken.jpg" in text
    again = run(capsys, "pack", photos, "--out", tmp_path / "set", code=2)
    assert "already there and not an empty folder" in again


def test_a_dry_run_writes_nothing(photos, tmp_path, capsys):
    text = run(capsys, "pack", photos, "--out", tmp_path / "set", "--dry-run")
    assert "21" in text
    assert list(tmp_path.iterdir()) == []


def test_index_of_tars_that_lie_elsewhere(packed, tmp_path, capsys):
    text = run(capsys, "index", packed / "*.tar", "--out", tmp_path / "mine" / "train", "--remap")
    assert "20" in text
    index = ShardIndex.open(tmp_path / "mine" / "train")
    original = ShardIndex.open(packed)
    assert index.shard_paths == original.shard_paths
    assert [index.read(number) for number in range(20)] == [original.read(number) for number in range(20)]
    run(capsys, "stats", tmp_path / "mine")


def test_stats_and_grid(packed, tmp_path, capsys):
    assert "20 of 5 identities" in run(capsys, "stats", packed.parent)
    run(capsys, "sample-grid", packed, tmp_path / "grid.png", "--identities", "3", "--images-per-identity", "4")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG"
        assert image.size[0] > 4 * 112


def test_verify_ends_with_an_error_if_something_is_wrong(tmp_path, capsys):
    split = tmp_path / "train"
    write_split(split, good_files(8))
    assert "8" in run(capsys, "verify", split)
    shard = split / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1  # Within the first image.
    shard.write_bytes(data)
    assert main(["data", "verify", str(split), "--decode"]) == 2
    captured = capsys.readouterr()
    assert "key sample-0" in captured.out
    assert "the data set is damaged, as listed above" in captured.err


def test_split_merge_and_dedup_give_the_same_images(packed, tmp_path, capsys):
    run(capsys, "split", packed, "--share", "0.4", "--out", tmp_path / "two")
    train, rest = tmp_path / "two" / "train", tmp_path / "two" / "verification"
    assert ShardIndex.open(rest).num_classes == 2
    run(capsys, "merge", train, rest, "--out", tmp_path / "whole")
    assert contents(tmp_path / "whole" / "train") == contents(packed)
    run(capsys, "merge", packed, train, "--out", tmp_path / "doubled")
    assert ShardIndex.open(tmp_path / "doubled" / "train").num_samples == 32
    assert "12" in run(capsys, "dedup", tmp_path / "doubled" / "train", "--out", tmp_path / "clean")
    assert contents(tmp_path / "clean" / "train") == contents(packed)


def test_export_to_a_folder_and_to_records_and_back(packed, tmp_path, capsys):
    run(capsys, "export", packed, "--format", "folder", "--out", tmp_path / "folder")
    assert len(list((tmp_path / "folder").rglob("*.jpg"))) == 20
    run(capsys, "export", packed, "--format", "rec", "--out", tmp_path / "records")
    (magic,) = struct.unpack("<I", (tmp_path / "records" / "train.rec").read_bytes()[:4])
    assert magic == 0xCED7230A
    for name in ("folder", "records"):
        run(capsys, "pack", tmp_path / name, "--out", tmp_path / f"{name}-again")
        back = contents(tmp_path / f"{name}-again" / "train")
        assert sorted(data for _, data in back) == sorted(data for _, data in contents(packed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "nowhere", "--out", "x"], "nowhere"),
        (["index", "nowhere/*.tar", "--out", "x"], "nowhere"),
        (["stats", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "no such folder"),
        (["merge", "nowhere", "--out", "x"], "two"),
        (["pack", "empty.rec", "--out", "x"], "empty.rec: there is no record in it"),
        (["pack", "nan.csv", "--out", "x"], "nan.csv: line 2: weight is 'nan', but must be finite and not negative"),
        (["pack", "minus.csv", "--out", "x"], "minus.csv: line 2: weight is '-1', but must be finite and not negative"),
        (["pack", "text.parquet", "--out", "x"], "column image holds str, but must hold the bytes of images"),
        (["export", "nowhere", "--format", "rec", "--out", "x"], "no such folder"),
    ],
)
def test_a_mistake_is_one_message(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.rec").touch()
    for name, weight in (("nan", "nan"), ("minus", "-1")):
        Path(f"{name}.csv").write_text(f"path,label,weight\n0.jpg,5,{weight}\n")
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x", "y"], "label": [1, 2]}), "text.parquet")
    error = run(capsys, *arguments, code=2)
    assert message in error
    assert "Traceback" not in error
    assert not Path("x").exists()


def test_the_same_split_twice_is_not_merged(packed, tmp_path, capsys):
    error = run(capsys, "merge", packed, packed, "--out", tmp_path / "twice", code=2)
    assert "hold the same data; name it once" in error
    assert list(tmp_path.iterdir()) == []


def test_a_tar_with_two_names_is_indexed_once(packed, tmp_path, capsys):
    shard = packed / "shard-000000.tar"
    (tmp_path / "other.tar").symlink_to(shard)
    error = run(capsys, "index", shard, tmp_path / "other.tar", "--out", tmp_path / "x", code=2)
    assert "named 2 times; name each tar once" in error
    assert not (tmp_path / "x").exists()
