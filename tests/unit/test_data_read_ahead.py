"""Reading windows ahead: what is read, when, and that nothing hangs."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from partialfc.data.errors import DataError
from partialfc.data.index import ShardIndex
from partialfc.data.plan import Draws, RankSteps, SamplePlan
from partialfc.data.read_ahead import ReadAhead, WarmSteps
from partialfc.data.writer import SplitWriter

SHARD_SIZES = (100, 100, 37)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "train"
    directory.mkdir()
    random = np.random.default_rng(0)
    with SplitWriter(directory, samples_per_shard=100) as writer:
        for number in range(sum(SHARD_SIZES)):
            writer.add(f"a/{number}", random.bytes(500 + number), extension="jpg", label=number % 5)
        writer.label_names += list("abcde")
    return directory


class RecordingStorage:
    """Real storage that writes down what is warmed, and can be told to fail or to hang."""

    def __init__(self, storage):
        self.storage = storage
        self.warmed = []
        self.error = None
        self.gate = threading.Event()
        self.gate.set()

    def warm(self, shard, start, stop):
        self.gate.wait(30.0)
        if self.error is not None:
            raise self.error
        self.warmed.append((shard, start, stop))
        self.storage.warm(shard, start, stop)


@pytest.fixture
def index(split):
    index = ShardIndex.open(split)
    index._storage = RecordingStorage(index.storage)
    return index


def steps_of(*, lanes=4, window=16, batch=10, rank=0, world_size=1, consumed=0, num_batches=24):
    plan = SamplePlan(SHARD_SIZES, seed=3, lanes=lanes, window=window)
    return RankSteps(
        plan=plan, global_batch=batch, rank=rank, world_size=world_size, consumed=consumed, num_batches=num_batches
    )


def is_warm(index, ids):
    """Whether what was warmed so far holds all of these samples."""
    shards, offsets, sizes = index.locate(np.asarray(ids))
    return all(
        any(own == shard and start <= offset and offset + size <= stop for own, start, stop in index.storage.warmed)
        for shard, offset, size in zip(shards, offsets, sizes, strict=True)
    )


@pytest.mark.parametrize("batch", [1, 4, 10, 64, 300])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("consumed", [0, 5, 230])
def test_a_step_is_given_out_when_its_samples_are_near(index, batch, rank, world_size, consumed):
    steps = steps_of(batch=batch, rank=rank, world_size=world_size, consumed=consumed, num_batches=500 // batch)
    seen = []
    for step in WarmSteps(index, steps):
        assert is_warm(index, steps.draws(step).ids)
        seen.append(step)
    assert seen == list(range(len(steps))) == list(range(len(WarmSteps(index, steps))))


def test_an_epoch_is_read_once_and_no_byte_more(index):
    steps = steps_of(batch=79, num_batches=3)
    assert list(WarmSteps(index, steps)) == [0, 1, 2]
    every, offsets, sizes = index.locate(np.arange(index.num_samples))
    covered = Counter(
        (int(shard), int(offset))
        for shard, offset, size in zip(every, offsets, sizes, strict=True)
        for own, start, stop in index.storage.warmed
        if own == shard and start <= offset and offset + size <= stop
    )
    assert len(covered) == index.num_samples
    assert set(covered.values()) == {1}


def test_a_rank_reads_its_own_lanes_only(index):
    list(WarmSteps(index, steps_of(batch=8, rank=0, world_size=4, num_batches=8)))
    lengths = sum(stop - start for _, start, stop in index.storage.warmed)
    _, _, sizes = index.locate(np.arange(index.num_samples))
    assert 0 < lengths < sizes.sum()
    plan = steps_of().plan
    assert is_warm(index, [sample for ids in plan.window_ids(0, 0, 0) for sample in ids])
    assert not is_warm(index, [plan.window_ids(0, 0, 3)[0][0]])


def until(condition):
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_not_more_than_one_window_ahead(index):
    steps = steps_of(batch=16, num_batches=14)  # A window of all lanes is 64 samples: 4 steps.
    windows = [
        [sample for lane in range(4) for ids in steps.plan.window_ids(0, number, lane) for sample in ids]
        for number in range(4)
    ]
    with ReadAhead(index, steps) as read_ahead:
        read_ahead.advance(0)
        until(lambda: is_warm(index, windows[1]))
        read_ahead.advance(3)
        time.sleep(0.1)
        assert not any(is_warm(index, [sample]) for sample in windows[2])
        read_ahead.advance(4)
        until(lambda: is_warm(index, windows[2]))
        time.sleep(0.1)
        assert not any(is_warm(index, [sample]) for sample in windows[3])


@pytest.mark.parametrize("error", [OSError("bad place"), DataError("the store is away")])
def test_errors_are_left_to_the_reader(index, error):
    index.storage.error = error
    assert list(WarmSteps(index, steps_of())) == list(range(24))


def test_an_error_of_our_own_is_not_a_hang(index):
    index.storage.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        list(WarmSteps(index, steps_of()))


def test_it_ends_while_a_read_hangs(index, monkeypatch):
    monkeypatch.setattr("partialfc.data.read_ahead._PATIENCE_SECONDS", 0.05)
    index.storage.gate.clear()
    read_ahead = ReadAhead(index, steps_of())
    waiting = threading.Thread(target=read_ahead.advance, args=(0,), daemon=True)
    waiting.start()
    read_ahead.close()
    waiting.join(30.0)
    assert not waiting.is_alive()
    index.storage.gate.set()
    read_ahead._thread.join(30.0)
    assert not read_ahead._thread.is_alive()


def test_leaving_early_ends_the_thread(index):
    steps = WarmSteps(index, steps_of())
    for step in steps:
        if step == 3:
            break
    del step
    until(lambda: not any(thread.name == "read-ahead" for thread in threading.enumerate()))
    assert list(steps)[:2] == [0, 1]


def test_no_steps(index):
    assert list(WarmSteps(index, steps_of(num_batches=0))) == []


def test_a_plan_without_windows_is_refused(index):
    class Everywhere:
        num_samples, lanes = 237, 1

        def draw(self, positions):
            return Draws(positions, torch.zeros_like(positions))

    steps = RankSteps(plan=Everywhere(), global_batch=4, rank=0, world_size=1, consumed=0, num_batches=2)
    with pytest.raises(ValueError, match="read_ahead: Everywhere draws samples from all places"):
        WarmSteps(index, steps)
