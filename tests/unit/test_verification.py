from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from sklearn.model_selection import KFold

from partialfc.evaluation import roc
from partialfc.evaluation.roc import ScoreCounts, count_scores
from partialfc.evaluation.verification import (
    Pairs,
    _best_threshold,
    make_pairs,
    roc_curve,
    tar_at_far,
    ten_fold_accuracy,
    verify,
)


def identities(count: int, images: int, dim: int = 8, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count * 1000 + images)
    centers = torch.randn(count, dim, generator=generator)
    labels = torch.arange(count).repeat_interleave(images)
    embeddings = centers[labels] + noise * torch.randn(count * images, dim, generator=generator)
    shuffle = torch.randperm(count * images, generator=generator)
    return embeddings[shuffle] * 3.0, labels[shuffle]


def unordered(pairs: Pairs) -> set[tuple[int, int]]:
    return {(min(a, b), max(a, b)) for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}


def of_kind(pairs: Pairs, same: bool) -> Pairs:
    chosen = pairs.same == same
    return Pairs(pairs.first[chosen], pairs.second[chosen], pairs.same[chosen])


# Pairs


@pytest.mark.parametrize(("count", "images", "num_pairs"), [(30, 5, 400), (7, 9, 200), (101, 2, 200)])
def test_pairs_are_a_balanced_protocol_without_repetition(count: int, images: int, num_pairs: int) -> None:
    _, labels = identities(count, images)
    pairs = make_pairs(labels, num_pairs=num_pairs, seed=3)
    assert len(pairs) == num_pairs
    assert torch.equal(pairs.same, labels[pairs.first] == labels[pairs.second])
    assert bool((pairs.first != pairs.second).all())
    assert len(unordered(pairs)) == num_pairs
    halves = pairs.same.view(10, 2, num_pairs // 20)
    assert bool(halves[:, 0].all())
    assert not bool(halves[:, 1].any())


def test_every_available_pair_can_be_drawn() -> None:
    labels = torch.tensor([5, 9, 5, -1, 9, 5, 2])
    pairs = make_pairs(labels, num_pairs=8, folds=2, seed=0)
    assert unordered(of_kind(pairs, True)) == {(0, 2), (0, 5), (2, 5), (1, 4)}
    drawn = set()
    for seed in range(40):
        drawn |= unordered(of_kind(make_pairs(labels, num_pairs=8, folds=2, seed=seed), False))
    valid = [row for row in range(7) if labels[row] != -1]
    assert drawn == {(a, b) for a, b in itertools.combinations(valid, 2) if labels[a] != labels[b]}


def test_pairs_follow_from_the_seed_alone() -> None:
    _, labels = identities(20, 4)
    draws = [make_pairs(labels, num_pairs=100, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0].first, draws[1].first)
    assert torch.equal(draws[0].second, draws[1].second)
    assert not torch.equal(draws[0].first, draws[2].first)


def test_same_pairs_are_drawn_evenly() -> None:
    labels = torch.arange(10).repeat_interleave(4)
    seen = torch.zeros(40)
    for seed in range(300):
        pairs = make_pairs(labels, num_pairs=20, folds=2, seed=seed)
        seen += torch.bincount(torch.cat([pairs.first[pairs.same], pairs.second[pairs.same]]), minlength=40)
    expected = 300 * 20 / 40
    assert float(((seen - expected) ** 2 / expected).sum()) < 70  # chi-square, 39 degrees: p = 0.002


@pytest.mark.parametrize(
    ("labels", "num_pairs", "message"),
    [
        (torch.arange(50), 20, r"20 pairs need 10 pairs of one identity, but 50 images of 50 identities make only 0"),
        (torch.zeros(50).long(), 20, r"need 10 pairs of two identities, but 50 images of 1 identities make only 0"),
        (torch.full((50,), -1), 20, r"0 images of 0 identities make only 0"),
        (torch.arange(50) % 5, 30, r"num_pairs is 30, but 10 folds .* multiple of 20; the nearest is 40"),
        (torch.arange(50) % 5, 0, r"num_pairs is 0, .* nearest is 20"),
    ],
)
def test_pairs_refuse_what_cannot_be_drawn(labels: torch.Tensor, num_pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pairs(labels, num_pairs=num_pairs, seed=0)


# Ten folds


def brute_force_ten_fold(embeddings: torch.Tensor, pairs: Pairs) -> tuple[float, float]:
    unit = embeddings.double().numpy() / np.linalg.norm(embeddings.double().numpy(), axis=1, keepdims=True)
    scores = (unit[pairs.first.numpy()] * unit[pairs.second.numpy()]).sum(1)
    same = pairs.same.numpy()
    accuracies = []
    for training, held_out in KFold(n_splits=10, shuffle=False).split(scores):
        distinct = np.unique(scores[training])
        candidates = [-np.inf, *((distinct[1:] + distinct[:-1]) / 2), np.inf]
        quality = [accuracy_score(same[training], scores[training] >= threshold) for threshold in candidates]
        threshold = candidates[int(np.argmax(quality))]
        accuracies.append(accuracy_score(same[held_out], scores[held_out] >= threshold))
    return float(np.mean(accuracies)), float(np.std(accuracies))


@pytest.mark.parametrize("noise", [0.4, 1.0, 3.0])
def test_ten_fold_accuracy_equals_brute_force(noise: float) -> None:
    embeddings, labels = identities(30, 4, noise=noise)
    pairs = make_pairs(labels, num_pairs=200, seed=5)
    mean, std = ten_fold_accuracy(embeddings, pairs)
    assert (mean, std) == pytest.approx(brute_force_ten_fold(embeddings, pairs), abs=1e-12)
    assert 0.5 < mean < 1.0


def test_equal_scores_cannot_be_told_apart() -> None:
    # Signs in four dimensions: the cosines are exactly -1, -0.5, 0, 0.5 or 1, each many times and of both kinds.
    embeddings, labels = identities(30, 4, dim=4, noise=1.0)
    pairs = make_pairs(labels, num_pairs=200, seed=5)
    mean, std = ten_fold_accuracy(embeddings.sign(), pairs)
    assert (mean, std) == pytest.approx(brute_force_ten_fold(embeddings.sign(), pairs), abs=1e-12)
    assert 0.5 < mean < 1.0


def test_the_best_threshold_lies_half_way() -> None:
    scores = torch.tensor([0.8, 0.1, 0.3, 0.6], dtype=torch.float64)
    assert _best_threshold(scores, torch.tensor([True, False, False, True])) == pytest.approx(0.45)
    assert _best_threshold(scores, torch.tensor([True] * 4)) == float("-inf")
    assert _best_threshold(scores, torch.tensor([False] * 4)) == float("inf")
    tiny = torch.tensor([0.5, np.nextafter(0.5, 1.0)], dtype=torch.float64)
    assert _best_threshold(tiny, torch.tensor([False, True])) == float(tiny[1])


def test_the_threshold_is_chosen_on_the_other_folds() -> None:
    # In one dimension cosines are +1 or -1. Same pairs score +1 in nine folds and -1 in the last, different ones the
    # other way round, so what the other nine teach is wrong on the last; its own threshold would do better.
    embeddings = torch.tensor([[1.0], [2.0], [-3.0]])
    first = torch.zeros(20, dtype=torch.int64)
    second = torch.tensor([1, 2] * 9 + [2, 1])
    pairs = Pairs(first, second, torch.tensor([True, False] * 10))
    mean, std = ten_fold_accuracy(embeddings, pairs)
    assert mean == pytest.approx(0.9)
    assert std == pytest.approx(0.3)


def test_ten_fold_accuracy_of_equal_scores_is_one_half() -> None:
    pairs = Pairs(torch.zeros(20).long(), torch.ones(20).long(), torch.tensor([True, False] * 10))
    assert ten_fold_accuracy(torch.ones(2, 4), pairs) == (0.5, 0.0)


def test_ten_fold_accuracy_refuses_bad_input() -> None:
    pairs = Pairs(torch.zeros(20).long(), torch.ones(20).long(), torch.tensor([True, False] * 10))
    with pytest.raises(ValueError, match=r"20 pairs cannot be divided into 3 equal folds"):
        ten_fold_accuracy(torch.ones(2, 4), pairs, folds=3)
    with pytest.raises(ValueError, match=r"embeddings are not finite"):
        ten_fold_accuracy(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), pairs)


# ROC


def score_sets() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    same, different = torch.randn(83, generator=generator) + 1, torch.randn(401, generator=generator)
    return [
        (same, different),
        ((same * 4).round() / 4, (different * 4).round() / 4),  # ties within and across kinds
        (same.round(), different.round()),
        (torch.ones(3), torch.ones(5)),
        (torch.tensor([2.0]), torch.tensor([1.0])),
    ]


@pytest.mark.parametrize("number", range(5))
def test_roc_equals_scikit_learn(number: int) -> None:
    same, different = score_sets()[number]
    truth = np.concatenate([np.ones(len(same)), np.zeros(len(different))])
    scores = torch.cat([same, different]).numpy()
    expected = sklearn_roc_curve(truth, scores, drop_intermediate=False)
    for mine, reference in zip(roc_curve(same, different), expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), reference)
    assert ScoreCounts.from_scores(same, different).auc() == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("far", [0.0, 1 / 401, 0.0024, 0.01, 0.1, 0.29, 0.5, 1.0])
def test_tar_at_far_equals_scikit_learn(number: int, far: float) -> None:
    same, different = score_sets()[number]
    truth = np.concatenate([np.ones(len(same)), np.zeros(len(different))])
    fars, tars, _ = sklearn_roc_curve(truth, torch.cat([same, different]).numpy(), drop_intermediate=False)
    assert tar_at_far(same, different, far) == tars[fars <= far].max()
    nearest = np.abs(fars - far)
    rate = fars[nearest == nearest.min()].max()
    assert tar_at_far(same, different, far, rule="nearest") == tars[fars == rate].max()


def test_a_tie_at_the_limit_is_rejected_as_a_whole() -> None:
    same = torch.tensor([0.9, 0.8, 0.7, 0.5])
    different = torch.tensor([0.8, 0.6, 0.6, 0.1])
    assert tar_at_far(same, different, 0.25) == 0.75
    # Half of the impostors may pass, but the second and the third score alike, so only one can.
    assert tar_at_far(same, different, 0.5) == 0.75
    assert tar_at_far(same, different, 0.5, rule="nearest") == 1.0
    assert tar_at_far(same, different, 0.75) == 1.0
    assert tar_at_far(same, different, 0.2499) == 0.25


def test_roc_refuses_bad_input() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="same_scores is empty"):
        tar_at_far(torch.ones(0), one, 0.1)
    with pytest.raises(ValueError, match="different_scores has 1 values that are not numbers"):
        roc_curve(one, torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"far is 1.5, but a false accept rate lies in \[0, 1\]"):
        tar_at_far(one, one, 1.5)
    with pytest.raises(ValueError, match="rule is 'best', but must be"):
        tar_at_far(one, one, 0.5, rule="best")  # type: ignore[arg-type]


# All against all


def all_scores(embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    rows = [row for row in range(len(labels)) if labels[row] != -1]
    pairs = torch.tensor(list(itertools.combinations(rows, 2)))
    scores = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    return scores[same], scores[~same]


@pytest.mark.parametrize("pairs_per_chunk", [1, 1000, 2**22])
def test_all_against_all_counts_each_pair_once(pairs_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roc, "PAIRS_PER_CHUNK", pairs_per_chunk)
    embeddings, labels = identities(15, 4, noise=1.0)
    labels[::7] = -1
    counts = count_scores(embeddings, labels)
    same, different = all_scores(embeddings, labels)
    assert (counts.num_same, counts.num_different) == (len(same), len(different))
    expected = ScoreCounts.from_scores(same, different)
    assert counts.auc() == pytest.approx(expected.auc(), abs=1e-6)
    for far in (0.001, 0.01, 0.1):
        assert counts.tar_at_far(far) == expected.tar_at_far(far)


def test_the_histogram_of_a_large_set_never_exceeds_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = identities(60, 4, noise=1.0)
    exact = count_scores(embeddings, labels)
    monkeypatch.setattr(roc, "MAX_EXACT_IMAGES", 10)
    monkeypatch.setattr(roc, "PAIRS_PER_CHUNK", 5000)
    binned = count_scores(embeddings, labels)
    assert len(binned.thresholds) == roc.HISTOGRAM_BINS + 1
    assert (binned.num_same, binned.num_different) == (exact.num_same, exact.num_different)
    assert binned.auc() == pytest.approx(exact.auc(), abs=1e-5)
    for far in (0.0001, 0.001, 0.01, 0.1):
        assert 0 <= exact.tar_at_far(far) - binned.tar_at_far(far) <= 0.003

    monkeypatch.setattr(roc, "HISTOGRAM_BINS", 16)
    coarse = count_scores(embeddings, labels)
    same, different = all_scores(embeddings, labels)
    for threshold, accepted_same, accepted_different in zip(
        coarse.thresholds.tolist(), coarse.same.tolist(), coarse.different.tolist(), strict=True
    ):
        if threshold > -1.0:
            assert accepted_same == int((same >= threshold).sum())
            assert accepted_different == int((different >= threshold).sum())


def test_all_against_all_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="make 0 pairs of one identity and 3 of two"):
        count_scores(torch.randn(3, 4), torch.arange(3))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) and labels of shape \(2,\)"):
        count_scores(torch.randn(3, 4), torch.arange(2))
    embeddings = torch.ones(3, 4)
    embeddings[1, 2] = float("inf")
    with pytest.raises(ValueError, match="1 of 3 embeddings are not finite, the first in row 1"):
        count_scores(embeddings, torch.zeros(3).long())


# Both


def test_verify_reports_both_views_and_leaves_failed_rows_out() -> None:
    embeddings, labels = identities(30, 4, noise=0.7)
    padded = torch.cat([torch.full((3, 8), float("nan")), embeddings])
    padded_labels = torch.cat([torch.full((3,), -1), labels])
    result = verify(padded, padded_labels, num_pairs=200, seed=1, fars=[0.001, 0.1])
    clean = verify(embeddings, labels, num_pairs=200, seed=1, fars=[0.001, 0.1])
    assert (result.num_images, result.num_left_out) == (120, 3)
    assert (clean.num_images, clean.num_left_out) == (120, 0)
    assert result.accuracy == clean.accuracy
    assert result.tar_at_far == clean.tar_at_far
    assert result.auc == clean.auc
    assert result.num_different_pairs == 120 * 119 // 2 - 30 * 6
    pairs = make_pairs(labels, num_pairs=200, seed=1)
    assert (clean.accuracy, clean.accuracy_std) == ten_fold_accuracy(embeddings, pairs)

    values = json.loads(json.dumps(result.to_dict()))
    assert values["tar_at_far"] == {"0.001": result.tar_at_far[0.001], "0.1": result.tar_at_far[0.1]}
    assert values["accuracy"] == result.accuracy


def test_length_of_embeddings_does_not_matter() -> None:
    embeddings, labels = identities(30, 4, noise=0.7)
    lengths = torch.arange(1, 121)[:, None] * 0.1
    assert (
        verify(embeddings, labels, num_pairs=200, seed=1, fars=[0.01]).tar_at_far
        == verify(embeddings * lengths, labels, num_pairs=200, seed=1, fars=[0.01]).tar_at_far
    )
