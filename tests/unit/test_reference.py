"""The reference loss against cross entropy written by hand, and both against a loss that clamping would hide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from partialfc import PartialFC
from partialfc.head import reference_loss
from partialfc.margins import ArcFace, CosFace, NormFace, Softmax


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    embeddings = 3 * torch.randn(7, 5, generator=generator, dtype=torch.float64)
    centers = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    return embeddings, torch.tensor([0, 10, 3, 3, 7, 1, 9]), centers


def test_softmax_is_cross_entropy_of_inner_products(batch):
    embeddings, labels, centers = batch
    loss, state = reference_loss(embeddings, labels, centers, Softmax())
    torch.testing.assert_close(loss, F.cross_entropy(embeddings @ centers.T, labels), rtol=1e-13, atol=0)
    assert state == {}


def test_normface_is_cross_entropy_of_scaled_cosines(batch):
    embeddings, labels, centers = batch
    cosines = F.cosine_similarity(embeddings[:, None], centers[None], dim=2)
    expected = F.cross_entropy(30.0 * cosines, labels)
    torch.testing.assert_close(reference_loss(embeddings, labels, centers, NormFace(30.0))[0], expected)


def test_cosface_takes_the_margin_from_the_own_class_alone(batch):
    embeddings, labels, centers = batch
    cosines = F.cosine_similarity(embeddings[:, None], centers[None], dim=2)
    expected = F.cross_entropy(30.0 * (cosines - 0.35 * F.one_hot(labels, 11)), labels)
    torch.testing.assert_close(reference_loss(embeddings, labels, centers, CosFace(30.0, margin=0.35))[0], expected)


def test_arcface_adds_the_margin_to_the_angle_of_the_own_class(batch):
    embeddings, labels, centers = batch
    cosines = F.cosine_similarity(embeddings[:, None], centers[None], dim=2)
    own = F.one_hot(labels, 11).bool()
    expected = F.cross_entropy(30.0 * torch.where(own, (cosines.acos() + 0.5).cos(), cosines), labels)
    loss = reference_loss(embeddings, labels, centers, ArcFace(30.0, margin=0.5, tail="none"))[0]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("margin", "embedding", "expected"),
    [
        # Logits (0, 96): log(e^0 + e^96) - 0.
        (Softmax(), [96.0, 0.0], 96.0),
        # Far past the range of exp in float32, so only with the maximum taken out first.
        (Softmax(), [1000.0, 0.0], 1000.0),
        # Cosines (-1, 3) / sqrt(10): bounded logits, summed without taking the maximum out.
        (CosFace(64.0, margin=0.35), [3.0, -1.0], 64.0 * (0.35 + 4 / 10**0.5)),
    ],
)
def test_a_loss_above_69_is_reported_as_it_is(margin, embedding, expected, dtype):
    # A probability clamped at 1e-30 would end at -log(1e-30) = 69.08.
    embeddings = torch.tensor([embedding], dtype=dtype)
    labels = torch.tensor([0])
    centers = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float(reference_loss(embeddings, labels, centers, margin)[0]) == pytest.approx(expected, rel=tolerance)

    head = PartialFC(2, 2, margin=margin, dtype=dtype)
    head.set_class_centers(centers)
    embeddings.requires_grad_()
    loss = head(embeddings, labels)
    assert float(loss.detach()) == pytest.approx(expected, rel=tolerance)
    loss.backward()
    own = embeddings.detach().clone().requires_grad_()
    reference_loss(own, labels, centers, margin)[0].backward()
    torch.testing.assert_close(embeddings.grad, own.grad)
    assert float(own.grad.abs().max()) > 0.5
