"""Samples that cannot be used: written down, counted by reason, and a reason to stop when they are too many."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import torch

from partialfc.data import BadSample
from partialfc.distributed.collectives import gather_objects, max_over_ranks
from partialfc.distributed.mesh import ShardMesh
from partialfc.telemetry import drop_from_step, read_lines

__all__ = ["BAD_SAMPLES_FILE", "BadSamples"]

logger = logging.getLogger(__name__)

BAD_SAMPLES_FILE = "bad_samples.jsonl"
_ALWAYS_ALLOWED = 20  # A share says nothing yet when few samples were seen.
_SHOWN = 10


class BadSamples:
    """The bad samples of a run on all ranks, in `bad_samples.jsonl`: a line with step, rank, reason and place for each.

    Args:
        directory: of the run.
        mesh: the ranks.
        device: where numbers are reduced over ranks.
        max_share: above this share of the samples seen the run stops; the first 20 are always allowed, unless it is 0.
        resume_step: the next step of the run; what an earlier start wrote from there on is dropped.
    """

    def __init__(
        self, directory: Path, *, mesh: ShardMesh, device: torch.device, max_share: float, resume_step: int
    ) -> None:
        self._path, self._mesh, self._device = directory / BAD_SAMPLES_FILE, mesh, device
        self._max_share = max_share
        self._new: list[dict[str, object]] = []
        self.counts: Counter[str] = Counter()
        if mesh.rank == 0:
            drop_from_step(self._path, resume_step)
            if self._path.exists():
                self.counts.update(str(line["reason"]) for line in read_lines(self._path))
        self.counts = gather_objects(self.counts, mesh)[0]

    def add(self, step: int, failures: tuple[BadSample, ...]) -> None:
        """Notes those of this rank at a step."""
        for bad in failures:
            logger.warning("step %d: sample masked: %s", step, bad.message)
            where = {"sample_id": bad.sample_id, "message": bad.message}
            self._new.append({"step": step, "rank": self._mesh.rank, "reason": bad.reason, **where})

    def settle(self, samples_seen: int) -> None:
        """Writes down what is new on all ranks, and decides whether to go on. Collective.

        Args:
            samples_seen: of the whole run, over all ranks.

        Raises:
            ValueError: on all ranks alike, if there are too many.
        """
        if not max_over_ranks([len(self._new)], self._mesh, self._device)[0]:
            return
        new = [line for lines in gather_objects(self._new, self._mesh) for line in lines]
        self._new = []
        self.counts.update(str(line["reason"]) for line in new)
        if self._mesh.rank == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
        total = self.counts.total()
        allowed = max(_ALWAYS_ALLOWED, self._max_share * samples_seen) if self._max_share else 0
        if total > allowed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            examples = "\n".join(f"  {line['message']}" for line in new[:_SHOWN])
            raise ValueError(
                f"{total} of {samples_seen} samples could not be used ({reasons}), which is more than "
                f"data.max_bad_share={self._max_share:g} allows; all are listed in {self._path}, among them\n"
                f"{examples}\nRepair the data (`partialfc data verify` finds all of it), or raise data.max_bad_share"
            )
