"""Collectives against what one process computes, their gradients, and how many of them a step takes."""

from __future__ import annotations

from typing import Any

import torch
from head_cases import ProbeMargin
from support import run_distributed
from torch import Tensor
from traffic import CountCollectives

from partialfc import PartialFC
from partialfc.distributed.collectives import (
    all_gather_equal,
    average_over_ranks,
    copy_to_shards,
    gather_rows,
    logsumexp_over_shards,
    max_over_ranks,
    start_reduce_scatter,
    sum_over_shards,
)
from partialfc.distributed.mesh import ShardMesh
from partialfc.head import VariationalPrototypes
from partialfc.margins import (
    AdaCos,
    AdaFace,
    ArcFace,
    CenterLoss,
    CircleLoss,
    ContrastiveLoss,
    CosFace,
    CurricularFace,
    ElasticFace,
    FNormSphereFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
    SphereFace,
    SphereFace2,
    TripletLoss,
    UniFace,
)

INF = float("inf")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_plain(rank: int, mesh: ShardMesh) -> None:
    own = torch.arange(2.0)[:, None] + 10 * rank
    assert all_gather_equal(own, mesh)[:, 0].tolist() == [10.0 * r + i for r in range(mesh.size) for i in range(2)]

    partial = torch.arange(2.0 * mesh.size) * (rank + 1)
    factor = sum(range(1, mesh.size + 1))
    wait = start_reduce_scatter(partial, mesh)
    # Others may go on in the meantime.
    assert max_over_ranks([rank], mesh) == [mesh.size - 1]
    assert wait().tolist() == [factor * (2.0 * rank + i) for i in range(2)]
    assert torch.equal(partial, torch.arange(2.0 * mesh.size) * (rank + 1)), "the argument was changed"

    assert max_over_ranks([rank, -rank, 5], mesh) == [mesh.size - 1, 0, 5]

    tensors = [torch.full((2, 2), float(rank)), torch.tensor(2.0 * rank)]
    average_over_ranks(tensors, mesh)
    mean = (mesh.size - 1) / 2
    assert tensors[0].tolist() == [[mean, mean], [mean, mean]]
    assert float(tensors[1]) == 2 * mean
    equal = draw(50, 3).float()
    again = equal.clone()
    average_over_ranks([again], mesh)
    assert torch.equal(again, equal)


def check_gather_rows(rank: int, mesh: ShardMesh) -> None:
    for sizes in ((2, 0, 3), (0, 0, 1), (0, 0, 0), (1, 1, 1), (4, 1, 0)):
        sizes = sizes[: mesh.size]
        everything = draw(sum(sizes), 2)
        start = sum(sizes[:rank])
        gathered = gather_rows(everything[start : start + sizes[rank]], mesh)
        assert torch.equal(gathered, everything), (sizes, gathered)
        labels = gather_rows(torch.full((sizes[rank],), 2**40 + rank), mesh)
        assert labels.tolist() == [2**40 + r for r, size in enumerate(sizes) for _ in range(size)]


def check_sum_and_copy(rank: int, mesh: ShardMesh) -> None:
    parts, weights = draw(mesh.size, 4), draw(4, seed=1)
    own = parts[rank].clone().requires_grad_()
    total = sum_over_shards(own, mesh)
    torch.testing.assert_close(total, parts.sum(0), rtol=0, atol=1e-14)
    assert torch.equal(own, parts[rank]), "the argument was changed"
    # Every rank holds the whole gradient of the replicated loss: it is passed on as it is, not summed.
    (gradient,) = torch.autograd.grad((total * weights).sum(), own)
    assert torch.equal(gradient, weights)

    replicated = draw(4, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad((copy_to_shards(replicated, mesh) * parts[rank]).sum(), replicated)
    torch.testing.assert_close(gradient, parts.sum(0), rtol=0, atol=1e-14)
    assert torch.equal(copy_to_shards(replicated, mesh), replicated)

    # Through both, a sharded sum of a replicated number has the gradient that one process would find.
    value = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum_over_shards(copy_to_shards(value, mesh) ** 2 * (rank + 1), mesh), value)
    assert abs(float(gradient) - 2 * 0.7 * sum(range(1, mesh.size + 1))) < 1e-13


def check_logsumexp(rank: int, mesh: ShardMesh) -> None:
    for sizes in ((2, 0, 3), (0, 0, 4), (1, 5, 1)):
        sizes = sizes[: mesh.size]
        start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
        for bounded in (True, False):
            # Without a bound, logits that would overflow or vanish on their own.
            logits = 3 * draw(6, sum(sizes)) + (
                0 if bounded else torch.tensor([0, 5000, -5000, 0, 0, 0]).double()[:, None]
            )
            if logits.numel():
                logits[3, 0] = -INF
                logits[4, :] = -INF
                logits[5, :-1] = -INF
            own = logits[:, start:stop].clone().requires_grad_()
            result = logsumexp_over_shards(own, mesh, bounded=bounded)
            whole = logits.clone().requires_grad_()
            expected = whole.logsumexp(1) if whole.shape[1] else torch.full((6,), -INF).double()
            torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)

            weights = draw(6, seed=3)
            (gradient,) = torch.autograd.grad((result * weights).sum(), own)
            # torch.logsumexp gives NaN in the backward of a row that is -inf throughout; here it has no gradient.
            some = (logits > -INF).any(1)
            assert not bool(gradient[~some].any())
            if bool(some.any()):
                (expected,) = torch.autograd.grad((whole[some].logsumexp(1) * weights[some]).sum(), whole)
                torch.testing.assert_close(gradient[some], expected[some, start:stop], rtol=1e-11, atol=1e-13)
            assert gradient.shape == own.shape


def collectives_of_a_step(head: PartialFC, rank: int) -> dict[str, int]:
    """Of the second step; at the first one the ranks agree on the size of a batch."""
    for _ in range(2):
        embeddings = draw(4, 8, seed=rank).float().requires_grad_()
        with CountCollectives() as counting:
            head(embeddings, torch.arange(4)).backward()
    return dict(counting.counts)


def check_counts(rank: int, mesh: ShardMesh, *, fused: bool) -> None:
    def count(margin: Margin, sample_rate: float, **options: Any) -> dict[str, int]:
        head = PartialFC(300, 8, margin=margin, sample_rate=sample_rate, fused=fused, **options)
        return collectives_of_a_step(head, rank)

    def expected(all_reduces: int) -> dict[str, int]:
        return {"_allgather_base_": 2, "allreduce_": all_reduces, "_reduce_scatter_base_": 1}

    for sample_rate in (1.0, 0.2):
        assert count(ArcFace(), sample_rate) == expected(2)
        assert count(CosFace(), sample_rate) == expected(2)
        # A maximum first, where exp of a logit may overflow: without normalisation, or at a large scale.
        assert count(Softmax(), sample_rate) == expected(3)
        assert count(ArcFace(scale=100.0), sample_rate) == expected(3)
        # Two gradients of per-row numbers that meet the classes of all ranks: in one message, if the step is fused.
        assert count(ProbeMargin(), sample_rate) == expected(4 if fused else 5)
        # What a margin knows of the row from the gathered batch costs nothing.
        for margin in (FNormSphereFace(), AdaFace(), MagFace(), ElasticFace(sort=True)):
            assert count(margin, sample_rate) == expected(2)
        # Negatives without a bound.
        for margin in (CircleLoss(), CurricularFace()):
            assert count(margin, sample_rate) == expected(3)
        # A sum without a maximum, and the gradient of the bias; a scale for each row, and its gradient.
        assert count(UniFace(), sample_rate) == count(SphereFace2(), sample_rate) == expected(3)
        assert count(SphereFace(), sample_rate) == count(NormFace(learned=True), sample_rate) == expected(4)
        # One more softmax, at the scale of the step before.
        assert count(AdaCos(), sample_rate) == expected(5)
        # Options that ask no other rank, and those that do.
        local = {"num_subcenters": 3, "sampling_correction": True}
        assert count(ArcFace(), sample_rate, **local) == expected(2)
        assert count(ArcFace(), sample_rate, variational=VariationalPrototypes()) == expected(2)
        assert count(ArcFace(), sample_rate, interclass_filtering_threshold=0.5) == expected(3)
        for term in (CenterLoss(), ContrastiveLoss(), TripletLoss()):
            assert count(ArcFace(), sample_rate, auxiliaries=[term]) == expected(3)


def check_all(rank: int, world_size: int) -> None:
    mesh = ShardMesh.from_group()
    assert (mesh.rank, mesh.size) == (rank, world_size)
    for check in (check_plain, check_gather_rows, check_sum_and_copy, check_logsumexp):
        check(rank, mesh)
    for fused in (True, False):
        check_counts(rank, mesh, fused=fused)


def test_one_process_takes_the_same_path_without_a_collective():
    for check in (check_plain, check_gather_rows, check_sum_and_copy, check_logsumexp):
        check(0, ShardMesh.single())
    for fused in (True, False):
        assert collectives_of_a_step(PartialFC(300, 8, margin=ArcFace(), sample_rate=0.2, fused=fused), 0) == {}


def test_three_ranks():
    run_distributed(check_all, 3)
