"""Remote data shards: range reads, retries, the cache that processes share; and the storage of local files."""

import errno
import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from partialfc.data.errors import DataError, SampleError
from partialfc.data.piece_cache import PIECE_BYTES, CacheSettings, PieceCache
from partialfc.data.remote import RemoteStorage, RemoteStore
from partialfc.data.storage import LocalStorage, open_storage


class FileServer(ThreadingHTTPServer):
    """Serves bytes from memory, and fails as told."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests = Counter()
        self.failures = Counter()  # path -> how many of the next GETs fail
        self.failure = 503  # status, or "cut", "short" or "stall"
        self.ranges = True
        self.etag = '"1"'
        self.stopped = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request, client_address):
        pass  # Clients that hang up belong to the tests.


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        server, name = self.server, self.path[1:]
        server.requests[self.command, name, self.headers.get("Range")] += 1
        if name not in server.files:
            return self.head(404, 0)
        failing = with_body and server.failures[name] > 0
        if failing:
            server.failures[name] -= 1
            if isinstance(server.failure, int):
                return self.head(server.failure, 0)
            if server.failure == "stall":
                server.stopped.wait(20.0)
                return None
        body = server.files[name]
        status, wanted = 200, self.headers.get("Range")
        if wanted and server.ranges:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            body, status = body[int(start) : int(stop) + 1], 206
        if failing and server.failure == "short":
            body = body[:-1]
        self.head(status, len(body))
        if with_body:
            self.wfile.write(body[: len(body) // 2] if failing and server.failure == "cut" else body)
        if failing and server.failure == "cut":
            self.close_connection = True
        return None

    def head(self, status, length):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.server.etag)
        self.end_headers()


@pytest.fixture
def server():
    content = np.random.default_rng(0).integers(0, 256, size=2 * PIECE_BYTES + 1000, dtype=np.uint8).tobytes()
    server = FileServer({"a.tar": content, "b.tar": content[:5000]})
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def settings(tmp_path, **changes):
    return CacheSettings(
        **{"directory": tmp_path / "cache", "first_wait_seconds": 0.01, "timeout_seconds": 120.0} | changes
    )


def opened(server, tmp_path, **changes):
    sizes = [len(server.files[name]) for name in ("a.tar", "b.tar")]
    storage = open_storage([server.url("a.tar"), server.url("b.tar")], sizes, cache=settings(tmp_path, **changes))
    storage.check()
    return storage


def gets(server, name):
    """Ranges that were asked for, but for the one byte of the check."""
    return {
        wanted: count
        for (command, path, wanted), count in server.requests.items()
        if (command, path) == ("GET", name) and wanted != "bytes=1-1"
    }


FIRST_PIECE = f"bytes=0-{PIECE_BYTES - 1}"


def test_any_range_equals_the_file(server, tmp_path):
    storage, content = opened(server, tmp_path), server.files["a.tar"]
    for offset, size in [
        (0, 1),
        (1234, 6000),
        (PIECE_BYTES - 10, 20),
        (PIECE_BYTES, 7),
        (len(content) - 5, 5),
        (0, len(content)),
        (77, 0),
    ]:
        assert storage.read(0, offset, size) == content[offset : offset + size]
    assert storage.read(1, 100, 4900) == content[100:5000]


def test_read_many_fetches_each_piece_once(server, tmp_path):
    storage, content = opened(server, tmp_path), server.files["a.tar"]
    offsets = [5, PIECE_BYTES - 50, 2 * PIECE_BYTES + 3, 7]
    found = storage.read_many([0, 0, 0, 1], offsets, [100] * 4)
    assert found == [*(content[offset : offset + 100] for offset in offsets[:3]), content[7:107]]
    last = f"bytes={2 * PIECE_BYTES}-{2 * PIECE_BYTES + 999}"
    assert gets(server, "a.tar") == {FIRST_PIECE: 1, f"bytes={PIECE_BYTES}-{2 * PIECE_BYTES - 1}": 1, last: 1}
    assert gets(server, "b.tar") == {"bytes=0-4999": 1}


def test_a_range_behind_the_end_is_a_truncated_sample(server, tmp_path):
    storage = opened(server, tmp_path)
    good, bad = storage.read_many([1, 1], [0, 4990], [10, 20])
    assert good == server.files["b.tar"][:10]
    assert isinstance(bad, SampleError)
    assert bad.reason == "truncated"
    assert str(bad) == "20 bytes expected, but the file holds 10"


def read_some(storage):
    return storage.read(0, 10, 10)


def test_processes_and_threads_share_what_was_fetched(server, tmp_path):
    storage = opened(server, tmp_path)
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(3) as pool:
            assert set(pool.map(read_some, [storage] * 6)) == {server.files["a.tar"][10:20]}
    copies = [pickle.loads(pickle.dumps(storage)) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(read_some, copies)) == {server.files["a.tar"][10:20]}
    assert gets(server, "a.tar") == {FIRST_PIECE: 1}
    assert not list((tmp_path / "cache").glob("*/*.part"))


def test_it_can_be_read_after_a_fork_in_the_middle(server, tmp_path):
    storage = opened(server, tmp_path)
    storage.read(0, 0, 5)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(storage.read, (1, 0, 5)) == server.files["b.tar"][:5]


@pytest.mark.parametrize("failure", [503, 429, "cut", "short"])
def test_failures_that_pass_are_tried_again(server, tmp_path, failure):
    storage = opened(server, tmp_path)
    server.failure, server.failures["a.tar"] = failure, 3
    assert storage.read(0, 0, 100) == server.files["a.tar"][:100]
    assert gets(server, "a.tar") == {FIRST_PIECE: 4}


def test_after_the_last_attempt_the_error_says_all(server, tmp_path):
    storage = opened(server, tmp_path, attempts=3)
    server.failures["a.tar"] = 3
    with pytest.raises(DataError, match=r"a\.tar: bytes 0 to 4194304 could not be read, tried 3 times.*503"):
        storage.read(0, 0, 100)
    assert not list((tmp_path / "cache").glob("*/*"))
    assert storage.read(0, 0, 100) == server.files["a.tar"][:100]


def test_waits_double(server, tmp_path):
    storage = opened(server, tmp_path, attempts=4, first_wait_seconds=0.1)
    server.failures["a.tar"] = 3
    start = time.monotonic()
    storage.read(0, 0, 1)
    assert time.monotonic() - start >= 0.1 + 0.2 + 0.4  # A sleep never ends early.


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, status):
    storage = opened(server, tmp_path)
    server.failure, server.failures["a.tar"] = status, 9
    with pytest.raises(DataError, match=r"a\.tar: bytes 0 to 4194304 could not be read, tried 1 times"):
        storage.read(0, 0, 100)


def test_a_server_that_stalls_is_left_after_the_time_limit(server, tmp_path):
    # Not checked: that has the same limit, and does not stall.
    limited = settings(tmp_path, attempts=2, timeout_seconds=0.3)
    storage = open_storage([server.url("a.tar")], [len(server.files["a.tar"])], cache=limited)
    server.failure, server.failures["a.tar"] = "stall", 2
    with pytest.raises(DataError, match=r"a\.tar: bytes 0 to 4194304 could not be read, tried 2 times.*Timeout"):
        storage.read(0, 0, 100)


def test_a_server_that_ignores_ranges_is_refused_at_the_start(server, tmp_path):
    server.ranges = False
    with pytest.raises(DataError, match=r"this store has no range reads; use data\.exact=false"):
        opened(server, tmp_path)


def test_a_server_that_begins_to_ignore_ranges_is_not_believed(server, tmp_path):
    storage = opened(server, tmp_path)
    server.ranges = False
    with pytest.raises(DataError, match="this store has no range reads"):
        storage.read(0, 0, 100)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_wrong_sizes_are_listed_at_the_start(server, tmp_path):
    paths, sizes = [server.url("a.tar"), server.url("b.tar")], [len(server.files["a.tar"]), 4999]
    with pytest.raises(ValueError, match=r"b\.tar: the data shard has 5000 bytes, but manifest\.json says 4999"):
        open_storage(paths, sizes, cache=settings(tmp_path)).check()


def test_a_missing_shard_is_found_at_the_start(server, tmp_path):
    with pytest.raises(DataError, match=r"c\.tar: its size could not be read, tried 1 times.*404"):
        open_storage([server.url("b.tar"), server.url("c.tar")], [5000, 5], cache=settings(tmp_path)).check()


def test_a_store_that_is_not_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.tar"
        # Nobody else can listen there meanwhile.
        with pytest.raises(DataError, match=r"a\.tar: its size could not be read, tried 2 times.*Cannot connect"):
            open_storage([url], [5], cache=settings(tmp_path, attempts=2)).check()


def test_urls_that_fsspec_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"xyz://a\.tar: Protocol not known"):
        open_storage(["xyz://a.tar"], [5], cache=settings(tmp_path)).check()


def test_any_store_of_fsspec_will_do(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/some/c.tar", bytes(range(200)))
    storage = open_storage(["memory://some/c.tar"], [200], cache=settings(tmp_path))
    storage.check()
    assert storage.read(0, 20, 5) == bytes(range(20, 25))


def test_paths_and_urls_do_not_mix():
    with pytest.raises(ValueError, match=r"/x/a\.tar is a file and http://h/b\.tar a URL"):
        open_storage(["/x/a.tar", "http://h/b.tar"], [1, 1])


def test_a_changed_file_is_not_taken_from_the_cache(server, tmp_path):
    assert opened(server, tmp_path).read(1, 0, 5) == server.files["b.tar"][:5]
    server.files["b.tar"], server.etag = bytes(5000), '"2"'
    assert opened(server, tmp_path).read(1, 0, 5) == bytes(5)


def test_a_piece_cut_by_a_crash_is_fetched_anew(server, tmp_path):
    opened(server, tmp_path).read(1, 0, 5)
    (piece,) = (tmp_path / "cache").glob("*/*")
    os.truncate(piece, 100)
    assert opened(server, tmp_path).read(1, 0, 5000) == server.files["b.tar"]
    assert piece.stat().st_size == 5000


def test_what_a_killed_process_left_is_filled_anew(server, tmp_path):
    opened(server, tmp_path).read(1, 0, 5)
    (piece,) = (tmp_path / "cache").glob("*/*")
    piece.rename(piece.with_suffix(".part"))
    piece.with_suffix(".part").write_bytes(b"x" * 9000)
    assert opened(server, tmp_path).read(1, 0, 5000) == server.files["b.tar"]
    assert [path.name for path in piece.parent.iterdir()] == [piece.name]


def test_the_least_recently_used_pieces_go(tmp_path):
    limit = 16 * PIECE_BYTES
    cache = PieceCache(settings(tmp_path, max_bytes=limit))
    half = PIECE_BYTES // 2

    def use(piece):
        os.close(cache.open("key", piece, size=half, fetch=lambda: bytes(half)))

    for piece in range(32):
        use(piece)
        # The clock of the file system may not tell them apart.
        os.utime(tmp_path / "cache" / "key" / f"{piece:06d}", ns=(piece, piece))
    use(0)  # used again, so 1 is the oldest now
    for piece in range(32, 36):
        use(piece)
    held = {int(path.name) for path in (tmp_path / "cache" / "key").iterdir()}
    assert held == {0, *range(5, 36)}


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"the cache of remote data cannot be written: Not a directory"):
        opened(server, tmp_path).read(1, 0, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bytes": 5}, "max_bytes is 5, but must be at least 67108864"),
        ({"attempts": 0}, "attempts is 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds 0.0"),
        ({"first_wait_seconds": -1.0}, "first_wait_seconds is -1.0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        CacheSettings(**changes)


def test_a_store_fetches_without_a_cache(server, tmp_path):
    store = RemoteStore(settings(tmp_path))
    assert store.stat(server.url("b.tar")) == (5000, '"1"')
    assert store.fetch(server.url("b.tar"), 10, 20) == server.files["b.tar"][10:20]


def local_files(tmp_path, count):
    paths = [str(tmp_path / f"{number:03d}.tar") for number in range(count)]
    for number, path in enumerate(paths):
        with open(path, "wb") as file:
            file.write(bytes([number]) * (1000 + number))
    return paths, [1000 + number for number in range(count)]


def test_local_files(tmp_path):
    paths, sizes = local_files(tmp_path, 100)
    storage = open_storage(paths, sizes)
    storage.check()
    assert storage.read_many(list(range(100)), [10] * 100, [5] * 100) == [bytes([n]) * 5 for n in range(100)]
    storage.read_many([50, 0], [0, 0], [1, 1])  # The one opened first now closes last.
    descriptors = [os.readlink(f"/proc/self/fd/{number}") for number in storage._descriptors.values()]
    assert descriptors == [path for path in paths[37:] if path != paths[50]] + [paths[50], paths[0]]
    assert pickle.loads(pickle.dumps(storage)).read(7, 1000, 7) == bytes([7]) * 7
    storage.warm(3, 0, 1003)


def test_local_faults(tmp_path):
    paths, sizes = local_files(tmp_path, 2)
    storage = LocalStorage(paths, sizes)
    good, bad = storage.read_many([0, 0], [990, 990], [10, 11])
    assert good == bytes(10)
    assert (bad.reason, str(bad)) == ("truncated", "11 bytes expected, but the file holds 10")
    os.remove(paths[1])
    with pytest.raises(DataError, match=r"001\.tar: the data shard cannot be opened: No such file"):
        storage.read(1, 0, 1)
    with pytest.raises(FileNotFoundError, match=r"001\.tar: the data shard is missing, though manifest\.json"):
        storage.check()
    os.truncate(paths[0], 5)
    with pytest.raises(ValueError, match=r"000\.tar: the data shard has 5 bytes, but manifest\.json says 1000"):
        storage.check()


def test_an_error_of_the_disk_is_one_bad_sample(tmp_path):
    # The memory of this process, where nothing is mapped, is a file that fails to be read with EIO.
    storage = LocalStorage(["/proc/self/mem"], [1])
    with pytest.raises(SampleError, match="the disk reports: Input/output error") as caught:
        storage.read(0, 0, 1)
    assert caught.value.reason == "unreadable"
    assert caught.value.__cause__.errno == errno.EIO


def test_a_folder_is_no_data_shard(tmp_path):
    with pytest.raises(DataError, match="the data shard cannot be read: Is a directory"):
        LocalStorage([str(tmp_path)], [1]).read(0, 0, 1)


def test_remote_storage_does_not_ask_before_it_is_used():
    assert isinstance(open_storage(["http://127.0.0.1:1/a.tar"], [1]), RemoteStorage)
