"""The pure functions of Center, contrastive and triplet loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import partialfc.margins
from partialfc.margins import AUXILIARIES, Auxiliary, CenterLoss, CenterTerm, ContrastiveLoss, PairTerm, TripletLoss


def doubles(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_table_has_every_auxiliary():
    exported = {
        name: entry
        for name in partialfc.margins.__all__
        if isinstance(entry := getattr(partialfc.margins, name), type) and issubclass(entry, Auxiliary)
    }
    for base in (Auxiliary, CenterTerm, PairTerm):
        assert exported.pop(base.__name__) is base
    assert exported == AUXILIARIES


def test_defaults_are_those_of_the_papers():
    assert (CenterLoss().weight, CenterLoss().alpha, CenterLoss().update) == (0.003, 0.5, "paper")
    assert (ContrastiveLoss().weight, ContrastiveLoss().margin, ContrastiveLoss().normalize) == (1.0, 1.0, True)
    assert (TripletLoss().weight, TripletLoss().margin, TripletLoss().soft) == (1.0, 0.3, False)


def test_center_loss_is_half_the_squared_distance():
    embeddings, centers = doubles([[3.0, 4.0], [1.0, 1.0]]).requires_grad_(), doubles([[0.0, 0.0], [1.0, -2.0]])
    terms = CenterLoss().row_terms(embeddings, centers)
    assert terms.tolist() == [12.5, 4.5]
    # Its gradient is x - k (eq. 3).
    assert torch.autograd.grad(terms.sum(), embeddings)[0].tolist() == [[3.0, 4.0], [0.0, 3.0]]


def test_centers_move_by_the_rule_of_the_paper_or_down_the_gradient():
    # Class 0: rows (2, 0) and (4, 2), center (1, 1); class 1: no row; class 2: row (0, 6), center (0, 0). 4 rows.
    centers = doubles([[1.0, 1.0], [5.0, 5.0], [0.0, 0.0]])
    pull = doubles([[-1.0 - 3.0, 1.0 - 1.0], [0.0, 0.0], [0.0, -6.0]])
    count, num_rows = doubles([2.0, 0.0, 1.0]), torch.tensor(4)
    # k - alpha sum (k - x) / (1 + n).
    moved = CenterLoss(alpha=0.5).moved(centers, pull, count, num_rows)
    torch.testing.assert_close(moved, doubles([[1 + 0.5 * 4 / 3, 1.0], [5.0, 5.0], [0.0, 0.5 * 6 / 2]]))
    # k - alpha sum (k - x) / B.
    moved = CenterLoss(alpha=0.5, update="gradient").moved(centers, pull, count, num_rows)
    torch.testing.assert_close(moved, doubles([[1 + 0.5 * 4 / 4, 1.0], [5.0, 5.0], [0.0, 0.5 * 6 / 4]]))
    assert torch.equal(CenterLoss(alpha=0.0).moved(centers, pull, count, num_rows), centers)
    # A batch without rows divides by nothing.
    still = CenterLoss(update="gradient").moved(centers, torch.zeros_like(pull), 0 * count, torch.tensor(0))
    assert torch.equal(still, centers)


def test_gradient_update_is_descent_on_the_mean_of_the_batch():
    embeddings = doubles([[2.0, 0.0], [4.0, 2.0], [7.0, 7.0]])
    center = doubles([[1.0, 1.0]]).requires_grad_()
    # Two of three rows belong to the center.
    mean = CenterLoss().row_terms(embeddings[:2], center.expand(2, -1)).sum() / 3
    (gradient,) = torch.autograd.grad(mean, center)
    pull = (center.detach() - embeddings[:2]).sum(0, keepdim=True)
    moved = CenterLoss(alpha=0.3, update="gradient").moved(center.detach(), pull, doubles([2.0]), torch.tensor(3))
    torch.testing.assert_close(moved, center.detach() - 0.3 * gradient)


# Four rows of classes 0, 0, 1, 1. Rows of this rank: the first three.
DISTANCE = doubles([[0.0, 0.4, 0.3, 1.5], [0.4, 0.0, 0.9, 0.8], [0.3, 0.9, 0.0, 1.2]])
SAME = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
DIFFERENT = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]).bool()


def test_contrastive_loss_averages_both_kinds_of_pairs_apart():
    term = ContrastiveLoss(margin=1.0)
    sums = term.sums(DISTANCE, SAME, DIFFERENT)
    near = 0.5 * (0.4**2 + 0.4**2 + 1.2**2)
    far = 0.5 * (0.7**2 + 0.1**2 + 0.2**2 + 0.7**2 + 0.1**2)  # 1.5 is farther than the margin
    torch.testing.assert_close(sums, doubles([near, far, 3.0, 6.0]))
    assert float(term.value(sums)) == pytest.approx(near / 3 + far / 6, rel=1e-14)


def test_slopes_of_contrastive_loss():
    distance = DISTANCE.clone().requires_grad_()
    sums = ContrastiveLoss(margin=1.0).sums(distance, SAME, DIFFERENT)
    (near,) = torch.autograd.grad(sums[0], distance, retain_graph=True)
    (far,) = torch.autograd.grad(sums[1], distance)
    torch.testing.assert_close(near, torch.where(SAME, DISTANCE, 0.0))
    torch.testing.assert_close(far, torch.where(DIFFERENT, -(1.0 - DISTANCE).clamp(min=0), 0.0))


def test_contrastive_loss_without_pairs_of_a_kind_is_the_other_kind():
    term, none = ContrastiveLoss(), torch.zeros_like(SAME)
    far = 0.5 * (0.7**2 + 0.1**2 + 0.2**2 + 0.7**2 + 0.1**2)
    assert float(term.value(term.sums(DISTANCE, none, DIFFERENT))) == pytest.approx(far / 6, rel=1e-14)
    assert float(term.value(term.sums(DISTANCE, none, none))) == 0.0


def test_triplet_loss_takes_the_hardest_of_both_kinds():
    # 0.3 + 0.4 - 0.3; 0.3 + 0.4 - 0.8 is below 0; 0.3 + 1.2 - 0.3.
    term = TripletLoss(margin=0.3)
    sums = term.sums(DISTANCE, SAME, DIFFERENT)
    torch.testing.assert_close(sums, doubles([0.4 + 0.0 + 1.2, 3.0]))
    assert float(term.value(sums)) == pytest.approx(1.6 / 3, rel=1e-14)


def test_triplet_loss_takes_the_farthest_of_several_of_its_class():
    # One row, with three of its class at 0.2, 0.7 and 0.5, and three others at 0.9, 0.6 and 0.8.
    distance, same = doubles([[0.0, 0.2, 0.7, 0.5, 0.9, 0.6, 0.8]]), torch.tensor([[0, 1, 1, 1, 0, 0, 0]]).bool()
    different = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]).bool()
    torch.testing.assert_close(TripletLoss(margin=0.3).sums(distance, same, different), doubles([0.3 + 0.7 - 0.6, 1.0]))


def test_soft_triplet_loss_has_no_margin():
    sums = TripletLoss(margin=5.0, soft=True).sums(DISTANCE, SAME, DIFFERENT)
    expected = sum(math.log(1 + math.exp(gap)) for gap in (0.1, -0.4, 0.9))
    torch.testing.assert_close(sums, doubles([expected, 3.0]))


def test_slopes_of_triplet_loss_are_at_the_hardest_pairs_alone():
    distance = DISTANCE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(TripletLoss(margin=0.3).sums(distance, SAME, DIFFERENT)[0], distance)
    assert slope.tolist() == [[0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 1.0]]


def test_triplet_loss_leaves_out_rows_that_lack_a_pair():
    term, same, different = TripletLoss(margin=0.3), SAME.clone(), DIFFERENT.clone()
    same[0] = False  # the first row is alone in its class
    different[1] = False  # the second has none to be told from
    distance = DISTANCE.clone().requires_grad_()
    sums = term.sums(distance, same, different)
    torch.testing.assert_close(sums.detach(), doubles([1.2, 1.0]))
    (slope,) = torch.autograd.grad(term.value(sums), distance)
    assert slope.tolist() == [[0.0] * 4, [0.0] * 4, [-1.0, 0.0, 0.0, 1.0]]
    assert float(term.value(term.sums(DISTANCE, same & False, different))) == 0.0


def test_pairs_of_an_empty_batch_cost_nothing():
    nothing = torch.zeros(0, 0)
    for term in (ContrastiveLoss(), TripletLoss(), TripletLoss(soft=True)):
        assert float(term.value(term.sums(nothing, nothing.bool(), nothing.bool()))) == 0.0
