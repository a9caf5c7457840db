"""Which class lives on which rank: integer arithmetic, without a process group."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ClassPartition", "block_size_for"]

_LARGEST_BLOCK = 256
_LEAST_BLOCKS = 64


def block_size_for(num_classes: int) -> int:
    """How many consecutive classes share a block: a power of two up to 256, fewer where there are few classes.

    A function of num_classes alone, so that what is keyed by block does not depend on the number of ranks.
    """
    largest = min(_LARGEST_BLOCK, max(1, num_classes // _LEAST_BLOCKS))
    return 1 << (largest.bit_length() - 1)


@dataclass(frozen=True)
class ClassPartition:
    """The classes [0, num_classes) in equal blocks, and the blocks in contiguous runs over the ranks.

    The run of a rank is what `torch.chunk`, and so a DTensor placed as `Shard(0)`, gives it: ceil(blocks / ranks) for
    each until none are left. The last ranks may own fewer, or none. Ids at or past num_classes in the last block are
    phantoms, which nobody may draw or train.

    Attributes:
        num_classes: classes over all ranks, at least 1.
        rank: this rank, in [0, world_size).
        world_size: number of ranks, at least 1.

    Raises:
        ValueError: if one of them is out of range.
    """

    num_classes: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}, but must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, but must be in [0, {self.world_size})")

    @property
    def block_size(self) -> int:
        """Classes in a block, phantoms included."""
        return block_size_for(self.num_classes)

    @property
    def num_blocks(self) -> int:
        """Blocks over all ranks."""
        return -(-self.num_classes // self.block_size)

    @property
    def local_blocks(self) -> range:
        """The blocks of this rank."""
        share = -(-self.num_blocks // self.world_size)
        return range(min(self.rank * share, self.num_blocks), min((self.rank + 1) * share, self.num_blocks))

    @property
    def class_start(self) -> int:
        """The first class of this rank."""
        return min(self.local_blocks.start * self.block_size, self.num_classes)

    @property
    def num_local_classes(self) -> int:
        """Classes of this rank, phantoms not counted."""
        return min(self.local_blocks.stop * self.block_size, self.num_classes) - self.class_start
