"""Class centers in 16 bits and momentum in 16 or 8: what is read back, and that it is right in the mean."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from partialfc import CenterSGD, HeadGroup, PartialFC
from partialfc.distributed.mesh import ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.class_centers import ClassCenters
from partialfc.head.optimizers import CenterOptimizer
from partialfc.head.storage import Field, MomentumDtype
from partialfc.margins import CosFace, Softmax

NUM_CLASSES, DIM = 300, 96  # one block of 64 elements for 8 bits, and half a block
SIXTEEN_BITS = [torch.float16, torch.bfloat16]
MANTISSA_BITS, SMALLEST_EXPONENT = {torch.float16: 10, torch.bfloat16: 7}, {torch.float16: -14, torch.bfloat16: -126}


@dataclass(frozen=True)
class Putting:
    """Puts the gradient into the centers, and twice the gradient into the momentum: what is written is known."""

    momentum_dtype: MomentumDtype = "float32"
    learning_rate: float = 1.0
    moves_idle_rows: ClassVar[bool] = False

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"momentum": Field(dtype=self.momentum_dtype)}

    def update_(
        self, centers_nD: Tensor, gradient_nD: Tensor, state: Mapping[str, Tensor], *, learning_rate: float
    ) -> None:
        centers_nD.copy_(gradient_nD)
        state["momentum"].copy_(2 * gradient_nD)

    def idle_step(self, learning_rate: float) -> Tensor:
        raise NotImplementedError

    def without_decay(self) -> Putting:
        return self


def table(
    optimizer: CenterOptimizer,
    dtype: torch.dtype = torch.float16,
    *,
    seed: int = 0,
    num_subcenters: int = 1,
    partition: ClassPartition | None = None,
) -> ClassCenters:
    """Class centers of 0."""
    return ClassCenters(
        partition or ClassPartition(NUM_CLASSES),
        (num_subcenters, DIM),
        optimizer=optimizer,
        mesh=ShardMesh.single(),
        seed=seed,
        init_std=0.0,
        dtype=dtype,
        sampled=False,
        device=None,
    )


def put(centers: ClassCenters, values: Tensor, rows: slice | Tensor | None = None, step: int = 0) -> None:
    centers.step_(rows, centers.read_rows(rows), values.clone(), learning_rate=1.0, step=step)


def stored(centers: ClassCenters, name: str) -> Tensor:
    """[C, K, D] as computed with, a copy."""
    return centers.formats[name].read(centers, name, None, centers.workspace).clone()


def everything(centers: ClassCenters) -> dict[str, Tensor]:
    """What is stored, bit for bit."""
    return {name: centers.read(name, None).clone() for name in centers._names}


def gap(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What separates the two 16-bit neighbours of each number."""
    exponent = values.abs().log2().floor().clamp(min=SMALLEST_EXPONENT[dtype])
    return torch.exp2(exponent - MANTISSA_BITS[dtype])


def spread(seed: int = 0, num_subcenters: int = 1) -> Tensor:
    """[C, K, D] of all sizes, signs, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_CLASSES, num_subcenters, DIM)
    values = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-18, 4, shape, generator=generator))
    values[::7, :, ::5] = 0.0
    return values


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_what_was_written_in_16_bits_is_read_to_within_a_gap(dtype):
    centers, values = table(Putting("bfloat16"), dtype), spread()
    put(centers, values)
    for name, expected, stored_dtype in (("weight", values, dtype), ("momentum", 2 * values, torch.bfloat16)):
        got = stored(centers, name)
        assert got.dtype == torch.float32
        assert centers.read(name, None).dtype == stored_dtype
        error = (got - expected).abs()
        assert bool((error < gap(expected, stored_dtype)).all())
        assert not bool(got[expected == 0].any())
        # Not the nearest, which is never off by more than half of it: a quarter of all errors is larger.
        assert 0.2 < float((error > gap(expected, stored_dtype) / 2)[expected != 0].double().mean()) < 0.3


def test_what_was_written_in_8_bits_is_read_to_within_a_step_of_its_block():
    centers, values = table(Putting("int8")), spread()
    put(centers, values)
    got, expected = stored(centers, "momentum")[:, 0], 2 * values[:, 0]
    assert centers.read("momentum", None).dtype == torch.int8
    for columns in (slice(0, 64), slice(64, 96)):
        scale = expected[:, columns].abs().amax(1, keepdim=True) / 127
        error = (got[:, columns] - expected[:, columns]).abs()
        assert bool((error <= 1.0001 * scale).all())
        assert 0.2 < float((error > scale / 2)[expected[:, columns].abs() > scale].double().mean()) < 0.3


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_number_that_fits_stays_as_it_is(dtype):
    centers, values = table(Putting("bfloat16"), dtype), spread().bfloat16().half().float()
    for step in range(3):
        put(centers, values, step=step)
        assert torch.equal(stored(centers, "weight"), values.to(dtype).float())
        assert torch.equal(stored(centers, "momentum"), (2 * values).bfloat16().float())


def assert_mean(values: Tensor, expected: float, deviation: float) -> None:
    """Within 5 standard deviations of the mean, each value with the given one."""
    assert abs(float(values.double().mean()) - expected) < 5 * deviation / values.numel() ** 0.5


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_small_update_is_there_in_the_mean_where_the_nearest_number_would_lose_it(dtype):
    update = 2.0**-14
    assert float(torch.tensor(1 - update).to(dtype)) == 1.0
    below = float(gap(torch.tensor(0.75), dtype))
    results = []
    for seed in range(40):
        centers = table(CenterSGD(momentum=0.0, weight_decay=0.0), dtype, seed=seed)
        centers.write("weight", None, torch.ones(NUM_CLASSES, 1, DIM, dtype=dtype))
        gradient = torch.full((NUM_CLASSES, 1, DIM), update)
        centers.step_(None, centers.read_rows(None), gradient, learning_rate=1.0, step=5)
        results.append(stored(centers, "weight"))
    values = torch.stack(results)
    assert set(values.unique().tolist()) == {1.0, 1.0 - below}
    share = update / below
    assert_mean(values, 1 - update, below * (share * (1 - share)) ** 0.5)
    # The error of a mean over many is far below the update itself, so that 5 of them tell.
    assert 10 * below * (share * (1 - share)) ** 0.5 / values.numel() ** 0.5 < update


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_weight_decay_goes_on_in_the_mean(dtype):
    steps, rate = 200, 1e-4
    centers = table(CenterSGD(momentum=0.0, weight_decay=1.0), dtype)
    centers.write("weight", None, torch.full((NUM_CLASSES, 1, DIM), 0.75, dtype=dtype))
    nearest = torch.tensor(0.75).to(dtype)
    for step in range(steps):
        centers.step_(None, centers.read_rows(None), torch.zeros(NUM_CLASSES, 1, DIM), learning_rate=rate, step=step)
        nearest = (nearest.float() * (1 - rate)).to(dtype)
    expected, width = 0.75 * (1 - rate) ** steps, float(gap(torch.tensor(0.75), dtype))
    share = 0.75 * rate / width
    assert float(nearest) == 0.75
    values = stored(centers, "weight")
    deviation = width * (steps * share * (1 - share)) ** 0.5
    assert_mean(values, expected, deviation)
    # Each step draws anew: then, not else, errors grow as the root of the number of steps.
    assert float(values.std()) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(
    ("momentum_dtype", "step_size"), [("bfloat16", 2.0**-9), ("int8", 1.0 / 127)], ids=["bfloat16", "int8"]
)
def test_momentum_is_right_in_the_mean(momentum_dtype, step_size):
    value = 0.3
    results = []
    for seed in range(20):
        centers = table(CenterSGD(momentum=0.9, weight_decay=0.0, momentum_dtype=momentum_dtype), seed=seed)
        gradient = torch.full((NUM_CLASSES, 1, DIM), value)
        gradient[..., [0, 64]] = 1.0  # sets the scale of each block
        centers.step_(None, centers.read_rows(None), gradient, learning_rate=0.0, step=1)
        found = stored(centers, "momentum")
        assert bool((found[..., [0, 64]] == 1.0).all())
        results.append(found[..., [*range(1, 64), *range(65, DIM)]])
    values = torch.stack(results)
    assert len(values.unique()) == 2
    share = value / step_size % 1
    assert 0.05 < share < 0.95
    assert_mean(values, value, step_size * (share * (1 - share)) ** 0.5)


FORMATS: list[tuple[torch.dtype, MomentumDtype]] = [
    *itertools.product(SIXTEEN_BITS, ("float32", "bfloat16", "int8")),
    (torch.float32, "int8"),
]


@pytest.mark.parametrize(("dtype", "momentum_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize("num_subcenters", [1, 3])
def test_what_is_stored_depends_on_seed_step_and_class_alone(dtype, momentum_dtype, num_subcenters):
    optimizer = CenterSGD(momentum=0.5, weight_decay=2.0**-6, momentum_dtype=momentum_dtype)
    generator = torch.Generator().manual_seed(2)

    def run(world_size: int, tile: int, seed: int = 0) -> dict[str, Tensor]:
        """Three steps on the shards of `world_size` ranks, `tile` rows at a time, forwards or backwards."""
        parts = []
        for rank in range(world_size):
            partition = ClassPartition(NUM_CLASSES, rank, world_size)
            own = slice(partition.class_start, partition.class_start + partition.num_local_classes)
            centers = table(optimizer, dtype, seed=seed, num_subcenters=num_subcenters, partition=partition)
            for step in range(3):
                gradient = spread(step, num_subcenters)[own]
                order = torch.randperm(len(gradient), generator=generator)
                runs = [slice(start, start + tile) for start in range(0, len(gradient), tile)]
                for rows in order.split(tile) if step == 1 else runs:
                    raw = centers.read_rows(rows)
                    centers.step_(rows, raw, gradient[rows].clone(), learning_rate=0.25, step=step)
            parts.append(everything(centers))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    expected = run(1, NUM_CLASSES)
    for world_size, tile in ((1, 37), (2, 64), (3, NUM_CLASSES), (4, 11)):
        found = run(world_size, tile)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), (world_size, tile)
    other = run(1, NUM_CLASSES, seed=1)
    rounded = "weight" if dtype in SIXTEEN_BITS else "momentum"
    assert float((other[rounded] != expected[rounded]).double().mean()) > 0.2


@pytest.mark.parametrize("what", ["seed", "step", "class", "sub-center", "quantity"])
def test_each_has_random_bits_of_its_own(what):
    # Halfway between two numbers, so that each is a fair coin.
    value = 1 + 2.0**-8
    ones = torch.full((NUM_CLASSES, 2, DIM), value)
    first, second = (table(Putting("bfloat16"), torch.bfloat16, seed=seed, num_subcenters=2) for seed in (0, 1))
    put(first, ones)
    put(second, ones)
    coins = stored(first, "weight") > value
    if what == "seed":
        other = stored(second, "weight") > value
    elif what == "step":
        put(first, ones, step=1)
        other = stored(first, "weight") > value
    elif what == "class":
        other = coins.roll(1, 0)
    elif what == "sub-center":
        coins, other = coins[:, 0], coins[:, 1]
    else:
        other = stored(first, "momentum") > 2 * value
    agree = (coins == other).double()
    for mean in (coins.double().mean(), agree.mean()):
        assert abs(float(mean) - 0.5) < 5 * 0.5 / coins.numel() ** 0.5
    # No row is like another.
    assert float(agree.flatten(1).mean(1).max()) < 0.9


def build(dtype: torch.dtype = torch.float32, **options: Any) -> PartialFC:
    return PartialFC(NUM_CLASSES, 8, **{"margin": CosFace(scale=16.0), "dtype": dtype, "init_std": 1.0, **options})


def train(head: PartialFC, step: int, size: int = 8) -> float:
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(size, head.class_centers.weight.shape[-1], generator=generator)
    loss = head(embeddings, torch.randint(NUM_CLASSES, (size,), generator=generator))
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_training_in_few_bits_goes_where_training_in_32_goes(dtype, momentum_dtype, sample_rate):
    few = build(dtype, sample_rate=sample_rate, optimizer=CenterSGD(momentum_dtype=momentum_dtype))
    many = build(sample_rate=sample_rate)
    assert few.dtype == few.gather_class_centers().dtype == torch.float32
    start = many.gather_class_centers()
    many.set_class_centers(few.gather_class_centers())
    for step in range(30):
        assert train(few, step) == pytest.approx(train(many, step), rel=0.03)
    moved = many.gather_class_centers() - start
    error = few.gather_class_centers() - many.gather_class_centers()
    assert float(moved.norm()) > 1
    # bfloat16 has steps of 2^-8 of a number, and 30 of them add up.
    assert float(error.norm() / moved.norm()) < (0.05 if dtype == torch.float16 else 0.4)
    resumed = build(dtype, sample_rate=sample_rate, optimizer=CenterSGD(momentum_dtype=momentum_dtype))
    resumed.load_state_dict(few.state_dict())
    for step in (30, 31):
        assert train(resumed, step) == train(few, step)
    assert all(torch.equal(got, expected) for got, expected in zip(resumed.buffers(), few.buffers(), strict=True))


@pytest.mark.parametrize("asked", SIXTEEN_BITS, ids=str)
def test_a_head_is_not_converted_to_16_bits(asked):
    message = (
        f"the head was asked to convert itself to {asked}, but its class centers stay in torch.float32: rounded to the "
        "nearest 16-bit number they would lose the small steps of training, weight decay first; build it with "
        "dtype=torch.float16 for 16 bits with stochastic rounding"
    )
    head = build()
    before = [buffer.clone() for buffer in head.buffers()]
    ways = [lambda: head.to(asked), lambda: HeadGroup({"faces": head}).to(asked)]
    ways.append(head.half if asked == torch.float16 else head.bfloat16)
    for convert in ways:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            convert()
        assert str(error.value) == message
    for value, expected in zip(head.buffers(), before, strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_a_head_in_16_bits_is_not_converted_to_32():
    with pytest.raises(ValueError, match=r"^the head was asked to convert itself to torch\.float32, but its class"):
        build(torch.float16).float()


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8"])
def test_a_head_in_16_bits_keeps_the_rest_in_32_if_it_is_asked_for_16(momentum_dtype):
    head = build(torch.float16, margin=Softmax(), optimizer=CenterSGD(momentum_dtype=momentum_dtype))
    dtypes = {name: buffer.dtype for name, buffer in head.named_buffers()}
    assert torch.float32 in dtypes.values()
    # To refuse would be as good.
    with contextlib.suppress(ValueError):
        head.half()
    assert {name: buffer.dtype for name, buffer in head.named_buffers()} == dtypes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (
                {"dtype": dtype},
                f"dtype is {dtype}, but class centers are stored in torch.float32 or torch.float64, or with stochastic "
                "rounding in torch.float16 or torch.bfloat16",
            )
            for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn)
        ),
        *(
            (
                {"matmul_dtype": dtype},
                f"matmul_dtype is {dtype}, but must be torch.bfloat16, or None for that of the sums",
            )
            for dtype in (torch.float16, torch.float32, torch.int8)
        ),
        (
            {"dtype": torch.float64, "matmul_dtype": torch.bfloat16},
            "matmul_dtype is torch.bfloat16, but class centers in torch.float64 are for exact comparisons",
        ),
    ],
    ids=str,
)
def test_other_formats_are_refused(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(**options)
    assert str(error.value) == message


def test_looks_at_dense_decay_in_16_bits_draw_anew_each_time():
    """Rows that are never in play decay by rounding alone, each time that somebody looks."""
    steps, rate = 50, 2e-4
    head = build(
        torch.float16,
        sample_rate=0.01,
        optimizer=CenterSGD(learning_rate=rate, momentum=0.0, weight_decay=1.0, decay="dense"),
    )
    head.set_class_centers(torch.full((NUM_CLASSES, 8), 0.75))
    never = torch.ones(NUM_CLASSES, dtype=torch.bool)
    embeddings = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        head(embeddings, torch.tensor([0])).backward()
        never[0] = False
        assert head.sampler is not None
        never[head.sampler.in_play(torch.tensor([0]), head.partition, step).rows] = False
        head.gather_class_centers()
    values = head.gather_class_centers()[never]
    width = 2.0**-11
    share = 0.75 * rate / width
    deviation = width * (steps * share * (1 - share)) ** 0.5
    assert_mean(values, 0.75 * (1 - rate) ** steps, deviation)
    assert float(values.std()) == pytest.approx(deviation, rel=0.2)
