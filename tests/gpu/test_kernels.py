"""The Triton versions on a GPU: the cases of `kernel_cases`, dispatch, and no waiting for the device."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_cases import *  # noqa: F403
from kernel_cases import DEVICE, case_of_second_pass, draw, integers, keys_of, sgd

from partialfc.kernels.blockwise import dequantize_, num_scales, quantize_
from partialfc.kernels.exponentials import exponentials_
from partialfc.kernels.rounding import stochastic_round_
from partialfc.kernels.second_pass import second_pass_sgd_
from partialfc.kernels.unit_rows import load_unit_rows_
from partialfc.keyed import normal


def run_all():
    """Each operation once, through its public function."""
    c, V, D = 37, 65, 130
    values, keys = draw(normal, c, D), keys_of(c)
    stochastic_round_(rounded := torch.empty_like(values, dtype=torch.float16), values, keys)
    codes, scales = torch.empty_like(values, dtype=torch.int8), values.new_empty(c, num_scales(D))
    quantize_(codes, scales, values, keys)
    dequantize_(decoded := torch.empty_like(values), codes, scales)
    logits, columns = draw(normal, V, c), integers(c + 1, V, 2) - 1
    sums = exponentials_(logits, shift_V=draw(normal, V), columns_VP=columns)
    unit, inverse = torch.empty_like(values), values.new_empty(c)
    load_unit_rows_(unit, inverse, values, torch.arange(c, device=DEVICE))
    stored, gradients = case_of_second_pass(c, V, D, table=torch.float16, momentum=torch.bfloat16)
    step = sgd()

    def again():
        stochastic_round_(rounded, values, keys)
        quantize_(codes, scales, values, keys)
        dequantize_(decoded, codes, scales)
        exponentials_(logits, shift_V=sums, columns_VP=columns)
        load_unit_rows_(unit, inverse, values, columns[:c, 0].contiguous())
        second_pass_sgd_(stored, gradients, step)

    return again, [rounded, decoded, unit]


def test_nothing_waits_for_the_device():
    again, results = run_all()
    again()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.isfinite().all() for result in results)
