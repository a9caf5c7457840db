"""The head: class centers sharded over ranks, negatives sampled, any margin, exact softmax, sparse update.

Shapes: B rows of the global batch, b of this rank's, P labels of a row, V = B P cases, n classes in play on this rank,
K sub-centers, D embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.distributed.mesh import ProcessGroup, ShardMesh
from partialfc.distributed.partition import ClassPartition
from partialfc.head.auxiliary import build_auxiliaries
from partialfc.head.checks import (
    check_dtypes,
    check_margin,
    check_numbers,
    check_offload,
    check_options,
    check_replicas,
    check_sampling,
)
from partialfc.head.class_centers import ClassCenters
from partialfc.head.global_batch import BatchGather
from partialfc.head.learned import LearnedNumbers
from partialfc.head.offload import OffloadedCenters
from partialfc.head.optimizers import CenterOptimizer, CenterSGD
from partialfc.head.sampling import ClassesInPlay, NegativeSampler, all_in_play
from partialfc.head.step import PendingStep, TrainingStep, finish, head_step
from partialfc.head.variational import PrototypeMemory, VariationalPrototypes
from partialfc.margins.auxiliary import Auxiliary
from partialfc.margins.base import Margin, State

__all__ = ["PartialFC"]


class PartialFC(nn.Module):
    """Margin softmax over `num_classes` class centers, each rank holding and updating its own share of them.

    Calling it is collective: every rank of `process_group` must call it in the same step, each with its own batch, of
    any size. `loss.backward()` leaves d(mean loss over the global batch) / d(embeddings of this rank), times the
    incoming gradient, in the embeddings' gradient, and moves the class centers in play by one step of `optimizer`
    along the gradient of the loss itself. If the loss is not finite, nothing moves, on any rank.

    In `eval()` mode or without gradients, all classes take part and nothing is learnt. (With dense decay, rows that
    were idle are brought up to date for it, which rounds them.)

    Args:
        num_classes: identities over all ranks, at least 1.
        embedding_dim: D.
        margin: the loss, from `partialfc.margins`.
        sample_rate: share of the classes that take part in a step besides those of the batch, in (0, 1].
        sampling: `"uniform"`: classes are drawn anew in each step. `"cyclic"`: in windows of a shuffled order, so that
            each is drawn equally often.
        sampling_correction: whether a class that was drawn counts by the inverse of its probability, so that sums over
            classes are those of all classes in the mean; None for what the margin needs.
        num_subcenters: K centers for each class, of which the nearest to an embedding counts (Deng et al., "Sub-center
            ArcFace", ECCV 2020).
        interclass_filtering_threshold: a negative whose cosine is above it is left out of the sum, as probably the
            same identity under another label (An et al., CVPR 2022); None leaves none out.
        variational: class centers are mixed with the last embeddings of their class; None for no.
        auxiliaries: terms added to the loss, from `partialfc.margins`.
        labels_per_row: P. With more than one, labels are [b, P], padded with -1; the loss of a row is the sum over
            its labels, none of which is a negative of the others.
        loss_weight: a factor on the whole loss, which class centers follow too.
        optimizer: how class centers move.
        fused: whether a step goes in two passes over tiles of the class centers in play and moves them in the second.
            If not, autograd works on all logits at once: the same results, more memory and time.
        dtype: in which class centers are stored: float32, or float64 for tests. In float16 or bfloat16 they are
            rounded stochastically, keyed by (seed, step, class), and computed with in float32.
        matmul_dtype: bfloat16 for operands of matrix products in 16 bits. Logits are sums in float32 whatever it is; on
            a CPU, whose library rounds results to the dtype of operands, it is used for gradients alone.
        gather_dtype: bfloat16 for embeddings and their gradients that travel between ranks in 16 bits, half the bytes.
            All ranks compute with the rounded embeddings, also if there is one rank; gradients are summed in 16 bits.
        offload: whether class centers and their optimizer state are kept in host memory, and only the rows of a step
            are brought to `device`: those that the next step draws while the backbone works. Takes a sample rate
            below 1. The results are the same, bit for bit.
        device: where the class centers live, or, with `offload`, where they are computed with.
        seed: of initialisation, sampling and noise; the same on all ranks. None of them depends on their number.
        init_std: standard deviation of the initial elements of class centers.
        process_group: over which the centers are sharded; None for the default group, or for a process on its own if
            torch.distributed is not initialised.
        replicate_over: the ranks that hold the same class centers as this one, for class centers that each node has
            as a whole; `process_group` is then over the ranks of this node, and all ranks of all nodes call the head.
            See `partialfc.distributed.mesh.node_groups`. The results are the same. None for no others.

    Attributes:
        learning_rate: of the next update; a schedule may set it before each step.
        defers_updates: whether `backward` leaves the update to `finish_update`, for a training step of which it is
            known only then whether it is made. False: the update runs in `backward`, while the gradient of the
            embeddings is on its way.
        step: steps done so far, also those that moved nothing because their loss was not finite.
        margin_state: what the margin remembers, by name, scalars that are equal on all ranks.
        statistics: what `diagnostics` shows of the last step, by name, scalars.

    Raises:
        ValueError: if an argument is out of range, or does not go with another.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: Margin,
        sample_rate: float = 1.0,
        sampling: str = "uniform",
        sampling_correction: bool | None = None,
        num_subcenters: int = 1,
        interclass_filtering_threshold: float | None = None,
        variational: VariationalPrototypes | None = None,
        auxiliaries: Sequence[Auxiliary] = (),
        labels_per_row: int = 1,
        loss_weight: float = 1.0,
        optimizer: CenterOptimizer | None = None,
        fused: bool = True,
        dtype: torch.dtype = torch.float32,
        matmul_dtype: torch.dtype | None = None,
        gather_dtype: torch.dtype | None = None,
        offload: bool = False,
        device: torch.device | str | None = None,
        seed: int = 0,
        init_std: float = 0.01,
        process_group: ProcessGroup | None = None,
        replicate_over: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        auxiliaries = tuple(auxiliaries)
        optimizer = CenterSGD() if optimizer is None else optimizer
        check_numbers(
            embedding_dim=embedding_dim,
            sample_rate=sample_rate,
            num_subcenters=num_subcenters,
            labels_per_row=labels_per_row,
            init_std=init_std,
            loss_weight=loss_weight,
        )
        check_dtypes(dtype, matmul_dtype, gather_dtype)
        check_margin(margin, sampling_correction, labels_per_row)
        check_sampling(sampling)
        check_offload(offload, sample_rate, optimizer)
        check_options(margin, interclass_filtering_threshold, variational, auxiliaries, num_subcenters, labels_per_row)
        self.margin, self.seed, self.loss_weight, self.labels_per_row = margin, seed, loss_weight, labels_per_row
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.learning_rate, self.step = optimizer.learning_rate, 0
        self.mesh = ShardMesh.from_group(process_group, replicate_over=replicate_over)
        if self.mesh.replicate_over is not None:
            check_replicas(fused=fused, offload=offload, auxiliaries=auxiliaries, variational=variational)
        self.partition = ClassPartition(num_classes, self.mesh.rank, self.mesh.size)
        self.fused, self.matmul_dtype, self.gather_dtype = fused, matmul_dtype, gather_dtype
        self.sampler = NegativeSampler(num_classes, sample_rate, law=sampling, seed=seed) if sample_rate < 1 else None
        self._build_tables((num_subcenters, embedding_dim), optimizer, init_std, dtype, device, offload)
        self._build_rest(embedding_dim, optimizer, auxiliaries, variational)
        self.corrects_sampling = sampling_correction or margin.needs_sampling_correction
        self._start()

    def _start(self) -> None:
        self.margin_state = self._on_device(self.margin.initial_state(self.partition.num_classes))
        self.statistics: dict[str, Tensor] = {}
        self.defers_updates = False
        self.pending: PendingStep | None = None
        self.unfinished: PendingStep | None = None
        self.gather_batch = BatchGather(self.mesh, dtype=self.gather_dtype)
        # exp(logit) and its sum over classes must stay finite in float32 for the softmax to do without a maximum.
        bound = self.margin.logit_bound
        self.bounded = bound is not None and bound + math.log(self.partition.num_classes) < 88
        # Makes the loss require a gradient even where the embeddings do not: the centers of a frozen backbone train.
        self._anchor = torch.zeros((), requires_grad=True)

    def _build_tables(
        self,
        row_shape: tuple[int, int],
        optimizer: CenterOptimizer,
        init_std: float,
        dtype: torch.dtype,
        device: torch.device | str | None,
        offload: bool,
    ) -> None:
        sampled = self.sampler is not None
        options: dict[str, Any] = {"mesh": self.mesh, "seed": self.seed, "device": device, "sampled": sampled}
        kind = OffloadedCenters if offload else ClassCenters
        self.class_centers = kind(
            self.partition, row_shape, optimizer=optimizer, init_std=init_std, dtype=dtype, **options
        )
        self.class_bias: ClassCenters | None = None
        if self.margin.has_class_bias:
            options |= {"optimizer": optimizer.without_decay(), "init_std": 0.0, "dtype": self.dtype}
            self.class_bias = ClassCenters(self.partition, (1, 1), **options)

    def _build_rest(
        self,
        embedding_dim: int,
        optimizer: CenterOptimizer,
        auxiliaries: Sequence[Auxiliary],
        variational: VariationalPrototypes | None,
    ) -> None:
        table: dict[str, Any] = {"mesh": self.mesh, "like": torch.empty(0, dtype=self.dtype, device=self.device)}
        learned = self.margin.initial_learned(self.partition.num_classes)
        plain = optimizer.without_decay()
        self.learned = LearnedNumbers(learned, optimizer=plain, like=table["like"]) if learned else None
        self.auxiliary_terms = build_auxiliaries(auxiliaries, self.partition, embedding_dim, **table)
        self.auxiliaries = nn.ModuleList(self.auxiliary_terms)
        self.prototypes: PrototypeMemory | None = None
        if variational is not None:
            self.prototypes = PrototypeMemory(variational, self.partition, embedding_dim, **table)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the valid rows of the global batch: a scalar, equal on all ranks.

        Args:
            embeddings: [b, D], this rank's, of any floating dtype; the head computes in its own. b may be 0.
            labels: [b] int64, global class ids; -1 masks a row. [b, P] if `labels_per_row` is P > 1; a row with nothing
                but -1 is masked.

        Raises:
            ValueError: if shapes or dtypes are wrong, or the learning rate is; on every rank, if a label of any rank
                is out of range.
            RuntimeError: if updates are deferred, and the last one waits for `finish_update`.
        """
        self._check_batch(embeddings, labels)
        if self.unfinished is not None:
            raise RuntimeError(
                "PartialFC was called while the update of its last step waits, since defers_updates is True; call "
                "finish_update after each backward"
            )
        if self.training and torch.is_grad_enabled():
            loss: Tensor = TrainingStep.apply(embeddings, self._anchor, self, labels)
            return loss
        batch = self.gather_batch(
            embeddings.to(self.dtype), self.label_rows(labels), num_classes=self.partition.num_classes
        )
        self.class_centers.wait()
        return head_step(self, batch, all_in_play(batch.labels_U, self.partition), with_gradient=False).loss

    def update_only_if(self, condition: Tensor) -> None:
        """Ties the update of the loss just computed, whose backward is to come, to one more condition.

        Args:
            condition: bool, a scalar, the same on all ranks.
        """
        if self.pending is not None:
            self.pending.steps = self.pending.steps & condition

    def finish_update(self, go: bool) -> None:
        """Makes the update that `backward` has left, if `defers_updates` is True: of everything, or of nothing.

        Nothing moves either if the loss was not finite. The step counts in any case.

        Args:
            go: whether to make it, the same on all ranks.

        Raises:
            RuntimeError: if no update waits.
        """
        unfinished = self.unfinished
        if unfinished is None:
            raise RuntimeError(
                "finish_update was called on a PartialFC without an update that waits; it belongs after a backward "
                "with defers_updates set to True, once"
            )
        self._forget_steps()
        unfinished.steps = unfinished.steps & go
        finish(self, unfinished)

    def _forget_steps(self) -> None:
        self.pending, self.unfinished = None, None

    def gather_class_centers(self) -> Tensor:
        """[num_classes, D] on every rank, or [num_classes, K, D] with K > 1 sub-centers; a copy. Collective."""
        centers = self.class_centers.gather()
        return centers[:, 0] if centers.shape[1] == 1 else centers

    def set_class_centers(self, centers: Tensor) -> None:
        """Replaces the class centers, shaped as `gather_class_centers` gives them, the same on every rank.

        Their momentum starts anew.

        Raises:
            ValueError: if the shape is another, or a center is not finite, or of length 0 where cosines are compared.
        """
        num_subcenters, dim = self.class_centers.weight.shape[2:]
        inner = (dim,) if num_subcenters == 1 else (num_subcenters, dim)
        expected = (self.partition.num_classes, *inner)
        if tuple(centers.shape) != expected:
            raise ValueError(f"class centers have shape {tuple(centers.shape)}, but must have {expected}")
        # As they will be stored: a number may be too large or too small for 16 bits.
        lengths = centers.to(self.class_centers.weight.dtype).to(self.dtype).norm(dim=-1)
        if not bool(lengths.isfinite().all()):
            raise ValueError(f"class centers have numbers that are not finite in {self.class_centers.weight.dtype}")
        if self.margin.compares_cosines and not bool(lengths.all()):
            # Its first gradient would be so large that it never moves again.
            place = tuple((lengths == 0).nonzero()[0].tolist())
            raise ValueError(f"class center {place} is zero, but a cosine needs a direction; draw it at random instead")
        self.class_centers.set(centers.reshape(-1, num_subcenters, dim))
        self._forget_steps()

    def diagnostics(self) -> dict[str, float]:
        """What there is to see of the last step: margin state, learned numbers, terms of the loss. Synchronises."""
        values = {**self.margin_state, **self.statistics}
        if self.learned is not None:
            values |= self.learned.values()
        return {name: float(value) for name, value in values.items()}

    @property
    def margin_remembers(self) -> bool:
        """Whether the margin has state, or numbers that are learned."""
        return bool(self.margin_state) or self.learned is not None or self.class_bias is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and everything that is computed: float32, or float64 if class centers are stored in that."""
        return self.class_centers.working_dtype

    def label_rows(self, labels: Tensor) -> Tensor:
        """Labels as [b, P] whatever P is."""
        return labels if self.labels_per_row > 1 else labels[:, None]

    def classes_in_play(self, labels_V: Tensor) -> ClassesInPlay:
        """The classes of this rank that take part in the coming step."""
        if self.sampler is None:
            return all_in_play(labels_V, self.partition)
        return self.sampler.in_play(labels_V, self.partition, self.step)

    def drawn_next(self) -> Tensor:
        """[n] int64, on the CPU: the rows that the coming step draws, besides those of its batch."""
        assert self.sampler is not None
        rows = self.sampler.in_play(torch.empty(0, dtype=torch.int64, device="cpu"), self.partition, self.step).rows
        assert rows is not None
        return rows

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.class_centers.device

    def _on_device(self, state: State) -> State:
        return {name: value.to(self.device) for name, value in state.items()}

    def _apply(self, function: Any, recurse: bool = True) -> PartialFC:
        stored = self.class_centers.weight.dtype
        others = [dtype for dtype in (stored, self.dtype) if function(torch.zeros(1, dtype=dtype)).dtype != dtype]
        if others:
            asked = function(torch.zeros(1, dtype=others[0])).dtype
            raise ValueError(
                f"the head was asked to convert itself to {asked}, but its class centers stay in {stored}: rounded to "
                "the nearest 16-bit number they would lose the small steps of training, weight decay first; build it "
                "with dtype=torch.float16 for 16 bits with stochastic rounding"
            )
        # The margin's state stays float64, but follows the class centers to another device.
        super()._apply(function, recurse)
        self.margin_state = self._on_device(self.margin_state)
        return self

    def _check_batch(self, embeddings: Tensor, labels: Tensor) -> None:
        dim = self.class_centers.weight.shape[-1]
        if embeddings.ndim != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
            raise ValueError(
                f"embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}, but must be floating [b, {dim}]"
            )
        inner = (self.labels_per_row,) if self.labels_per_row > 1 else ()
        expected = (len(embeddings), *inner)
        if tuple(labels.shape) != expected or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}, but must be torch.int64 of shape "
                f"{expected}, {'one' if not inner else f'{self.labels_per_row} (padded with -1)'} for each embedding"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """The step and the margin's state, for the state dict."""
        return {"step": self.step, "margin": dict(self.margin_state)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what `get_extra_state` gave.

        Raises:
            ValueError: if the state is that of another margin.
        """
        if state["margin"].keys() != self.margin_state.keys():
            raise ValueError(
                f"the saved margin state has {sorted(state['margin'])}, but {type(self.margin).__name__} has "
                f"{sorted(self.margin_state)}; load it into the margin that it was saved from"
            )
        self.step = int(state["step"])
        self._forget_steps()
        self.margin_state = self._on_device(state["margin"])
