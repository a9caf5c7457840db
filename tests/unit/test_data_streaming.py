"""Streaming: full batches and equal steps from tars read front to back, whatever is wrong with them."""

import io
import itertools
import shutil
import tarfile
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from partialfc.data import shard_stream
from partialfc.data.augment import Augmentation
from partialfc.data.decode import decode_image
from partialfc.data.errors import DataError
from partialfc.data.index import ShardIndex
from partialfc.data.piece_cache import CacheSettings
from partialfc.data.split_format import write_split_files
from partialfc.data.streaming import StreamingLoader
from partialfc.data.synthesis import synthesize
from partialfc.data.writer import SplitWriter

NO_CHANGE = Augmentation(horizontal_flip=0.0)
QUICK = CacheSettings(attempts=3, first_wait_seconds=0.0, timeout_seconds=120.0)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """45 samples of 9 identities in shards of 11, 11, 11, 11 and 1."""
    folder = tmp_path_factory.mktemp("data")
    synthesize(folder / "set", identities=9, images_per_identity=5, seed=0, image_size=16)
    made = ShardIndex.open(folder / "set" / "train")
    (folder / "train").mkdir()
    with SplitWriter(folder / "train", samples_per_shard=11) as writer:
        writer.label_names = made.label_names
        for sample in range(made.num_samples):
            writer.add(f"people/{sample}", made.read(sample), extension="jpg", label=int(made.labels[sample]))
    return ShardIndex.open(folder / "train")


def loader(directory, **options):
    defaults = {
        "global_batch": 9,
        "rank": 0,
        "world_size": 1,
        "consumed": 0,
        "num_batches": 5,
        "image_size": 16,
        "augmentation": NO_CHANGE,
        "num_workers": 0,
        "seed": 3,
        "shuffle_buffer": 16,
        "cache": QUICK,
    }
    return StreamingLoader(directory=directory, **(defaults | options))


def joined(batches):
    batches = list(batches)
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "ids")]


def equal(first, second):
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


def failures_of(batches):
    return [failure for batch in batches for failure in batch.failures]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_makes_the_same_steps_of_full_batches(index, num_workers, world_size):
    for rank in range(world_size):
        batches = loader(index.directory, rank=rank, world_size=world_size, num_workers=num_workers, num_batches=7)
        assert len(batches) == 7
        found = list(batches)
        assert [len(batch.ids) for batch in found] == [9 // world_size] * 7
        assert failures_of(found) == []
        images, labels, ids = joined(found)
        assert labels.tolist() == index.labels[ids.numpy()].tolist()
        stored = np.stack([decode_image(index.read(sample)).transpose(2, 0, 1) for sample in ids.tolist()])
        np.testing.assert_array_equal(images.numpy(), stored)


def test_batches_of_uneven_ranks(index):
    sizes = [[len(batch.ids) for batch in loader(index.directory, rank=r, world_size=2)] for r in range(2)]
    assert sizes == [[4] * 5, [5] * 5]


def test_one_stream_sees_each_sample_once_a_pass(index):
    _, _, ids = joined(loader(index.directory, shuffle_buffer=1, num_batches=10))
    passes = ids.reshape(2, 45)
    assert passes.sort(dim=1).values.equal(torch.arange(45).expand(2, 45))
    assert not passes[0].equal(passes[1])


def test_workers_and_ranks_share_the_data_shards(index):
    """5 streams, 5 shards: in the first turn each has another one."""
    firsts = []
    for rank in range(5):
        batch = next(iter(loader(index.directory, rank=rank, world_size=5, global_batch=5, shuffle_buffer=1)))
        firsts.append(int(batch.ids[0]))
    assert sorted(firsts) == [0, 11, 22, 33, 44]


def test_streams_take_turns(index):
    turns = []
    for rank, count in ((0, 3), (1, 2)):
        _, _, ids = joined(loader(index.directory, rank=rank, world_size=2, shuffle_buffer=1, num_batches=12))
        shards = [shard for shard, _ in itertools.groupby((ids // 11).tolist())]
        turns += shards[:count]
    assert sorted(turns) == [0, 1, 2, 3, 4]


def test_the_buffer_mixes(index):
    plain = next(iter(loader(index.directory, shuffle_buffer=1, global_batch=11))).ids // 11
    mixed = next(iter(loader(index.directory, shuffle_buffer=45, global_batch=11))).ids // 11
    assert len(plain.unique()) <= 3
    assert len(mixed.unique()) >= 4


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_same_keys_give_the_same_batches(index, num_workers):
    changes = Augmentation(color=1.0, occlusion=0.5)
    batches = loader(index.directory, num_workers=num_workers, augmentation=changes)
    first = joined(batches)
    assert equal(joined(batches), first)
    assert equal(joined(loader(index.directory, num_workers=num_workers, augmentation=changes)), first)
    for change in ({"consumed": 45}, {"seed": 4}, {"rank": 1, "world_size": 2, "global_batch": 18}):
        other = joined(loader(index.directory, num_workers=num_workers, augmentation=changes, **change))
        assert not other[2].equal(first[2])


def test_a_sample_looks_different_when_it_comes_again(index):
    images, _, ids = joined(loader(index.directory, augmentation=Augmentation(color=1.0), num_batches=10))
    again = [images[ids == sample] for sample in range(45)]
    pairs = [pictures for pictures in again if len(pictures) > 1]
    assert len(pairs) > 20
    assert all(not pictures[0].equal(pictures[1]) for pictures in pairs)


def test_fewer_data_shards_than_workers(tmp_path, index):
    with SplitWriter(tmp_path, samples_per_shard=50) as writer:
        writer.label_names = ["ada"]
        writer.add("1", index.read(0), extension="jpg", label=0)
        writer.add("2", index.read(1), extension="jpg", label=0)
    _, labels, ids = joined(loader(tmp_path, num_workers=3, rank=1, world_size=2, num_batches=6))
    assert (len(ids), ids.unique().tolist(), labels.unique().tolist()) == (30, [0, 1], [0])


class Tar:
    """A tar made by hand."""

    def __init__(self):
        self.file = io.BytesIO()
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w")

    def add(self, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        return self

    def bytes(self):
        self.tar.close()
        return self.file.getvalue()


def split_of(directory, tars, *, claimed, names=None):
    """A split whose manifest claims `claimed` samples of 9 labels for each of some tars."""
    directory.mkdir(exist_ok=True)
    shards = []
    for number, (data, count) in enumerate(zip(tars, claimed, strict=True)):
        name = f"shard-{number:06d}.tar"
        (directory / name).write_bytes(data)
        shards.append({"name": (names or {}).get(number, name), "bytes": len(data), "num_samples": count})
    records = np.zeros(sum(claimed), dtype=[("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("crc32", "<u4")])
    records["label"] = np.arange(len(records)) % 9
    write_split_files(directory, records, label_names=[f"name {n}" for n in range(9)], shards=shards)
    return directory


def good_tar(index, samples):
    tar = Tar()
    for sample in samples:
        tar.add(f"{sample}.jpg", index.read(sample)).add(f"{sample}.cls", str(index.labels[sample]).encode())
    return tar.bytes()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_keep_a_slot(tmp_path, index, num_workers):
    jpeg = index.read(0)
    tar = Tar()
    tar.add("0.jpg", jpeg).add("0.cls", b"4")
    tar.add("1.jpg", b"nothing").add("1.cls", b"4")
    tar.add("2.jpg", jpeg[:200]).add("2.cls", b"4")
    tar.add("3.jpg", jpeg)
    tar.add("4.cls", b"4").add("4.txt", b"no image")
    tar.add("5.jpg", jpeg).add("5.cls", b"four")
    tar.add("6.jpg", jpeg).add("6.jpg", jpeg).add("6.cls", b"4")
    tar.add("7.JPG", jpeg).add("7.cls", b" 4\n")
    tar.add("8.png", jpeg).add("8.cls", b"4")
    split = split_of(tmp_path / "train", [tar.bytes()], claimed=[9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(loader(split, num_batches=2, num_workers=num_workers, shuffle_buffer=1))
    assert [batch.ids.tolist() for batch in batches] == [list(range(9))] * 2
    assert [batch.labels.tolist() for batch in batches] == [[4, -1, -1, -1, -1, -1, -1, 4, 4]] * 2
    assert [bool(image.any()) for image in batches[0].images] == [label == 4 for label in batches[0].labels]
    found = {failure.sample_id: failure for failure in batches[0].failures}
    assert [found[number].reason for number in range(1, 7)] == [
        "not an image",
        "damaged image",
        "unreadable",
        "not an image",
        "unreadable",
        "unreadable",
    ]
    shard = split / "shard-000000.tar"
    assert found[3].message == f"{shard}, sample 3 (key 3): there is no .cls beside it"
    assert found[4].message == f"{shard}, sample 4 (key 4): there is no image among its members ['cls', 'txt']"
    assert found[5].message == f"{shard}, sample 5 (key 5): its label b'four' is no whole number"
    assert "duplicate file name in tar file" in found[6].message


def cut(data, name, *, into):
    """The part of a tar before the header of a member, and so many bytes of it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmember(name).offset + into]


def scribbled(data, name):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmember(name).offset
    return data[:offset] + b"?" * 512 + data[offset + 512 :]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: cut(data, "4.jpg", into=700), "unexpected end of data"),
        (lambda data: cut(data, "4.jpg", into=100), "end of the tar"),
        (lambda data: cut(data, "4.jpg", into=0), "end of the tar"),
        (lambda data: scribbled(data, "4.jpg"), "end of the tar"),
    ],
    ids=["in a file", "in a header", "between members", "damaged header"],
)
def test_a_tar_that_ends_early_is_counted_and_left(tmp_path, index, damage, why):
    tars = [good_tar(index, range(20, 30)), damage(good_tar(index, range(10)))]
    split = split_of(tmp_path / "train", tars, claimed=[10, 10])
    batches = list(loader(split, global_batch=15, num_batches=2, shuffle_buffer=1))
    assert sorted(torch.cat([batch.ids for batch in batches]).tolist()) == sorted(2 * [*range(10), *range(10, 15)])
    failures = failures_of(batches)
    assert [(failure.sample_id, failure.reason) for failure in failures] == [(14, "truncated")] * 2
    assert failures[0].message == f"{split / 'shard-000001.tar'}, sample 14: 4 of 10 samples read, then: {why}"


def test_tars_without_any_sample_do_not_hang(tmp_path):
    split = split_of(tmp_path / "train", [Tar().add("readme", b"x").bytes()] * 2, claimed=[9, 9])
    batches = list(loader(split))
    assert all((batch.labels == -1).all() for batch in batches)
    assert len(failures_of(batches)) == 45
    assert "0 of 9 samples read, then: end of the tar" in batches[0].failures[0].message


def test_empty_data_shards_are_passed_over(tmp_path, index):
    split = split_of(tmp_path / "train", [Tar().bytes(), good_tar(index, range(9))], claimed=[0, 9])
    _, _, ids = joined(loader(split, num_batches=2, shuffle_buffer=1))
    assert sorted(ids.tolist()) == sorted(2 * list(range(9)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_no_tar_stops_the_run(tmp_path, index, num_workers):
    split = split_of(tmp_path / "train", [b"<html>" + bytes(5000)], claimed=[9])
    with pytest.raises(
        DataError,
        match=r"shard-000000.tar: the data shard cannot be read beyond its first 0 samples, tried 3 times; "
        "last error: ReadError: ",
    ):
        list(loader(split, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("label", [b"9", b"-1"])
def test_labels_outside_stop_the_run(tmp_path, index, label, num_workers):
    tar = Tar().add("a.jpg", index.read(0)).add("a.cls", label).bytes()
    split = split_of(tmp_path / "train", [tar], claimed=[9])
    with pytest.raises(DataError, match=rf"sample 0 \(key a\): the label is {int(label)}, but .* labels in \[0, 9\)"):
        list(loader(split, num_workers=num_workers))


def test_a_data_shard_that_vanishes_stops_the_run(tmp_path, index):
    split = split_of(tmp_path / "train", [good_tar(index, range(9))], claimed=[9])
    batches = loader(split, num_batches=9)
    (split / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match="tried 3 times; last error: FileNotFoundError: No such file"):
        list(batches)


def test_what_is_wrong_is_found_before_the_start(tmp_path, index):
    split = Path(shutil.copytree(index.directory, tmp_path / "train"))
    with pytest.raises(ValueError, match="global_batch=2 at least world_size=3"):
        loader(split, global_batch=2, world_size=3)
    with pytest.raises(ValueError, match="shuffle_buffer=0 at least 1"):
        loader(split, shuffle_buffer=0)
    with pytest.raises(ValueError, match="num_batches=-1 must not be negative"):
        loader(split, num_batches=-1)
    with pytest.raises(ValueError, match=r"rank is 1, but must be in \[0, 1\)"):
        loader(split, rank=1)
    (split / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-000001.tar: the data shard has 0 bytes, but manifest.json says"):
        loader(split)
    (split / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001.tar: the data shard is missing"):
        loader(split)
    records = np.load(split / "index.npy")
    shards = [{"name": f"shard-{n:06d}.tar", "bytes": 1, "num_samples": 9} for n in range(5)]
    write_split_files(split, records, label_names=index.label_names, shards=shards, labels_in_shards=False)
    with pytest.raises(ValueError, match="the labels of the index are not those in the tars"):
        loader(split)
    shards = [{"name": f"nowhere://x/{n}.tar", "bytes": 1, "num_samples": 9} for n in range(5)]
    write_split_files(split, records, label_names=index.label_names, shards=shards)
    with pytest.raises(ValueError, match=r"nowhere://x/0.tar: .*; known: http"):
        loader(split)


class Server(BaseHTTPRequestHandler):
    """Sends whole files, however the request asks for parts; fails, or breaks off, as it is told to."""

    files: dict[str, bytes]
    failures = 0
    breaks: tuple[float, ...] = ()  # The share of the file after which each answer breaks off.
    requests = 0
    taken = 0  # Bytes of the present answer that the reader has.

    def do_GET(self):
        kind = type(self)
        kind.requests += 1
        data = kind.files.get(self.path)
        if data is None or kind.failures > 0:
            kind.failures -= 1
            self.send_error(503 if data is not None else 404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind.breaks:
            share, *kind.breaks = kind.breaks
            sent = data[: int(len(data) * share)]
            self.wfile.write(sent)
            self.wfile.flush()
            # At the end of a connection the client drops what nobody has read yet.
            deadline = time.monotonic() + 60
            while kind.taken < len(sent) and time.monotonic() < deadline:
                time.sleep(0.005)
            self.connection.close()
            return
        self.wfile.write(data)

    def do_HEAD(self):
        self.send_error(405)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def remote(tmp_path, index, monkeypatch):
    """A split whose tars lie on a server that has no range reads."""
    pytest.importorskip("aiohttp")
    tars = [good_tar(index, range(0, 20)), good_tar(index, range(20, 30))]
    handler = type("OneServer", (Server,), {"files": {f"/{n}.tar": data for n, data in enumerate(tars)}})
    open_shard = shard_stream._open

    def watched(path, timeout_seconds):
        handler.taken = 0
        stream = open_shard(path, timeout_seconds)
        read = stream.read

        def noted(size=-1):
            data = read(size)
            handler.taken += len(data)
            return data

        stream.read = noted
        return stream

    monkeypatch.setattr(
        shard_stream, "_open", lambda path, limit: watched(path, limit) if "://" in path else open_shard(path, limit)
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = {n: f"http://127.0.0.1:{server.server_address[1]}/{n}.tar" for n in range(2)}
    split = split_of(tmp_path / "remote", tars, claimed=[20, 10], names=names)
    local = split_of(tmp_path / "local", tars, claimed=[20, 10])
    yield split, local, handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_without_range_reads(remote, num_workers):
    split, local, _ = remote
    assert equal(joined(loader(split, num_workers=num_workers)), joined(loader(local, num_workers=num_workers)))


@pytest.mark.parametrize(
    ("failures", "breaks", "attempts"),
    [(2, [], 3), (0, [0.5, 0.5], 3), (1, [0.5], 2), (0, [0.25, 0.5, 0.75], 2)],
    ids=["failures", "breaks", "both", "breaks after progress"],
)
def test_trouble_that_passes_changes_nothing(remote, failures, breaks, attempts):
    split, local, handler = remote
    cache = CacheSettings(attempts=attempts, first_wait_seconds=0.0, timeout_seconds=120.0)
    list(loader(split, cache=cache, shuffle_buffer=4))
    without = handler.requests
    handler.failures, handler.breaks = failures, breaks
    batches = list(loader(split, cache=cache, shuffle_buffer=4))
    assert failures_of(batches) == []
    assert equal(joined(batches), joined(loader(local, shuffle_buffer=4)))
    assert handler.requests == 2 * without + failures + len(breaks)


@pytest.mark.parametrize(
    ("failures", "breaks", "requests"), [(10**6, [], 3), (0, [0.5] * 9, 3)], ids=["failures", "breaks"]
)
def test_trouble_that_stays_stops_the_run(remote, failures, breaks, requests):
    split, _, handler = remote
    handler.failures, handler.breaks = failures, breaks
    with pytest.raises(
        DataError, match=r"http://127.0.0.1:\d+/[01].tar: the data shard cannot be read .* tried 3 times"
    ):
        list(loader(split))
    assert handler.requests == requests
