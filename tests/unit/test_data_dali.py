"""The DALI loader gives what the torch loader gives; DALI's own reader keeps the promises of streaming."""

import io
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from partialfc.data import dali_source
from partialfc.data.augment import Augmentation
from partialfc.data.dali_loader import DaliLoader
from partialfc.data.dali_pipeline import require_dali
from partialfc.data.dali_source import jpeg_size
from partialfc.data.dali_stream import DaliStream
from partialfc.data.decode import decode_image
from partialfc.data.errors import DataError
from partialfc.data.index import ShardIndex
from partialfc.data.loader import TorchLoader
from partialfc.data.plan import RankSteps, SamplePlan
from partialfc.data.split_format import write_split_files
from partialfc.data.writer import SplitWriter

SIZE = 16
FLIPS, STILL = Augmentation(), Augmentation(horizontal_flip=0.0)


def picture(number, *, height=SIZE, width=SIZE):
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes that asks for 30,000 x 30,000 pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def without_tables(jpeg):
    """A JPEG whose quantisation tables are hidden in a segment that decoders skip."""
    return jpeg.replace(b"\xff\xdb", b"\xff\xe5")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def wide_gray():
    buffer = io.BytesIO()
    Image.fromarray(picture(3)[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = picture(1)
GOOD = {
    "coarse": encoded(PIXELS, quality=30),
    "no subsampling": encoded(PIXELS, quality=100, subsampling=0),
    "4:2:2": encoded(PIXELS, subsampling=1),
    "4:4:0": simplejpeg.encode_jpeg(PIXELS, colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(PIXELS, colorsubsampling="411"),
    "progressive": encoded(PIXELS, progressive=True),
    "rgb": encoded(PIXELS, keep_rgb=True),
    "gray": encoded(PIXELS, mode="L"),
    "restarts": encoded(PIXELS, restart_marker_blocks=1),
    "rotated by exif": encoded(PIXELS, exif=turned()),
    "cmyk": encoded(PIXELS, mode="CMYK"),
    "trailing bytes": encoded(PIXELS) + b"\0\0\0",
    "png": encoded(PIXELS, "PNG"),
    "png with alpha": encoded(PIXELS, "PNG", mode="RGBA"),
    "palette": encoded(PIXELS, "PNG", mode="P"),
    "16-bit gray": wide_gray(),
    "gif": encoded(PIXELS, "GIF", mode="P"),
    "bmp": encoded(PIXELS, "BMP"),
    "webp": encoded(PIXELS, "WEBP", lossless=True),
}
BAD = {
    "text": b"<html>not found</html>",
    "magic alone": b"\xff\xd8\xff\xe0 nor this",
    "cut jpeg": encoded(PIXELS)[:400],
    "cut png": encoded(PIXELS, "PNG")[:200],
    "bomb": bomb(),
}


def write(directory, files, *, samples_per_shard=20, labels=7):
    directory.mkdir()
    with SplitWriter(directory, samples_per_shard=samples_per_shard) as writer:
        writer.label_names = [str(label) for label in range(min(labels, len(files)))]
        for number, file in enumerate(files):
            writer.add(f"{number:03d}", file, extension="jpg", label=number % labels)
    return ShardIndex.open(directory)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """45 JPEGs in shards of 20."""
    return write(tmp_path_factory.mktemp("jpegs") / "set", [encoded(picture(number)) for number in range(45)])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """All kinds of files, good and bad."""
    return write(tmp_path_factory.mktemp("mixed") / "set", [*GOOD.values(), *BAD.values()])


def steps(index, **options):
    defaults = {"global_batch": 8, "rank": 0, "world_size": 1, "consumed": 0, "num_batches": 8}
    return RankSteps(plan=SamplePlan(index.shard_sizes, seed=4, lanes=4, window=8), **(defaults | options))


def dali(index, *, augmentation=FLIPS, image_size=SIZE, num_workers=0, threads=2, prefetch=2, **options):
    own = {name: options.pop(name) for name in ("layout", "dtype", "device_id") if name in options}
    return DaliLoader(
        index=index,
        steps=steps(index, **options),
        image_size=image_size,
        augmentation=augmentation,
        num_workers=num_workers,
        seed=11,
        threads=threads,
        prefetch=prefetch,
        **own,
    )


def reference(index, *, augmentation=FLIPS, image_size=SIZE, **options):
    return TorchLoader(
        index=index,
        steps=steps(index, **options),
        image_size=image_size,
        augmentation=augmentation,
        num_workers=0,
        seed=11,
    )


def stream(index, *, augmentation=STILL, image_size=SIZE, shuffle_buffer=10, seed=11, **options):
    return DaliStream(
        index=index,
        steps=steps(index, **options),
        image_size=image_size,
        augmentation=augmentation,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
    )


def threads():
    return set(os.listdir("/proc/self/task"))


def left_besides(before):
    """The threads that stay; the system shows one for a moment after it was joined."""
    deadline = time.monotonic() + 60
    while (left := threads() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def reasons(batch):
    return [(failure.sample_id, failure.reason) for failure in batch.failures]


def assert_same(batches, expected, *, tolerance=0):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.ids.equal(other.ids)
        assert batch.labels.equal(other.labels)
        assert batch.failures == other.failures
        assert batch.images.dtype == other.images.dtype
        assert batch.images.shape == other.images.shape
        assert (batch.images.int() - other.images.int()).abs().max() <= tolerance


@pytest.mark.parametrize("name", GOOD)
def test_all_kinds_of_files_have_the_pixels_of_the_torch_loader(mixed, name):
    number = list(GOOD).index(name)
    options = {"global_batch": 1, "num_batches": 1}
    position = next(
        p for p in range(len(GOOD) + len(BAD)) if int(steps(mixed, consumed=p, **options).draws(0).ids) == number
    )
    (batch,) = dali(mixed, consumed=position, augmentation=STILL, **options)
    assert batch.ids.tolist() == [number]
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), decode_image(GOOD[name]))


def test_good_and_bad_files_come_as_from_the_torch_loader(mixed):
    batches = list(dali(mixed))
    assert_same(batches, reference(mixed))
    assert {failure.sample_id for batch in batches for failure in batch.failures} == {19, 20, 21, 22, 23}
    bad = [(batch, slot) for batch in batches for slot in range(8) if batch.ids[slot] >= 19]
    assert all(batch.labels[slot] == -1 and batch.images[slot].max() == 0 for batch, slot in bad)
    failures = {failure.sample_id: failure for batch in batches for failure in batch.failures}
    assert failures[23].reason == "too large"
    assert failures[21].message.startswith(f"{mixed.shard_paths[1]}, sample 21 (key 021) at byte ")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "options", [{"num_workers": 1}, {"num_workers": 3, "threads": 1}, {"threads": 3, "prefetch": 5}, {"prefetch": 1}]
)
def test_workers_threads_and_prefetch_change_nothing(mixed, options):
    loader = dali(mixed, **options)
    assert len(loader) == 8
    assert_same(loader, reference(mixed))
    assert_same(loader, reference(mixed))  # Iterating again starts over.


def test_ranks_and_a_resume_change_nothing(jpegs):
    whole = list(reference(jpegs))
    ranks = [list(dali(jpegs, rank=rank, world_size=3, num_batches=3)) for rank in range(3)]
    for step in range(3):
        assert torch.cat([rank[step].images for rank in ranks]).equal(whole[step].images)
        assert torch.cat([rank[step].ids for rank in ranks]).equal(whole[step].ids)
    assert_same(dali(jpegs, consumed=24, num_batches=5), whole[3:])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_batches_of_one_and_of_none(jpegs, rank):
    options = {"global_batch": 2, "rank": rank, "world_size": 3, "num_batches": 5}
    batches = list(dali(jpegs, **options))
    assert_same(batches[:1], list(reference(jpegs, **options))[:1]) if rank else None
    assert [batch.images.shape for batch in batches] == [(min(rank, 1), 3, SIZE, SIZE)] * 5
    assert [len(batch.ids) for batch in batches] == [len(batch.labels) for batch in batches] == [min(rank, 1)] * 5


def test_fewer_batches_than_are_prefetched(jpegs):
    assert list(dali(jpegs, num_batches=0)) == []
    assert_same(dali(jpegs, num_batches=2, prefetch=4), reference(jpegs, num_batches=2))


@pytest.mark.parametrize(
    ("augmentation", "tolerance"),
    [
        (Augmentation(crop=0.7, crop_area=(0.3, 1.0)), 1),
        (Augmentation(color=0.7, hue_degrees=40.0), 1),
        (Augmentation(grayscale=0.5), 1),
        (Augmentation(blur=0.7), 1),
        (Augmentation(blur=0.7, blur_sigma=(4.0, 20.0)), 1),
        (Augmentation(occlusion=0.8, occlusion_area=(0.0, 0.5)), 0),
        (Augmentation(crop=0.5, color=0.5, hue_degrees=40.0, grayscale=0.3, blur=0.3, occlusion=0.5), 3),
    ],
    ids=["crop", "color", "grayscale", "blur", "wide blur", "occlusion", "all"],
)
def test_augmentation_is_that_of_the_torch_loader(mixed, augmentation, tolerance):
    assert_same(
        dali(mixed, augmentation=augmentation), reference(mixed, augmentation=augmentation), tolerance=tolerance
    )


@pytest.mark.parametrize("image_size", [16, 24])
def test_other_sizes_are_resized(tmp_path, caplog, image_size):
    sizes = [(16, 16)] * 64
    for sample, size in zip((19, 33, 60), ((30, 40), (9, 16), (64, 16)), strict=True):
        sizes[sample] = size
    files = [encoded(picture(number, height=height, width=width)) for number, (height, width) in enumerate(sizes)]
    index = write(tmp_path / "set", files)
    for prefetch in (1, 3):
        batches = list(dali(index, image_size=image_size, prefetch=prefetch))
        assert_same(batches, reference(index, image_size=image_size), tolerance=1)
    assert not {19, 33, 60} & set(batches[0].ids.tolist())  # The pipeline begins without resizing where the size is 16.
    assert caplog.text == ""


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize(("dtype", "precision"), [("uint8", 0.0), ("float32", 1e-6), ("float16", 1e-3)])
def test_layout_and_type(mixed, layout, dtype, precision):
    for batch, plain in zip(dali(mixed, layout=layout, dtype=dtype), dali(mixed), strict=True):
        expected = plain.images if layout == "CHW" else plain.images.permute(0, 2, 3, 1)
        if dtype != "uint8":
            expected = expected.double() / 127.5 - 1.0
        assert batch.images.dtype == getattr(torch, dtype)
        assert batch.images.is_contiguous()
        torch.testing.assert_close(batch.images, expected.to(batch.images.dtype), atol=precision, rtol=0)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_files_that_make_dali_fail_are_masked_and_the_run_goes_on(tmp_path, caplog, prefetch):
    files = [encoded(picture(number)) for number in range(45)]
    for number in (0, 17, 18, 44):
        files[number] = without_tables(files[number])
        assert jpeg_size(files[number]) == (SIZE, SIZE)
    files[20:30] = [BAD["text"]] * 10
    index = write(tmp_path / "set", files)
    with caplog.at_level(logging.WARNING):
        batches = list(dali(index, prefetch=prefetch, num_batches=11))
    assert_same(batches, reference(index, num_batches=11))
    assert {sample for batch in batches for sample, _ in reasons(batch)} == {0, 17, 18, *range(20, 30), 44}
    assert f"masked: {index.shard_paths[0]}, sample 17 (key 017) at byte " in caplog.text
    assert "Its pipeline is built anew" in caplog.text


def test_what_dali_alone_cannot_decode_is_fed_uncompressed(tmp_path, caplog, monkeypatch):
    files = [encoded(picture(number)) for number in range(20)] + [GOOD["gif"]]
    index = write(tmp_path / "set", files)
    # As if DALI were given a GIF, which it does not know.
    monkeypatch.setattr(dali_source, "jpeg_size", lambda data: (SIZE, SIZE))
    batches = list(dali(index))
    assert_same(batches, reference(index))
    assert "Python decodes these images well" in caplog.text


def test_a_failure_without_a_culprit_ends_the_run(mixed, monkeypatch):
    monkeypatch.setattr(dali_source, "_PNM_HEADER", b"P9 %d %d 255 ")  # No format that DALI knows.
    with pytest.raises(DataError, match="DALI failed, though all images were decoded before: "):
        list(dali(mixed))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_vanished_shard_ends_the_run_with_its_name(tmp_path, jpegs, num_workers):
    index = write(tmp_path / "set", [encoded(picture(number)) for number in range(45)])
    os.unlink(index.shard_paths[1])
    list(dali(jpegs))
    before = threads()
    with pytest.raises(DataError, match=f"{index.shard_paths[1]}: the data shard cannot be opened") as caught:
        list(dali(index, num_workers=num_workers))
    # Worker processes have a thread of their own in the parent.
    assert num_workers or not left_besides(before), f"a pipeline lives on with {caught.value!r}"


def test_nothing_is_left_of_a_loader_that_was_not_read_to_its_end(jpegs):
    list(dali(jpegs))
    before = threads()
    batches = iter(dali(jpegs, threads=4))
    next(batches)
    assert len(threads() - before) >= 4
    batches.close()
    assert not left_besides(before)


ORPHANS = """
import multiprocessing, sys, time
from partialfc.data.augment import Augmentation
from partialfc.data.dali_loader import DaliLoader
from partialfc.data.index import ShardIndex
from partialfc.data.plan import RankSteps, SamplePlan

index = ShardIndex.open(sys.argv[1])
steps = RankSteps(plan=SamplePlan(index.shard_sizes, seed=0), global_batch=4, rank=0, world_size=1, consumed=0,
                  num_batches=1000)
loader = DaliLoader(index=index, steps=steps, image_size=16, augmentation=Augmentation(), num_workers=2, seed=0)
batches = iter(loader)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed(jpegs):
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(jpegs.directory)], stdout=subprocess.PIPE)
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("file", "size"),
    [
        (encoded(picture(0, height=9, width=21)), (9, 21)),
        (encoded(picture(0, height=300, width=5), progressive=True), (300, 5)),
        (GOOD["gray"], (16, 16)),
        (GOOD["cmyk"], None),
        (GOOD["png"], None),
        (GOOD["trailing bytes"], None),
        (GOOD["coarse"][:-1], None),
        (GOOD["coarse"].replace(b"\xff\xc0", b"\xff\xc9"), None),  # Says that it is arithmetically coded.
        (b"\xff\xd8\xff\xd9", None),
        (b"\xff\xd8\xff\xe0\xff\xff\xff\xd9", None),
        (b"\xff\xd8\xff\xda\x00\x02\xff\xd9", None),
        (b"\xff\xd8\xff\xe0\x00\x00\xff\xd9", None),
        (b"", None),
    ],
)
def test_size_of_ordinary_jpegs(file, size):
    assert jpeg_size(file) == size


def test_impossible_settings_are_refused(jpegs):
    for options, message in (
        ({"threads": 0}, "threads is 0, but must be at least 1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"layout": "WHC"}, r"layout is 'WHC', but must be one of \('CHW', 'HWC'\)"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            dali(jpegs, **options)


def test_a_missing_dali_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install 'partialfc\[dali\]'"):
        require_dali()


@pytest.mark.parametrize(("world_size", "global_batch"), [(1, 8), (3, 12), (3, 7), (2, 60)])
def test_a_stream_shows_each_sample_once_a_pass(jpegs, world_size, global_batch):
    passes = [[], []]
    for rank in range(world_size):
        batches = list(stream(jpegs, rank=rank, world_size=world_size, global_batch=global_batch, num_batches=45))
        size = global_batch * (rank + 1) // world_size - global_batch * rank // world_size
        assert [len(batch.ids) for batch in batches] == [size] * 45
        ids = torch.cat([batch.ids for batch in batches])
        assert torch.cat([batch.labels for batch in batches]).equal(ids % 7)
        start = 0
        for number, seen in enumerate(passes):  # DALI gives each rank the next part at each pass.
            part = (rank + number) % world_size
            stop = start + 45 * (part + 1) // world_size - 45 * part // world_size
            seen += ids[start:stop].tolist()
            start = stop
    assert [sorted(seen) for seen in passes] == [list(range(45))] * 2
    assert passes[0] != sorted(passes[0])


def test_a_stream_has_the_pixels_of_the_files(jpegs):
    for batch in stream(jpegs, num_batches=6):
        for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), decode_image(jpegs.read(sample)))


def test_a_stream_is_keyed_by_seed_and_start(jpegs):
    def ids(**options):
        return torch.cat([batch.ids for batch in stream(jpegs, **options)]).tolist()

    assert ids() == ids()
    assert ids() != ids(seed=12)
    assert ids() != ids(consumed=24)
    assert len(list(stream(jpegs, num_batches=0))) == 0


def test_a_stream_augments_by_place(jpegs):
    everything = Augmentation(crop=0.5, color=0.5, grayscale=0.3, blur=0.3, occlusion=0.5)
    first, again = (list(stream(jpegs, augmentation=everything, image_size=20)) for _ in range(2))
    assert_same(first, again)
    assert first[0].images.shape == (8, 3, 20, 20)
    patterns = []
    for batch in stream(jpegs, augmentation=FLIPS):
        patterns.append([])
        for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            stored = torch.from_numpy(decode_image(jpegs.read(sample)).copy()).permute(2, 0, 1)
            assert image.equal(stored) or image.equal(stored.flip(2))
            patterns[-1].append(image.equal(stored.flip(2)))
    assert 16 <= sum(map(sum, patterns)) <= 48
    assert len(set(map(tuple, patterns))) == 8


def test_a_stream_with_an_empty_shard(tmp_path):
    directory = write(tmp_path / "set", [encoded(picture(number)) for number in range(45)]).directory
    with tarfile.open(directory / "empty.tar", "w"):
        pass
    manifest = json.loads((directory / "manifest.json").read_text())
    empty = {"name": "empty.tar", "bytes": (directory / "empty.tar").stat().st_size, "num_samples": 0}
    shards = [manifest["shards"][0], empty, *manifest["shards"][1:]]
    records, names = np.load(directory / "index.npy"), [str(label) for label in range(7)]
    write_split_files(directory, records, label_names=names, shards=shards)
    index = ShardIndex.open(directory)
    assert index.shard_sizes == [20, 0, 20, 5]
    batches = list(stream(index, num_batches=6))
    ids = torch.cat([batch.ids for batch in batches])
    assert sorted(ids[:45].tolist()) == list(range(45))
    assert torch.cat([batch.labels for batch in batches]).equal(ids % 7)


def test_a_stream_of_a_rank_without_samples(jpegs):
    batches = list(stream(jpegs, rank=0, world_size=2, global_batch=1, num_batches=3))
    assert [batch.images.shape for batch in batches] == [(0, 3, SIZE, SIZE)] * 3


def test_a_stream_ends_at_a_file_that_dali_cannot_decode(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(DataError, match=r"(?s)DALI's reader failed, .*`partialfc data verify --decode`"):
        list(stream(mixed))
    assert list(tmp_path.iterdir()) == []


def test_impossible_streams_are_refused(jpegs):
    with pytest.raises(ValueError, match="45 samples for 46 ranks"):
        stream(jpegs, world_size=46)
    with pytest.raises(ValueError, match="shuffle_buffer=0"):
        stream(jpegs, shuffle_buffer=0)
