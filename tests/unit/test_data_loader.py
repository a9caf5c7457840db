"""Loaders: what a step holds depends on the position in the stream alone."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.data import (
    Augmentation,
    DataError,
    RankSteps,
    SamplePlan,
    SequentialLoader,
    ShardIndex,
    TorchLoader,
    decode_image,
    horizontal_flips,
    normalize_images,
    synthesize,
)
from partialfc.data import loader as data_loader
from partialfc.data.loader import WholeBatchLoader, _start_worker
from partialfc.data.writer import SplitWriter


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    synthesize(out, identities=9, images_per_identity=5, seed=0, image_size=16)
    return ShardIndex.open(out / "train")


def loader(index, **options):
    steps = {
        "plan": SamplePlan(index.shard_sizes, seed=4, lanes=4, window=8),
        "global_batch": 8,
        "rank": 0,
        "world_size": 1,
        "consumed": 0,
        "num_batches": 8,
    }
    steps |= {name: options.pop(name) for name in steps if name in options}
    defaults = {"image_size": 16, "augmentation": Augmentation(), "num_workers": 0, "seed": 11}
    return TorchLoader(index=index, steps=RankSteps(**steps), **(defaults | options))


def joined(batches):
    batches = list(batches)
    assert all(batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64 for batch in batches)
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.ids for batch in batches]),
    )


def equal(first, second):
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


def pictures(stream):
    """In an order that does not depend on how the stream was cut into batches."""
    images, labels, ids = stream
    return sorted(zip(ids.tolist(), labels.tolist(), [image.numpy().tobytes() for image in images], strict=True))


@pytest.fixture(scope="module")
def stream(index):
    return joined(loader(index))


def test_stream_is_the_plan(index, stream):
    images, labels, ids = stream
    plan = SamplePlan(index.shard_sizes, seed=4, lanes=4, window=8)
    whole = RankSteps(plan=plan, global_batch=8, rank=0, world_size=1, consumed=0, num_batches=8)
    draws = plan.draw(torch.cat([whole.positions(step) for step in range(8)]))
    assert ids.equal(draws.ids)
    assert labels.tolist() == [int(index.labels[sample]) for sample in ids]
    assert len(set(ids[:40].tolist())) == 40
    assert set(ids[:48].tolist()) == set(range(45))
    flips = horizontal_flips(draws.visits, ids, seed=11)
    for image, sample, flip in zip(images, ids.tolist(), flips.tolist(), strict=True):
        stored = torch.from_numpy(decode_image(index.read(sample)).copy()).permute(2, 0, 1)
        assert image.equal(stored.flip(2) if flip else stored)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(index, stream, num_workers):
    batches = loader(index, num_workers=num_workers)
    assert len(batches) == 8
    assert equal(joined(batches), stream)


def test_ranks_change_nothing(index, stream):
    ranks = [list(loader(index, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [8, 8, 8]
    assert sorted(len(rank[0].labels) for rank in ranks) == [2, 3, 3]
    assert equal(joined(batch for step in zip(*ranks, strict=True) for batch in step), stream)


def test_resume_changes_nothing(index, stream):
    before = joined(loader(index, num_batches=3))
    ranks = [list(loader(index, rank=r, world_size=2, consumed=24, global_batch=20, num_batches=2)) for r in range(2)]
    after = joined(batch for step in zip(*ranks, strict=True) for batch in step)
    together = [torch.cat(pair) for pair in zip(before, after, strict=True)]
    assert pictures(together) == pictures(stream)


def test_iterating_again_starts_over(index, stream):
    batches = loader(index, num_workers=1)
    assert equal(joined(batches), joined(batches))


def test_flips_are_drawn_anew_each_epoch():
    ids = torch.arange(4000)
    first = horizontal_flips(torch.zeros_like(ids), ids, seed=0)
    second = horizontal_flips(torch.ones_like(ids), ids, seed=0)
    for flips in (first, first ^ second, first ^ horizontal_flips(torch.zeros_like(ids), ids, seed=1)):
        assert 0.46 < flips.float().mean() < 0.54


def test_flip_can_be_turned_off(index):
    images, _, ids = joined(loader(index, augmentation=Augmentation(horizontal_flip=0)))
    stored = np.stack([decode_image(index.read(sample)).transpose(2, 0, 1) for sample in ids.tolist()])
    np.testing.assert_array_equal(images.numpy(), stored)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sequential_loader_sees_each_sample_once(index, num_workers):
    parts = [
        list(SequentialLoader(index=index, batch_size=4, rank=r, world_size=4, image_size=16, num_workers=num_workers))
        for r in range(4)
    ]
    assert sorted(sum(len(batch.ids) for batch in part) for part in parts) == [11, 11, 11, 12]
    images, labels, ids = joined(batch for part in parts for batch in part)
    assert ids.tolist() == list(range(45))
    assert labels.tolist() == index.labels.tolist()
    assert images[20].numpy().transpose(1, 2, 0).tolist() == decode_image(index.read(20)).tolist()


def test_more_ranks_than_samples(index):
    sizes = []
    for rank in range(50):
        part = SequentialLoader(index=index, batch_size=4, rank=rank, world_size=50, image_size=16, num_workers=0)
        assert len(part) == len(list(part))
        sizes += [len(batch.ids) for batch in part]
    assert sizes == [1] * 45


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_samples_keep_their_slot(tmp_path, num_workers):
    good, directory = io.BytesIO(), tmp_path / "train"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(good, "PNG")
    directory.mkdir()
    with SplitWriter(directory, samples_per_shard=10) as writer:
        writer.label_names = ["a"]
        for number, data in enumerate(
            [good.getvalue(), b"not an image", b"\xff\xd8\xff\xe0 nor this", good.getvalue()]
        ):
            writer.add(str(number), data, extension="png", label=0)
    index = ShardIndex.open(directory)
    shard = Path(index.shard_paths[0])
    data = bytearray(shard.read_bytes())
    data[data.rindex(b"IDAT") + 6] ^= 255  # Damages sample 3 after the index was written.
    shard.write_bytes(data)
    (batch,) = SequentialLoader(index=index, batch_size=9, rank=0, world_size=1, image_size=16, num_workers=num_workers)
    assert batch.labels.tolist() == [0, -1, -1, -1]
    assert batch.ids.tolist() == [0, 1, 2, 3]
    assert [int(image.max()) for image in batch.images] == [9, 0, 0, 0]
    assert len(batch.failures) == 3
    assert [failure.reason for failure in batch.failures] == ["not an image", "damaged image", "checksum"]
    for sample, failure in zip((1, 2, 3), batch.failures, strict=True):
        assert failure.sample_id == sample
        assert failure.message.startswith(f"{shard}, sample {sample} (key {sample}) at byte ")


def test_images_of_another_size_are_resized(index):
    batch = next(iter(loader(index, image_size=24, augmentation=Augmentation(horizontal_flip=0))))
    assert batch.images.shape == (8, 3, 24, 24)
    stored = Image.fromarray(decode_image(index.read(int(batch.ids[0]))))
    expected = np.asarray(stored.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(batch.images[0].numpy(), expected)


def test_jpeg_pixels_equal_those_of_pillow(index):
    for sample in range(5):
        with Image.open(io.BytesIO(index.read(sample))) as image:
            np.testing.assert_array_equal(decode_image(index.read(sample)), np.asarray(image.convert("RGB")))


def test_workers_outlive_the_warning_of_a_scheduler(index, stream):
    before = children()
    batches = iter(loader(index, num_workers=1, num_batches=40))
    next(batches)
    (worker,) = children() - before
    for warning in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(worker, warning)
    rest = list(batches)
    assert len(rest) == 39
    assert rest[6].ids.equal(stream[2][56:64])


def test_a_second_sigterm_ends_a_worker():
    ready, spared = multiprocessing.Event(), multiprocessing.Event()
    worker = multiprocessing.get_context("fork").Process(target=wait_as_worker, args=(ready, spared))
    worker.start()
    assert ready.wait(60)
    os.kill(worker.pid, signal.SIGTERM)
    assert spared.wait(60)
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(60)
    assert worker.exitcode == -signal.SIGTERM


def wait_as_worker(ready, spared):
    _start_worker(0)
    before = signal.getsignal(signal.SIGTERM)
    ready.set()
    while signal.getsignal(signal.SIGTERM) is before:
        time.sleep(0.01)
    spared.set()
    time.sleep(600)


def test_a_dead_worker_is_named(index):
    before = children()
    batches = iter(loader(index, num_workers=2, num_batches=400))
    next(batches)
    os.kill(min(children() - before), signal.SIGKILL)
    with pytest.raises(DataError, match=r"died before batch \d+ \(pid \d+, killed by SIGKILL\). It may"):
        list(batches)


class Breaking:
    """Batches over a connection that a worker breaks as it dies."""

    def __next__(self):
        raise ConnectionResetError("by peer")


def test_a_worker_that_is_still_dying_is_named_and_not_its_connection(index, monkeypatch):
    wait = data_loader.wait
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()

    def wait_for_its_end(sentinels, seconds):
        worker.kill()
        return wait(sentinels, 60)

    monkeypatch.setattr(data_loader, "wait", wait_for_its_end)
    with pytest.raises(DataError, match=rf"died before batch 7 \(pid {worker.pid}, killed by SIGKILL\)"):
        loader(index, num_workers=1)._next(Breaking(), [worker], 7)


UNDER_FORKSERVER = """
import multiprocessing, sys
from partialfc.data import SequentialLoader, ShardIndex

multiprocessing.set_start_method("forkserver")  # the default of Python 3.14
loader = SequentialLoader(
    index=ShardIndex.open(sys.argv[1]), batch_size=20, rank=0, world_size=1, image_size=16, num_workers=2
)
print([batch.ids.tolist() for batch in loader])
"""


def test_workers_live_where_python_starts_processes_from_a_server(index):
    # torch warns of more workers than this process may use cores.
    command = [sys.executable, "-W", "ignore:This DataLoader", "-c", UNDER_FORKSERVER, str(index.directory)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.stderr == ""
    assert ended.stdout == f"{[list(range(20)), list(range(20, 40)), list(range(40, 45))]}\n"


KILLED_WITH_A_LOCK = """
import os, signal, sys
from partialfc.data.errors import DataError
from partialfc.data.loader import WholeBatchLoader

class Steps:
    def __len__(self):
        return 9
    def __getitem__(self, step):
        loop = sys._getframe()
        while "done_event" not in loop.f_locals:
            loop = loop.f_back
        # As a worker has it for a moment at each batch.
        loop.f_locals["done_event"]._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

try:
    next(iter(WholeBatchLoader(Steps(), num_workers=2, timeout_seconds=60.0)))
except DataError as error:
    print(error)
"""


def test_a_loader_ends_although_a_worker_was_killed_with_a_lock_in_hand():
    ended = subprocess.run([sys.executable, "-c", KILLED_WITH_A_LOCK], capture_output=True, text=True, timeout=120)
    assert "killed by SIGKILL" in ended.stdout, ended.stderr


class StuckSteps:
    """A read that never comes back, as from a server that is gone."""

    def __len__(self):
        return 9

    def __getitem__(self, step):
        if step == 2:
            time.sleep(3600)
        return step


def test_a_hanging_worker_is_given_up():
    stuck = WholeBatchLoader(StuckSteps(), num_workers=1, timeout_seconds=1.0)
    batches = iter(stuck)
    # On a busy machine the start of a worker takes longer.
    limit, stuck._timeout_seconds = stuck._timeout_seconds, 60.0
    assert [next(batches), next(batches)] == [0, 1]
    stuck._timeout_seconds = limit
    with pytest.raises(DataError, match=r"no batch came from 1 data workers within 1 seconds, waiting for batch 2"):
        next(batches)


def test_a_shard_that_vanishes_stops_the_run_with_its_name(index, tmp_path):
    copy = tmp_path / "train"
    shutil.copytree(index.directory, copy)
    opened = ShardIndex.open(copy)
    (copy / "shard-000000.tar").unlink()
    for num_workers in (0, 1):
        with pytest.raises(DataError, match=r"shard-000000.tar: the data shard cannot be opened: No such file"):
            list(loader(opened, num_workers=num_workers))


def children():
    """Processes that this one started, among them some that pytest or other tests have."""
    return {int(child) for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


def test_normalized_images_lie_in_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert normalize_images(images).tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert normalize_images(images).dtype == torch.float32
    assert images.tolist() == [0, 51, 255]


def test_impossible_arguments_are_refused(index):
    with pytest.raises(ValueError, match=r"num_workers=-1 must not be negative"):
        loader(index, num_workers=-1)
    with pytest.raises(ValueError, match="global_batch=0"):
        loader(index, global_batch=0)
    with pytest.raises(ValueError, match="consumed=-8"):
        loader(index, consumed=-8)
    with pytest.raises(ValueError, match=r"rank is 3, but must be in \[0, 2\)"):
        loader(index, rank=3, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        SequentialLoader(index=index, batch_size=0, rank=0, world_size=1, image_size=16, num_workers=0)
