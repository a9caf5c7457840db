"""The losses against pytorch-metric-learning, an independent implementation of many of them.

PML keeps its class centers as the columns of W, [D, C], and takes angular margins in degrees. Losses are compared with
their gradients for embeddings and class centers, in float64, both those of the reference and those of the head.

B rows, C classes, K sub-centers, D embedding dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor

from partialfc import CenterSGD, PartialFC
from partialfc.head import reference_loss
from partialfc.margins import (
    ArcFace,
    CircleLoss,
    ContrastiveLoss,
    CosFace,
    FNormSphereFace,
    Margin,
    NormFace,
    PairTerm,
    SphereFace,
    TripletLoss,
)

B, C, D = 14, 9, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
LABELS = torch.tensor([0, 8, 3, 3, 7, 1, 5, 3, 0, 8, 2, 6, 4, 4])


def batch(num_subcenters: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D] of different norms, and class centers [C, K, D]."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(B, D, generator=generator, dtype=torch.float64)
    centers = torch.randn(C, num_subcenters, D, generator=generator, dtype=torch.float64)
    # Two rows nearly opposite to their class, where a linear tail begins, and one near it.
    for row, factor in ((1, -2.0), (4, -0.7), (5, 1.5)):
        noise = torch.randn(D, generator=generator, dtype=torch.float64)
        embeddings[row] = factor * centers[LABELS[row], 0] + 0.1 * noise
    return embeddings, centers


Result = tuple[Tensor, Tensor, Tensor]
"""Loss, its gradient for the embeddings, and for the class centers [C, K, D]."""


def by_pml(loss_function: torch.nn.Module, num_subcenters: int = 1) -> Result:
    embeddings, centers = batch(num_subcenters)
    embeddings.requires_grad_()
    # Column j K + k is sub-center k of class j.
    loss_function.W = torch.nn.Parameter(centers.reshape(-1, D).T.contiguous())
    loss = loss_function(embeddings, LABELS)
    x_gradient, w_gradient = torch.autograd.grad(loss, (embeddings, loss_function.W))
    return loss.detach(), x_gradient, w_gradient.T.reshape(C, num_subcenters, D)


def by_reference(margin: Margin, num_subcenters: int = 1) -> Result:
    embeddings, centers = batch(num_subcenters)
    leaves = embeddings.requires_grad_(), centers.requires_grad_()
    loss, _ = reference_loss(embeddings, LABELS, centers, margin)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def by_head(margin: Margin, num_subcenters: int = 1, **options) -> Result:
    embeddings, centers = batch(num_subcenters)
    # With these settings a step is the gradient.
    optimizer = CenterSGD(learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    head = PartialFC(
        C, D, margin=margin, num_subcenters=num_subcenters, optimizer=optimizer, dtype=torch.float64, **options
    )
    head.set_class_centers(centers if num_subcenters > 1 else centers[:, 0])
    loss = head(embeddings.requires_grad_(), LABELS)
    loss.backward()
    step = centers - head.gather_class_centers().view(C, num_subcenters, D)
    return loss.detach(), embeddings.grad, step


def assert_same(margin: Margin, theirs: Result, num_subcenters: int = 1) -> None:
    assert float(theirs[0]) > 0.1
    assert float(theirs[1].abs().max()) > 1e-3
    assert float(theirs[2].abs().max()) > 1e-3
    for ours in (by_reference(margin, num_subcenters), by_head(margin, num_subcenters)):
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)


def own_angles(num_subcenters: int = 1) -> Tensor:
    embeddings, centers = batch(num_subcenters)
    cosine = F.cosine_similarity(embeddings[:, None], centers[LABELS], dim=2)
    return cosine.amax(1).acos()


@pytest.mark.parametrize("m", [0.1, 0.5, 1.2])
@pytest.mark.parametrize("scale", [8.0, 64.0])
def test_arcface(m, scale):
    # Both have the linear tail and the exact gradient, and the tail is in play.
    assert bool((own_angles() > math.pi - m).any())
    assert bool((own_angles() < math.pi - m).any())
    theirs = by_pml(losses.ArcFaceLoss(C, D, margin=math.degrees(m), scale=scale))
    assert_same(ArcFace(scale=scale, margin=m), theirs)


@pytest.mark.parametrize(("m", "scale"), [(0.35, 64.0), (0.2, 8.0)])
def test_cosface(m, scale):
    assert_same(CosFace(scale=scale, margin=m), by_pml(losses.CosFaceLoss(C, D, margin=m, scale=scale)))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_sphereface(m):
    # PML has no annealing, and a factor on |x| which is 1 by default.
    pieces = (m * own_angles() / math.pi).floor()
    assert set(pieces.tolist()) == {float(k) for k in range(m)}
    margin = SphereFace(margin=m, lambda_start=0.0, lambda_min=0.0)
    assert_same(margin, by_pml(losses.SphereFaceLoss(C, D, margin=m)))


@pytest.mark.parametrize("m", [2, 4])
def test_sphereface_with_the_norm_replaced(m):
    # The same of embeddings that have the scale as their norm. Gradients for the embeddings, which there have a part
    # along the embedding, are left out.
    embeddings, centers = batch()
    loss_function = losses.SphereFaceLoss(C, D, margin=m)
    loss_function.W = torch.nn.Parameter(centers[:, 0].T.contiguous())
    theirs = loss_function(30.0 * F.normalize(embeddings), LABELS)
    (gradient,) = torch.autograd.grad(theirs, loss_function.W)
    ours = by_head(FNormSphereFace(scale=30.0, margin=m, lambda_start=0.0, lambda_min=0.0))
    torch.testing.assert_close(ours[0], theirs.detach(), **CLOSE)
    torch.testing.assert_close(ours[2][:, 0], gradient.T, **CLOSE)


@pytest.mark.parametrize("num_subcenters", [2, 3])
def test_subcenter_arcface(num_subcenters):
    function = losses.SubCenterArcFaceLoss(
        num_classes=C, embedding_size=D, margin=math.degrees(0.5), scale=16.0, sub_centers=num_subcenters
    )
    theirs = by_pml(function, num_subcenters)
    # Not every sub-center is the nearest one of some row.
    assert bool((theirs[2] != 0).any(2).any(0).all())
    assert_same(ArcFace(scale=16.0, margin=0.5), theirs, num_subcenters)


@pytest.mark.parametrize("scale", [8.0, 64.0])
def test_normface(scale):
    # PML divides inner products by a temperature; its default distance normalises the embeddings.
    assert_same(NormFace(scale=scale), by_pml(losses.NormalizedSoftmaxLoss(C, D, temperature=1 / scale)))


@pytest.mark.parametrize(("m", "gamma"), [(0.25, 16.0), (0.4, 4.0)])
def test_circle_loss(m, gamma):
    # PML has it for pairs. With class centers as the other half of each pair, every row has one pair of its class and
    # C - 1 of others, which is the loss for classes.
    embeddings, centers = batch()
    leaves = embeddings.requires_grad_(), centers.requires_grad_()
    function = losses.CircleLoss(m=m, gamma=gamma, reducer=reducers.MeanReducer())
    loss = function(embeddings, LABELS, ref_emb=centers[:, 0], ref_labels=torch.arange(C))
    # PML's softplus has the threshold 20 of torch, which costs up to 2e-9.
    theirs = loss.detach(), *torch.autograd.grad(loss, leaves)
    for ours in (by_reference(CircleLoss(gamma, margin=m)), by_head(CircleLoss(gamma, margin=m))):
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


class HalfOfSquares(reducers.MeanReducer):
    """Mean of 1/2 z^2. With z = d, and z = [margin - d]_+, PML's contrastive loss becomes that of Hadsell et al.:

    PML sums the means over its two kinds of pairs, as we do, but has d and [margin - d]_+ themselves, and by default
    takes their mean over those that are not 0.
    """

    def element_reduction(self, losses: Tensor, *_):
        return 0.5 * losses.square().mean()


def term_by_head(term: PairTerm) -> tuple[float, Tensor]:
    """The term as diagnostics tell it, and what it adds to the gradient of the embeddings, over its weight."""
    loss, gradient, _ = by_head(NormFace(scale=4.0))
    embeddings, centers = batch()
    head = PartialFC(C, D, margin=NormFace(scale=4.0), dtype=torch.float64, auxiliaries=[term])
    head.set_class_centers(centers[:, 0])
    both = head(embeddings.requires_grad_(), LABELS)
    both.backward()
    value = head.diagnostics()[type(term).__name__]
    assert float(both.detach()) == pytest.approx(float(loss) + term.weight * value, rel=1e-12)
    assert head.diagnostics()["margin_loss"] == pytest.approx(float(loss), rel=1e-12)
    return value, (embeddings.grad - gradient) / term.weight


def assert_same_term(term: PairTerm, function: torch.nn.Module, miner: torch.nn.Module | None = None) -> None:
    embeddings = batch()[0].requires_grad_()
    loss = function(embeddings, LABELS, miner(embeddings, LABELS) if miner is not None else None)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert float(loss.detach()) > 0.1
    value, ours = term_by_head(term)
    assert value == pytest.approx(float(loss.detach()), rel=1e-10)
    torch.testing.assert_close(ours, gradient, **CLOSE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("margin", [1.0, 3.0])
def test_contrastive_loss(normalize, margin):
    distance = distances.LpDistance(normalize_embeddings=normalize)
    function = losses.ContrastiveLoss(neg_margin=margin, distance=distance, reducer=HalfOfSquares())
    assert_same_term(ContrastiveLoss(weight=0.7, margin=margin, normalize=normalize), function)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_batch_hard_triplet_loss(normalize, soft):
    # Classes with a single row are in the batch; the miner leaves them out, as we do.
    assert bool((LABELS.bincount() == 1).any())
    distance = distances.LpDistance(normalize_embeddings=normalize)
    function = losses.TripletMarginLoss(
        margin=0.0 if soft else 0.3, smooth_loss=soft, distance=distance, reducer=reducers.MeanReducer()
    )
    miner = miners.BatchHardMiner(distance=distance)
    assert_same_term(TripletLoss(weight=0.7, margin=0.3, normalize=normalize, soft=soft), function, miner)
