"""The webdataset loader: batches of the torch loader, with the stages of users in between, none of them lossy."""

import itertools
import re
import sys
import textwrap

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from partialfc.data.augment import Augmentation
from partialfc.data.errors import SampleError
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedIndex
from partialfc.data.loader import TorchLoader
from partialfc.data.plan import RankSteps, SamplePlan
from partialfc.data.synthesis import synthesize
from partialfc.data.webdataset_loader import WebDatasetLoader
from partialfc.data.webdataset_stages import load_stages
from partialfc.data.writer import SplitWriter

ALL_CHANGES = Augmentation(crop=0.5, color=0.5, grayscale=0.3, blur=0.3, occlusion=0.5)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


def open_copy(source, directory, *, samples_per_shard, changed=None):
    """A split with the samples of another one in smaller shards; some of its files replaced."""
    directory.mkdir()
    with SplitWriter(directory, samples_per_shard=samples_per_shard) as writer:
        writer.label_names = source.label_names
        for sample in range(source.num_samples):
            data = (changed or {}).get(sample, source.read(sample))
            writer.add(f"people/{sample}", data, extension="jpg", label=int(source.labels[sample]))
    return ShardIndex.open(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    synthesize(out, identities=9, images_per_identity=5, seed=0, image_size=16)
    return ShardIndex.open(out / "train")


@pytest.fixture(scope="module")
def index(made, tmp_path_factory):
    """45 samples in shards of 11, 11, 11, 11 and 1."""
    return open_copy(made, tmp_path_factory.mktemp("data") / "train", samples_per_shard=11)


@pytest.fixture(scope="module")
def damaged(made, tmp_path_factory):
    """Sample 3 is no image, sample 20 a JPEG cut in half."""
    changed = {3: b"nothing", 20: made.read(20)[:200]}
    return open_copy(made, tmp_path_factory.mktemp("data") / "train", samples_per_shard=11, changed=changed)


def options(index, **changes):
    names = ("global_batch", "rank", "world_size", "consumed", "num_batches")
    defaults = {"global_batch": 9, "rank": 0, "world_size": 1, "consumed": 0, "num_batches": 6}
    steps = RankSteps(
        plan=SamplePlan(index.shard_sizes, seed=4, lanes=4, window=8),
        **(defaults | {name: changes.pop(name) for name in names if name in changes}),
    )
    others = {"image_size": 16, "augmentation": Augmentation(), "num_workers": 0, "seed": 11}
    return {"index": index, "steps": steps} | others | changes


def loader(index, *stages, **changes):
    return WebDatasetLoader(stages=stages, **options(index, **changes))


def joined(batches):
    batches = list(batches)
    assert all(batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64 for batch in batches)
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "ids")]


def equal(first, second):
    return len(first) == len(second) == 3 and all(a.equal(b) for a, b in zip(first, second, strict=True))


def keep(sample):
    return sample


def invert(sample):
    return sample | {"image": 255 - sample["jpg"]}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("augmentation", [Augmentation(), ALL_CHANGES], ids=["flips", "all"])
def test_without_stages_batches_are_those_of_the_torch_loader(index, num_workers, augmentation):
    expected = joined(TorchLoader(**options(index, augmentation=augmentation)))
    batches = loader(index, num_workers=num_workers, augmentation=augmentation)
    assert len(batches) == 6
    assert equal(joined(batches), expected)
    assert sorted(expected[2][:45].tolist()) == list(range(45))


@pytest.mark.parametrize(
    "stages",
    [
        (wds.map(keep),),
        (wds.decode("rgb8"),),
        (wds.decode("rgb8"), wds.rename(image="jpg;png"), wds.info(n=0)),
        (wds.decode("pil"), wds.map(lambda sample: {"image": sample["jpg"]})),
        (wds.decode("torchrgb8"),),
        (wds.map_dict(jpg=lambda data: bytes(data), cls=int), lambda samples: (dict(sample) for sample in samples)),
    ],
    ids=["bytes", "array", "renamed", "pil", "tensor", "functions"],
)
@pytest.mark.parametrize("num_workers", [0, 3])
def test_stages_that_change_nothing_change_nothing(index, stages, num_workers):
    expected = joined(TorchLoader(**options(index, augmentation=ALL_CHANGES)))
    assert equal(joined(loader(index, *stages, augmentation=ALL_CHANGES, num_workers=num_workers)), expected)


def test_stages_get_ordinary_samples(index):
    seen = []
    plan = SamplePlan(index.shard_sizes, seed=4, lanes=4, window=8)
    joined(loader(index, wds.map(lambda sample: seen.append(dict(sample)) or sample), consumed=40, num_batches=1))
    assert sorted(sample["__position__"] for sample in seen) == list(range(40, 49))
    for sample in seen:
        sample_id = int(plan.sample_ids(torch.tensor(sample["__position__"])))
        assert sample == {
            "__key__": f"people/{sample_id}",
            "__url__": index.shard_paths[sample_id // 11],
            "__position__": sample["__position__"],
            "__id__": sample_id,
            "__visit__": int(sample["__position__"] >= 45),
            "jpg": index.read(sample_id),
            "cls": str(index.labels[sample_id]).encode(),
        }


def test_what_stages_do_is_in_the_batch(index):
    plain = joined(loader(index, augmentation=Augmentation(horizontal_flip=0.0)))
    flat = Augmentation(horizontal_flip=0.0)
    inverted = joined(loader(index, wds.decode("rgb8"), wds.map(invert), augmentation=flat, num_workers=1))
    assert inverted[0].equal(255 - plain[0])
    assert equal([plain[0], *inverted[1:]], plain)


def test_ranks_and_restarts_change_nothing(index):
    stages = (wds.decode("rgb8"), wds.map(invert))
    stream = joined(loader(index, *stages))
    before = joined(loader(index, *stages, num_batches=2))
    ranks = [
        list(loader(index, *stages, rank=r, world_size=2, consumed=18, num_batches=4, num_workers=r)) for r in range(2)
    ]
    assert [[len(batch.ids) for batch in rank] for rank in ranks] == [[4] * 4, [5] * 4]
    after = joined(batch for step in zip(*ranks, strict=True) for batch in step)
    assert equal([torch.cat(pair) for pair in zip(before, after, strict=True)], stream)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_ahead_changes_nothing(index, num_workers):
    expected = joined(loader(index))
    assert equal(joined(loader(index, wds.map(keep), read_ahead=True, num_workers=num_workers)), expected)


def test_images_are_brought_to_their_size_after_the_stages(index):
    batch = next(iter(loader(index, wds.decode("rgb8"), image_size=24)))
    expected = next(iter(TorchLoader(**options(index, image_size=24))))
    assert batch.images.shape == (9, 3, 24, 24)
    assert batch.images.equal(expected.images)


def test_several_sets_as_one(index, damaged):
    both = JoinedIndex([index, damaged])
    expected = list(TorchLoader(**options(both, num_batches=9)))
    assert equal(joined(loader(both, num_batches=9)), joined(expected))
    assert equal(joined(loader(both, wds.decode("rgb8"), num_batches=9)), joined(expected))
    assert [failure.sample_id for batch in expected for failure in batch.failures] in ([48, 65], [65, 48])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "stages", [(), (wds.map(keep),), (wds.decode("rgb8"), wds.map(keep))], ids=["none", "map", "decode"]
)
def test_bad_samples_keep_their_slot(damaged, stages, num_workers):
    expected = list(TorchLoader(**options(damaged)))
    found = list(loader(damaged, *stages, num_workers=num_workers))
    assert equal(joined(found), joined(expected))
    assert [batch.failures for batch in found] == [batch.failures for batch in expected]
    failures = {failure.sample_id: failure for batch in found for failure in batch.failures}
    assert {number: failure.reason for number, failure in failures.items()} == {3: "not an image", 20: "damaged image"}
    assert failures[20].message.startswith(f"{damaged.shard_paths[1]}, sample 20 (key people/20) at byte ")
    images, labels, ids = joined(found)
    assert labels[ids == 3].tolist() == [-1] * int((ids == 3).sum())
    assert not images[labels == -1].any()


def test_bit_rot_keeps_its_slot(made, tmp_path):
    changed = dict.fromkeys(range(5), b"nothing")
    index = open_copy(made, tmp_path / "train", samples_per_shard=11, changed=changed)
    _, (offset,), _ = index.locate(np.array([30]))
    with open(index.shard_paths[2], "r+b") as file:
        file.seek(int(offset) + 60)
        byte = file.read(1)
        file.seek(int(offset) + 60)
        file.write(bytes([byte[0] ^ 1]))
    (expected,) = TorchLoader(**options(index, global_batch=45, num_batches=1))
    for stages in ((), (wds.map(keep),)):
        (batch,) = loader(index, *stages, global_batch=45, num_batches=1)
        assert batch.failures == expected.failures
        found = {failure.sample_id: failure.reason for failure in batch.failures}
        assert found == {**dict.fromkeys(range(5), "not an image"), 30: "checksum"}
        assert list(found) == [sample for sample in batch.ids.tolist() if sample in found]
        assert next(iter(found)) != 30
        assert batch.ids[batch.labels == -1].tolist() == list(found)


def two_at_a_time(samples):
    """Holds two samples back before it hands them on."""
    held = []
    for sample in samples:
        held.append(sample)
        if len(held) == 3:
            yield held.pop(0)
    yield from held


def picky(sample):
    if sample["__id__"] in (7, 8, 33):
        raise SampleError("too large", "more than we like")
    return sample


@pytest.mark.parametrize(
    "stages", [(wds.map(picky),), (two_at_a_time, wds.map(picky)), (wds.map(picky), two_at_a_time)]
)
def test_a_stage_may_call_samples_bad(index, stages):
    batches = list(loader(index, *stages))
    plain = joined(TorchLoader(**options(index)))
    _, labels, ids = joined(batches)
    assert ids.equal(plain[2])
    refused = torch.isin(ids, torch.tensor([7, 8, 33]))
    assert labels.equal(torch.where(refused, -1, plain[1]))
    failures = [failure for batch in batches for failure in batch.failures]
    assert len(failures) == int(refused.sum()) >= 3
    assert {failure.reason for failure in failures} == {"too large"}
    assert all(failure.message.endswith(": more than we like") for failure in failures)


def picky_decoder(name, data):
    if name == ".cls" and int(data) == 2:
        raise SampleError("too large", "more than we like")


def test_a_decoder_may_call_samples_bad(index):
    _, labels, ids = joined(loader(index, wds.decode(picky_decoder, "rgb8")))
    expected = torch.from_numpy(index.labels[ids.numpy()])
    assert labels.equal(torch.where(expected == 2, -1, expected))


def break_down(sample):
    if sample["__id__"] == 7:
        raise KeyError("eyes")
    return sample


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stages", [(wds.map(break_down),), (two_at_a_time, wds.map(break_down), two_at_a_time)])
def test_a_stage_that_fails_stops_the_run(index, stages, num_workers):
    place = r"test_data_webdataset.py:\d+ in break_down\)"
    where = re.escape(f"{index.shard_paths[0]}, sample 7 (key people/7) at byte ")
    number = 1 + stages.index(next(stage for stage in stages if isinstance(stage, wds.filters.FilterFunction)))
    with pytest.raises(
        ValueError, match=rf"{where}\d+: stage {number} \(map break_down\) failed: KeyError: 'eyes'.*{place}"
    ):
        list(loader(index, *stages, num_workers=num_workers))


def refuse_all(samples):
    raise RuntimeError("no model file")
    yield


def tired(samples):
    held = list(samples)
    if len(held) > 1:
        raise RuntimeError("tired")
    yield from held


def test_a_stage_that_fails_by_itself_stops_the_run(index):
    with pytest.raises(ValueError, match="before the first sample: a webdataset stage failed: RuntimeError: no model"):
        list(loader(index, refuse_all))
    with pytest.raises(ValueError, match=r"or one of the 8 samples drawn next: a webdataset stage failed: .*: tired"):
        list(loader(index, tired))


def drop(samples):
    return (sample for sample in samples if sample["__id__"] != 7)


def drop_last(samples):
    return itertools.islice(samples, 8)


def repeat(samples):
    for sample in samples:
        yield sample
        if sample["__id__"] == 7:
            yield sample


def repeat_last(samples):
    samples = list(samples)
    return iter([*samples, samples[-1]])


def turn_round(samples):
    return reversed(list(samples))


def to_names(samples):
    return ({"image": sample["jpg"]} for sample in samples)


def to_arrays(samples):
    return (sample["jpg"] for sample in samples)


@pytest.mark.parametrize(
    "stage", [drop, drop_last, repeat, repeat_last, turn_round, to_names, to_arrays, wds.map(lambda sample: None)]
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_stages_that_turn_out_lossy_stop_the_run(index, stage, num_workers):
    with pytest.raises(
        ValueError, match=r"sample \d+ \(key people/\d+\) at byte \d+: the sample .* of stage 2 \("
    ) as caught:
        list(
            loader(
                index, wds.map(keep), stage, wds.map(keep) if stage is not to_arrays else keep, num_workers=num_workers
            )
        )
    name = "map <lambda>" if isinstance(stage, wds.filters.FilterFunction) else stage.__name__
    assert f"of stage 2 ({name}); a stage may change samples, but must hand on each one once" in str(caught.value)
    if stage in (drop, repeat):
        first = next(batch.ids.tolist() for batch in loader(index) if 7 in batch.ids.tolist())
        missed = 7 if stage is drop else first[first.index(7) + 1]
        assert f"sample {missed} (key people/{missed}) " in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (wds.select(bool), r"stage 1 \(select bool\) drops samples; exact epochs need each sample once"),
        (wds.rsample(0.5), r"stage 1 \(rsample\) drops samples"),
        (wds.slice(3), r"stage 1 \(slice\) drops samples"),
        (wds.shuffle(100), r"stage 1 \(shuffle\) reorders samples"),
        (wds.detshuffle(), r"stage 1 \(detshuffle\) reorders samples"),
        (wds.Cached(), r"stage 1 \(Cached\) repeats the samples"),
        (wds.to_tuple("jpg", "cls"), r"stage 1 \(to_tuple\) turns samples into tuples"),
        (wds.map_tuple(keep), r"stage 1 \(map_tuple keep\) turns samples into tuples"),
        (wds.extract_keys("*.jpg"), r"stage 1 \(extract_keys\) turns samples into tuples"),
        (
            wds.batched(8),
            r"stage 1 \(batched\) turns samples into tuples or batches, but batches are made by the loader",
        ),
        (wds.unbatched(), r"stage 1 \(unbatched\) turns"),
        (wds.resampled(), r"stage 1 \(resampled\) is a source of data shards"),
        (wds.DataPipeline().with_epoch(3), r"stage 1 \(DataPipeline\) is a source of samples"),
        (wds.WebDataset("a.tar", shardshuffle=False), r"stage 1 \(WebDataset\) is a source"),
        (
            wds.map(keep, handler=wds.warn_and_continue),
            r"stage 1 \(map keep\) drops samples that fail \(handler=warn_and",
        ),
        (wds.map(keep, wds.ignore_and_stop), r"stage 1 \(map keep\) drops samples that fail \(handler=ignore_and_stop"),
        (wds.decode("rgb8", handler=keep), r"stage 1 \(decode\) drops samples that fail \(handler=keep\)"),
        (wds.map, r"stage 1 \(map\) is not complete: call it, as in wds.map\(function\)"),
        (wds.detshuffle, r"stage 1 \(detshuffle\) is not complete"),
        ([wds.map(keep)], r"stage 1 \(list\) is no webdataset stage"),
        (3, r"stage 1 \(int\) is no webdataset stage: 3"),
    ],
)
def test_lossy_stages_are_refused_before_the_start(index, stage, message):
    with pytest.raises(ValueError, match=message):
        loader(index, stage)
    with pytest.raises(ValueError, match=message.replace("stage 1", "stage 2")):
        loader(index, wds.map(keep), stage)


def test_handlers_that_raise_are_welcome(index):
    stages = (wds.map(keep, handler=wds.reraise_exception), wds.decode("rgb8", handler=wds.filters.reraise_exception))
    assert equal(joined(loader(index, *stages)), joined(loader(index)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda sample: sample | {"cls": 99},
            r"the stages changed 'cls' from \d to 99, but labels come from the index",
        ),
        (lambda sample: sample | {"cls": "ada"}, "the stages changed 'cls' from .* to 'ada'"),
        (lambda sample: {"picture": 1}, r"the stages gave \['__key__', 'picture'\], but .* under 'image' or 'jpg'"),
        (
            lambda sample: {"image": np.zeros((16, 16, 3))},
            r"gave ndarray float64 \(16, 16, 3\) as the image, but it must",
        ),
        (lambda sample: {"image": np.zeros((16, 16), np.uint8)}, r"gave ndarray uint8 \(16, 16\) as the image"),
        (lambda sample: {"image": "x.jpg"}, "gave str  as the image, but it must be bytes, a PIL image, or uint8"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_no_sample_any_more_stops_the_run(index, change, message, num_workers):
    with pytest.raises(ValueError, match=rf"\(key people/\d+\) at byte \d+: .*{message}"):
        list(loader(index, wds.map(change), num_workers=num_workers))


def test_images_may_be_channels_first_or_gray_in_pillow(index):
    stage = wds.map(lambda sample: {"image": Image.new("L", (16, 16), 50)})
    assert (next(iter(loader(index, stage))).images == 50).all()
    stage = wds.map(lambda sample: {"image": np.full((3, 16, 20), 9, np.uint8)})
    assert next(iter(loader(index, stage))).images.shape == (9, 3, 16, 16)


def test_configured_stages(tmp_path, monkeypatch, index):
    (tmp_path / "my_stages.py").write_text(
        textwrap.dedent(
            """
            import webdataset as wds
            good = lambda: [wds.decode("rgb8")]
            def bad(): return wds.decode("rgb8")
            def broken(): raise OSError("no such model")
            number = 3
            """
        )
    )
    (tmp_path / "my_broken_stages.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert equal(joined(loader(index, *load_stages("my_stages:good"))), joined(loader(index)))
    for path, message in {
        "my_stages": "stages: 'my_stages' must name a function as in my_package.my_module:my_function",
        "my_stages:": "must name a function",
        "their_stages:good": "the module their_stages of 'their_stages:good' cannot be imported: ModuleNotFoundError",
        "my_broken_stages:good": "cannot be imported: ZeroDivisionError: division by zero .*my_broken_stages.py:1",
        "my_stages:better": r"my_stages has no function 'better'; it has \['good', 'bad', 'broken'\]",
        "my_stages:number": "my_stages has no function 'number'",
        "my_stages:bad": r"my_stages:bad\(\) gave a FilterFunction, but must give a list of webdataset stages",
        "my_stages:broken": r"my_stages:broken\(\) failed: OSError: no such model \(.*my_stages.py:5 in broken\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_stages(path)
    sys.modules.pop("my_stages")
