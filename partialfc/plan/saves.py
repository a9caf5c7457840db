"""What a save takes: copies in host memory, and storage. Counted on the real state of a run that has no values.

A rank's part of a tensor is written in pieces; see `partialfc.checkpoint.parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from partialfc.assembly import build_backbone_optimizer
from partialfc.checkpoint.parts import FlatState, Part, flatten
from partialfc.config import Config, HeadConfig
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.engine import EngineSettings, build_engine
from partialfc.head import HeadGroup
from partialfc.plan.backbone import valueless_backbone
from partialfc.plan.head import BLOCK, lone_head

__all__ = ["SaveCost", "SavedState", "count_saved_state"]


@dataclass(frozen=True)
class SaveCost:
    """Of one save.

    Attributes:
        copy_bytes: the copy of its state that the rank with the most classes keeps in host memory from its first save
            on; 0 if saves block.
        writer_bytes: what the writer holds in host memory besides, at most, on the rank with the most of that: of a
            save that blocks, as the last one may in any run.
        disk_bytes: of all tensors of a checkpoint, all ranks together.
        num_kept: checkpoints on disk at most, that which is being written included.
    """

    copy_bytes: int
    writer_bytes: int
    disk_bytes: int
    num_kept: int

    @property
    def host_bytes(self) -> int:
        """In host memory for a save, at most."""
        return self.copy_bytes + self.writer_bytes


@dataclass(frozen=True)
class _SavedTensor:
    """One tensor of a checkpoint, on any number of ranks.

    Attributes:
        name: dotted, in the checkpoint.
        shape: of the whole tensor; of a table of classes, what it has of each class.
        dtype: of the numbers.
        head: whose classes it is a table of; None if of none.
        over_ranks: whether its rows are sharded over all ranks; else, but for tables, each rank has all of it.
        on_host: whether it is in host memory anyway.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    head: str | None
    over_ranks: bool
    on_host: bool


@dataclass(frozen=True)
class _Share:
    """What the first rank, and so the fullest, has of a tensor.

    Attributes:
        tensor: which one.
        part: of it, without memory.
        whole_bytes: of the tensor.
        holders: how many ranks have that part, of which one writes each piece.
    """

    tensor: _SavedTensor
    part: Part
    whole_bytes: int
    holders: int

    @property
    def copy_bytes(self) -> int:
        """Of a copy in host memory. That of what is on a GPU is pinned, which torch does in powers of two."""
        size = self.part.num_bytes
        return size if self.tensor.on_host or not size else 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class SavedState:
    """What of a run is saved, and how.

    Attributes:
        tensors: in the order in which they are written.
        asynchronous: whether training goes on while a copy is written.
        num_kept: checkpoints on disk at most, that which is being written included.
    """

    tensors: tuple[_SavedTensor, ...]
    asynchronous: bool
    num_kept: int

    def cost(self, *, identities: Mapping[str, int], num_shards: Mapping[str, int], num_ranks: int) -> SaveCost:
        """Of a save of so many classes on so many ranks.

        Args:
            identities: classes of each head.
            num_shards: ranks over which the classes of a head are sharded.
            num_ranks: of the run.
        """
        shares = []
        for tensor in self.tensors:
            shape, shards = tensor.shape, num_ranks if tensor.over_ranks else 1
            if tensor.head is not None:
                partition, shards = ClassPartition(identities[tensor.head]), num_shards[tensor.head]
                shape = torch.Size([partition.num_blocks, partition.block_size, *shape])
            own = torch.Size([-(-shape[0] // shards), *shape[1:]]) if shape else shape
            part = Part.of(torch.empty(own, dtype=tensor.dtype, device="meta"))
            assert part is not None
            shares.append(_Share(tensor, part, shape.numel() * tensor.dtype.itemsize, num_ranks // shards))
        return SaveCost(
            copy_bytes=sum(share.copy_bytes for share in shares) if self.asynchronous else 0,
            writer_bytes=max(_most_held(pieces) for pieces in _pieces_by_rank(shares, num_ranks)),
            disk_bytes=sum(share.whole_bytes for share in shares),
            num_kept=self.num_kept,
        )


def _pieces_by_rank(shares: Iterable[_Share], num_ranks: int) -> list[list[tuple[_Share, int]]]:
    """Shares and bytes of their pieces, as ranks write them.

    Of a part that several ranks have, DCP lets that one write a piece which has the fewest bytes to write so far.
    """
    written: list[list[tuple[_Share, int]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for share in shares:
        for piece in share.part.pieces():
            size = piece.sizes.numel() * share.part.dtype.itemsize
            rank = min(range(share.holders), key=loads.__getitem__)
            loads[rank] += size
            written[rank].append((share, size))
    return written


def _most_held(pieces: Iterable[tuple[_Share, int]]) -> int:
    """Bytes of the copies in host memory while one file is written.

    DCP copies piece by piece, but it lets go of one only when it has the next of the same tensor, or the file is done.
    A whole tensor that is in host memory already is not copied; a piece of one is.
    """
    held: dict[str, int] = {}
    now = most = 0
    for share, size in pieces:
        name = share.tensor.name
        if share.tensor.on_host and size == share.part.num_bytes:
            continue
        most = max(most, now + size)
        now += size - held.get(name, 0)
        held[name] = size
    return most


def count_saved_state(config: Config, settings: Mapping[str, HeadConfig], *, device: str = "cuda") -> SavedState:
    """Takes the state dicts of a real engine and of real heads that have no values.

    Args:
        config: for what is not of the heads.
        settings: of each head, "main" first.
        device: "cuda" or "cpu": where it will run.

    Raises:
        ValueError: if a part cannot be built as configured.
    """
    tensors = [*_of_backbone(config, device)]
    for name, head in settings.items():
        tensors += _of_head(config, name, head, device)
    keeps = config.checkpoint
    return SavedState(tuple(tensors), keeps.asynchronous, keeps.keep_last + keeps.keep_best + 1)


def _of_backbone(config: Config, device: str) -> Iterator[_SavedTensor]:
    backbone = valueless_backbone(config)
    # All engines save the same; those that shard need a process group.
    engine = build_engine(
        "ddp",
        backbone,
        make_optimizer=partial(build_backbone_optimizer, config),
        mesh=ShardMesh.single(),
        settings=EngineSettings(ema_decay=config.engine.ema_decay),
    )
    shapes = {name: parameter.shape for name, parameter in backbone.named_parameters()}
    for name, part in _parts(flatten(engine.state_dict())):
        section, _, rest = name.partition(".")
        owner = rest.removeprefix("state.").rpartition(".")[0] if section == "optimizer" else rest
        # What else there is, of a parameter or apart, is not sharded: steps of the optimizer, batch statistics.
        over_ranks = config.engine.name == "fsdp2" and part.shape == shapes.get(owner)
        yield _SavedTensor(name, part.shape, part.dtype, None, over_ranks, device == "cpu")


def _of_head(config: Config, name: str, settings: HeadConfig, device: str) -> Iterator[_SavedTensor]:
    """What is larger with twice as many classes is a table."""
    path, dim = "head" if name == "main" else f"tasks.{name}.head", config.backbone.embedding_dim
    heads = (lone_head(config, settings, size, dim, path=path) for size in (BLOCK, 2 * BLOCK))
    small, large = (dict(_parts(flatten({"head": HeadGroup({name: head}).state_dict()}))) for head in heads)
    for key, part in small.items():
        growth = large[key].shape.numel() - part.shape.numel()
        shape = torch.Size([growth // BLOCK]) if growth else part.shape
        on_host = device == "cpu" or part.read(0, part.num_rows).device.type == "cpu"
        yield _SavedTensor(key, shape, part.dtype, name if growth else None, False, on_host)


def _parts(state: FlatState) -> Iterator[tuple[str, Part]]:
    return ((name, value) for name, value in state.values.items() if isinstance(value, Part))
