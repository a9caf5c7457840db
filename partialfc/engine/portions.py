"""A batch that goes through a network in portions, of which one at a time has its activations in memory.

The head must see the whole batch at once, so the embeddings of all portions are needed before the first gradient is
there. All portions but the last run without a graph; once the gradient is there they are computed again, one by one.
That costs (k - 1) / k of a further forward pass and saves (k - 1) / k of the activations, much as checkpointing of
activations would. One portion is the same code and computes nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from partialfc.engine.buffers import kept_buffers

__all__ = ["PortionedPass"]


class PortionedPass:
    """One forward and backward pass of one batch.

    Args:
        network: images [b, 3, H, W] -> embeddings [b, D].
        images: this rank's, at least one a portion.
        num_portions: k.
        before: called with whether the coming portion is the last to get its gradient, gives a context for the
            forward pass of a portion with a graph. There an engine arranges that ranks communicate once.

    Attributes:
        embeddings: [b, D], a leaf that requires a gradient.

    Raises:
        ValueError: if there are fewer images than portions.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        num_portions: int,
        *,
        before: Callable[[bool], AbstractContextManager[None]],
    ) -> None:
        if num_portions > 1 and len(images) < num_portions:
            raise ValueError(
                f"a batch of {len(images)} images cannot go through the backbone in {num_portions} portions; make "
                "batches larger, or portions fewer"
            )
        self._network, self._before = network, before
        *self._earlier, last = images.tensor_split(num_portions)
        self._random_states = []
        outputs = []
        for portion in self._earlier:
            self._random_states.append(_random_state(images.device))
            with torch.no_grad():
                outputs.append(network(portion))
        with before(num_portions == 1):
            self._last_output = network(last)
        outputs.append(self._last_output.detach())
        self.embeddings = torch.cat(outputs).requires_grad_()

    def backward(self, gradient: Tensor, propagate: Callable[[Tensor, Tensor], None]) -> None:
        """Accumulates the gradient of all portions.

        Args:
            gradient: of the embeddings, [b, D].
            propagate: runs backward from an output with its gradient.
        """
        sizes = [len(portion) for portion in self._earlier] + [len(self._last_output)]
        *earlier, last = gradient.split(sizes)
        propagate(self._last_output, last)
        if not earlier:
            return
        # The first pass has moved the batch statistics already.
        with kept_buffers(self._network):
            for number, (portion, state, part) in enumerate(
                zip(self._earlier, self._random_states, earlier, strict=True), start=1
            ):
                with _replayed(state, portion.device), self._before(number == len(earlier)):
                    output = self._network(portion)
                propagate(output, part)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draws what was drawn after `state`, and then goes on as if nothing had been drawn."""
    cpu, cuda = state
    with torch.random.fork_rng(devices=[] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
