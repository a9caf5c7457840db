"""The keyed random streams: known answers, integers equal to tensors, bijections, and uniformity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from partialfc.keyed import KeyedPermutation, hash64, normal, randint, uniform

# Runs, checkpoints and data sets depend on these streams. If a value below changes, every result of every user does.
KNOWN_HASHES = {
    (): 0,
    (0,): -4616330145664149646,
    (1,): -8781374349175268871,
    (0, 0): 8181361038691905571,
    (1, 2, 3): -3769210422419869805,
    (-1,): 9144768067225538723,
}
KNOWN_PERMUTATIONS = {
    1: [0],
    5: [0, 4, 2, 1, 3],
    16: [1, 11, 0, 4, 6, 12, 5, 8],
    256: [127, 52, 8, 226, 65, 246, 186, 138],
    1000: [142, 613, 73, 773, 575, 433, 497, 576],
}
WORD_MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """The output function of SplitMix64, in unsigned arithmetic."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD_MASK
    return value ^ (value >> 31)


def chi_square_deviation(counts: Tensor) -> float:
    """How many standard deviations the chi-square of equally likely bins lies from its mean."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("words", KNOWN_HASHES, ids=str)
def test_hash_has_its_known_answer(words):
    assert hash64(*words) == KNOWN_HASHES[words]


def test_hash_is_splitmix64_chained_over_the_words():
    # The first output of SplitMix64 seeded with 0, from the published generator, as a check of this test.
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    for words in itertools.product((0, 1, 12345, 2**63, WORD_MASK), repeat=2):
        state = 2
        for word in words:
            state = ((splitmix64(state) ^ word) + 0x9E3779B97F4A7C15) & WORD_MASK
        assert hash64(*words) & WORD_MASK == splitmix64(state)


def test_integers_and_tensors_give_the_same_bits():
    words = [0, 1, -1, 255, 2**31, -(2**63), 2**63 - 1]
    words_tensor = torch.tensor(words)
    assert hash64(words_tensor).tolist() == [hash64(word) for word in words]
    assert hash64(7, words_tensor, -3).tolist() == [hash64(7, word, -3) for word in words]
    grid = hash64(words_tensor[:, None], words_tensor[None, :])
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[hash64(left, right) for right in words] for left in words]


def test_only_the_low_64_bits_of_an_integer_count():
    assert hash64(2**64 - 1) == hash64(-1)
    assert hash64(2**64 + 5, 9) == hash64(5, 9)


def test_words_and_their_order_and_number_matter():
    values = [hash64(*words) for count in range(4) for words in itertools.product(range(6), repeat=count)]
    assert len(set(values)) == len(values)


def test_numbers_have_their_known_answers():
    assert uniform(1, 2, 3).item() == 0.7956706935728685
    assert normal(1, 2, 3).item() == pytest.approx(0.09023617947399651, rel=1e-12)
    assert randint(1000, 1, 2, 3).item() == 905
    index = torch.arange(4)
    assert uniform(7, index).tolist() == [
        0.8992797341370423,
        0.6808342921666942,
        0.01784197313582392,
        0.817838823141551,
    ]
    assert normal(7, index).tolist() == pytest.approx(
        [-1.0713577594297, 1.4724990950058012, -1.686526425911117, 0.6878100212063016], rel=1e-12
    )
    assert randint(10, 7, index).tolist() == [4, 9, 3, 4]


def test_uniform_is_uniform():
    numbers = uniform(3, torch.arange(40_000))
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert abs(chi_square_deviation(numbers.mul(100).long().bincount(minlength=100).double())) < 4
    # Neighbouring keys are independent.
    pairs = numbers[:-1].mul(10).long() * 10 + numbers[1:].mul(10).long()
    assert abs(chi_square_deviation(pairs.bincount(minlength=100).double())) < 4


def test_every_bit_of_the_hash_is_fair():
    values = hash64(11, torch.arange(20_000))
    for bit in range(64):
        ones = int((values >> bit & 1).sum())
        assert abs(ones - 10_000) < 5 * math.sqrt(5_000), f"bit {bit}: {ones} ones of 20000"


def test_normal_has_the_moments_of_a_normal():
    numbers = normal(5, torch.arange(100_000))
    assert bool(numbers.isfinite().all())
    # Standard errors of the first four moments at this size: 0.003, 0.004, 0.012, 0.031.
    for power, (moment, error) in {1: (0, 0.003), 2: (1, 0.0045), 3: (0, 0.0123), 4: (3, 0.031)}.items():
        assert float((numbers**power).mean()) == pytest.approx(moment, abs=4 * error)


def test_randint_is_uniform_in_its_range():
    counts = randint(7, 1, torch.arange(14_000)).bincount()
    assert counts.numel() == 7
    assert abs(chi_square_deviation(counts.double())) < 4


@pytest.mark.parametrize("size", KNOWN_PERMUTATIONS)
def test_permutation_has_its_known_answer(size):
    known = KNOWN_PERMUTATIONS[size]
    assert KeyedPermutation(size)(torch.arange(len(known)), 42).tolist() == known


@pytest.mark.parametrize("size", [*range(1, 71), 256, 1000, 7919])
def test_permutation_is_a_bijection_and_inverse_undoes_it(size):
    permutation, positions = KeyedPermutation(size), torch.arange(size)
    keys = torch.tensor([[0], [-1], [hash64(4, size)]])
    elements = permutation(positions, keys)
    assert elements.shape == (3, size)
    assert torch.equal(elements.sort(1).values, positions.expand(3, size))
    assert torch.equal(permutation.inverse(elements, keys), positions.expand(3, size))
    assert torch.equal(permutation(permutation.inverse(positions, -1), -1), positions)


def test_permutation_takes_one_element_at_a_time_and_keys_as_integers_or_tensors():
    permutation = KeyedPermutation(100)
    whole = permutation(torch.arange(100), 9)
    assert [int(permutation(torch.tensor(position), 9)) for position in range(100)] == whole.tolist()
    assert torch.equal(permutation(torch.arange(100), torch.tensor(9)), whole)


@pytest.mark.parametrize("positions", [1, 8, 16, 40, 256])
@pytest.mark.parametrize("size", [1, 2, 37, 256, 512, 1000, 1009, 5888])
def test_permutation_of_many_positions_for_each_key_is_that_of_each(size, positions):
    permutation = KeyedPermutation(size)
    position = torch.arange(3, 3 + positions) % size
    keys = hash64(6, torch.arange(5))
    kept = keys.clone()
    assert torch.equal(permutation.for_each_key(position, keys), permutation(position, keys[:, None]))
    assert torch.equal(keys, kept)
    assert permutation.for_each_key(position, keys[:0]).shape == (0, positions)


@pytest.mark.parametrize("size", [*range(1, 71), 145, 146, 173, 256, 1009, 7919])
def test_static_permutation_has_the_same_elements(size):
    positions, keys = torch.arange(size), hash64(7, torch.arange(20))[:, None]
    static, plain = KeyedPermutation(size, static=True), KeyedPermutation(size)
    assert torch.equal(static(positions, keys), plain(positions, keys))
    assert torch.equal(static.inverse(positions, keys), plain.inverse(positions, keys))


@pytest.mark.parametrize("size", [2, 3, 5, 16, 37, 256])
def test_permutation_brings_every_pair_to_the_front_equally_often(size):
    draws = 20_000
    keys = hash64(8, torch.arange(draws))[:, None]
    first, second = KeyedPermutation(size)(torch.arange(2), keys).T
    assert abs(chi_square_deviation(first.bincount(minlength=size).double())) < 4
    # Pairs fall into size * (size - 1) bins; large sizes are folded, so that bins are not empty.
    pairs = first * (size - 1) + second - (second > first).long()
    bins = size * (size - 1)
    if bins > 2000:
        fold = next(fold for fold in range(2000, 0, -1) if bins % fold == 0)
        pairs, bins = pairs % fold, fold
    assert abs(chi_square_deviation(pairs.bincount(minlength=bins).double())) < 4 or bins == 1


def test_permutation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^KeyedPermutation: size is 0, but must be at least 1$"):
        KeyedPermutation(0)
