"""Indexing tars that others wrote, and walking through tars of all kinds."""

import io
import json
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from partialfc.data.index import ShardIndex
from partialfc.data.indexing import index_tars
from partialfc.data.piece_cache import CacheSettings
from partialfc.data.tar_scan import SequentialFile, TarError, scan_tar, split_name
from partialfc.data.writer import SplitWriter

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number=0, kind="JPEG", size=(12, 12)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members, *, kind="ustar"):
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def people(first, count, *, labels=3):
    for number in range(first, first + count):
        yield f"p/{number:04d}.jpg", picture(number)
        yield f"p/{number:04d}.cls", str(number % labels).encode()


def scan(path):
    with SequentialFile(str(path), CacheSettings()) as file:
        return list(scan_tar(file, wants=lambda name: True))


# Walking through tars.

LONG = "f" * 90 + "/" + "g" * 90
LONGER = "/".join(["h" * 70] * 5)


@pytest.mark.parametrize("kind", FORMATS)
def test_members_of_each_format_equal_those_of_tarfile(tmp_path, kind):
    names = ["a.jpg", "d/b.c.png", f"{LONG}.jpg"]
    if kind != "ustar":
        names += [f"{LONGER}.jpg", "Übung/é.jpg"]
    path = write_tar(
        tmp_path / "a.tar", [(name, os.urandom(511 + place)) for place, name in enumerate(names)], kind=kind
    )
    found = scan(path)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size, tar.extractfile(info).read()) for info in tar]
    assert [member[:4] for member in found] == expected
    assert [member.name for member in found] == names
    assert all(member.is_file and member.is_padded_with_zeros for member in found)


def test_sizes_beyond_octal_numbers(tmp_path):
    info = tarfile.TarInfo("big.bin")
    info.size = 9 * 2**30
    for kind in ("gnu", "pax"):
        path = tmp_path / f"{kind}.tar"
        with open(path, "wb") as file:
            file.write(info.tobuf(FORMATS[kind]))
            start = file.tell()
            file.truncate(start + info.size + 1024)  # A hole in the file: nothing is stored.
        with SequentialFile(str(path), CacheSettings()) as file:
            (member,) = scan_tar(file, wants=lambda name: False)
        assert (member.name, member.offset, member.size) == ("big.bin", start, info.size)


def test_links_and_folders_are_no_files(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [("d", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.jpg"
            tar.addfile(info)
    assert [(member.name, member.is_file) for member in scan(path)] == [
        ("d/", False),
        ("s.jpg", False),
        ("h.jpg", False),
    ]


def damaged(tmp_path, change):
    path = tmp_path / "a.tar"
    write_tar(path, people(0, 5))
    content = bytearray(path.read_bytes())
    changed = change(content)
    path.write_bytes(content if changed is None else changed)
    return path


def end_of_members(content):
    return len(content.rstrip(b"\0")) // 512 * 512 + 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", r"a\.tar: the tar has no bytes"),
        (lambda content: content[:700], r"cut inside of 'p/0000\.jpg': it needs \d+ bytes, the file has 700"),
        (lambda content: content[: end_of_members(content)], r"ends at byte \d+, without an end-of-archive marker"),
        (
            lambda content: content[: end_of_members(content) - 1024 + 100],
            r"ends inside of a header at byte \d+, without an end-of-archive",
        ),
        (lambda content: content.__setitem__(3, 88), r"the header at byte 0 does not match its checksum"),
        (lambda content: content.__setitem__(150, 88), r"no tar header at byte 0"),
        (lambda content: content + content, r"there are bytes at 20480, behind the end-of-archive marker.*`cat`"),
    ],
)
def test_damage_is_named_with_its_byte(tmp_path, change, message):
    with pytest.raises(TarError, match=message):
        scan(damaged(tmp_path, change))


def test_sparse_files_are_refused(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.type = b"S"
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(TarError, match="sparse file at byte 0"):
        scan(tmp_path / "a.tar")
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(TarError, match="sparse file at byte 1024"):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize("content", [b"99 path=x\n", b"7 path=x\n", b"x path=x\n", b"17 size=notanum\n"])
def test_damaged_pax_headers(tmp_path, content):
    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", len(content)
    data = info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0") + tarfile.TarInfo("a.jpg").tobuf() + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(TarError, match=r"the PAX header at byte 512"):
        scan(tmp_path / "a.tar")


def test_keys_are_those_of_webdataset():
    assert split_name("a/b.c/d.e.JPG") == ("a/b.c/d", "e.jpg")
    assert split_name("d.cls") == ("d", "cls")
    assert split_name("a/.hidden") is None
    assert split_name("a/README") is None


# Indexing.


def test_an_index_of_foreign_tars_reads_their_images(tmp_path):
    paths = [
        write_tar(tmp_path / f"x-{number:03d}.tar", people(10 * number, 10), kind=kind)
        for number, kind in enumerate(FORMATS)
    ]
    calls = []
    report = index_tars(
        f"{tmp_path}/x-{{000..002}}.tar",
        tmp_path / "out",
        num_workers=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert (report.num_samples, report.num_classes, report.num_shards, report.problems) == (30, 3, 3, ())
    assert calls == [(1, 3), (2, 3), (3, 3)]
    index = ShardIndex.open(tmp_path / "out")
    assert index.shard_paths == paths
    assert index.label_names == ["0", "1", "2"]
    assert index.labels_in_shards
    assert index.weights is None
    assert index.quality is None
    assert [index.read(number) for number in range(30)] == [picture(number) for number in range(30)]
    assert index.labels.tolist() == [number % 3 for number in range(30)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "by_label.npy",
        "index.npy",
        "label_names.json",
        "label_starts.npy",
        "manifest.json",
    ]


def test_workers_and_ways_to_name_tars_change_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    paths = [write_tar(tmp_path / "in" / f"{number}.tar", people(5 * number, 5)) for number in range(3)]
    fingerprints = set()
    for number, tars in enumerate([paths, f"{tmp_path}/in", f"{tmp_path}/in/*.tar", [f"{tmp_path}/in/{{0..2}}.tar"]]):
        index_tars(tars, tmp_path / f"out{number}", num_workers=int(number == 1))
        fingerprints.add(ShardIndex.open(tmp_path / f"out{number}").fingerprint)
    assert len(fingerprints) == 1


def test_what_cannot_be_used_is_listed_with_key_and_byte(tmp_path):
    good, label = picture(0), b"0"
    members = [
        ("ok.jpg", good),
        ("ok.cls", label),
        ("no_label.jpg", good),
        ("no_image.cls", label),
        ("cut.jpg", good[: len(good) // 2]),
        ("cut.cls", label),
        ("text.jpg", b"<html>"),
        ("text.cls", label),
        ("empty.jpg", b""),
        ("empty.cls", label),
        ("two.jpg", good),
        ("two.png", picture(1, "PNG")),
        ("two.cls", label),
        ("blank.jpg", good),
        ("blank.cls", b" \n"),
        ("json.jpg", good),
        ("json.json", b"{oops"),
        ("half.jpg", good),
        ("half.json", b'{"label": 1.5}'),
        ("weight.jpg", good),
        ("weight.json", b'{"label": 0, "weight": -1}'),
        ("ok.jpg", good),
        ("ok.cls", label),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    report = index_tars(path, tmp_path / "out")
    assert report.num_samples == 1
    assert [(problem.key, problem.reason) for problem in report.problems] == [
        ("no_label", "no label"),
        ("no_image", "no image"),
        ("cut", "damaged image"),
        ("text", "not an image"),
        ("empty", "not an image"),
        ("two", "several images"),
        ("blank", "bad label"),
        ("json", "bad label"),
        ("half", "bad label"),
        ("weight", "bad number"),
        ("ok", "duplicate key"),
    ]
    with tarfile.open(path) as tar:
        assert report.problems[2].offset == tar.getmember("cut.jpg").offset_data
    text = str(report)
    assert "left out: 11 samples" in text
    assert f"{path}, key text at byte" in text
    assert "3 x bad label" in text
    assert index_tars(path, tmp_path / "undecoded", decode=False).num_samples == 3


def test_links_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in people(0, 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("l.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "p/0000.jpg"
        tar.addfile(info)
        info = tarfile.TarInfo("l.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"0"))
    (problem,) = index_tars(str(tmp_path / "a.tar"), tmp_path / "out").problems
    assert (problem.key, problem.reason) == ("l", "not a file")


def test_labels_weights_and_quality_from_json(tmp_path):
    members = []
    for number, values in enumerate(
        [
            {"label": 0, "quality": 0.5},
            {"cls": "1", "weight": 2, "quality": 1},
            {"identity": 0, "other": [1], "quality": 0.25},
        ]
    ):
        members += [(f"{number}.png", picture(number, "PNG")), (f"{number}.json", json.dumps(values).encode())]
    report = index_tars(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.tolist() == [0, 1, 0]
    assert index.weights.tolist() == [1.0, 2.0, 1.0]
    assert index.quality.tolist() == [0.5, 1.0, 0.25]
    assert not index.labels_in_shards
    assert "data.exact=false is refused" in str(report)


def test_quality_of_some_samples_alone_is_refused(tmp_path):
    members = [*people(0, 3), ("x.jpg", picture()), ("x.json", b'{"label": 0, "quality": 1}')]
    with pytest.raises(ValueError, match="3 of 4 samples have no quality, but others do"):
        index_tars(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def labelled(tmp_path, labels):
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.jpg", picture(number)), (f"{number}.cls", label.encode())]
    return write_tar(tmp_path / "a.tar", members)


def test_labels_with_gaps_need_remap(tmp_path):
    path = labelled(tmp_path, ["7", "2", "100", "2"])
    message = r"the 3 labels in the tars go from 2 to 100: of 0 to 100, 98 have no sample, first 0 .*--remap"
    with pytest.raises(ValueError, match=message):
        index_tars(path, tmp_path / "out")
    report = index_tars(path, tmp_path / "out", remap=True)
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.tolist() == [1, 0, 2, 0]
    assert index.label_names == ["2", "7", "100"]
    assert not index.labels_in_shards
    assert not report.labels_in_shards


def test_names_as_labels_need_remap(tmp_path):
    path = labelled(tmp_path, ["grace", "ada", "12", "ada"])
    with pytest.raises(ValueError, match=r"labels in the tars are names, such as 'ada'; pass --remap to number the 3"):
        index_tars(path, tmp_path / "out")
    index_tars(path, tmp_path / "out", remap=True)
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.tolist() == [2, 1, 0, 1]
    assert index.label_names == ["12", "ada", "grace"]


def test_remap_leaves_good_labels_alone(tmp_path):
    index_tars(labelled(tmp_path, ["1", "0", "01\n"]), tmp_path / "out", remap=True)
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.tolist() == [1, 0, 1]
    assert index.labels_in_shards


def test_all_damaged_tars_are_named_and_nothing_is_written(tmp_path):
    write_tar(tmp_path / "a.tar", people(0, 3))
    for name, size in [("b.tar", 700), ("c.tar", 0)]:
        write_tar(tmp_path / name, people(0, 3))
        os.truncate(tmp_path / name, size)
    with pytest.raises(ValueError, match=r"(?s)2 of 3 tars cannot be indexed.*b\.tar: cut.*c\.tar: the tar has no"):
        index_tars(str(tmp_path), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "c.tar"]


def test_an_empty_tar_is_a_shard_without_samples(tmp_path):
    paths = [write_tar(tmp_path / "a.tar", []), write_tar(tmp_path / "b.tar", people(0, 3))]
    report = index_tars(paths, tmp_path / "out")
    assert report.empty_shards == (paths[0],)
    assert ShardIndex.open(tmp_path / "out").shard_sizes == [0, 3]
    with pytest.raises(ValueError, match=r"a\.tar: no usable sample in 1 tars, 0 left out"):
        index_tars(paths[0], tmp_path / "none")


def test_a_dry_run_writes_nothing(tmp_path):
    path = write_tar(tmp_path / "a.tar", people(0, 6))
    assert index_tars(path, tmp_path / "out", dry_run=True).num_samples == 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


def test_names_that_lead_nowhere(tmp_path):
    path = write_tar(tmp_path / "a.tar", people(0, 3))
    with pytest.raises(FileNotFoundError, match=r"b\*\.tar: no such tar"):
        index_tars(f"{tmp_path}/b*.tar", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no such tar"):
        index_tars(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(ValueError, match="named 2 times"):
        index_tars([path, path], tmp_path / "out")
    with pytest.raises(ValueError, match="no tar is named"):
        index_tars([], tmp_path / "out")
    with pytest.raises(ValueError, match="must all be the one or the other"):
        index_tars([path, "http://127.0.0.1:1/b.tar"], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        index_tars(path, tmp_path / "full")


# Remote tars, and splits of ours.


class RangeHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path, wanted = self.translate_path(self.path), self.headers.get("Range")
        if not wanted or not os.path.isfile(path):
            return super().do_GET()
        start, _, stop = wanted.removeprefix("bytes=").partition("-")
        with open(path, "rb") as file:
            file.seek(int(start))
            body = file.read(int(stop) + 1 - int(start))
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return self.wfile.write(body)


@pytest.fixture
def web(tmp_path):
    root = tmp_path / "web"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(root)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def settings(tmp_path):
    return CacheSettings(directory=tmp_path / "cache", attempts=2, first_wait_seconds=0.01, timeout_seconds=120.0)


def test_tars_behind_urls(tmp_path, web):
    root, url = web
    for number in range(2):
        write_tar(root / f"{number}.tar", people(5 * number, 5))
    report = index_tars(f"{url}/{{0..1}}.tar", tmp_path / "out", cache=settings(tmp_path))
    assert report.num_samples == 10
    index = ShardIndex.open(tmp_path / "out", cache=settings(tmp_path))
    assert index.shard_paths == [f"{url}/0.tar", f"{url}/1.tar"]
    assert [index.read(number) for number in range(10)] == [picture(number) for number in range(10)]
    index_tars(str(root), tmp_path / "local")
    assert ShardIndex.open(tmp_path / "local").fingerprint == index.fingerprint
    with pytest.raises(
        ValueError, match=r"(?s)1 of 2 tars cannot be indexed.*/2\.tar: its size could not be read.*404"
    ):
        index_tars([f"{url}/0.tar", f"{url}/2.tar"], tmp_path / "missing", cache=settings(tmp_path))


def packed(directory):
    directory.mkdir(parents=True)
    with SplitWriter(directory, samples_per_shard=4) as writer:
        for number in range(9):
            writer.add(f"a/{number}", picture(number), extension="jpg", label=number % 2)
        writer.label_names += ["ada", "grace"]
    return directory


def test_a_split_elsewhere_is_attached(tmp_path, web):
    root, url = web
    original = ShardIndex.open(packed(root / "faces" / "train"))
    for number, location in enumerate([str(root / "faces/train"), f"{url}/faces/train", f"{url}/faces/train/"]):
        report = index_tars(location, tmp_path / f"out{number}", cache=settings(tmp_path))
        assert (report.num_samples, report.num_classes, report.num_shards) == (9, 2, 3)
        index = ShardIndex.open(tmp_path / f"out{number}", cache=settings(tmp_path))
        assert index.shard_paths == [f"{location.rstrip('/')}/shard-{shard:06d}.tar" for shard in range(3)]
        assert index.fingerprint == original.fingerprint
        assert index.label_names == ["ada", "grace"]
        assert [index.read(sample) for sample in range(9)] == [picture(sample) for sample in range(9)]
    assert index_tars(f"{url}/faces/train", tmp_path / "dry", dry_run=True, cache=settings(tmp_path)).num_samples == 9
    assert not (tmp_path / "dry").exists()


def test_a_split_elsewhere_with_a_changed_shard_is_refused(tmp_path, web):
    root, url = web
    directory = packed(root / "train")
    with open(directory / "shard-000001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"shard-000001\.tar: the data shard has \d+ bytes, but manifest\.json says"):
        index_tars(f"{url}/train", tmp_path / "out", cache=settings(tmp_path))
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match=r"nothing/manifest\.json: its size could not be read, tried 1 times"):
        index_tars(f"{url}/nothing", tmp_path / "out", cache=settings(tmp_path))
