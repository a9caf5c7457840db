"""Sources: lists, Parquet, LMDB, folders, and what is none."""

import io
import os
import pickle

import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from partialfc.data import ShardIndex
from partialfc.data.errors import SampleError
from partialfc.data.packing import pack
from partialfc.data.sources import open_source
from partialfc.data.sources.base import TextColumn, number_identities


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number} a.png").write_bytes(png(number))
    return tmp_path


def contents(source):
    return [(source.identity_name(place), source.key(place), source.read(place)) for place in range(source.num_entries)]


def packed(path, tmp_path, **options):
    report = pack(open_source(path, **options), tmp_path / "out", verification_share=0.0, seed=0)
    return report, ShardIndex.open(tmp_path / "out" / "train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "images/0 a.png 10\nimages/1 a.png 9\nimages/2 a.png 10\n"),
        ("a.lst", "images/0 a.png\t10\nimages/1 a.png\t9\r\n\nimages/2 a.png\t10"),
        ("a.tsv", "path\tlabel\nimages/0 a.png\t10\nimages/1 a.png\t9\nimages/2 a.png\t10\n"),
        ("a.csv", 'label,path\n10,images/0 a.png\n9,"images/1 a.png"\n10,images/2 a.png\n'),
    ],
)
def test_lists(folder, name, text):
    (folder / name).write_text(text)
    source = open_source(folder / name)
    assert source.identity_names == ["9", "10"]
    assert source.identities.tolist() == [1, 0, 1]
    assert [source.read(place) for place in range(3)] == [png(0), png(1), png(2)]
    keys = [source.key(place) for place in range(3)]
    assert [key.split("/")[0] for key in keys] == ["10", "9", "10"]
    assert len(set(keys)) == 3
    assert source.describe(0).startswith(f"{folder}/images/0 a.png ({folder}/{name}, line ")
    assert source.count_bytes(np.arange(3)) == sum(len(png(number)) for number in range(3))


def test_list_with_weights_and_a_root(folder):
    os.rename(folder / "images", folder / "moved")
    (folder / "a.csv").write_text("path,label,weight,quality\n0 a.png,ada,0.5,20\n1 a.png,zoe,2,30\nno.png,bob,1,1\n")
    report, index = packed(folder / "a.csv", folder, root=folder / "moved")
    assert index.label_names == ["ada", "zoe"]
    assert index.weights.tolist() == [0.5, 2.0]
    assert index.quality.tolist() == [20.0, 30.0]
    assert report.skipped_by_reason == {"unreadable": 1}
    assert report.empty_identities == ("bob",)
    assert report.skipped[0].path == f"{folder}/moved/no.png ({folder}/a.csv, line 4)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no image"),
        ("a.png 1\nb.png\n", r"line 2 has 1 columns, but path, label are expected: \['b.png'\]"),
        ("a.png\t1\t0.5\t7\tx\n", "line 1 has 5 columns"),
        ("a.png\t1\theavy\n", "line 1: weight is 'heavy', but must be a number"),
        ("path\tlabel\tage\n", r"line 1 names the columns \['age'\]"),
        ("a.png ../b\n", "'../b' cannot name an identity"),
        ("a.png /etc\n", "'/etc' cannot name an identity"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.txt")


def test_list_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a.png \xff\n")
    with pytest.raises(ValueError, match=r"a.txt: not a text file in UTF-8"):
        open_source(tmp_path / "a.txt")


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_in_row_groups_and_files(tmp_path, struct):
    images = [png(number) for number in range(300)]
    images[7] = None
    rows = [{"bytes": image, "path": None} for image in images] if struct else images
    labels = [(7 * number) % 11 for number in range(300)]
    table = pyarrow.table({"image": rows, "label": labels, "weight": np.arange(300.0)})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table.slice(0, 200), tmp_path / "set" / "a.parquet", row_group_size=90)
    pyarrow.parquet.write_table(table.slice(200), tmp_path / "set" / "b.parquet", row_group_size=1000)
    source = open_source(tmp_path / "set")
    assert source.identity_names == [str(label) for label in range(11)]
    assert source.identities.tolist() == labels
    assert source.weights.tolist() == list(range(300))
    for place in (299, 3, 5, 0, 89, 90, 179, 180, 199, 200, 250, 201):
        assert source.read(place) == images[place]
    assert source.describe(95) == f"{tmp_path}/set/a.parquet, row group 1, row 5"
    assert source.key(95) == f"{labels[95]}/0-1-5"
    with pytest.raises(SampleError, match="row 7 of row group 0 has no image"):
        source.read(7)
    again = pickle.loads(pickle.dumps(source.part(np.arange(80, 100))))
    assert [again.read(place) for place in range(20)] == images[80:100]


def test_parquet_with_texts_and_other_columns(tmp_path):
    table = pyarrow.table({"photo": [png(0), png(1), png(2)], "who": ["zoe", "ada", "zoe"]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"has no column image or .*, but \['photo', 'who'\]; set image_column"):
        open_source(path)
    source = open_source(path, image_column="photo", label_column="who")
    assert [name for name, _, _ in contents(source)] == ["zoe", "ada", "zoe"]
    assert source.identity_names == ["ada", "zoe"]
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"", b""], "who": ["a", None]}), path)
    with pytest.raises(ValueError, match="column who: 1 rows have no label"):
        open_source(path, label_column="who")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""], "label": [0.5]}), path)
    with pytest.raises(ValueError, match="is of type double, but labels are whole numbers or texts"):
        open_source(path)


def write_lmdb(path, values):
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


def test_lmdb_with_identities_in_its_keys(tmp_path):
    values = {"zoe/1.png": png(0), "ada/é.b.png": png(1), "ada/c/2": png(2), "__len__": b"3"}
    source = open_source(write_lmdb(tmp_path / "base", values))
    assert source.identity_names == ["ada", "zoe"]
    assert contents(source) == [("ada", "ada/c/2", png(2)), ("ada", "ada/é_b", png(1)), ("zoe", "zoe/1", png(0))]
    assert [(file.reason, file.message) for file in source.skipped] == [("other key", "not of the form identity/name")]
    report, index = packed(tmp_path / "base", tmp_path)
    assert index.labels.tolist() == [0, 0, 1]
    assert report.train_images == 3
    again = pickle.loads(pickle.dumps(source))
    assert again.read(0) == png(2)
    assert source.count_bytes(np.array([0, 2])) == len(png(2)) + len(png(0))


def test_lmdb_keys_that_become_one(tmp_path):
    with pytest.raises(ValueError, match=r"the keys 'ada/1.jpg' and 'ada/1.png' both become 'ada/1'"):
        open_source(write_lmdb(tmp_path / "base", {"ada/1.png": b"", "ada/1.jpg": b""}))


def test_lmdb_with_a_list(tmp_path):
    path = write_lmdb(tmp_path / "base", {"000001": png(0), "000002": png(1)})
    with pytest.raises(ValueError, match=r"no key of the form identity/name among 2; .*base/labels.tsv"):
        open_source(path)
    (path / "labels.tsv").write_text("000002\t5\n000001\t3\nnone\t3\n")
    source = open_source(path)
    assert contents(source.part(np.arange(2))) == [("5", "5/1", png(1)), ("3", "3/2", png(0))]
    with pytest.raises(SampleError, match="no such key"):
        source.read(2)


def test_what_is_no_source_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder; expected a folder with one folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.zip: a file that ends with '.zip' cannot be imported; expected a folder"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="root is for lists alone"):
        open_source(folder, root=folder)
    with pytest.raises(ValueError, match="image_column and label_column are for Parquet"):
        open_source(folder, label_column="who")
    (tmp_path / "a.mdb").write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match=r"a.mdb: not an LMDB database"):
        open_source(tmp_path / "a.mdb")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.mdb").write_bytes(b"")
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install partialfc\[lmdb\]"):
        open_source(tmp_path / "a.mdb")
    with pytest.raises(ImportError, match=r"pip install partialfc\[parquet\]"):
        open_source(tmp_path / "a.parquet")


def test_digest_tells_lists_apart(folder):
    digests = set()
    for text in ("images/0 a.png 1\n", "images/1 a.png 1\n", "images/0 a.png 2\n"):
        (folder / "a.txt").write_text(text)
        os.utime(folder / "a.txt", (0, 0))
        digests.add(open_source(folder / "a.txt").digest())
    assert len(digests) == 3
    assert open_source(folder / "a.txt").digest() in digests


def test_text_column_holds_any_name():
    texts = ["", "ab", "é\udcff", "", "日本"]
    column = TextColumn.of(texts)
    assert [column[place] for place in range(5)] == texts
    part = column.take(np.array([4, 0, 2]))
    assert [part[place] for place in range(3)] == ["日本", "", "é\udcff"]


def test_numbers_are_ordered_as_numbers():
    assert number_identities(["10", "9", "007"], where="")[0] == ["007", "9", "10"]
    names, places = number_identities(["10", "9", "b"], where="")
    assert names == ["10", "9", "b"]
    assert places.tolist() == [0, 1, 2]
