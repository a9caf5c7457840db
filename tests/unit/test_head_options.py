"""Options of the head in one process: what they do, what they remember, and what does not go together."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc import CenterAdamW, CenterSGD, HeadGroup, PartialFC
from partialfc.head import VariationalPrototypes, reference_loss
from partialfc.head.auxiliary import _Distance
from partialfc.margins import (
    AdaCos,
    AdaFace,
    ArcFace,
    CenterLoss,
    CosFace,
    CurricularFace,
    MagFace,
    NormFace,
    Softmax,
    SphereFace,
    SphereFace2,
    TripletLoss,
    UniFace,
)

DIM = 6
STILL = CenterSGD(learning_rate=0.0)


def build(num_classes: int = 40, **options: Any) -> PartialFC:
    options = {"margin": CosFace(scale=8.0), "dtype": torch.float64, "init_std": 1.0, **options}
    return PartialFC(num_classes, DIM, **options)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True
    )


# Sampling correction.


def test_a_corrected_sampled_sum_is_that_of_all_classes_in_the_mean():
    embeddings, labels = rows(6).detach(), torch.tensor([0, 7, 7, 200, 399, 100])
    margin = Softmax(bias=False, scale=0.3)
    full = build(400, margin=margin)
    centers = full.gather_class_centers()
    logits = 0.3 * embeddings @ centers.T
    others = logits.exp().sum(1) - logits.exp().gather(1, labels[:, None])[:, 0]

    def sums(correction: bool) -> Tensor:
        """Of the other classes, mean over 300 draws, from the loss of each row on its own."""
        head = build(400, margin=margin, sample_rate=0.2, sampling_correction=correction, optimizer=STILL)
        drawn = []
        for _ in range(300):
            # One row at a time would change what is in the batch, and so what is always in play.
            loss = head(embeddings.clone().requires_grad_(), labels)
            loss.backward()
            drawn.append(float(loss.detach()))
        return torch.tensor(drawn, dtype=torch.float64)

    exact = float(torch.log1p(others / logits.exp().gather(1, labels[:, None])[:, 0]).mean())
    corrected, published = sums(True), sums(False)
    assert float(corrected.mean()) == pytest.approx(exact, abs=0.02)
    assert float(published.mean()) < exact - 1.0


def test_the_weight_of_a_drawn_class_is_the_inverse_of_its_probability():
    head = build(400, margin=SphereFace2(), sample_rate=0.2, optimizer=STILL)
    assert head.corrects_sampling
    embeddings, labels = rows(3), torch.tensor([5, 6, 399])
    in_play = head.sampler.in_play(labels, head.partition, 0)
    weights = torch.full((400,), 0.0, dtype=torch.float64)
    weights[in_play.rows] = 1 / head.sampler.inclusion_probability
    weights[labels] = 1.0
    cosines = F.normalize(embeddings.detach()) @ F.normalize(head.gather_class_centers()).T
    bias = float(head.learned.values()["bias"])
    g = 2 * ((cosines + 1) / 2) ** 3 - 1
    negative = F.softplus(40 * (g + 0.4) + bias, threshold=50)
    own = F.softplus(-(40 * (g - 0.4) + bias), threshold=50).gather(1, labels[:, None])[:, 0]
    others = (negative * weights).sum(1) - negative.gather(1, labels[:, None])[:, 0]
    expected = (50 / 40 * (0.7 * own + 0.3 * others)).mean()
    torch.testing.assert_close(head(embeddings, labels).detach(), expected, rtol=1e-12, atol=0)


# Sub-centers.


def test_only_the_nearest_subcenter_gets_a_gradient():
    head = build(
        10, margin=ArcFace(scale=8.0), num_subcenters=3, optimizer=CenterSGD(0.1, momentum=0.0, weight_decay=0.0)
    )
    before = head.gather_class_centers()
    assert before.shape == (10, 3, DIM)
    embedding = rows(1)
    nearest = (F.normalize(embedding.detach()) @ F.normalize(before, dim=2).flatten(0, 1).T).view(10, 3).argmax(1)
    head(embedding, torch.tensor([4])).backward()
    moved = (head.gather_class_centers() != before).any(2)
    assert torch.equal(moved, F.one_hot(nearest, 3).bool())


def test_equal_subcenters_do_not_share_a_gradient():
    head = build(2, num_subcenters=2, optimizer=CenterSGD(1.0, momentum=0.0, weight_decay=0.0))
    centers = torch.ones(2, 2, DIM, dtype=torch.float64) * torch.tensor([1.0, -1.0]).view(2, 1, 1)
    head.set_class_centers(centers)
    head(rows(1), torch.tensor([0])).backward()
    assert (head.gather_class_centers() != centers).any(2).sum(1).tolist() == [1, 1]


def test_subcenters_are_set_in_their_shape():
    with pytest.raises(ValueError, match=r"^class centers have shape \(40, 6\), but must have \(40, 2, 6\)$"):
        build(num_subcenters=2).set_class_centers(torch.zeros(40, 6))


# Class biases and learned numbers.


def test_biases_learn_and_do_not_decay():
    head = build(margin=Softmax(), optimizer=CenterSGD(learning_rate=0.5, momentum=0.0, weight_decay=0.9))
    embeddings, labels = rows(5), torch.tensor([3, 3, 1, 0, 39])
    centers, bias = head.gather_class_centers(), torch.zeros(40, dtype=torch.float64)
    for _ in range(2):
        leaf = bias.clone().requires_grad_()
        expected = reference_loss(embeddings.detach(), labels, centers, Softmax(), bias_C=leaf)[0]
        loss = head(embeddings, labels)
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=0)
        loss.backward()
        bias = bias - 0.5 * torch.autograd.grad(expected, leaf)[0]
        centers = head.gather_class_centers()
        torch.testing.assert_close(head.class_bias.gather().flatten(), bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", [CenterSGD(learning_rate=0.2, weight_decay=0.5), CenterAdamW(learning_rate=0.2)])
def test_a_learned_scale_moves_by_the_optimizer_without_decay(optimizer):
    head = build(margin=NormFace(scale=8.0, learned=True), optimizer=optimizer)
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    expected = (
        torch.optim.SGD([scale], lr=0.2, momentum=0.9)
        if isinstance(optimizer, CenterSGD)
        else torch.optim.AdamW([scale], lr=0.2, weight_decay=0.0)
    )
    for step in range(3):
        embeddings, labels = rows(4, step), torch.arange(4)
        loss, _ = reference_loss(
            embeddings.detach(), labels, head.gather_class_centers(), head.margin, learned={"scale": scale}
        )
        scale.grad = None
        loss.backward()
        head(embeddings, labels).backward()
        expected.step()
        assert head.diagnostics()["scale"] == pytest.approx(float(scale.detach()), rel=1e-12)


# Variational prototypes.


def test_an_embedding_counts_from_the_start_step_until_it_is_too_old():
    settings = VariationalPrototypes(weight=0.25, max_age=2, start_step=2)
    head = build(margin=NormFace(8.0), variational=settings, optimizer=STILL)
    centers = head.gather_class_centers()
    seen = rows(1).detach()
    for step in range(5):
        # Class 7 is seen in step 0, and in the others only class 9.
        embeddings, labels = (seen, torch.tensor([7])) if step == 0 else (rows(1, step).detach(), torch.tensor([9]))
        memory = {7: (0, seen[0])} if step else {}
        memory |= {9: (step - 1, rows(1, step - 1).detach()[0])} if step > 1 else {}
        mixed = F.normalize(centers)
        for label, (when, embedding) in memory.items():
            if step >= 2 and step - when <= 2:
                mixed[label] = 0.75 * mixed[label] + 0.25 * F.normalize(embedding, dim=0)
        expected = reference_loss(embeddings, labels, mixed, head.margin)[0]
        loss = head(embeddings.requires_grad_(), labels)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0, msg=f"step {step}")
        loss.backward()


def test_of_several_embeddings_of_a_class_the_last_is_remembered():
    head = build(variational=VariationalPrototypes(), optimizer=STILL)
    embeddings = rows(4)
    head(embeddings, torch.tensor([5, 8, 5, -1])).backward()
    assert head.prototypes is not None
    remembered = head.prototypes.state_dict()
    assert (remembered["seen"].flatten() == 0).nonzero()[:, 0].tolist() == [5, 8]
    found = remembered["embedding"].flatten(0, 1)[[5, 8]]
    torch.testing.assert_close(found, F.normalize(embeddings.detach())[[2, 1]], rtol=1e-14, atol=0)


# Several labels for a row.


def test_the_loss_of_a_row_is_the_sum_over_its_labels_and_none_is_a_negative_of_another():
    head = build(margin=Softmax(bias=False), labels_per_row=3, optimizer=STILL)
    embeddings = rows(3)
    logits = embeddings.detach() @ head.gather_class_centers().T
    loss = head(embeddings, torch.tensor([[4, -1, 9], [6, 6, -1], [-1, -1, -1]]))
    expected = 0.0
    for row, labels in ((0, (4, 9)), (1, (6,))):
        others = [math.exp(logits[row, label]) for label in range(40) if label not in labels]
        expected += sum(math.log1p(sum(others) / math.exp(logits[row, label])) for label in labels)
    assert float(loss.detach()) == pytest.approx(expected / 2, rel=1e-12)
    loss.backward()
    assert not bool(embeddings.grad[2].any())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            "labels are torch.int64 of shape (3,), but must be torch.int64 of shape (3, 2), 2 (padded with -1) for "
            "each embedding",
        ),
        (
            torch.tensor([[0, 1], [0, 40], [0, 0]]),
            "labels[1, 1] on rank 0 is 40, but must be in [0, 40), or -1 to mask the row; 1 of 6 labels of this batch "
            "are out of range. Check num_classes against the data.",
        ),
    ],
)
def test_bad_rows_of_labels_are_named(labels, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(labels_per_row=2)(rows(3), labels)
    assert str(error.value) == message


# Auxiliary terms, weights, what there is to see.


def test_terms_are_added_with_their_weights_and_the_whole_is_weighted():
    terms = [CenterLoss(weight=0.5), TripletLoss(weight=2.0)]
    embeddings, labels = rows(5), torch.tensor([3, 3, 1, 0, 1])
    head = build(auxiliaries=terms, loss_weight=0.1, optimizer=STILL)
    loss = head(embeddings, labels)
    loss.backward()
    seen = head.diagnostics()
    plain = build(optimizer=STILL)(rows(5), labels)
    assert seen["margin_loss"] == pytest.approx(float(plain.detach()), rel=1e-12)
    assert seen["CenterLoss"] == pytest.approx(0.5 * float(embeddings.detach().square().sum()) / 5, rel=1e-12)
    expected = 0.1 * (seen["margin_loss"] + 0.5 * seen["CenterLoss"] + 2.0 * seen["TripletLoss"])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_a_loss_that_is_not_finite_leaves_everything_a_head_has():
    options = {"auxiliaries": [CenterLoss()], "variational": VariationalPrototypes(), "num_subcenters": 1}
    for margin in (UniFace(scale=8.0), AdaCos(), AdaFace(scale=8.0)):
        head = build(margin=margin, **options)
        head(rows(4), torch.arange(4)).backward()
        before = {name: value for name, value in head.state_dict().items() if name != "_extra_state"}
        before = {name: value.clone() for name, value in before.items()}
        state, embeddings = dict(head.margin_state), rows(4, 1)
        with torch.no_grad():
            embeddings[2, 1] = math.nan
        head(embeddings, torch.arange(4)).backward()
        assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())
        assert all(torch.equal(head.margin_state[name], value) for name, value in state.items())


@pytest.mark.parametrize("margin", [UniFace(scale=8.0), AdaFace(scale=8.0), AdaCos(), SphereFace()], ids=str)
def test_a_head_with_everything_goes_on_bit_for_bit(tmp_path, margin):
    options: dict[str, Any] = {
        "margin": margin,
        "sample_rate": 0.4,
        "auxiliaries": [CenterLoss()],
        "variational": VariationalPrototypes(start_step=1),
        "interclass_filtering_threshold": 0.5,
    }

    def train(head: PartialFC, steps: range) -> list[float]:
        losses = []
        for step in steps:
            loss = head(rows(6, step), torch.arange(6) + step)
            loss.backward()
            losses.append(float(loss.detach()))
        return losses

    straight = build(**options)
    train(straight, range(3))
    torch.save(straight.state_dict(), tmp_path / "head.pt")
    resumed = build(**options)
    resumed.load_state_dict(torch.load(tmp_path / "head.pt"))
    assert train(resumed, range(3, 6)) == train(straight, range(3, 6))


# What does not go together.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_subcenters": 0}, "num_subcenters is 0, but must be at least 1"),
        ({"labels_per_row": 0}, "labels_per_row is 0, but must be at least 1"),
        ({"loss_weight": 0.0}, "loss_weight is 0.0, but must be positive and finite"),
        ({"loss_weight": math.inf}, "loss_weight is inf, but must be positive and finite"),
        ({"variational": {"weight": 0.1}}, "variational is {'weight': 0.1}, but must be VariationalPrototypes or None"),
        ({"margin": "ArcFace"}, "margin is 'ArcFace', but must be a margin of partialfc.margins, such as ArcFace()"),
        (
            {"margin": UniFace(), "sampling_correction": False},
            "sampling_correction is False, but UniFace depends on the level of the sum over all classes and needs it; "
            "leave it at None",
        ),
        (
            {"margin": SphereFace2(), "labels_per_row": 2},
            "labels_per_row is 2, but SphereFace2 is not a softmax, and would count the negatives of a row once for "
            "each label; it takes 1",
        ),
        (
            {"interclass_filtering_threshold": 1.0},
            "interclass_filtering_threshold is 1.0, but must be in (-1, 1)",
        ),
        (
            {"margin": Softmax(), "interclass_filtering_threshold": 0.4},
            "interclass_filtering_threshold is 0.4, but must be None: Softmax compares no cosines",
        ),
        (
            {"variational": VariationalPrototypes(), "num_subcenters": 2},
            "variational prototypes take one center for each class, but num_subcenters is 2",
        ),
        (
            {"variational": VariationalPrototypes(), "margin": Softmax()},
            "variational prototypes are unit vectors, but Softmax compares no cosines",
        ),
        (
            {"auxiliaries": ["CenterLoss"]},
            "auxiliaries has 'CenterLoss', but must have terms of partialfc.margins, such as CenterLoss()",
        ),
        (
            {"auxiliaries": [CenterLoss()], "labels_per_row": 2},
            "auxiliaries take one label for each row, but labels_per_row is 2",
        ),
        (
            {"margin": AdaCos(), "num_classes": 2},
            "AdaCos has a scale for 3 classes or more, but num_classes is 2",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.0}, "VariationalPrototypes.weight is 1.0, but must be in [0, 1)"),
        ({"max_age": -1}, "VariationalPrototypes.max_age is -1, but must not be negative"),
        ({"start_step": -5}, "VariationalPrototypes.start_step is -5, but must not be negative"),
    ],
)
def test_bad_settings_of_prototypes_are_named(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        VariationalPrototypes(**settings)
    assert str(error.value) == message


# Groups of heads.


def test_a_group_gives_each_head_its_rows():
    heads = HeadGroup({"a": build(loss_weight=0.5), "b": build(30, seed=1)})
    embeddings = rows(5)
    loss = heads(embeddings, {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4, 29])})
    first = build()(rows(5)[:2], torch.tensor([1, 2]))
    second = build(30, seed=1)(rows(5)[2:], torch.tensor([3, 4, 29]))
    assert float(loss.detach()) == pytest.approx(0.5 * float(first.detach()) + float(second.detach()), rel=1e-13)
    loss.backward()
    assert bool(embeddings.grad.any(1).all())
    assert heads["b"].step == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": torch.tensor([1])}, "labels are for the heads ['a'], but must be for ['a', 'b']"),
        (
            {"a": torch.tensor([1, 2]), "b": torch.tensor([3])},
            "there are 5 embeddings, but labels of 2 + 1 rows for the heads a, b",
        ),
    ],
)
def test_rows_that_do_not_fit_a_group_are_named(labels, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        HeadGroup({"a": build(), "b": build()})(rows(5), labels)
    assert str(error.value) == message


def test_a_group_needs_a_head_and_names():
    with pytest.raises(ValueError, match=r"^a group of heads needs at least one head$"):
        HeadGroup({})
    for name in ("", "a.b"):
        message = f"a head is called '{name}', but a name must not be empty and have no dot"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            HeadGroup({name: build()})


def test_a_group_takes_heads_of_their_own():
    head = build()
    for heads, name in (({"a": head, "b": head}, "a"), ({"a": build(), "b": torch.nn.Identity()}, "b")):
        with pytest.raises(ValueError, match=f"^head '{name}' must be a PartialFC of its own$"):
            HeadGroup(heads)


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_a_batch_without_a_valid_row_moves_nothing(labels):
    # Not even by momentum, decay or the count of an annealing.
    head = build(margin=SphereFace(), auxiliaries=[CenterLoss()])
    head(rows(3), torch.arange(3)).backward()
    before, iteration = head.gather_class_centers(), head.margin_state["iteration"]
    loss = head(rows(len(labels)), torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(head.gather_class_centers(), before)
    assert torch.equal(head.margin_state["iteration"], iteration)
    assert head.step == 2


def test_a_number_that_one_margin_learned_is_not_loaded_as_that_of_another():
    with pytest.raises(RuntimeError, match=r'Missing key.*"learned.value_bias"'):
        build(margin=UniFace()).load_state_dict(build(margin=NormFace(learned=True)).state_dict())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (0.0, "class center (3,) is zero, but a cosine needs a direction; draw it at random instead"),
        (math.nan, "class centers have numbers that are not finite in torch.float64"),
    ],
)
def test_class_centers_without_a_direction_are_refused(bad, message):
    head = build()
    before = head.gather_class_centers()
    centers = before.clone()
    centers[3] = bad
    with pytest.raises(ValueError) as error:  # noqa: PT011
        head.set_class_centers(centers)
    assert str(error.value) == message
    assert torch.equal(head.gather_class_centers(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_stays_out_of_half_precision(dtype):
    head = build()
    reason = f"^the head was asked to convert itself to {dtype}, but its class centers stay in torch.float64: rounded "
    with pytest.raises(ValueError, match=reason):
        head.to(dtype)
    assert head.dtype == head.class_centers.weight.dtype == torch.float64


def test_heads_may_have_names_that_modules_have():
    heads = HeadGroup({"train": build(), "type": build()})
    heads(rows(3), {"type": torch.tensor([1, 2]), "train": torch.tensor([3])}).backward()
    assert heads.diagnostics().keys() == {"train/margin_loss", "type/margin_loss"}
    assert heads["train"].step == heads["type"].step == 1
    assert "head_train.class_centers.weight" in heads.state_dict()


def test_one_bad_row_stops_all_heads_of_a_group():
    margins = {"good": CurricularFace(scale=8.0), "bad": UniFace(scale=8.0)}
    heads = HeadGroup({name: build(margin=margin, auxiliaries=[CenterLoss()]) for name, margin in margins.items()})
    labels = {"good": torch.tensor([1, 2]), "bad": torch.tensor([3])}
    heads(rows(3), labels).backward()
    before = {name: value.clone() for name, value in heads.state_dict().items() if "extra" not in name}
    t = heads["good"].margin_state["t"]
    embeddings = rows(3, 1)
    with torch.no_grad():
        embeddings[2, 0] = math.nan
    loss = heads(embeddings, labels)
    assert bool(loss.isnan())
    loss.backward()
    assert all(torch.equal(heads.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(heads["good"].margin_state["t"], t)
    heads(rows(3, 2), labels).backward()
    assert not torch.equal(
        heads.state_dict()["head_good.class_centers.weight"], before["head_good.class_centers.weight"]
    )


def test_terms_of_one_kind_are_told_apart():
    head = build(auxiliaries=[TripletLoss(), TripletLoss(soft=True)])
    head(rows(4), torch.tensor([1, 1, 2, 2])).backward()
    assert head.diagnostics().keys() == {"margin_loss", "TripletLoss", "TripletLoss_2"}


def test_the_norms_of_embeddings_are_shown_where_they_matter():
    head = build(margin=MagFace(scale=8.0))
    embeddings = rows(3)
    head(embeddings, torch.tensor([1, -1, 2])).backward()
    expected = float(embeddings.detach()[[0, 2]].norm(dim=1).mean())
    assert head.diagnostics()["embedding_norm"] == pytest.approx(expected, rel=1e-12)


def test_the_state_of_a_margin_follows_the_head_to_another_device():
    head = build(margin=SphereFace()).to("meta")
    assert head.margin_state["iteration"].device.type == "meta"
    assert head.margin_state["iteration"].dtype == torch.float64


def test_the_gradient_of_a_learned_scale_cannot_turn_the_loss_around():
    # Labels that have nothing to do with the embeddings: the best scale is 0, and the steps are long.
    head = build(margin=NormFace(scale=2.0, learned=True), optimizer=CenterSGD(learning_rate=2.0))
    for step in range(30):
        loss = head(rows(16, step), torch.arange(16))
        loss.backward()
        assert float(loss.detach()) < 6.0
    assert float(head.learned.values()["scale"]) < 0


def test_distances_have_the_derivative_of_distances():
    x, y = rows(3, 1).detach(), rows(4, 2).detach()
    y[1] = x[2]
    distance = _Distance.apply(x, y)
    torch.testing.assert_close(distance, (x[:, None] - y).square().sum(2).sqrt(), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(_Distance.apply, (rows(3, 1), rows(4, 2)))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_Distance.apply(leaf, leaf)[0, 0], leaf)
    assert not bool(gradient.any())
