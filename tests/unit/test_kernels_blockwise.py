"""`kernels.blockwise`: 8 bits and a scale for each block of 64."""

import math

import pytest
import torch

from partialfc.kernels.blockwise import BLOCK, dequantize_, num_scales, quantize_
from partialfc.keyed import hash64


def keys_of(count, stream=0):
    return hash64(4, stream, torch.arange(count))


def quantized(values, keys):
    codes = torch.full(values.shape, 99, dtype=torch.int8)
    scales = torch.full((len(values), num_scales(values.shape[1])), 99.0)
    quantize_(codes, scales, values, keys)
    return codes, scales


def read(codes, scales):
    out = torch.full(codes.shape, 99.0)
    dequantize_(out, codes, scales)
    return out


def test_num_scales():
    assert [num_scales(length) for length in (1, 63, 64, 65, 128, 512)] == [1, 1, 1, 2, 2, 8]


@pytest.mark.parametrize("columns", [1, 6, 64, 65, 130, 512])
def test_error_is_below_a_scale_and_scales_are_those_of_the_blocks(columns):
    values = torch.randn(30, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 30)[:, None]
    codes, scales = quantized(values, keys_of(30))
    for block in range(num_scales(columns)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        largest = values[:, part].abs().amax(1)
        assert torch.equal(scales[:, block], largest / 127)
        error = (read(codes, scales) - values)[:, part].abs() / scales[:, block, None]
        assert (error < 1 + 1e-4).all()
        assert (codes[:, part].abs().amax(1) == 127).all()


def test_mean_over_keys_is_the_value():
    count = 40_000
    row = torch.tensor([1.0, -0.9999, 0.5, 0.3, -0.01, 1e-3, -1e-4, 2e-6, 0.0, 63.5 / 127, 1 / 127])
    codes, scales = quantized(row.repeat(count, 1), keys_of(count))
    share = (row * 127).frac().abs().double()
    sigma = (share * (1 - share)).clamp(min=1e-6).sqrt() / 127 / math.sqrt(count)
    assert ((read(codes, scales).double().mean(0) - row).abs() <= 5 * sigma).all()


def test_zeros_stay_and_blocks_of_nothing_are_zero():
    values = torch.randn(20, 130, generator=torch.Generator().manual_seed(0))
    values[:, ::3] = 0.0
    values[:, 64:128] = 0.0
    values[:, 128:] = 1e-35
    result = read(*quantized(values, keys_of(20)))
    assert not result[:, ::3].any()
    assert not result[:, 64:].any()
    assert result[:, 1].count_nonzero() > 15


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 63, 64, 69])
def test_what_is_not_finite_makes_its_block_nan(column, bad):
    values = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    values[1, column] = bad
    codes, scales = quantized(values, keys_of(3))
    result, block = read(codes, scales), slice(0, 64) if column < 64 else slice(64, 70)
    assert result[1, block].isnan().all()
    assert not codes[1, block].any()
    assert int(result.isnan().sum()) == block.stop - block.start


def test_largest_numbers_do_not_overflow():
    values = torch.tensor([[3.4e38, -3.4e38, 1e30, 0.0]])
    result = read(*quantized(values, keys_of(1)))
    assert torch.allclose(result[:, :2], values[:, :2])


def test_row_depends_on_its_values_and_key_alone(monkeypatch):
    values, keys = torch.randn(40, 130, generator=torch.Generator().manual_seed(1)), keys_of(40)
    codes, scales = quantized(values, keys)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    moved_codes, moved_scales = quantized(values[order], keys[order])
    assert torch.equal(codes[order], moved_codes)
    assert torch.equal(scales[order], moved_scales)
    monkeypatch.setattr("partialfc.kernels.blockwise.CHUNK_ELEMENTS", 300)
    assert torch.equal(codes, quantized(values, keys)[0])
    assert not torch.equal(codes, quantized(values, keys_of(40, 1))[0])


def test_arguments_that_do_not_fit_are_refused():
    codes, scales, values = torch.zeros(4, 70, dtype=torch.int8), torch.zeros(4, 2), torch.zeros(4, 70)
    with pytest.raises(AssertionError):
        quantize_(codes, scales[:, :1].contiguous(), values, keys_of(4))
    with pytest.raises(AssertionError):
        quantize_(codes, scales, torch.zeros(70, 4).T, keys_of(4))
    with pytest.raises(AssertionError):
        dequantize_(values, codes.int(), scales)
