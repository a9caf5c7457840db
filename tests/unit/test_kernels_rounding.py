"""`kernels.rounding`: right in the mean, neighbours only, a function of value, key and column."""

import math

import pytest
import torch

from partialfc.kernels.rounding import LARGEST, random_bits, stochastic_round_
from partialfc.keyed import hash64

DTYPES = [torch.float16, torch.bfloat16]
FLOAT16_NUMBERS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def keys_of(count, stream=0):
    return hash64(3, stream, torch.arange(count))


def rounded(values, keys, dtype):
    out = torch.empty(values.shape, dtype=dtype)
    stochastic_round_(out, values, keys)
    return out


def neighbours(values, dtype):
    """The 16-bit numbers at or below, and at or above, float32 values; by search, not by bits."""
    if dtype == torch.float16:
        grid = FLOAT16_NUMBERS[FLOAT16_NUMBERS.isfinite()].float().unique()
    else:
        halves = torch.arange(2**16, dtype=torch.int32) << 16
        grid = halves.view(torch.float32)
        grid = grid[grid.isfinite()].unique()
    at = torch.searchsorted(grid, values.contiguous())
    upper = grid[at.clamp(max=len(grid) - 1)]
    lower = torch.where(upper == values, upper, grid[(at - 1).clamp(min=0)])
    return lower, upper


VALUES = [
    0.1,
    -0.1,
    0.044,
    1.0 + 2**-20,
    2.0 - 2**-20,
    -4.0 + 2**-15,
    1000.3,
    3e-5,
    -2e-7,
    4.1e-8,
    2e-8,
    -1e-9,
    65503.9,
]
VALUES += [
    2.0**-14 + 2**-30,
    2.0**-14 - 2**-30,
    2.0**-24 * 1.75,
    -(2.0**-15) * 1.001,
    6e-39,
    -(2.0**-40),
    2.0**-133 * 0.3,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", VALUES)
def test_mean_over_keys_is_the_value(value, dtype):
    count = 40_000
    column = torch.full((count, 3), value)
    result = rounded(column, keys_of(count), dtype).double()
    lower, upper = neighbours(column[:1, :1], dtype)
    low, high, exact = lower.double().item(), upper.double().item(), column[0, 0].double().item()
    assert ((result == low) | (result == high)).all()
    share = (exact - low) / (high - low) if high > low else 0.0
    sigma = (high - low) * math.sqrt(max(share * (1 - share), 1e-9) / count)
    assert ((result.mean(0) - exact).abs() <= 5 * sigma).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_a_neighbour(dtype):
    values = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-6, 1).repeat(10)
    lower, upper = neighbours(values, dtype)
    result = rounded(values, keys_of(300), dtype).float()
    assert ((result == lower) | (result == upper)).all()
    assert (result == lower).float().mean() == pytest.approx(0.5, abs=0.02)


def test_what_float16_holds_exactly_stays():
    finite = FLOAT16_NUMBERS[FLOAT16_NUMBERS.isfinite()].view(1, -1)
    for key in range(5):
        assert torch.equal(rounded(finite.float(), keys_of(1, key), torch.float16), finite)


def test_what_bfloat16_holds_exactly_stays():
    numbers = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    numbers = numbers[numbers.isfinite()].view(1, -1)
    assert torch.equal(rounded(numbers, keys_of(1), torch.bfloat16).float(), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_saturate_and_others_stay(dtype):
    largest = LARGEST[dtype]
    values = torch.tensor([[3.4028e38, -3.4028e38, torch.inf, -torch.inf, torch.nan, 0.5]]).repeat(50, 1)
    result = rounded(values, keys_of(50), dtype).float()
    expected = torch.tensor([[largest, -largest, torch.inf, -torch.inf, torch.nan, 0.5]]).expand(50, -1)
    assert torch.equal(result.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))
    assert largest == torch.finfo(dtype).max


def test_float16_saturates_where_rounding_to_the_nearest_would_be_infinite():
    assert (rounded(torch.tensor([[65504.1, 65520.0, 1e6]]), keys_of(1), torch.float16) == 65504).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 6, 513])
def test_row_depends_on_its_value_and_key_alone(columns, dtype, monkeypatch):
    values, keys = torch.randn(40, columns, generator=torch.Generator().manual_seed(1)), keys_of(40)
    whole = rounded(values, keys, dtype)
    assert torch.equal(whole, rounded(values, keys, dtype))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(whole[order], rounded(values[order], keys[order], dtype))
    assert torch.equal(whole[7:8], rounded(values[7:8], keys[7:8], dtype))
    monkeypatch.setattr("partialfc.kernels.rounding.CHUNK_ELEMENTS", 100)
    assert torch.equal(whole, rounded(values, keys, dtype))
    assert not torch.equal(whole, rounded(values, keys_of(40, 1), dtype))
    # An element does not depend on how many there are after it, nor on the other rows.
    assert torch.equal(whole[:, :1], rounded(values[:, :1].contiguous(), keys, dtype))


def test_a_nan_in_a_row_leaves_the_others_alone():
    values, keys = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)), keys_of(4)
    damaged = values.clone()
    damaged[2, 3] = torch.nan
    before, after = rounded(values, keys, torch.float16), rounded(damaged, keys, torch.float16)
    assert after[2, 3].isnan()
    after[2, 3] = before[2, 3]
    assert torch.equal(before, after)


def signs(bits):
    """[n] -> [n, 31], +-1 for each bit."""
    return ((bits[:, None] >> torch.arange(31, dtype=torch.int32)) & 1).double() * 2 - 1


def test_bits_are_fair_and_those_of_neighbouring_columns_independent():
    count = 1 << 16
    bits = random_bits(keys_of(count), 12)
    assert (bits >= 0).all()
    parts = {column: signs(bits[:, column]) for column in (0, 1, 2, 4, 8, 11)}
    # 31 * 31 numbers of standard deviation 1 stay below 5.
    for part in parts.values():
        assert (part.mean(0).abs() * math.sqrt(count)).max() < 5
        within = (part.T @ part / count).fill_diagonal_(0)
        assert (within.abs() * math.sqrt(count)).max() < 5
    for left, right in ((0, 1), (1, 2), (0, 8), (4, 8), (8, 11), (2, 4)):
        assert ((parts[left].T @ parts[right] / count).abs() * math.sqrt(count)).max() < 5
    assert ((parts[0] * parts[1] * parts[2]).mean(0).abs() * math.sqrt(count)).max() < 5


def test_bits_of_neighbouring_keys_are_independent():
    count = 1 << 16
    bits = random_bits(keys_of(count), 4)
    for lag in (1, 2, 256):
        left, right = signs(bits[lag:, 3]), signs(bits[:-lag, 3])
        assert ((left.T @ right / len(left)).abs() * math.sqrt(len(left))).max() < 5


def test_bits_along_a_row_are_uniform():
    """Chi-square of 16 bins in 200 rows of 4096: mean 15, standard deviation sqrt(30 / 200)."""
    bins = random_bits(keys_of(200), 4096) >> 27
    counts = torch.stack([(bins == number).sum(1) for number in range(16)]).double()
    statistic = ((counts - 256) ** 2 / 256).sum(0)
    assert abs(statistic.mean() - 15) < 5 * math.sqrt(30 / 200)


def test_arguments_that_do_not_fit_are_refused():
    values, keys, out = torch.zeros(4, 6), keys_of(4), torch.zeros(4, 6, dtype=torch.float16)
    with pytest.raises(AssertionError):
        stochastic_round_(out, torch.zeros(6, 4).T, keys)
    with pytest.raises(AssertionError):
        stochastic_round_(out, values, keys[:3])
    with pytest.raises(AssertionError):
        stochastic_round_(torch.zeros(4, 6), values, keys)
