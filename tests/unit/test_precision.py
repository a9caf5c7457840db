"""Every loss with a backbone in half precision: 100 steps at 100,000 classes end where those in float32 end.

With 2 % of the classes sampled; `make soak` runs the full softmax too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partialfc import CenterSGD, PartialFC
from partialfc.keyed import normal, randint
from partialfc.margins import (
    MARGINS,
    ArcFace,
    CenterLoss,
    CircleLoss,
    ContrastiveLoss,
    CurricularFace,
    ElasticFace,
    Margin,
    NormFace,
    SphereFace2,
    TripletLoss,
    UniFace,
)
from partialfc.optim import build_optimizer

NUM_CLASSES, FEATURES, DIM, BATCH, STEPS = 100_000, 48, 128, 32, 100
# Labels come from few classes, spread over all, so that 100 steps learn something.
NUM_SEEN = 256
LOSSES: dict[str, tuple[Margin, dict[str, Any]]] = {
    **{name: (margin(), {}) for name, margin in MARGINS.items()},
    # A bias that all classes pull on wants a lower rate.
    "SphereFace2": (SphereFace2(), {"optimizer": CenterSGD(learning_rate=0.01)}),
    "UniFace": (UniFace(), {"optimizer": CenterSGD(learning_rate=0.01)}),
    "ElasticFace+": (ElasticFace(sort=True), {}),
    "NormFace, learned": (NormFace(learned=True), {}),
    "ArcFace, detached": (ArcFace(gradient="detached"), {}),
    "sub-centers": (ArcFace(), {"num_subcenters": 3}),
    "filtering": (ArcFace(), {"interclass_filtering_threshold": 0.4}),
    "auxiliaries": (ArcFace(), {"auxiliaries": [CenterLoss(), ContrastiveLoss(), TripletLoss()]}),
}


@cache
def batch(step: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(BATCH)
    labels = randint(NUM_SEEN, 1, step, rows) * (NUM_CLASSES // NUM_SEEN)
    columns = torch.arange(FEATURES)
    noise = normal(3, step, rows[:, None], columns)
    return (normal(2, labels[:, None], columns) + noise).float(), labels


def train(name: str, sample_rate: float, dtype: torch.dtype) -> Tensor:
    """The losses of all steps, [STEPS]."""
    margin, options = LOSSES[name]
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(FEATURES, DIM), nn.BatchNorm1d(DIM))
    optimizer = build_optimizer(backbone, name="sgd", learning_rate=0.02)
    head = PartialFC(
        NUM_CLASSES,
        DIM,
        margin=margin,
        sample_rate=sample_rate,
        init_std=0.1,
        **{"optimizer": CenterSGD(learning_rate=0.1), **options},
    )
    # Loss scaling, without which gradients of half precision vanish: the head's own part knows nothing of it.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    losses = []
    for step in range(STEPS):
        images, labels = batch(step)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            # The last layer of a network leaves embeddings in half precision.
            embeddings = backbone(images).to(dtype)
            loss = head(embeddings, labels)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert bool(head.gather_class_centers().isfinite().all())
    assert all(parameter.isfinite().all() for parameter in backbone.parameters())
    return torch.stack(losses)


def check(name: str, sample_rate: float) -> None:
    exact = train(name, sample_rate, torch.float32)
    assert bool(exact.isfinite().all())
    final = float(exact[-10:].mean())
    assert final < 0.8 * float(exact[:5].mean()), "it must have learnt something"
    for dtype in (torch.bfloat16, torch.float16):
        losses = train(name, sample_rate, dtype)
        assert bool(losses.isfinite().all())
        assert float(losses[-10:].mean()) == pytest.approx(final, rel=0.02), dtype


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_ends_where_float32_ends(name: str) -> None:
    check(name, 0.02)


@pytest.mark.soak
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_ends_where_float32_ends_without_sampling(name: str) -> None:
    check(name, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_from_the_cosine_to_the_loss_is_float32(dtype: torch.dtype) -> None:
    seen = set()

    class Recording(ArcFace):
        def target(self, cosine_B, parameters):
            seen.add(("target", cosine_B.dtype))
            return super().target(cosine_B, parameters)

        def negative(self, cosine_Bn, parameters):
            seen.add(("negative", cosine_Bn.dtype))
            return super().negative(cosine_Bn, parameters)

        def row_loss(self, own_B, negatives_B):
            seen.update([("own logit", own_B.dtype), ("sum of the others", negatives_B.dtype)])
            return super().row_loss(own_B, negatives_B)

    head = PartialFC(500, DIM, margin=Recording(), auxiliaries=[TripletLoss()])
    embeddings = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = head(embeddings, torch.arange(4))
    loss.backward()
    assert seen == {(what, torch.float32) for what in ("target", "negative", "own logit", "sum of the others")}
    assert loss.dtype == torch.float32
    assert embeddings.grad.dtype == dtype


@pytest.mark.parametrize(
    "margin", [ArcFace(), CurricularFace(), CircleLoss()], ids=lambda margin: type(margin).__name__
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "autograd"])
def test_autocast_around_backward_does_not_reach_the_update(margin, fused):
    results = []
    for enabled in (False, True):
        head = PartialFC(300, 32, margin=margin, fused=fused)
        embeddings = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            head(embeddings, torch.arange(16)).backward()
        results.append([embeddings.grad, head.gather_class_centers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
