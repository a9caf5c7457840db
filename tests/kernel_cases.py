"""Triton versions of `partialfc.kernels` against their twins and against float64.

Run by tests/gpu/test_kernels.py on a GPU, and by tests/unit/test_kernels_triton.py in a process of their own, where
Triton's interpreter takes CPU tensors. The rule for what is not the same bits: an error against float64 that is at most
twice that of plain torch in the same dtypes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from partialfc.kernels._triton_blockwise import dequantize_triton_, quantize_triton_
from partialfc.kernels._triton_exponentials import exponentials_triton_
from partialfc.kernels._triton_rounding import stochastic_round_triton_
from partialfc.kernels._triton_second_pass import second_pass_sgd_triton_
from partialfc.kernels._triton_unit_rows import load_unit_rows_triton_
from partialfc.kernels.blockwise import dequantize_twin_, num_scales, quantize_twin_
from partialfc.kernels.exponentials import exponentials_twin_
from partialfc.kernels.rounding import stochastic_round_twin_
from partialfc.kernels.second_pass import RowGradients, SGDStep, StoredRows, second_pass_sgd_twin_
from partialfc.kernels.unit_rows import load_unit_rows_twin_
from partialfc.keyed import hash64, normal, randint, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 3e-8, 5.9e-8, -6.1e-5, 2.0**-14, 2.0**-24, 0.1, 1.0, 65503.9, 65504, 65519, 65520]
SPECIAL += [1e6, -1e30, 3.4028e38, -3.4028e38, torch.inf, -torch.inf, torch.nan]


def draw(law, *shape, key=1):
    return law(key, torch.arange(torch.Size(shape).numel()).view(shape)).float().to(DEVICE)


def integers(high, *shape, key=1):
    return randint(high, key, torch.arange(torch.Size(shape).numel()).view(shape)).to(DEVICE)


def keys_of(count, stream=0):
    return hash64(7, stream, torch.arange(count)).to(DEVICE)


def assert_as_exact(found, twin, exact, slack=1):
    """The rule, with 2e-7 of the largest value for where the twin happens to be exact."""
    size = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * slack * (twin.double() - exact).abs().max() + 2e-7 * size if exact.numel() else 0.0
    assert found.shape == exact.shape
    assert exact.numel() == 0 or (found.double() - exact).abs().max() <= allowed


def assert_rounded(found, exact):
    """To the nearest bfloat16; the interpreter cuts off instead."""
    gap = 2.0**-8 if DEVICE == "cuda" else 2.0**-7
    assert ((found.double() - exact).abs() <= 1.001 * gap * exact.abs() + 1e-38).all()


def bits(tensor):
    """Bits, with one nan for all: they may have any."""
    tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("c", "D"), [(1, 1), (3, 37), (37, 130), (4, 1500), (0, 5)])
def test_rounding_has_the_bits_of_the_twin(c, D, dtype):
    values = draw(normal, c, D) * 10.0 ** (4 * draw(normal, c, D, key=2))
    if D > len(SPECIAL):
        values[:, : len(SPECIAL)] = torch.tensor(SPECIAL, device=DEVICE)
    twin, found = (torch.full((c, D), 9.0, dtype=dtype, device=DEVICE) for _ in range(2))
    stochastic_round_twin_(twin, values, keys_of(c))
    stochastic_round_triton_(found, values, keys_of(c))
    assert torch.equal(bits(found), bits(twin))


@pytest.mark.parametrize(("c", "D"), [(1, 1), (3, 37), (37, 130), (5, 64), (4, 2000), (0, 5)])
def test_blockwise_has_the_codes_of_the_twin(c, D):
    values = draw(normal, c, D) * 10.0 ** (4 * draw(normal, c, 1, key=2))
    if c > 3:
        values[0], values[1, 0], values[2, -1], values[3] = 0.0, torch.nan, -torch.inf, 1e-33
    codes, scales, numbers = [], [], []
    for quantize_, dequantize_ in ((quantize_twin_, dequantize_twin_), (quantize_triton_, dequantize_triton_)):
        code = torch.full((c, D), 9, dtype=torch.int8, device=DEVICE)
        scale, number = torch.full((c, num_scales(D)), 9.0, device=DEVICE), torch.full((c, D), 9.0, device=DEVICE)
        quantize_(code, scale, values, keys_of(c))
        dequantize_(number, code, scale)
        codes.append(code)
        scales.append(scale)
        numbers.append(number)
    assert torch.equal(*codes)
    assert torch.equal(bits(scales[0]), bits(scales[1]))
    assert torch.equal(bits(numbers[0]), bits(numbers[1]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "c"), [(1, 1), (3, 37), (37, 130), (65, 3), (2, 1030), (3, 0), (0, 3)])
def test_exponentials_are_as_exact_as_the_twin(V, c, out_dtype, weighted):
    logits, columns = 5 * draw(normal, V, c), integers(c + 1, V, 3, key=3) - 1
    if V > 2 and c > 2:
        columns[0], columns[1, 1] = -1, columns[1, 0]
        logits[2, 1] = -torch.inf
    options = {"shift_V": draw(normal, V, key=2) + 3, "columns_VP": columns}
    if V:
        options["shift_V"][-1] = torch.inf
    if weighted:
        options |= {"log_weight_c": draw(normal, c, key=4), "factor_V": draw(uniform, V, key=5)}
    exact = logits.double()
    doubles = {name: value if name == "columns_VP" else value.double() for name, value in options.items()}
    sums = [exponentials_twin_(exact, **doubles)]
    terms = [exact]
    for function in (exponentials_twin_, exponentials_triton_):
        own, out = logits.clone(), None if out_dtype is None else torch.full_like(logits, 9.0, dtype=out_dtype)
        sums.append(function(own, out_Vc=out, **options))
        terms.append(own if out is None else out)
    assert_as_exact(sums[2], sums[1], sums[0])
    if out_dtype == torch.bfloat16:
        assert_rounded(terms[2], exact)
    else:
        assert_as_exact(terms[2], terms[1], exact)
    if c:
        assert not torch.where(columns >= 0, terms[2].float().gather(1, columns.clamp(min=0)), 0.0).any()
    assert V == 0 or not terms[2][-1].any()


@pytest.mark.parametrize("unit_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("c", "D"), [(1, 1), (3, 37), (37, 65), (65, 130), (2, 1024), (0, 3)])
def test_unit_rows_are_as_exact_as_the_twin(c, D, dtype, unit_dtype):
    table = (0.05 * draw(normal, c + 3, D)).to(dtype)
    table[0] = torch.nan  # which no row may show, as only -1 could lead there
    table[1] = 0.0
    rows = torch.randperm(c + 2, generator=torch.Generator().manual_seed(1))[:c].to(DEVICE) + 1
    if c > 1:
        rows[c // 2] = -1
    found, twin = ((torch.full((c, D), 9.0, dtype=unit_dtype, device=DEVICE), rows.new_zeros(c).float()) for _ in "ab")
    load_unit_rows_triton_(*found, table, rows)
    load_unit_rows_twin_(*twin, table, rows)
    row = torch.where(rows[:, None] >= 0, table[rows.clamp(min=0)].double(), 0.0)
    inverse = torch.where(rows >= 0, 1 / row.norm(dim=1).clamp(min=1e-12), 0.0)
    assert_as_exact(found[1], twin[1], inverse)
    exact = row * inverse[:, None]
    if unit_dtype == torch.bfloat16:
        assert_rounded(found[0], exact)
    else:
        assert_as_exact(found[0], twin[0], exact)


def case_of_second_pass(c, V, D, *, table=torch.float32, momentum=torch.float32, operand=torch.float32, scale=16.0):
    """Arguments in which the gradients by the logits are as those of a softmax."""
    rows = torch.randperm(c + 3, generator=torch.Generator().manual_seed(1))[:c].to(DEVICE)
    if c > 1:
        rows[c // 2] = -1
    centers = 0.05 * draw(normal, c + 3, D)
    stored = StoredRows(
        table_ND=centers.to(table),
        rows_c=rows,
        momentum_ND=None if momentum is None else (0.01 * draw(normal, c + 3, D, key=2)).to(momentum),
        keys_c=keys_of(c),
        momentum_keys_c=keys_of(c, 1),
    )
    embeddings = scale * F.normalize(draw(normal, V, D, key=3), dim=1)
    shift = torch.logsumexp(embeddings @ F.normalize(centers, dim=1).T, 1)
    if V > 2:
        shift[-1] = torch.inf
    own_column = integers(c + 1, V, key=4) - 1
    gradients = RowGradients(
        embeddings.to(operand), shift, draw(uniform, V, key=5) / V, own_column, -draw(uniform, V, key=6) / V
    )
    return stored, gradients


def after(function, stored, gradients, step):
    """(table, momentum) after the step, of copies."""
    copied = StoredRows(**{name: None if value is None else value.clone() for name, value in vars(stored).items()})
    function(copied, gradients, step)
    return [value for value in (copied.table_ND, copied.momentum_ND) if value is not None]


def exact_step(stored, gradients, step):
    """The definition, in float64, by autograd."""
    present = stored.rows_c >= 0
    rows = stored.rows_c.clamp(min=0)
    center = stored.table_ND.double()[rows].requires_grad_()
    logits = gradients.operand_VD.double() @ F.normalize(center, dim=1).T
    slopes = (logits.detach() - gradients.shift_V.double()[:, None]).exp() * gradients.factor_V.double()[:, None]
    for case, column in enumerate(gradients.own_column_V.tolist()):
        if column >= 0:
            slopes[case, column] = gradients.own_V[case].double()
    logits.backward(slopes)
    direction = center.grad + step.weight_decay * center.detach()
    result = []
    if stored.momentum_ND is not None:
        momentum = stored.momentum_ND.double()
        direction = direction + step.momentum * momentum[rows]
        result = [momentum.index_put((rows[present],), direction[present])]
    moved = center.detach() - step.learning_rate * direction
    return [stored.table_ND.double().index_put((rows[present],), moved[present]), *result]


def sgd(*, steps=True, momentum=0.9):
    return SGDStep(torch.tensor(steps, device=DEVICE), learning_rate=0.3, momentum=momentum, weight_decay=0.01)


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("c", "V", "D"), [(1, 1, 1), (3, 37, 6), (37, 3, 65), (65, 130, 37), (1, 65, 130), (37, 1, 512), (3, 3, 1024)]
)
def test_second_pass_is_as_exact_as_the_twin(c, V, D, operand):
    stored, gradients = case_of_second_pass(c, V, D, operand=operand)
    exact = exact_step(stored, gradients, sgd())
    twin, found = (
        after(function, stored, gradients, sgd()) for function in (second_pass_sgd_twin_, second_pass_sgd_triton_)
    )
    # The interpreter cuts off where it converts to bfloat16, and such errors add up.
    slack = 16 if operand == torch.bfloat16 and DEVICE == "cpu" else 1
    for own, other, true in zip(found, twin, exact, strict=True):
        assert_as_exact(own, other, true, slack)
        idle = torch.ones(len(true), dtype=torch.bool, device=DEVICE)
        idle[stored.rows_c[stored.rows_c >= 0]] = False
        assert torch.equal(own[idle], other[idle])


def test_second_pass_without_momentum():
    stored, gradients = case_of_second_pass(37, 65, 48, momentum=None)
    step = sgd(momentum=0.0)
    (found,), (twin,) = (after(f, stored, gradients, step) for f in (second_pass_sgd_triton_, second_pass_sgd_twin_))
    assert_as_exact(found, twin, exact_step(stored, gradients, step)[0])
    assert not torch.equal(found, stored.table_ND)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_pass_rounds_as_the_twin(dtype):
    """Sums in another order move few numbers over the point where they are rounded the other way."""
    stored, gradients = case_of_second_pass(37, 65, 130, table=dtype, momentum=dtype)
    found, twin = (after(f, stored, gradients, sgd()) for f in (second_pass_sgd_triton_, second_pass_sgd_twin_))
    for own, other, true in zip(found, twin, exact_step(stored, gradients, sgd()), strict=True):
        assert (own == other).float().mean() > 0.99
        gap = 2.0 ** (-10 if dtype == torch.float16 else -7) * true.abs() + 2.0**-24
        assert ((own.double() - true).abs() <= 1.01 * gap).all()


def test_second_pass_without_a_step_writes_nothing():
    stored, gradients = case_of_second_pass(37, 65, 48, table=torch.float16)
    for function in (second_pass_sgd_twin_, second_pass_sgd_triton_):
        table, momentum = after(function, stored, gradients, sgd(steps=False))
        assert torch.equal(table, stored.table_ND)
        assert torch.equal(momentum, stored.momentum_ND)
