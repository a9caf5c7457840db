"""These tests build a Slurm cluster, so they run where `make slurm-test` asks for them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster

collect_ignore_glob = [] if os.environ.get("PARTIALFC_SLURM") == "1" else ["test_*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # Not in pytest's own folder: munge wants one that all may enter, and sockets a short path.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with running_cluster(directory) as cluster:
            yield cluster
