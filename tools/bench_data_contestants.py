"""The contestants of `bench_data.py`: ways to get batches of pixels out of the same data set."""

from __future__ import annotations

import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["CONTESTANTS", "Case", "run_contestant"]

_WARM_UP_BATCHES = 8  # Beyond what loaders fetch ahead.


@dataclass(frozen=True)
class Case:
    """What is loaded.

    Attributes:
        split: the folder of the split.
        image_size: of all of its images.
        batch: images at a time.
        workers: loader processes, where a loader has them.
    """

    split: Path
    image_size: int
    batch: int
    workers: int


def run_contestant(name: str, case: Case) -> tuple[float, float]:
    """(CPU seconds per image, images per second) over one epoch, after some batches to warm up."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # As in a program that was not started by another.
    batches = CONTESTANTS[name](case)
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    images, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while images < 8192 // case.batch * case.batch:
        images += next(batches)
    return (_cpu_seconds() - cpu) / images, images / (time.perf_counter() - start)


def _cpu_seconds() -> float:
    """Of this process and its children, whether they ended or not."""
    ticks, pending = 0, [os.getpid()]
    while pending:
        pid = pending.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(value) for value in fields[11:15])
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pending += [int(child) for child in children.read_text().split()]
        except FileNotFoundError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def _files(case: Case) -> list[bytes]:
    from partialfc.data import ShardIndex

    index = ShardIndex.open(case.split)
    return [index.read(number) for number in range(min(index.num_samples, 8192))]


def _bare_decode(case: Case) -> Iterator[int]:
    import simplejpeg

    for data in _again(_files(case)):
        simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)
        yield 1


def _bare_pillow(case: Case) -> Iterator[int]:
    from PIL import Image

    for data in _again(_files(case)):
        with Image.open(io.BytesIO(data)) as image:
            np.asarray(image.convert("RGB"))
        yield 1


def _planned(case: Case, make: Callable[..., Any], **options: Any) -> Iterator[int]:
    from partialfc.data import Augmentation, RankSteps, SamplePlan, ShardIndex

    index = ShardIndex.open(case.split)
    plan = SamplePlan(index.shard_sizes, seed=0)
    steps = RankSteps(plan=plan, global_batch=case.batch, rank=0, world_size=1, consumed=0, num_batches=10**6)
    common = {"index": index, "steps": steps, "image_size": case.image_size, "seed": 0}
    for batch in make(augmentation=Augmentation(horizontal_flip=0.5), **common, **options):
        yield len(batch.labels)


def _torch_loader(case: Case) -> Iterator[int]:
    from partialfc.data import TorchLoader

    return _planned(case, TorchLoader, num_workers=case.workers)


def _webdataset_loader(case: Case) -> Iterator[int]:
    from partialfc.data import WebDatasetLoader

    return _planned(case, WebDatasetLoader, num_workers=case.workers)


def _dali_loader(case: Case) -> Iterator[int]:
    from partialfc.data import DaliLoader

    return _planned(case, DaliLoader, num_workers=0, threads=1)


def _dali_native(case: Case) -> Iterator[int]:
    from partialfc.data import DaliStream

    return _planned(case, DaliStream, threads=1)


def _webdataset_pillow(case: Case) -> Iterator[int]:
    """What webdataset's own documentation shows, with flips as everybody writes them."""
    import random

    import webdataset
    from torch.utils.data import DataLoader

    def to_pixels(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        pixels = np.asarray(sample["jpg"])
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), sample["cls"]

    shards = [str(path) for path in sorted(case.split.glob("*.tar"))]
    data = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).repeat().shuffle(1000)
    data = data.decode("pil").map(to_pixels).batched(case.batch)
    for images, _ in DataLoader(data, batch_size=None, num_workers=case.workers, prefetch_factor=4):
        yield len(images)


def _image_folder(case: Case) -> Iterator[int]:
    """A folder of files, Pillow, and a DataLoader that collates: the usual first loop."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    folder = case.split / "files"
    if not folder.exists():
        folder.mkdir()
        for number, data in enumerate(_files(case)):
            (folder / f"{number:06d}.jpg").write_bytes(data)

    class Files(Dataset[tuple[torch.Tensor, int]]):
        paths = sorted(folder.iterdir())

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            with Image.open(self.paths[number % len(self.paths)]) as image:
                pixels = np.asarray(image.convert("RGB"))
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), number

    loader = DataLoader(Files(), batch_size=case.batch, sampler=_Endless(), num_workers=case.workers, prefetch_factor=4)
    for images, _ in loader:
        yield len(images)


class _Endless:
    def __iter__(self) -> Iterator[int]:
        return islice(count(), 10**9)

    def __len__(self) -> int:
        return 10**9


def _again(files: list[bytes]) -> Iterator[bytes]:
    while True:
        yield from files


CONTESTANTS: dict[str, Callable[[Case], Iterator[int]]] = {
    "simplejpeg, decode only": _bare_decode,
    "Pillow, decode only": _bare_pillow,
    "torch loader": _torch_loader,
    "webdataset loader": _webdataset_loader,
    "DALI loader": _dali_loader,
    "DALI's own reader": _dali_native,
    "webdataset + Pillow": _webdataset_pillow,
    "folder + Pillow": _image_folder,
}
