from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support import run_distributed
from torch import Tensor, nn

from partialfc.distributed.mesh import ShardMesh
from partialfc.evaluation.extract import extract_embeddings


@dataclass
class Batch:
    images: Tensor
    labels: Tensor


class Backbone(nn.Module):
    """Small, and with everything that a mode or a mirror changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3 * 4 * 5, 6)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).view_as(parameter))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.drop(self.norm(images)).flatten(1))


def batch(number: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (size, 3, 4, 5), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(size) + 10 * number - 1)


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


def expected(batches: list[Batch], flip: bool = True) -> tuple[Tensor, Tensor]:
    backbone = Backbone().eval()
    images = normalize(torch.cat([batch.images for batch in batches]))
    with torch.no_grad():
        embeddings = backbone(images) + backbone(torch.flip(images, [3])) if flip else backbone(images)
    return embeddings, torch.cat([batch.labels for batch in batches])


def extract(
    batches: list[Batch], mesh: ShardMesh, backbone: nn.Module | None = None, **options: object
) -> tuple[Tensor, Tensor]:
    return extract_embeddings(
        backbone or Backbone(),
        iter(batches),
        device=torch.device("cpu"),
        mesh=mesh,
        normalize_images=normalize,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("flip", [True, False])
def test_one_process(flip: bool) -> None:
    batches = [batch(0, 4), batch(1, 1), batch(2, 3)]
    embeddings, labels = extract(batches, ShardMesh.single(), flip=flip)
    wanted, wanted_labels = expected(batches, flip)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, wanted)
    assert torch.equal(labels, wanted_labels)
    assert not embeddings.requires_grad


def test_modes_and_statistics_are_as_before() -> None:
    backbone = Backbone().train()
    backbone.norm.eval()  # a frozen part
    statistics = backbone.norm.running_mean.clone()
    extract([batch(0, 4)], ShardMesh.single(), backbone)
    assert (backbone.training, backbone.norm.training, backbone.drop.training) == (True, False, True)
    assert torch.equal(backbone.norm.running_mean, statistics)

    broken = Batch(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.zeros(2).long())
    with pytest.raises(RuntimeError):
        extract([broken], ShardMesh.single(), backbone)
    assert (backbone.training, backbone.norm.training, backbone.drop.training) == (True, False, True)


def test_autocast_lowers_the_precision_of_the_forward_pass_alone() -> None:
    batches = [batch(0, 4)]
    exact, _ = extract(batches, ShardMesh.single())
    low, _ = extract(batches, ShardMesh.single(), autocast_dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_no_images_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are no images to embed"):
        extract([], ShardMesh.single())


def check_ranks(rank: int, world_size: int) -> None:
    mesh = ShardMesh.from_group()
    shares = [[batch(0, 4), batch(1, 2)], [], [batch(2, 1)]]
    embeddings, labels = extract(shares[rank], mesh)
    wanted, wanted_labels = expected([part for share in shares for part in share])
    torch.testing.assert_close(embeddings, wanted)
    assert torch.equal(labels, wanted_labels)
    with pytest.raises(ValueError, match="no rank has a batch"):
        extract([], mesh)

    backbone = Backbone()
    if rank == 2:
        backbone.linear = nn.Linear(3 * 4 * 5, 7)
    with pytest.raises(ValueError, match=r"ranks disagree on the embedding dimension: \[6, 7\]"):
        extract(shares[rank], mesh, backbone)


def test_ranks_with_uneven_shares_and_none() -> None:
    run_distributed(check_ranks, 3)
