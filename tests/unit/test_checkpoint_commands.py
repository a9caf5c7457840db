"""`partialfc checkpoint ...` on checkpoints of a head, saved as one rank and rewritten as several."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from partialfc import CenterSGD, PartialFC
from partialfc.checkpoint import CheckpointStore, parts, reading, rewriting
from partialfc.checkpoint.manifest import Manifest
from partialfc.checkpoint.reading import StoredState
from partialfc.cli import main
from partialfc.config import load_config, write_config
from partialfc.data import ShardIndex, synthesize
from partialfc.distributed.mesh import ShardMesh
from partialfc.head import HeadGroup
from partialfc.margins import CosFace

# Blocks of two, and one class of the last block is none.
NUM_CLASSES, DIM = 401, 64
MESH = ShardMesh.single()


def head_of(num_subcenters: int = 1, **options: Any) -> HeadGroup:
    options = {"optimizer": CenterSGD(momentum_dtype="int8"), "dtype": torch.float16, "init_std": 1.0, **options}
    return HeadGroup({"main": PartialFC(NUM_CLASSES, DIM, margin=CosFace(), num_subcenters=num_subcenters, **options)})


def state_of(heads: HeadGroup, step: int) -> dict[str, Any]:
    backbone = {"layer.weight": torch.randn(600, 500, generator=torch.Generator().manual_seed(1))}
    return {"head": heads.state_dict(), "backbone": backbone, "progress": {"step": step, "losses": [0.5, 1.5]}}


def run_with(directory: Path, heads: HeadGroup, *steps: int, data_fingerprint: str = "none") -> Path:
    """The directory of a run that has been saved at some steps."""
    store = CheckpointStore(directory / "checkpoints", mesh=MESH, keep_last=9)
    for step in steps:
        metadata = {"num_classes": NUM_CLASSES, "tasks": ["main"], "data_fingerprint": data_fingerprint}
        store.save(step, state_of(heads, step), metadata=metadata, score=step / 7)
    return directory


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces that are a small part of everything large here."""
    num_bytes = 2**14
    monkeypatch.setattr(parts, "PIECE_BYTES", num_bytes)
    monkeypatch.setattr(rewriting, "PIECE_BYTES", num_bytes)
    monkeypatch.setattr(rewriting, "_LEAST_SPLIT_BYTES", 2**12)
    return num_bytes


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", head_of(), 7, 14)
    folder = run / "checkpoints"
    for command in ("inspect", "verify"):
        for place in (run, folder):
            assert main(["checkpoint", command, str(place)]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].split() == ["step", "size", "ranks", "torch", "score", "state"]
            assert [line.split() for line in lines[1:3]] == [
                [str(step), "1.2", "MiB", "1", torch.__version__, score, "good"]
                for step, score in ((7, "1"), (14, "2"))
            ]
    assert main(["checkpoint", "inspect", str(folder / "step-00000014")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["num_classes", str(NUM_CLASSES)] in lines
    assert ["head.head_main.class_centers.weight", "float16", "[101,", "4,", "1,", "64]", "50.5", "KiB"] in lines
    assert ["backbone.layer.weight", "float32", "[600,", "500]", "1.1", "MiB"] in lines
    assert ["progress.losses", "no", "tensor"] in lines

    # A flipped bit is found by reading alone; a size without.
    damage(folder / "step-00000007" / "__0_0.distcp")
    assert main(["checkpoint", "inspect", str(run)]) == 0
    assert capsys.readouterr().err == ""
    assert main(["checkpoint", "verify", str(run)]) == 1
    shown = capsys.readouterr()
    assert [line.split()[-1] for line in shown.out.splitlines()] == ["state", "damaged", "good"]
    assert f"partialfc: {folder / 'step-00000007'} is damaged: __0_0.distcp has sha256" in shown.err
    assert main(["checkpoint", "verify", str(folder / "step-00000014")]) == 0
    (folder / "step-00000014" / ".metadata").write_bytes(b"")
    assert main(["checkpoint", "inspect", str(folder / "step-00000014")]) == 1
    assert ".metadata has 0 bytes instead of" in capsys.readouterr().err
    (folder / "step-00000007" / "MANIFEST.json").unlink()
    assert main(["checkpoint", "inspect", str(run)]) == 1
    assert "MANIFEST.json cannot be read" in capsys.readouterr().err


def test_what_is_no_directory_is_damaged_beside_good_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", head_of(), 7, 14)
    folder = run / "checkpoints"
    (folder / "step-00000015").write_text("a file")
    (folder / "step-00000016").symlink_to("nowhere")
    (folder / "step-00000017").symlink_to("step-00000017")
    (folder / "step-00000018").mkdir()
    (folder / "step-00000018" / "__0_0.distcp").symlink_to("nowhere")
    for command in ("inspect", "verify"):
        assert main(["checkpoint", command, str(run)]) == 1
        shown = capsys.readouterr()
        states = {line.split()[0]: line.split()[-1] for line in shown.out.splitlines()[1:7]}
        assert states == {"7": "good", "14": "good", "15": "damaged", "16": "damaged", "17": "damaged", "18": "damaged"}
        assert f"{folder / 'step-00000015'} is damaged: MANIFEST.json cannot be read: Not a directory" in shown.err
        assert f"{folder / 'step-00000016'} is damaged: MANIFEST.json cannot be read: No such file" in shown.err
    (folder / "latest").symlink_to("step-00000014")
    assert main(["checkpoint", "verify", str(folder / "latest")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "14"]
    assert main(["checkpoint", "inspect", str(folder / "latest")]) == 0
    assert "backbone.layer.weight" in capsys.readouterr().out


def test_a_pickle_that_was_changed_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", head_of(), 7)
    damage(run / "checkpoints" / "step-00000007" / ".metadata")
    assert main(["checkpoint", "inspect", str(run / "checkpoints" / "step-00000007")]) == 1
    assert ".metadata has sha256" in capsys.readouterr().err


@pytest.mark.parametrize("num_subcenters", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_export_centers(
    tmp_path: Path, num_subcenters: int, dtype: torch.dtype, small_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = head_of(num_subcenters, dtype=dtype)
    run = run_with(tmp_path / "run", heads, 7)
    largest = watch_reads(monkeypatch)
    out = tmp_path / "centers.npy"
    assert main(["checkpoint", "export-centers", str(run), "--out", str(out)]) == 0
    exported = np.load(out)
    assert exported.dtype == np.float32
    assert np.array_equal(exported, heads["main"].gather_class_centers().numpy())
    assert exported.shape == ((NUM_CLASSES, DIM) if num_subcenters == 1 else (NUM_CLASSES, num_subcenters, DIM))
    # It was read in small parts, and was written in such.
    assert 0 < largest() <= small_pieces < exported.nbytes / 5
    facts = json.loads((tmp_path / "centers.json").read_text())
    assert (facts["step"], facts["task"], facts["label_names"], facts["shape"]) == (7, "main", None, [*exported.shape])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["centers.json", "centers.npy", "run"]


def test_label_names_come_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    synthesize(data, identities=NUM_CLASSES - 3, images_per_identity=1, image_size=32, seed=0)
    overrides = [f"run.directory={run}", f"data.directory={data}", f"head.num_classes={NUM_CLASSES}"]
    overrides += ["evaluation.enabled=false"]
    run.mkdir()
    write_config(load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", overrides), first_rank=True)
    run_with(run, head_of(), 7, data_fingerprint=ShardIndex.open(data / "train").fingerprint)
    assert main(["checkpoint", "export-centers", str(run), "--out", str(tmp_path / "centers.npy")]) == 0
    names = json.loads((tmp_path / "centers.json").read_text())["label_names"]
    # The head has room for three more.
    assert names == ShardIndex.open(data / "train").label_names
    assert len(names) == NUM_CLASSES - 3
    # Without the data, or with other data in its place, that is said, and the rest is exported all the same.
    shutil.rmtree(data)
    synthesize(data, identities=NUM_CLASSES - 3, images_per_identity=1, image_size=32, seed=1)
    for out, reason in (("other", f"{data / 'train'} has other data than the checkpoint was"), ("gone", "")):
        capsys.readouterr()
        assert main(["checkpoint", "export-centers", str(run), "--out", str(tmp_path / f"{out}.npy")]) == 0
        assert f"the file will have no label names: {reason}" in capsys.readouterr().err
        assert json.loads((tmp_path / f"{out}.json").read_text())["label_names"] is None
        shutil.rmtree(data, ignore_errors=True)


def test_label_names_of_each_task_come_from_its_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, sets = tmp_path / "run", {"main": tmp_path / "faces", "products": tmp_path / "products"}
    for seed, directory in enumerate(sets.values()):
        synthesize(directory, identities=NUM_CLASSES - seed, images_per_identity=1, image_size=32, seed=seed)
    overrides = [f"run.directory={run}", f"data.directory={sets['main']}", "evaluation.enabled=false"]
    overrides += [f"tasks.products.data_directory={sets['products']}", "tasks.products.head.margin.name=CosFace"]
    overrides += ["tasks.products.global_batch_size=8"]
    run.mkdir()
    write_config(load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", overrides), first_rank=True)
    heads = HeadGroup({name: PartialFC(NUM_CLASSES - seed, DIM, margin=CosFace()) for seed, name in enumerate(sets)})
    indices = {name: ShardIndex.open(directory / "train") for name, directory in sets.items()}
    metadata: dict[str, Any] = {"tasks": list(sets)}
    for name, index in indices.items():
        prefix = "" if name == "main" else f"{name}/"
        metadata |= {f"{prefix}num_classes": index.num_classes, f"{prefix}data_fingerprint": index.fingerprint}
    # As on a cluster whose checkpoints are kept elsewhere.
    (tmp_path / "scratch").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    CheckpointStore(run / "checkpoints", mesh=MESH).save(7, state_of(heads, 7), metadata=metadata)
    export = ["checkpoint", "export-centers", str(run / "checkpoints"), "--task"]
    for name, index in indices.items():
        assert main([*export, name, "--out", str(tmp_path / f"{name}.npy")]) == 0
        assert json.loads((tmp_path / f"{name}.json").read_text())["label_names"] == index.label_names
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), heads[name].gather_class_centers().numpy())
    shutil.rmtree(sets["products"])
    shutil.copytree(sets["main"], sets["products"])
    capsys.readouterr()
    assert main([*export, "products", "--out", str(tmp_path / "again.npy")]) == 0
    assert f"{sets['products'] / 'train'} has other data than the checkpoint was trained on" in capsys.readouterr().err


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The largest tensor that was read from a checkpoint since, in bytes."""
    sizes: list[int] = []
    read, load = StoredState.read, torch.load

    def watched_read(self: StoredState, *arguments: Any) -> torch.Tensor:
        box = read(self, *arguments)
        sizes.append(box.nbytes)
        return box

    def watched_load(*arguments: Any, **options: Any) -> Any:
        value = load(*arguments, **options)
        if isinstance(value, torch.Tensor):
            sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(reading.StoredState, "read", watched_read)
    monkeypatch.setattr(torch, "load", watched_load)
    return lambda: max(sizes, default=0)


def test_export_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", head_of(), 7, 14)
    export = ["checkpoint", "export-centers", str(run)]
    (tmp_path / "there.json").write_text("mine")
    for arguments, message in [
        ([*export, "--out", str(tmp_path / "there.npy")], "there.json exists; give another --out"),
        ([*export, "--out", str(tmp_path / "x.pt")], "x.pt, but must end in .npy"),
        ([*export, "--out", str(tmp_path / "x.npy"), "--task", "other"], "--task is other, but"),
        (["checkpoint", "export-centers", str(tmp_path), "--out", str(tmp_path / "x.npy")], "has no checkpoints; give"),
        ([*export, "--out", str(tmp_path / "no" / "x.npy")], f"there is no directory {tmp_path / 'no'}; make it"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    # What needs no reading is refused before gigabytes are read; those of a damaged one would be told first.
    damage(run / "checkpoints" / "step-00000014" / "__0_0.distcp")
    for arguments, message in [
        (["--out", str(tmp_path / "there.npy")], "there.json exists"),
        (["--out", str(tmp_path / "x.npy"), "--task", "other"], "--task is other, but"),
    ]:
        assert main([*export, *arguments]) == 2
        assert message in capsys.readouterr().err
    # The newest is damaged: it is not silently another one that is exported.
    assert main([*export, "--out", str(tmp_path / "x.npy")]) == 1
    assert "step-00000014 is damaged: __0_0.distcp has sha256" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there.json"]
    assert main(["checkpoint", "export-centers", f"{run}/checkpoints/step-00000007", "--out", f"{tmp_path}/x.npy"]) == 0


@pytest.mark.parametrize("num_ranks", [1, 3, 80])
def test_reshard(tmp_path: Path, num_ranks: int, small_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = head_of()
    run = run_with(tmp_path / "run", heads, 7)
    source = run / "checkpoints" / "step-00000007"
    largest = watch_reads(monkeypatch)
    out = tmp_path / "other" / "checkpoints"
    assert main(["checkpoint", "reshard", str(run), "--ranks", str(num_ranks), "--out", str(out)]) == 0
    assert 0 < largest() <= small_pieces
    (copy,) = out.iterdir()
    assert copy.name == "step-00000007"
    assert len(list(copy.glob("*.distcp"))) == num_ranks
    assert Manifest.read(copy).metadata == {**Manifest.read(source).metadata, "world_size": num_ranks}
    assert sum(file.stat().st_size for file in copy.glob("*.distcp")) < 1.7 * Manifest.read(source).total_bytes
    if num_ranks == 3:
        sizes = [file.stat().st_size for file in copy.glob("*.distcp")]
        assert max(sizes) < 1.3 * min(sizes), "the large tensors are cut alike"
    # It is loaded as any other is.
    store = CheckpointStore(out, mesh=MESH)
    assert store.latest() == copy
    fresh = head_of(seed=5)
    state = {"head": fresh.state_dict(), "backbone": {"layer.weight": torch.zeros(600, 500)}}
    state["progress"] = {"step": 0, "losses": []}
    store.load(copy, state)
    fresh.load_state_dict(state["head"])
    expected = state_of(heads, 7)
    for name in heads["main"].class_centers._names:
        assert torch.equal(fresh["main"].class_centers.read(name, None), heads["main"].class_centers.read(name, None))
    assert torch.equal(state["backbone"]["layer.weight"], expected["backbone"]["layer.weight"])
    assert state["progress"] == expected["progress"]
    # And back again.
    again = rewriting.reshard(copy, tmp_path / "again", num_ranks=1)
    store.load(again, state)


def test_a_checkpoint_may_be_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path / "run", head_of(), 7)
    monkeypatch.chdir(run / "checkpoints" / "step-00000007")
    assert main(["checkpoint", "reshard", ".", "--ranks", "2", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step-00000007"]


def test_reshard_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path / "run", head_of(), 7)
    own, out = run / "checkpoints", tmp_path / "out"
    assert main(["checkpoint", "reshard", str(run), "--ranks", "2", "--out", str(own)]) == 2
    assert f"{own / 'step-00000007'} exists; give another --out" in capsys.readouterr().err
    assert main(["checkpoint", "reshard", str(run), "--ranks", "0", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "--ranks is 0, but must be from 1 to 65536" in captured.err
    assert "verify" not in captured.err, "nothing is read for it"
    # What is read back is another number: nothing is committed.
    rows_of = StoredState.read_rows

    def wrong(self: StoredState, name: str, start: int, stop: int) -> torch.Tensor:
        rows = rows_of(self, name, start, stop)
        if "tmp-" in str(self._reader.path) and name.endswith("weight"):
            rows.view(-1)[-1] += 1
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(StoredState, "read_rows", wrong)
        assert main(["checkpoint", "reshard", str(run), "--ranks", "2", "--out", str(out)]) == 2
    assert "was not copied as it is" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "step-00000007").symlink_to("nowhere")
    assert main(["checkpoint", "reshard", str(run), "--ranks", "2", "--out", str(linked)]) == 2
    assert f"{linked / 'step-00000007'} exists; give another --out" in capsys.readouterr().err
    assert [path.readlink() for path in linked.iterdir()] == [Path("nowhere")]
    damage(own / "step-00000007" / "__0_0.distcp")
    assert main(["checkpoint", "reshard", str(run), "--ranks", "2", "--out", str(out)]) == 1
    assert list(out.iterdir()) == []


@pytest.mark.soak
def test_memory_is_bounded(tmp_path: Path) -> None:
    """What is a gigabyte and a half takes some pieces of 128 MiB to export and to rewrite."""
    weight = torch.randn(12_000, 256, 1, 128)
    store = CheckpointStore(tmp_path / "checkpoints", mesh=MESH)
    metadata = {"num_classes": 12_000 * 256, "tasks": ["main"]}
    store.save(1, {"head": {"head_main.class_centers.weight": weight}}, metadata=metadata)
    del weight
    script = "import resource, sys; from partialfc.cli import main; import partialfc.train; "
    script += "code = main(sys.argv[1:]) if sys.argv[1:] else 0; "
    script += "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"

    def peak(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
        code, kibibytes = done.stdout.split()[-2:]
        assert code == "0"
        return int(kibibytes) * 1024

    idle = peak()
    out = ["--out", str(tmp_path / "centers.npy")]
    assert peak("checkpoint", "export-centers", str(tmp_path), *out) - idle < 6 * parts.PIECE_BYTES
    out = ["--out", str(tmp_path / "few")]
    assert peak("checkpoint", "reshard", str(tmp_path), "--ranks", "3", *out) - idle < 6 * parts.PIECE_BYTES
    shutil.rmtree(tmp_path)
