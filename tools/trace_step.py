"""A profiler trace of one training step of the head, and how long the network and the update were at work together.

    torchrun --nproc-per-node 2 tools/trace_step.py --classes 200000 --dim 256 --batch 1024 --output trace.json

The embedding gradient is on its way to the other ranks (reduce-scatter) while this rank moves its class centers. The
trace of the first rank is written for chrome://tracing or Perfetto. On a CPU, where gloo's threads are other threads of
the same cores, this shows the order of things, not what a GPU gains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from partialfc import PartialFC
from partialfc.distributed.launch import process_group
from partialfc.margins import ArcFace

__all__ = ["Overlap", "overlap_of", "trace"]

SENDING, UPDATE = "reduce-scatter of the embedding gradient", "update of class centers"


@dataclass(frozen=True)
class Overlap:
    """Two stretches of time, each (start, end) in microseconds of the trace.

    Attributes:
        sending: from the moment that the collective is under way until it has ended.
        update: of the class centers.
    """

    sending: tuple[float, float]
    update: tuple[float, float]

    @property
    def microseconds(self) -> float:
        """How long both went on."""
        return max(0.0, min(self.sending[1], self.update[1]) - max(self.sending[0], self.update[0]))


def overlap_of(events: Sequence[Mapping[str, Any]]) -> Overlap:
    """Finds the two in the events of a trace of one step of one head, over gloo."""
    spans = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if "dur" in event]
    ((_, start, end),) = (span for span in spans if span[0] == SENDING)
    ((_, *update),) = (span for span in spans if span[0] == UPDATE)
    # Nothing else is sent meanwhile; gloo notes it under a name of its own choice.
    ((_, *sending),) = (span for span in spans if span[0].startswith("gloo:") and start <= span[1] <= end)
    return Overlap((sending[0], sending[1]), (update[0], update[1]))


def trace(step: Callable[[], object], path: Path) -> Overlap:
    """Runs `step` under the profiler and writes its trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    profiler.export_chrome_trace(str(path))
    return overlap_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("classes", 200_000), ("dim", 256), ("batch", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("trace.json"))
    options = parser.parse_args()
    with process_group("cpu") as (mesh, _):
        if mesh.size == 1:
            raise SystemExit("one process sends nothing; start it with torchrun --nproc-per-node 2")
        torch.manual_seed(mesh.rank)
        head = PartialFC(options.classes, options.dim, margin=ArcFace())
        embeddings = torch.randn(options.batch, options.dim).requires_grad_()
        labels = torch.randint(options.classes, (options.batch,))

        def step() -> None:
            head(embeddings, labels).backward()

        step()
        path = options.output if mesh.rank == 0 else options.output.with_suffix(f".{mesh.rank}.json")
        found = trace(step, path)
        if mesh.rank:
            path.unlink()
            return
        sending, update = ((end - start) / 1e3 for start, end in (found.sending, found.update))
        print(
            f"reduce-scatter {sending:.2f} ms, update {update:.2f} ms, both at once {found.microseconds / 1e3:.2f} ms"
        )


if __name__ == "__main__":
    main()
