"""Several heads on one backbone: each has its own identities, margin, data and weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from partialfc.head.partial_fc import PartialFC

__all__ = ["HeadGroup"]


class HeadGroup(nn.Module):
    """Named heads, of which each takes some of the rows of a batch.

    The loss is the sum over heads of the mean loss of each one's valid rows over the global batch, times its
    `loss_weight`. If it is not finite, nothing moves in any of the heads. Calling the group is collective, as is
    calling a head.

    Args:
        heads: by name; their order is that of the rows.

    Raises:
        ValueError: if there is none, or one comes twice, or a name is empty or has a dot.
    """

    def __init__(self, heads: Mapping[str, PartialFC]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("a group of heads needs at least one head")
        for name, head in heads.items():
            if not name or "." in name:
                raise ValueError(f"a head is called {name!r}, but a name must not be empty and have no dot")
            if not isinstance(head, PartialFC) or sum(other is head for other in heads.values()) > 1:
                raise ValueError(f"head {name!r} must be a PartialFC of its own")
            # A prefix, since a module cannot be called "train" or "type".
            self.add_module(f"head_{name}", head)
        self.names = list(heads)

    def __getitem__(self, name: str) -> PartialFC:
        """The head of that name."""
        head = self.get_submodule(f"head_{name}")
        assert isinstance(head, PartialFC)
        return head

    @property
    def defers_updates(self) -> bool:
        """Whether the heads leave their updates to `finish_update`; see `PartialFC`. Set for all of them."""
        return any(self[name].defers_updates for name in self.names)

    @defers_updates.setter
    def defers_updates(self, defers: bool) -> None:
        for name in self.names:
            self[name].defers_updates = defers

    def finish_update(self, go: bool) -> None:
        """Makes the updates that `backward` has left, in all heads, or in none; see `PartialFC.finish_update`."""
        for name in self.names:
            self[name].finish_update(go)

    def forward(self, embeddings: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the losses, a scalar, equal on all ranks.

        Args:
            embeddings: [b, D], the rows of the first head, then those of the second, and so on.
            labels: the labels of each head's rows, by name, as `PartialFC.forward` takes them; of any number, even 0.

        Raises:
            ValueError: if the names are not those of the heads, or the rows do not add up.
        """
        if sorted(labels) != sorted(self.names):
            raise ValueError(f"labels are for the heads {list(labels)}, but must be for {self.names}")
        sizes = [len(labels[name]) for name in self.names]
        if sum(sizes) != len(embeddings):
            raise ValueError(
                f"there are {len(embeddings)} embeddings, but labels of {' + '.join(map(str, sizes))} rows for the "
                f"heads {', '.join(self.names)}"
            )
        parts = embeddings.split(sizes)
        losses = [self[name](part, labels[name]) for name, part in zip(self.names, parts, strict=True)]
        loss = torch.stack(losses).sum()
        for name in self.names:
            self[name].update_only_if(loss.detach().isfinite())
        return loss

    def diagnostics(self) -> dict[str, float]:
        """What each head has to show, as name/number; see `PartialFC.diagnostics`."""
        return {f"{name}/{key}": value for name in self.names for key, value in self[name].diagnostics().items()}
