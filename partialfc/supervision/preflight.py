"""A look around before the first step: can these ranks train together, and do they see the same files?"""

from __future__ import annotations

import hashlib
import logging
import platform
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

import partialfc
from partialfc.distributed.collectives import gather_objects, max_over_ranks, sum_over_shards
from partialfc.distributed.errors import name_hosts, name_ranks
from partialfc.distributed.mesh import ShardMesh
from partialfc.supervision.agreement import RankError, agree
from partialfc.supervision.exit_codes import EXIT_USER_ERROR

__all__ = ["clock_warning", "disagreements", "preflight"]

logger = logging.getLogger(__name__)

_MAX_SKEW_SECONDS = 5.0
_BANDWIDTH_ELEMENTS = 2**20
_BANDWIDTH_ROUNDS = 4
_SEE_SECONDS = 10.0  # Other hosts may see a new file of a shared file system late.


def preflight(mesh: ShardMesh, device: torch.device, *, facts: dict[str, Any], directory: Path) -> None:
    """Compares all ranks, and says what it found in one line of rank 0's log. Collective.

    Versions, the code of this package and the given facts must be the same. Different devices, and clocks that are
    more than 5 seconds apart, are only warned of: nothing in a run compares the clocks of two hosts.

    Args:
        mesh: the ranks.
        device: of this rank.
        facts: what else must be the same, by name, such as the settings and the data's fingerprint.
        directory: of the run. All ranks must see what the first writes there, or in the folder where it will be made.

    Raises:
        RankError: on all ranks alike. It names what differs, with the ranks grouped by value, or says that the first
            cannot write in the directory.
    """
    hosts = gather_objects(socket.gethostname(), mesh)
    own = {name: str(value) for name, value in (_versions() | facts).items()}
    digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    if len(set(gather_objects(digest, mesh))) > 1:  # all facts of all ranks are much
        found = disagreements(gather_objects(own, mesh), hosts)
        text = "\n".join(["the ranks cannot train together:", *(f"  {line}" for line in found)])
        raise RankError(text, EXIT_USER_ERROR)
    _check_directory(mesh, directory, hosts)
    max_over_ranks([0], mesh)  # all ranks leave this at about the same moment
    clocks = gather_objects(time.time(), mesh)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    warnings = disagreements(gather_objects({"device": device_name}, mesh), hosts) + clock_warning(clocks, hosts)
    speed = _all_reduce_bytes_per_second(mesh, device)
    if mesh.rank == 0:
        for warning in warnings:
            logger.warning("preflight: %s", warning)
        ranks = "1 process" if mesh.size == 1 else f"{mesh.size} ranks on {_count(len(set(hosts)), 'host')}"
        together = "" if mesh.size == 1 else f"; all-reduce {speed / 1e9:.2f} GB/s"
        logger.info("preflight: %s, %s, torch %s%s", ranks, device_name, torch.__version__, together)


def disagreements(facts: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """A line for each fact that is not the same on all ranks: "torch: 2.13.0 on ranks 0-6, 2.11.0 on rank 7 (host)".

    Args:
        facts: of each rank, by name.
        hosts: of each rank.
    """
    lines = []
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        ranks_of: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(facts):
            ranks_of.setdefault(of_rank.get(name, "none"), []).append(rank)
        if len(ranks_of) > 1:
            most = max(len(ranks) for ranks in ranks_of.values())
            values = [
                f"{value} on {name_ranks(ranks)}{_at(ranks, hosts) if len(ranks) < most else ''}"
                for value, ranks in ranks_of.items()
            ]
            lines.append(f"{name}: {', '.join(values)}")
    return lines


def clock_warning(clocks: list[float], hosts: list[str]) -> list[str]:
    """A line for clocks that are far from the middle one; none if all are near.

    Args:
        clocks: seconds, read on all ranks at about the same moment.
        hosts: of each rank.
    """
    middle = sorted(clocks)[len(clocks) // 2]
    far = [rank for rank, clock in enumerate(clocks) if abs(clock - middle) > _MAX_SKEW_SECONDS]
    if not far:
        return []
    offsets = [clocks[rank] - middle for rank in far]
    worst = max(offsets, key=abs)
    return [
        f"the clock of {name_ranks(far)}{_at(far, hosts)} is {worst:+.1f} seconds from those of the others; "
        "times in logs and files will confuse"
    ]


def _versions() -> dict[str, str]:
    digest = hashlib.sha256()
    root = Path(partialfc.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "partialfc": f"{partialfc.__version__} (code {digest.hexdigest()[:8]})",
    }


def _check_directory(mesh: ShardMesh, directory: Path, hosts: list[str]) -> None:
    # Or where it will be made: a run that cannot begin leaves nothing.
    folders = [directory, *directory.absolute().parents]
    level = next(number for number, folder in enumerate(folders) if folder.exists())
    place = folders[level]
    token, error = place / f".preflight-{uuid.uuid4().hex}", None
    if mesh.rank == 0:
        try:
            token.touch()
        except OSError as failure:
            text = f"run.directory {directory} cannot be written: {failure.strerror}: {place}"
            error = OSError(failure.errno, text)  # its number says whether another start may do better
    agree(mesh, signal=0, error=error)
    # Each looks in what is that folder for itself: a relative path may lead elsewhere from where it was started.
    level, name = gather_objects((level, token.name), mesh)[0]
    path = folders[min(level, len(folders) - 1)] / name
    deadline = time.monotonic() + _SEE_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(gather_objects(seen, mesh)) if not sees]
    if mesh.rank == 0:
        path.unlink(missing_ok=True)
    if blind:
        raise RankError(
            f"run.directory {directory} is not the same folder on all ranks: {name_ranks(blind)}"
            f"{_at(blind, hosts)} cannot see what rank 0 ({hosts[0]}) writes there; give a folder of a file "
            "system that all hosts share",
            EXIT_USER_ERROR,
        )


def _all_reduce_bytes_per_second(mesh: ShardMesh, device: torch.device) -> float:
    """Of one rank's tensor. All ranks end together, so a slow one cannot be told apart here."""
    value, seconds = torch.zeros(_BANDWIDTH_ELEMENTS, device=device), []
    for _ in range(_BANDWIDTH_ROUNDS):
        started = time.perf_counter()
        sum_over_shards(value, mesh).sum().item()
        seconds.append(time.perf_counter() - started)
    return value.numel() * value.element_size() / min(seconds)


def _at(ranks: list[int], hosts: list[str]) -> str:
    return f" ({name_hosts(hosts[rank] for rank in ranks)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
