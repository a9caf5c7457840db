"""How often the samples of a data set are seen: the choices of a configuration, each of which makes a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from partialfc.data.identity_plan import IdentityPlan
from partialfc.data.index import ShardIndex
from partialfc.data.joined import JoinedIndex
from partialfc.data.plan import Plan, SamplePlan
from partialfc.data.weighted_plan import RepeatPlan, WeightedPlan

__all__ = ["SAMPLINGS", "Balanced", "IdentityGroups", "RepeatRare", "Sampling", "Shuffled", "Weighted"]


class Sampling(ABC):
    """A way to draw samples."""

    @abstractmethod
    def plan(self, index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int) -> Plan:
        """The order that this gives for a data set.

        Args:
            index: the data set.
            seed: key of the order.
            global_batch: samples of a step over all ranks.

        Raises:
            ValueError: if the data set or the batch does not go with it.
        """


@dataclass(frozen=True)
class _Windowed(Sampling):
    """Reads stay local: `lanes` places are read side by side, and `window` samples of each are shuffled together."""

    lanes: int = 64
    window: int = 65536

    def __post_init__(self) -> None:
        for name in ("lanes", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True)
class Shuffled(_Windowed):
    """Each sample once an epoch."""

    def plan(self, index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int) -> Plan:
        """See `Sampling.plan`."""
        return SamplePlan(index.shard_sizes, seed=seed, lanes=self.lanes, window=self.window)


@dataclass(frozen=True)
class Weighted(_Windowed):
    """Each sample as often as its weight in the index says, rounded down or up in each epoch."""

    def plan(self, index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int) -> Plan:
        """See `Sampling.plan`."""
        if index.weights is None:
            raise ValueError(
                f"{index.directory} has no weights; pack it from a list with a column `weight`, or use another sampling"
            )
        return WeightedPlan(index.weights, seed=seed, lanes=self.lanes, window=self.window)


@dataclass(frozen=True)
class RepeatRare(_Windowed):
    """The images of an identity with fewer than `at_least` are repeated in each epoch, until there are as many."""

    at_least: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_least < 1:
            raise ValueError(f"at_least is {self.at_least}, but must be at least 1")

    def plan(self, index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int) -> Plan:
        """See `Sampling.plan`."""
        return RepeatPlan(
            index.labels, index.label_starts, at_least=self.at_least, seed=seed, lanes=self.lanes, window=self.window
        )


@dataclass(frozen=True)
class Balanced(Sampling):
    """Each identity equally often, however many images it has."""

    def plan(self, index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int) -> Plan:
        """See `Sampling.plan`."""
        return IdentityPlan(index.label_starts, index.by_label, seed=seed)


@dataclass(frozen=True)
class IdentityGroups(Sampling):
    """P x K: each global batch is of P different identities with `images_per_identity` = K images each."""

    images_per_identity: int = 4

    def __post_init__(self) -> None:
        if self.images_per_identity < 1:
            raise ValueError(f"images_per_identity is {self.images_per_identity}, but must be at least 1")

    def plan(self, index: ShardIndex | JoinedIndex, *, seed: int, global_batch: int) -> Plan:
        """See `Sampling.plan`."""
        identities, rest = divmod(global_batch, self.images_per_identity)
        if rest:
            raise ValueError(
                f"a global batch of {global_batch} does not consist of whole groups of images_per_identity="
                f"{self.images_per_identity}; make it a multiple"
            )
        return IdentityPlan(
            index.label_starts,
            index.by_label,
            seed=seed,
            images_per_identity=self.images_per_identity,
            identities_per_batch=identities,
        )


SAMPLINGS: dict[str, type[Sampling]] = {
    "shuffled": Shuffled,
    "balanced": Balanced,
    "identity_groups": IdentityGroups,
    "weighted": Weighted,
    "repeat_rare": RepeatRare,
}
