"""Class centers in host memory: the results of resident ones, bit for bit, whatever happens between steps."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import CenterAdagrad, CenterAdamW, CenterSGD, PartialFC
from partialfc.head.offload import OffloadedCenters
from partialfc.margins import ArcFace, CurricularFace, Softmax

NUM_CLASSES, DIM, BATCH = 3000, 16, 8


def build(offload: bool, **options: Any) -> PartialFC:
    options = {"margin": ArcFace(), "sample_rate": 0.1, **options}
    return PartialFC(NUM_CLASSES, DIM, offload=offload, seed=3, **options)


def run(head: PartialFC, num_steps: int, first: int = 0) -> list[Tensor]:
    """Loss and embedding gradient of each step."""
    results = []
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(BATCH, DIM, generator=generator).requires_grad_()
        # Few labels, so that steps share rows.
        labels = torch.randint(40, (BATCH,), generator=generator)
        loss = head(embeddings, labels)
        loss.backward()
        results += [loss.detach(), embeddings.grad]
    return results


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": False},
        {"margin": Softmax()},
        {"margin": CurricularFace(), "num_subcenters": 2},
        {"optimizer": CenterAdamW()},
        {"dtype": torch.float16, "optimizer": CenterAdagrad()},
        {"dtype": torch.bfloat16, "optimizer": CenterSGD(momentum_dtype="int8"), "sampling": "cyclic"},
        {"sample_rate": 0.9},
    ],
    ids=str,
)
def test_results_are_those_of_resident_centers(options):
    resident, offloaded = build(False, **options), build(True, **options)
    assert isinstance(offloaded.class_centers, OffloadedCenters)
    assert_same(run(resident, 10), run(offloaded, 10))
    assert torch.equal(resident.gather_class_centers(), offloaded.gather_class_centers())
    saved = offloaded.state_dict()
    for name, value in resident.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, saved[name]), name


def test_evaluation_saving_and_loading_between_steps_see_what_was_learnt():
    results = []
    for offload in (False, True):
        head = build(offload)
        found = run(head, 4)
        head.eval()
        found.append(head(torch.ones(2, DIM), torch.tensor([5, 2999])))
        head.train()
        found += run(head, 2, first=4)
        state = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in head.state_dict().items()
        }
        found += run(head, 3, first=6)
        # Back to step 6, with rows of step 9 fetched already.
        head.load_state_dict(state)
        again = run(head, 3, first=6)
        assert_same(found[-6:], again)
        centers = head.gather_class_centers()
        head.set_class_centers(centers.flip(0))
        assert torch.equal(head.gather_class_centers(), centers.flip(0))
        results.append(found + again + run(head, 2, first=9) + [head.gather_class_centers()])
    assert_same(*results)


def test_a_step_that_moves_nothing_leaves_the_host_as_it_was():
    head = build(True)
    run(head, 3)
    before = head.gather_class_centers()
    head(torch.full((2, DIM), torch.nan, requires_grad=True), torch.tensor([1, 2])).backward()
    assert torch.equal(head.gather_class_centers(), before)
    assert all(bool(value.isfinite().all()) for value in run(head, 2, first=3))


def test_a_loss_that_is_never_differentiated_moves_nothing():
    resident, offloaded = build(False), build(True)
    for head in (resident, offloaded):
        run(head, 2)
        head(torch.ones(BATCH, DIM, requires_grad=True), torch.arange(BATCH))
    assert_same(run(resident, 3, first=2), run(offloaded, 3, first=2))
    assert torch.equal(resident.gather_class_centers(), offloaded.gather_class_centers())


def test_rows_of_the_next_step_are_fetched_by_another_thread_before_its_batch_is_known(monkeypatch):
    fetched: list[tuple[str, int]] = []
    fetch = OffloadedCenters._fetch

    def noted(self: OffloadedCenters, rows: Tensor) -> Any:
        fetched.append((threading.current_thread().name, len(rows)))
        return fetch(self, rows)

    monkeypatch.setattr(OffloadedCenters, "_fetch", noted)
    head = build(True)
    run(head, 3)
    head.class_centers.wait()
    drawn = len(head.drawn_next())
    ahead = [count for thread, count in fetched if thread.startswith("class centers")]
    assert len(ahead) == 3
    assert all(abs(count - drawn) <= 8 for count in ahead)
    # What is left for the step itself are positives; and, in the first, everything.
    besides = [count for thread, count in fetched if not thread.startswith("class centers")]
    assert besides[0] == 0
    assert besides[1] >= drawn
    assert all(count <= BATCH for count in besides[2:])


def test_moving_the_head_leaves_them_where_they_are():
    head = build(True)
    head.to(torch.device("cpu"))
    assert head.class_centers.weight.device.type == "cpu"


def test_it_does_not_move_to_another_device():
    with pytest.raises(ValueError, match="was asked to move to meta, but class centers in host memory are computed"):
        build(True).to(torch.device("meta"))


def test_a_copy_goes_its_own_way():
    head = build(True)
    run(head, 3)
    twin = copy.deepcopy(head)
    assert_same(run(head, 3, first=3), run(twin, 3, first=3))
    run(twin, 1, first=6)
    assert not torch.equal(head.gather_class_centers(), twin.gather_class_centers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 1.0}, "offload is True, but sample_rate is 1: all class centers would be brought"),
        ({"optimizer": CenterSGD(decay="dense")}, "offload is True, but the optimizer's decay is dense"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(True, **options)
