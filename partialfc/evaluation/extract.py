"""From batches of images to embeddings, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from partialfc.distributed.collectives import gather_rows
from partialfc.distributed.mesh import ShardMesh

__all__ = ["LabelledImages", "extract_embeddings"]


class LabelledImages(Protocol):
    """What extraction needs of a batch: images uint8 [b, 3, H, W] and labels int64 [b]."""

    @property
    def images(self) -> Tensor: ...  # noqa: D102

    @property
    def labels(self) -> Tensor: ...  # noqa: D102


@torch.no_grad()
def extract_embeddings(
    backbone: nn.Module,
    batches: Iterable[LabelledImages],
    *,
    device: torch.device,
    mesh: ShardMesh,
    normalize_images: Callable[[Tensor], Tensor],
    flip: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeds this rank's batches and gathers those of all ranks.

    Ranks may have different numbers of batches, or none: the backbone must not communicate in its forward pass.

    Args:
        backbone: maps images [b, 3, H, W] to embeddings [b, D]. Runs in evaluation mode; each of its modules is then
            put back into the mode it was in.
        batches: this rank's share of the images.
        device: where the backbone lives.
        mesh: the ranks that share the work.
        normalize_images: from uint8 [b, 3, H, W] on the device to what the backbone expects.
        flip: add the embedding of the mirrored image to each embedding.
        autocast_dtype: precision of the forward pass; None leaves the backbone as it is.

    Returns:
        embeddings float32 [N, D], not normalised, and labels int64 [N], on `device`, in rank order and within a rank
        in batch order, equal on all ranks.

    Raises:
        ValueError: if no rank has an image, or ranks disagree on D.
    """
    embeddings, labels = [], []
    with (
        _evaluation_mode(backbone),
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
    ):
        for batch in batches:
            images = normalize_images(batch.images.to(device, non_blocking=True))
            embedding = backbone(images).float()
            if flip:
                embedding = embedding + backbone(images.flip(-1)).float()
            embeddings.append(embedding)
            labels.append(batch.labels.to(device, non_blocking=True))

    local_dim = torch.tensor([embeddings[0].shape[1] if embeddings else 0], device=device)
    dims = sorted({int(dim) for dim in gather_rows(local_dim, mesh)} - {0})
    if not dims:
        raise ValueError("there are no images to embed: no rank has a batch; check the evaluation data")
    if len(dims) > 1:
        raise ValueError(f"ranks disagree on the embedding dimension: {dims}; they run different backbones")
    # Empty first parts, so that a rank without batches has something of the right shape to give.
    local_embeddings = torch.cat([torch.empty(0, dims[0], device=device), *embeddings])
    local_labels = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *labels])
    return gather_rows(local_embeddings, mesh), gather_rows(local_labels, mesh)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Restores each module apart, since part of a backbone may be frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
