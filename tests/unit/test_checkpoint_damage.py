"""Whatever happens to the bytes of a checkpoint is found, named and passed over; and no state is touched by it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from partialfc.checkpoint import CheckpointError, CheckpointStore
from partialfc.checkpoint.manifest import MANIFEST_NAME
from partialfc.checkpoint.rewriting import reshard
from partialfc.distributed.mesh import ShardMesh
from partialfc.keyed import randint

ROWS = 3000


def state_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(ROWS, 128, generator=generator) if step else torch.zeros(ROWS, 128)
    return {"head": {"weight": weight, "momentum": weight[:300] / 7}, "progress": {"step": step}}


class Draw:
    """Numbers of one damage, by seed."""

    def __init__(self, seed: int) -> None:
        self._seed, self._count = seed, 0

    def below(self, bound: int) -> int:
        self._count += 1
        return int(randint(torch.tensor(bound), self._seed, self._count))

    def one_of(self, files: list[Path]) -> Path:
        return files[self.below(len(files))]


def flip_bit(target: Path, other: Path, draw: Draw) -> str:
    file = draw.one_of(sorted(target.iterdir()))
    data = bytearray(file.read_bytes())
    data[draw.below(len(data))] ^= 1 << draw.below(8)
    file.write_bytes(data)
    return file.name


def zero_page(target: Path, other: Path, draw: Draw) -> str:
    file = draw.one_of(sorted(target.glob("*.distcp")))
    data = bytearray(file.read_bytes())
    start = draw.below(len(data) // 4096) * 4096
    data[start : start + 4096] = bytes(4096)
    file.write_bytes(data)
    return file.name


def truncate(target: Path, other: Path, draw: Draw) -> str:
    file = draw.one_of(sorted(target.iterdir()))
    data = file.read_bytes()
    file.write_bytes(data[: draw.below(len(data))])
    return file.name


def grow(target: Path, other: Path, draw: Draw) -> str:
    file = draw.one_of(sorted(target.iterdir()))
    file.write_bytes(file.read_bytes() + bytes(1 + draw.below(5000)))
    return file.name


def delete(target: Path, other: Path, draw: Draw) -> str:
    file = draw.one_of(sorted(target.iterdir()))
    file.unlink()
    return file.name


def swap(target: Path, other: Path, draw: Draw) -> str:
    """Two files change places; those of the class centers have the same size."""
    files = sorted(target.glob("*.distcp"))
    first = draw.one_of(files[1:])
    second = draw.one_of([file for file in files[1:] if file != first])
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    return min(first.name, second.name)


def mix(target: Path, other: Path, draw: Draw) -> str:
    """A file of another step, of the same size."""
    file = draw.one_of(sorted(target.iterdir()))
    shutil.copy(other / file.name, file)
    # A manifest is good in itself, and then disagrees with the other files.
    return ".metadata" if file.name == MANIFEST_NAME else file.name


DAMAGES: list[Callable[[Path, Path, Draw], str]] = [
    *[flip_bit] * 10,
    zero_page,
    *[truncate] * 2,
    grow,
    delete,
    *[swap] * 2,
    *[mix] * 3,
]


def inflict(tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """That many damages, one at a time; how often each kind was found."""
    store = CheckpointStore(tmp_path / "run", mesh=ShardMesh.single())
    alone = CheckpointStore(tmp_path / "alone", mesh=ShardMesh.single())
    for step in (1, 2):
        # Of three ranks, so that there are several files.
        reshard(alone.save(step, state_at(step), metadata={"x": 1}), tmp_path / "run", num_ranks=3)
    good, target = (store.directory / f"step-0000000{step}" for step in (1, 2))
    pristine = {file.name: file.read_bytes() for file in target.iterdir()}
    assert sorted(pristine) == [".metadata", MANIFEST_NAME, "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    found: Counter[str] = Counter()
    for number in range(count):
        damage = DAMAGES[number % len(DAMAGES)]
        name = damage(target, good, Draw(number))
        if {file.name: file.read_bytes() for file in target.iterdir()} == pristine:
            continue  # a page of zeros was zeroed
        caplog.clear()
        assert store.latest() == good, (damage.__name__, number, name)
        assert "passing over a damaged checkpoint" in caplog.text
        assert name in caplog.text, (damage.__name__, number, name, caplog.text)
        state = state_at(0)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            store.load(target, state)
        assert not state["head"]["weight"].any()
        assert state["progress"]["step"] == 0
        found[damage.__name__] += 1
        for file in target.iterdir():
            file.unlink()
        for file_name, data in pristine.items():
            (target / file_name).write_bytes(data)
    assert store.latest() == target
    store.load(target, state := state_at(0))
    assert torch.equal(state["head"]["weight"], state_at(2)["head"]["weight"])
    return found


def test_every_damage_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert inflict(tmp_path, 200, caplog).total() == 200


@pytest.mark.soak
def test_two_thousand_damages_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = inflict(tmp_path, 2000, caplog)
    assert found.total() == 2000
    assert set(found) == {damage.__name__ for damage in DAMAGES}
