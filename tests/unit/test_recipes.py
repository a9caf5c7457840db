"""Every recipe in configs/ is valid, builds, and keeps the published settings that it claims to mirror."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from partialfc import PartialFC
from partialfc.backbones import build_backbone
from partialfc.config import Config, load_config
from partialfc.margins import ArcFace, CosFace
from partialfc.optim import build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "faces.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path: Path) -> None:
    config = load_config(path)
    size = config.data.image_size
    backbone = build_backbone(
        config.backbone.name,
        embedding_dim=config.backbone.embedding_dim,
        image_size=size,
        **config.backbone.options,
    )
    with torch.no_grad():
        embeddings = backbone.eval()(torch.zeros(1, 3, size, size))
    assert embeddings.shape == (1, config.backbone.embedding_dim)
    optimizer = build_optimizer(
        backbone,
        name=config.optimizer.name,
        learning_rate=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        betas=config.optimizer.betas,
        decay_norms=config.optimizer.decay_norms,
    )
    assert optimizer.param_groups[0]["lr"] == config.optimizer.learning_rate
    head = PartialFC(
        num_classes=100,
        embedding_dim=config.backbone.embedding_dim,
        margin=config.head.margin,
        sample_rate=config.head.sample_rate,
        optimizer=config.head.center_optimizer,
    )
    loss = head(torch.randn(4, config.backbone.embedding_dim, requires_grad=True), torch.arange(4))
    loss.backward()
    assert loss.isfinite()


def test_there_is_a_recipe_for_each_published_set() -> None:
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "ms1mv3_iresnet100", "glint360k_iresnet100", "webface42m_iresnet100"} <= names


def _published(config: Config) -> tuple[float, float, float, int, float, float]:
    assert config.head.center_optimizer.learning_rate == config.optimizer.learning_rate
    return (
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
        config.training.epochs,
        config.training.global_batch_size,
        config.head.sample_rate,
        config.training.warmup_epochs,
    )


def test_published_settings() -> None:
    ms1mv3 = load_config(CONFIGS / "ms1mv3_iresnet100.yaml")
    assert _published(ms1mv3) == (0.2, 5e-4, 25, 1024, 1.0, 0)
    assert ms1mv3.head.margin == ArcFace(scale=64.0, margin=0.5, gradient="detached", tail="none")
    glint = load_config(CONFIGS / "glint360k_iresnet100.yaml")
    assert _published(glint) == (0.1, 1e-4, 20, 1024, 1.0, 0)
    assert glint.head.margin == CosFace(scale=64.0, margin=0.4)
    webface = load_config(CONFIGS / "webface42m_iresnet100.yaml")
    assert _published(webface) == (0.3, 5e-4, 20, 4096, 0.2, 1)
    vit = load_config(CONFIGS / "webface42m_vit_base.yaml")
    assert _published(vit) == (1e-3, 0.1, 40, 24576, 0.3, 4)
