"""Which sample is seen when, if identities take turns instead of images: class-balanced and P x K sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from partialfc.data.joined import Column
from partialfc.data.plan import Draws, check_positions
from partialfc.keyed import KeyedPermutation, hash64

__all__ = ["IdentityPlan"]

_CIRCLE, _CYCLE_ORDER, _IMAGE_ORDER = 11, 12, 13
_ROUNDS = 12  # As `KeyedPermutation` takes for tiny domains, which the images of an identity mostly are.


class IdentityPlan:
    """Groups of K images of one identity, and every identity equally often. K = 1 is class-balanced sampling.

    Positions [g * K, (g + 1) * K) are group g. Identities come in cycles: in each, floor(C / P) * P of the C identities
    have one group, in an order of its own. So P consecutive groups that begin at a multiple of P, which is a batch of
    P * K positions, are of P different identities. If P does not divide C, the identities left out of a cycle are the
    next ones in a keyed circle of all, so that over time each is left out equally often.

    An identity with n images hands them out in passes of n, each image once, without end. A group of K <= n images
    holds no image twice: an order of the images is kept until the end of a pass is the end of a group. If K > n,
    images repeat within a group, and their `visits` tell them apart.

    Args:
        label_starts: int64 [C + 1]: label c has the samples by_label[label_starts[c] : label_starts[c + 1]].
        by_label: integers [N], sample ids grouped by label.
        seed: key of the order.
        images_per_identity: K.
        identities_per_batch: P.

    Attributes:
        num_samples: stream positions of an epoch: N, an epoch is as long as the data. The stream does not
            start anew there.
        lanes: 1, as neither identities nor images are near each other.

    Raises:
        ValueError: if K or P is below 1, P exceeds C, or, when it is drawn from, a label has no sample.
    """

    def __init__(
        self,
        label_starts: Column,
        by_label: Column,
        *,
        seed: int,
        images_per_identity: int = 1,
        identities_per_batch: int = 1,
    ) -> None:
        classes = len(label_starts) - 1
        if images_per_identity < 1 or identities_per_batch < 1:
            raise ValueError(
                f"IdentityPlan: images_per_identity={images_per_identity} and "
                f"identities_per_batch={identities_per_batch}, but both must be at least 1"
            )
        if identities_per_batch > classes:
            raise ValueError(
                f"IdentityPlan: identities_per_batch is {identities_per_batch}, but there are {classes} identities, "
                "and those of a batch must differ; lower it"
            )
        self.num_samples = len(by_label)
        self.lanes = 1
        self._label_starts, self._by_label = label_starts, by_label
        self._seed, self._group_size, self._classes = seed, images_per_identity, classes
        self._left_out = classes % identities_per_batch
        self._circle = KeyedPermutation(classes)
        self._cycle_order = KeyedPermutation(classes - self._left_out)

    def draw(self, stream_positions: Tensor) -> Draws:
        """The samples at some stream positions, and how many passes over its identity's images came before.

        Args:
            stream_positions: int64, not negative, any shape and order.

        Raises:
            ValueError: if a position is negative, or a label has no sample.
        """
        positions = torch.as_tensor(stream_positions, dtype=torch.int64)
        check_positions(positions, "IdentityPlan")
        labels, turns = self._turns(positions.flatten() // self._group_size)
        starts = torch.from_numpy(np.asarray(self._label_starts[labels.numpy()], dtype=np.int64))
        sizes = torch.from_numpy(np.asarray(self._label_starts[labels.numpy() + 1], dtype=np.int64)) - starts
        if bool((sizes < 1).any()):
            raise ValueError(f"IdentityPlan: label {int(labels[sizes < 1][0])} has no sample")
        number = turns * self._group_size + positions.flatten() % self._group_size
        passes = number // sizes
        # After this many passes their end is the end of a group.
        passes_of_order = self._group_size // torch.gcd(sizes, torch.tensor(self._group_size))
        keys = hash64(self._seed, _IMAGE_ORDER, labels, passes // passes_of_order)
        places = starts + _permute(number % sizes, sizes, keys)
        ids = torch.from_numpy(np.asarray(self._by_label[places.numpy()]).astype(np.int64))
        return Draws(ids.view(positions.shape), passes.view(positions.shape))

    def _turns(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The label of each group, and how many groups the label had before."""
        cycles, slots = groups // self._cycle_order.size, groups % self._cycle_order.size
        slots = self._cycle_order(slots, hash64(self._seed, _CYCLE_ORDER, cycles))
        # Cycle c leaves out the places [c * left_out, (c + 1) * left_out) of the circle.
        places = (slots + (cycles + 1) * self._left_out) % self._classes
        times_left_out = (cycles * self._left_out - places + self._classes - 1) // self._classes
        return self._circle(places, hash64(self._seed, _CIRCLE)), cycles - times_left_out


def _permute(places: Tensor, sizes: Tensor, keys: Tensor) -> Tensor:
    """The elements at places [b] of keyed permutations of [0, size), each with a size and key of its own, int64 [b].

    What `KeyedPermutation` does for one size, on pairs in [0, left) x [0, right), of which there are at least `size`.
    """
    left_sizes = sizes.double().sqrt().ceil().long()
    right_sizes = (sizes + left_sizes - 1) // left_sizes
    elements, walking = places.clone(), torch.arange(len(places))
    while len(walking):
        left_size, right_size, key = left_sizes[walking], right_sizes[walking], keys[walking]
        left, right = elements[walking] // right_size, elements[walking] % right_size
        for number in range(_ROUNDS):
            half = right if number % 2 == 0 else left
            added = hash64((key ^ half) + (number << 32)) & (2**63 - 1)
            if number % 2 == 0:
                left = (left + added % left_size) % left_size
            else:
                right = (right + added % right_size) % right_size
        elements[walking] = left * right_size + right
        walking = walking[elements[walking] >= sizes[walking]]
    return elements
