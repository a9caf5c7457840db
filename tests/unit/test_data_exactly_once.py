"""Each sample once an epoch, equal steps on all ranks, one order: for any ranks, workers, loaders and restarts."""

import io
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from partialfc.data import Augmentation, DaliLoader, RankSteps, SamplePlan, ShardIndex, TorchLoader, WebDatasetLoader
from partialfc.data.split_format import write_split_files
from partialfc.data.writer import ShardWriter

LOADERS = {"torch": TorchLoader, "webdataset": WebDatasetLoader, "dali": DaliLoader}
WORLD_SIZES, WORKERS = (1, 2, 3, 4, 8), (0, 1, 3)
SIDE = 16
COMBINATIONS = list(itertools.product(LOADERS, WORLD_SIZES, WORKERS))
SEED = 20261124


def uneven_sizes(total):
    """Shards of very different sizes, an empty one and one of a single sample among them."""
    if total < 5:
        return [0, *[1] * total, 0]
    return [0, total // 2, 1, 0, total // 7, total - total // 2 - 1 - total // 7]


def write_uneven(directory, total):
    """A split of that many samples in uneven shards; a few pictures, again and again."""
    directory.mkdir(parents=True)
    pictures = []
    for number in range(7):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    shards, records, number = [], [], 0
    for place, size in enumerate(uneven_sizes(total)):
        writer = ShardWriter(directory / f"shard-{place:06d}.tar")
        for _ in range(size):
            writer.add(f"{number:07d}", pictures[number % 7], extension="jpg", label=number % min(total, 10))
            number += 1
        written, num_bytes = writer.close()
        shards.append({"name": f"shard-{place:06d}.tar", "bytes": num_bytes, "num_samples": size})
        records.append(written)
    names = [f"person-{label}" for label in range(min(total, 10))]
    write_split_files(directory, np.concatenate(records), label_names=names, shards=shards)
    return ShardIndex.open(directory)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    made = {}

    def get(total):
        if total not in made:
            made[total] = write_uneven(tmp_path_factory.mktemp("sets") / str(total), total)
        return made[total]

    return get


def plan_of(index):
    return SamplePlan(index.shard_sizes, seed=3, lanes=5, window=64)


def batch_of(total):
    return min(total, 64 if total < 10_000 else 8192)


def rank_loader(index, name, world_size, rank, workers, *, consumed=0, num_batches=None, global_batch=None):
    global_batch = global_batch or batch_of(index.num_samples)
    steps = RankSteps(
        plan=plan_of(index),
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        consumed=consumed,
        num_batches=-(-index.num_samples // global_batch) if num_batches is None else num_batches,
    )
    return LOADERS[name](
        index=index, steps=steps, image_size=SIDE, augmentation=Augmentation(), num_workers=workers, seed=1
    )


def global_batches(index, name, world_size, workers, **options):
    """Ids, labels and a sum of the pixels of each step, all ranks together; every rank makes as many steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        ranks = [list(rank_loader(index, name, world_size, rank, workers, **options)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return [
        (
            torch.cat([batch.ids for batch in step]).tolist(),
            torch.cat([batch.labels for batch in step]).tolist(),
            torch.cat([batch.images.long().flatten(1) @ torch.arange(SIDE * SIDE * 3) for batch in step]).tolist(),
        )
        for step in zip(*ranks, strict=True)
    ]


def check(index, name, world_size, workers):
    found = global_batches(index, name, world_size, workers)
    assert found == global_batches(index, "torch", 1, 0)
    total = index.num_samples
    ids = [sample for step in found for sample in step[0]]
    epoch = plan_of(index).sample_ids(torch.arange(len(ids)))
    assert sorted(ids) == sorted(epoch.tolist())
    whole = len(ids) // total * total
    assert sorted(epoch[:whole].tolist()) == sorted(list(range(total)) * (whole // total))
    labels = [label for step in found for label in step[1]]
    assert labels == index.labels[np.array(ids)].tolist()


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_each_sample_once_in_one_order(indexes, total):
    """A seeded tenth of the combinations, and the plainest ones."""
    chosen = random.Random(SEED + total).sample(COMBINATIONS, 5)
    for name, world_size, workers in [("webdataset", 1, 0), ("dali", 1, 0), *chosen]:
        check(indexes(total), name, world_size, workers)


@pytest.mark.soak
@pytest.mark.parametrize("total", [1, 7, 1000])
@pytest.mark.parametrize(("name", "world_size", "workers"), COMBINATIONS)
def test_each_sample_once_in_every_combination(indexes, total, name, world_size, workers):
    check(indexes(total), name, world_size, workers)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "world_size", "workers"), COMBINATIONS)
def test_each_of_100003_samples_once(indexes, name, world_size, workers):
    check(indexes(100_003), name, world_size, workers)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_share_100003_samples(world_size):
    plan = SamplePlan(uneven_sizes(100_003), seed=3)
    global_batch, steps = 8192, 13
    parts = [
        RankSteps(plan=plan, global_batch=global_batch, rank=r, world_size=world_size, consumed=0, num_batches=steps)
        for r in range(world_size)
    ]
    ids = torch.cat([part.draws(step).ids for step in range(steps) for part in parts])
    visits = torch.cat([part.draws(step).visits for step in range(steps) for part in parts])
    assert sorted(ids[visits == 0].tolist()) == list(range(100_003))


@given(
    st.lists(st.tuples(st.sampled_from(WORLD_SIZES), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([7, 61]),
)
@settings(max_examples=30, deadline=None)
def test_any_restarts_on_any_ranks_make_up_the_epoch(phases, global_batch, total):
    plan = SamplePlan(uneven_sizes(total), seed=9, lanes=3, window=8)
    consumed, seen = 0, []
    for world_size, num_batches in itertools.chain(phases, itertools.repeat((2, 3))):
        if consumed >= total:
            break
        for rank in range(world_size):
            steps = RankSteps(
                plan=plan,
                global_batch=global_batch,
                rank=rank,
                world_size=world_size,
                consumed=consumed,
                num_batches=num_batches,
            )
            for step in range(num_batches):
                draws = steps.draws(step)
                seen += draws.ids[draws.visits == 0].tolist()
        consumed += global_batch * num_batches
    assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("name", LOADERS)
def test_stopped_at_4_ranks_and_gone_on_with_3_then_1(indexes, name):
    """At random steps; the pictures are those of an undisturbed run, bit for bit."""
    index = indexes(1000)
    generator = random.Random(SEED)
    first, second = generator.randint(1, 6), generator.randint(1, 6)
    whole = global_batches(index, "torch", 1, 0, num_batches=16)
    pieces = global_batches(index, name, 4, 0, num_batches=first)
    pieces += global_batches(index, name, 3, 1, consumed=64 * first, num_batches=second)
    pieces += global_batches(index, name, 1, 0, consumed=64 * (first + second), num_batches=16 - first - second)
    assert pieces == whole
    ids = [sample for step in pieces for sample in step[0]]
    assert set(ids) == set(range(1000))
    assert len(ids) == 1024
