"""A small network, its data and its training, for the tests of engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.distributed.mesh import ShardMesh
from partialfc.engine import BackboneEngine, EngineSettings, build_engine
from partialfc.engine.portioned import whole
from partialfc.head import HeadGroup, PartialFC
from partialfc.keyed import normal, randint
from partialfc.margins import ArcFace
from partialfc.optim import build_optimizer

# 22 divides neither by 2 * 2 nor by 3: shards are uneven, and one has padding.
WIDTH, DIM, NUM_CLASSES, SIZE, BATCH, STEPS = 22, 7, 40, 4, 24, 10
# Name and stage of ZeRO.
ENGINES = {"ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2), **{f"zero{stage}": ("deepspeed", stage) for stage in (1, 2, 3)}}


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, *, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(self.dropout(torch.tanh(self.first(self.norm(features)))))


class Network(nn.Module):
    """Images [b, 3, 4, 4] -> embeddings [b, 7]. No layer looks across the batch, unless it has batch norm."""

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * SIZE**2, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout=dropout, batch_norm=batch_norm) for _ in range(2))
        self.last = nn.Linear(WIDTH, DIM)
        self.frozen = nn.Parameter(torch.full((DIM,), 1.5), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images.flatten(1))
        for block in self.blocks:
            features = block(features)
        embeddings: Tensor = self.last(features) * self.frozen
        return embeddings


@dataclass(frozen=True)
class Case:
    """One way to train it."""

    engine: str = "ddp"
    optimizer: str = "sgd"
    head: bool = True
    network: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, mesh: ShardMesh) -> BackboneEngine:
        torch.manual_seed(0)
        name, stage = ENGINES[self.engine]
        # Clipping is active in most steps.
        settings = EngineSettings(**{"max_gradient_norm": 2.0, "zero_stage": stage, **self.settings})
        rate = 0.1
        make_optimizer = partial(
            build_optimizer, name=self.optimizer, learning_rate=rate, weight_decay=0.01, decay_norms=False
        )
        network = Network(**self.network)
        return build_engine(name, network, make_optimizer=make_optimizer, mesh=mesh, settings=settings)

    @property
    def learning_rate(self) -> float:
        return {"sgd": 0.1, "adamw": 0.003}[self.optimizer]


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(BATCH)
    images = normal(1, step, rows[:, None], torch.arange(3 * SIZE**2)[None]).float().view(BATCH, 3, SIZE, SIZE)
    return images, randint(NUM_CLASSES, 2, step, rows)


def build_heads(mesh: ShardMesh, *, defers_updates: bool = False) -> HeadGroup:
    head = PartialFC(
        NUM_CLASSES, DIM, margin=ArcFace(scale=16.0), sample_rate=0.5, seed=5, init_std=1.0, process_group=mesh.group
    )
    head.learning_rate = 0.1
    heads = HeadGroup({"main": head})
    heads.defers_updates = defers_updates
    return heads


def train_step(
    engine: BackboneEngine, heads: HeadGroup, mesh: ShardMesh, step: int, *, rate: float, poison: float | None = None
) -> tuple[float, float, bool]:
    """(loss, gradient norm, whether the backbone moved). `poison` is put into an image of the last rank."""
    torch.manual_seed(100 * step + mesh.rank)
    images, labels = (part.tensor_split(mesh.size)[mesh.rank] for part in global_batch(step))
    if poison is not None and mesh.rank == mesh.size - 1:
        images = images.clone()
        images[0, 0, 0, 0] = poison
    loss = heads(engine.forward(images), {"main": labels})
    engine.backward(loss)
    outcome = engine.step(learning_rate=rate)
    if heads.defers_updates:
        heads.finish_update(outcome.updated)
    return float(loss.detach()), outcome.gradient_norm, outcome.updated


def flattened(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf by its path; tensors as they are on one rank. Collective."""
    leaves: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            leaves |= flattened(value, f"{prefix}{key}/")
        else:
            leaves[prefix + key] = whole(value.detach()).clone() if isinstance(value, Tensor) else value
    return leaves


def trained(case: Case, mesh: ShardMesh, *, steps: int = STEPS) -> dict[str, Tensor]:
    """What a run comes to: losses, gradient norms, class centers, and all that the engine would save."""
    engine, heads = case.build(mesh), build_heads(mesh)
    records = [train_step(engine, heads, mesh, step, rate=case.learning_rate) for step in range(steps)]
    assert all(updated for _, _, updated in records)
    return {
        "losses": torch.tensor([loss for loss, _, _ in records]),
        "norms": torch.tensor([norm for _, norm, _ in records]),
        "centers": heads["main"].gather_class_centers(),
        **flattened(engine.state_dict()),
    }


def largest_difference(results: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """Over all tensors, of the largest elementwise difference in units of the tensor's largest element."""
    assert results.keys() == expected.keys()
    differences = []
    for name, value in expected.items():
        value, result = torch.as_tensor(value).double(), torch.as_tensor(results[name]).double()
        assert result.shape == value.shape, name
        scale = float(value.abs().max()) or 1.0
        differences.append((float((result - value).abs().max()) / scale, name))
    return max(differences)
