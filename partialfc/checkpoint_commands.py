"""The commands `partialfc checkpoint ...`: checkpoints looked at, checked, exported and rewritten.

Each is one process without a process group, and holds a small part of a checkpoint in memory. They end with 0, with 1
if a checkpoint is damaged, and with 2 and one message on standard error for a user's mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partialfc.checkpoint.inspection import CheckpointSummary

__all__ = ["add_checkpoint_commands"]

_DAMAGED = 1


def _inspect(options: argparse.Namespace) -> int:
    from partialfc.checkpoint.inspection import find_checkpoints, summarize
    from partialfc.checkpoint.manifest import MANIFEST_NAME

    paths = find_checkpoints(options.path)
    summaries = [summarize(path, contents=False) for path in paths]
    print(_table(summaries))
    is_one = (options.path / MANIFEST_NAME).exists()  # and not the only one of a folder
    if is_one and summaries[0].damage is None:
        print(_metadata_lines(summaries[0].metadata))
        print(_tensor_lines(paths[0]))
    print("\nFiles were compared by size; `partialfc checkpoint verify` reads them.")
    return _report(summaries)


def _verify(options: argparse.Namespace) -> int:
    from partialfc.checkpoint.inspection import find_checkpoints

    summaries = _verified(find_checkpoints(options.path))
    print(_table(summaries))
    return _report(summaries)


def _verified(paths: list[Path]) -> list[CheckpointSummary]:
    """Of which every byte was read."""
    from partialfc.checkpoint.inspection import summarize
    from partialfc.telemetry import ProgressBar

    total = sum(summarize(path, contents=False).total_bytes for path in paths)
    with ProgressBar(total, description="verify", unit="bytes") as bar:
        return [summarize(path, contents=True, on_bytes=bar.update) for path in paths]


def _newest(path: Path) -> Path:
    """The newest checkpoint at a place."""
    from partialfc.checkpoint.inspection import find_checkpoints

    return find_checkpoints(path)[-1]


def _export_centers(options: argparse.Namespace) -> int:
    from partialfc.checkpoint.inspection import summarize
    from partialfc.checkpoint.rewriting import check_export, export_rows
    from partialfc.telemetry import ProgressBar

    path = _newest(options.path)
    check_export(options.out)
    metadata, task = summarize(path, contents=False).metadata, options.task
    if metadata and task not in metadata.get("tasks", []):  # without it the manifest is damaged, which is told below
        raise ValueError(f"--task is {task}, but {path} has {', '.join(metadata.get('tasks', [])) or 'none'}")
    (found,) = _verified([path])
    if found.damage is not None:
        return _report([found])
    num_classes = _fact(metadata, task, "num_classes")
    facts = {
        "checkpoint": str(found.path),
        "step": found.step,
        "task": task,
        "label_names": _label_names(found.path, task, metadata),
    }
    with ProgressBar(num_classes, description="export", unit="class centers") as bar:
        export_rows(
            found.path,
            f"head.head_{task}.class_centers.weight",
            options.out,
            num_rows=num_classes,
            facts=facts,
            on_rows=bar.update,
        )
    print(options.out)
    return 0


def _label_names(path: Path, task: str, metadata: dict[str, Any]) -> list[str] | None:
    """The identity of each class, if the run's configuration and data are where they were; None if not."""
    from partialfc.assembly import open_tasks
    from partialfc.config import load_config

    try:
        config = load_config(path.absolute().parent.parent / "config.yaml")
        index = open_tasks(config)[task].index
        if index.fingerprint != _fact(metadata, task, "data_fingerprint"):
            raise ValueError(f"{index.directory} has other data than the checkpoint was trained on")
    except (OSError, ValueError) as error:
        print(f"partialfc: the file will have no label names: {error}", file=sys.stderr)
        return None
    # A head may have room for more classes than the data.
    return index.label_names[: _fact(metadata, task, "num_classes")]


def _fact(metadata: dict[str, Any], task: str, name: str) -> Any:
    """What a checkpoint says of one of its tasks."""
    return metadata.get(name if task == "main" else f"{task}/{name}")


def _reshard(options: argparse.Namespace) -> int:
    from partialfc.checkpoint.rewriting import check_reshard, reshard, reshard_bytes
    from partialfc.telemetry import ProgressBar

    path = _newest(options.path)
    check_reshard(path, options.out, num_ranks=options.ranks)
    (found,) = _verified([path])
    if found.damage is not None:
        return _report([found])
    with ProgressBar(reshard_bytes(found.path), description="reshard", unit="bytes") as bar:
        copy = reshard(found.path, options.out, num_ranks=options.ranks, on_bytes=bar.update)
    print(copy)
    return 0


def _report(summaries: list[CheckpointSummary]) -> int:
    """Names what is damaged, on standard error; the exit code."""
    damaged = [summary for summary in summaries if summary.damage is not None]
    for summary in damaged:
        print(f"partialfc: {summary.path} is damaged: {summary.damage}", file=sys.stderr)
    return _DAMAGED if damaged else 0


def _table(summaries: list[CheckpointSummary]) -> str:
    from partialfc.checkpoint.file_system import format_bytes

    lines = ["{:>10}  {:>10}  {:>5}  {:<14}  {:>10}  {}".format("step", "size", "ranks", "torch", "score", "state")]
    for summary in summaries:
        metadata = summary.metadata
        score = metadata.get("score")
        lines.append(
            f"{summary.step:>10}  {format_bytes(summary.total_bytes):>10}  {metadata.get('world_size', '?'):>5}  "
            f"{metadata.get('torch_version', '?'):<14}  {'-' if score is None else format(score, '.5g'):>10}  "
            f"{'good' if summary.damage is None else 'damaged'}"
        )
    return "\n".join(lines)


def _metadata_lines(metadata: dict[str, Any]) -> str:
    """One line for each value, those of dictionaries too."""
    values: dict[str, Any] = {}
    for name, value in metadata.items():
        inner = value.items() if isinstance(value, dict) else ()
        values |= {f"{name}: {key}": item for key, item in inner} if inner else {name: value}
    width = max(map(len, values), default=0)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in sorted(values.items()))])


def _tensor_lines(path: Path) -> str:
    from partialfc.checkpoint.file_system import format_bytes
    from partialfc.checkpoint.reading import StoredState

    stored = StoredState(path)
    width = max(map(len, [*stored.tensors, *stored.values]), default=0)
    lines = [""]
    for name, entry in sorted(stored.tensors.items()):
        dtype, shape = entry.properties.dtype, list(entry.size)
        size = format_bytes(entry.size.numel() * dtype.itemsize)
        lines.append(f"{name:<{width}}  {str(dtype).removeprefix('torch.'):<9}  {shape!s:<24}  {size:>10}")
    lines += [f"{name:<{width}}  no tensor" for name in sorted(stored.values)]
    return "\n".join(lines)


def add_checkpoint_commands(parser: argparse.ArgumentParser) -> None:
    """Adds the commands to the parser of `partialfc checkpoint`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    place = "the run.directory of a training, its folder of checkpoints, or one of them"

    inspect = commands.add_parser("inspect", help="print what checkpoints there are; of one, what it holds")
    inspect.add_argument("path", type=Path, help=place)
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="read every byte and name each damaged file")
    verify.add_argument("path", type=Path, help=place)
    verify.set_defaults(command=_verify)

    newest = f"{place}; of several, the newest is taken"
    export = commands.add_parser("export-centers", help="write the class centers as a float32 .npy file")
    export.add_argument("path", type=Path, help=newest)
    export.add_argument("--task", default="main", help="whose head; default: %(default)s")
    export.add_argument("--out", type=Path, required=True, help="a .npy file; label names go into a .json file beside")
    export.set_defaults(command=_export_centers)

    reshard = commands.add_parser("reshard", help="write a checkpoint as another number of ranks would")
    reshard.add_argument("path", type=Path, help=newest)
    reshard.add_argument("--ranks", type=int, required=True, help="never needed to resume: any number of ranks does")
    reshard.add_argument("--out", type=Path, required=True, help="a folder of checkpoints, such as runs/b/checkpoints")
    reshard.set_defaults(command=_reshard)
