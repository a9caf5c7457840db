"""The plain-torch twins of `exponentials`, `unit_rows` and `second_pass` against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from partialfc.kernels.exponentials import exponentials_
from partialfc.kernels.rounding import stochastic_round_
from partialfc.kernels.second_pass import RowGradients, SGDStep, StoredRows, second_pass_sgd_
from partialfc.kernels.unit_rows import load_unit_rows_
from partialfc.keyed import hash64, normal, uniform


def draw(law, *shape, key=1):
    return law(key, torch.arange(math.prod(shape)).view(shape))


def test_exponentials_by_hand():
    logits = torch.tensor([[0.0, math.log(2), -math.inf], [1.0, 2.0, 3.0], [5.0, 6.0, 7.0]], dtype=torch.float64)
    columns = torch.tensor([[-1, -1], [1, 1], [0, -1]])
    shift = torch.tensor([0.0, 1.0, math.inf], dtype=torch.float64)
    weight = torch.tensor([0.0, math.log(3), 0.0], dtype=torch.float64)
    sums = exponentials_(
        logits, shift_V=shift, columns_VP=columns, log_weight_c=weight, factor_V=torch.tensor([1.0, 0.5, 9.0]).double()
    )
    expected = torch.tensor([[1.0, 6.0, 0.0], [0.5, 0.0, 0.5 * math.exp(2)], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(logits, expected, rtol=1e-14, atol=0)
    assert torch.allclose(sums, expected.sum(1), rtol=1e-14, atol=0)


def test_none_beside_an_own_class_in_the_first_column():
    """-1 is looked up somewhere: it must not undo, nor do, what another entry does there."""
    logits = torch.zeros(3, 4)
    exponentials_(logits, shift_V=torch.zeros(3), columns_VP=torch.tensor([[0, -1], [-1, 0], [-1, -1]]))
    assert logits.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


def test_own_class_is_0_whatever_its_logit():
    logits = torch.tensor([[math.inf, 0.0], [200.0, 0.0]])
    sums = exponentials_(logits, shift_V=torch.zeros(2), columns_VP=torch.zeros(2, 1, dtype=torch.int64))
    assert logits.tolist() == [[0, 1], [0, 1]]
    assert sums.tolist() == [1, 1]


def test_sums_are_of_what_is_not_rounded():
    logits = draw(normal, 5, 300).float()
    exact = logits.double().exp().sum(1)
    out = torch.empty(5, 300, dtype=torch.bfloat16)
    sums = exponentials_(logits.clone(), shift_V=torch.zeros(5), columns_VP=torch.full((5, 1), -1), out_Vc=out)
    assert sums.dtype == torch.float32
    assert torch.allclose(sums.double(), exact, rtol=1e-6)
    assert not torch.allclose(out.double().sum(1), exact, rtol=1e-6)
    assert torch.equal(out, logits.exp().bfloat16())


@pytest.mark.parametrize(("V", "c", "P"), [(0, 3, 1), (3, 0, 1), (3, 4, 0)])
def test_exponentials_of_nothing(V, c, P):
    logits = torch.zeros(V, c)
    columns = torch.full((V, P), -1)
    assert exponentials_(logits, shift_V=torch.zeros(V), columns_VP=columns).tolist() == [float(c)] * V


def test_exponentials_refuses_what_is_not_contiguous():
    with pytest.raises(AssertionError):
        exponentials_(torch.zeros(4, 3).T, shift_V=torch.zeros(3), columns_VP=torch.full((3, 1), -1))


def load(table, rows, dtype=torch.float32):
    unit, inverse = torch.full((len(rows), table.shape[1]), 9.0, dtype=dtype), torch.full((len(rows),), 9.0)
    load_unit_rows_(unit, inverse, table, torch.tensor(rows))
    return unit, inverse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unit_rows(dtype):
    table = torch.tensor([[math.nan, math.nan], [3.0, 4.0], [0.0, 0.0], [-0.5, 0.0]], dtype=dtype)
    unit, inverse = load(table, [3, -1, 1, 2, 1])
    assert torch.allclose(unit, torch.tensor([[-1, 0], [0, 0], [0.6, 0.8], [0, 0], [0.6, 0.8]]))
    assert torch.allclose(inverse, torch.tensor([2, 0, 0.2, 1e12, 0.2]))
    assert torch.allclose(load(table, [1], torch.bfloat16)[0].float(), torch.tensor([[0.6, 0.8]]), atol=2e-3)


def test_norms_of_16_bit_rows_are_in_32():
    """2**13 squares of 1 are past where bfloat16 and float16 stop counting."""
    for dtype in (torch.float16, torch.bfloat16):
        assert load(torch.ones(1, 2**13, dtype=dtype), [0])[1].item() == pytest.approx(2**-6.5, rel=1e-6)


def test_unit_rows_of_an_empty_table():
    unit, inverse = load(torch.zeros(0, 3), [-1, -1])
    assert not unit.any()
    assert not inverse.any()


def test_unit_rows_refuses_what_is_not_contiguous():
    with pytest.raises(AssertionError):
        load(torch.zeros(3, 4).T, [0])


def case(c=7, V=11, D=6, *, table=torch.float32, momentum=torch.float32):
    """(stored, gradients) with one row that is not there, and one that nothing points to."""
    rows = torch.tensor([4, 0, -1, 8, 2, 6, 1][:c])
    stored = StoredRows(
        table_ND=(0.3 * draw(normal, 9, D)).to(table),
        rows_c=rows,
        momentum_ND=None if momentum is None else (0.1 * draw(normal, 9, D, key=2)).to(momentum),
        keys_c=hash64(1, torch.arange(c)),
        momentum_keys_c=hash64(2, torch.arange(c)),
    )
    shift = draw(normal, V, key=3).float() + 4
    shift[-1] = math.inf
    own_column = torch.arange(V) % (c + 1) - 1
    gradients = RowGradients(
        4 * F.normalize(draw(normal, V, D, key=4).float(), dim=1),
        shift,
        draw(uniform, V, key=5).float(),
        own_column,
        -draw(uniform, V, key=6).float(),
    )
    return stored, gradients


def step(*, steps=True, momentum=0.9, learning_rate=0.2, weight_decay=0.01):
    return SGDStep(torch.tensor(steps), learning_rate, momentum, weight_decay)


def loss(centers_cD, gradients):
    """One whose gradient by the logits is what the kernel takes it to be: exp(logit - shift) * factor, or own."""
    logits = gradients.operand_VD.double() @ F.normalize(centers_cD, dim=1).T
    columns = torch.arange(logits.shape[1])
    own = gradients.own_column_V[:, None] == columns
    negatives = ((logits - gradients.shift_V.double()[:, None]).exp() * gradients.factor_V.double()[:, None])[~own]
    return negatives.sum() + (logits * gradients.own_V.double()[:, None])[own].sum()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_pass_is_torch_sgd(momentum):
    stored, gradients = case(momentum=torch.float32 if momentum else None)
    centers = stored.table_ND.double()[stored.rows_c.clamp(min=0)].requires_grad_()
    optimizer = torch.optim.SGD([centers], lr=0.2, momentum=momentum, weight_decay=0.01)
    if momentum:
        buffer = stored.momentum_ND.double()[stored.rows_c.clamp(min=0)]
        optimizer.state[centers]["momentum_buffer"] = buffer
    present = stored.rows_c >= 0
    # What points to the row that is not there counts for nobody.
    loss(centers, gradients).backward()
    optimizer.step()
    before = stored.table_ND.clone()
    second_pass_sgd_(stored, gradients, step(momentum=momentum))
    rows = stored.rows_c[present]
    assert torch.allclose(stored.table_ND[rows].double(), centers.detach()[present], rtol=1e-5, atol=1e-6)
    if momentum:
        assert torch.allclose(stored.momentum_ND[rows].double(), buffer[present], rtol=1e-5, atol=1e-6)
    idle = [row for row in range(9) if row not in rows.tolist()]
    assert len(idle) == 3
    assert torch.equal(stored.table_ND[idle], before[idle])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_pass_rounds_table_and_momentum_each_with_its_keys(dtype):
    stored, gradients = case(table=dtype, momentum=dtype)
    exact = StoredRows(stored.table_ND.float(), stored.rows_c, stored.momentum_ND.float())
    second_pass_sgd_(exact, gradients, step())
    second_pass_sgd_(stored, gradients, step())
    present = stored.rows_c >= 0
    rows = stored.rows_c[present]
    pairs = (
        (stored.table_ND, exact.table_ND, stored.keys_c),
        (stored.momentum_ND, exact.momentum_ND, stored.momentum_keys_c),
    )
    for found, values, keys in pairs:
        expected = torch.empty(len(rows), 6, dtype=dtype)
        stochastic_round_(expected, values[rows].contiguous(), keys[present])
        assert torch.equal(found[rows], expected)


def test_second_pass_without_a_step_writes_nothing():
    stored, gradients = case()
    table, momentum = stored.table_ND.clone(), stored.momentum_ND.clone()
    second_pass_sgd_(stored, gradients, step(steps=False))
    assert torch.equal(stored.table_ND, table)
    assert torch.equal(stored.momentum_ND, momentum)
    second_pass_sgd_(stored, gradients, step())
    assert not torch.equal(stored.table_ND, table)


def test_second_pass_refuses_what_does_not_fit():
    stored, gradients = case(table=torch.float16)
    with pytest.raises(AssertionError, match="needs keys"):
        second_pass_sgd_(StoredRows(stored.table_ND, stored.rows_c, stored.momentum_ND), gradients, step())
    with pytest.raises(AssertionError):
        second_pass_sgd_(stored, gradients, step(momentum=0.0))
    with pytest.raises(AssertionError):
        second_pass_sgd_(StoredRows(torch.zeros(6, 9).T, stored.rows_c), gradients, step(momentum=0.0))
