"""Vision transformers for aligned faces: Dosovitskiy et al., "An image is worth 16x16 words" (ICLR 2021).

Widths and depths are those that face recognition publishes results for. There is no class token: an aligned face has
each part at its own place, so all tokens are laid side by side and go through one linear layer, which can weigh each
place by itself, as the last layer of IResNet does. A mean over the tokens would give that up.

Shapes: b batch, t tokens, d width, h attention heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.backbones.embedding import (
    check_count,
    check_images,
    check_probability,
    check_sizes,
    embedding_norm,
    features_to_embedding,
)

__all__ = ["TransformerBlock", "VisionTransformer"]

_HEAD_DIM = 64
_MLP_RATIO = 4


class DropPath(nn.Module):
    """Leaves out a residual branch for single samples in training (Huang et al., "Stochastic depth", ECCV 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch_btd: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d], of the same mean."""
        if not self.training or self.probability == 0.0:
            return branch_btd
        keep = 1.0 - self.probability
        mask = branch_btd.new_empty(len(branch_btd), 1, 1).bernoulli_(keep)
        return branch_btd * (mask / keep)


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each on a layer norm of its input and added to it ("pre-norm").

    Args:
        width: d, a multiple of 64, which is the width of an attention head.
        drop_path: probability of leaving out a branch.
    """

    def __init__(self, width: int, *, drop_path: float) -> None:
        super().__init__()
        self.num_heads = width // _HEAD_DIM
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, _MLP_RATIO * width), nn.GELU(), nn.Linear(_MLP_RATIO * width, width))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        tokens_btd = tokens_btd + self.drop_path(self._attention(self.norm1(tokens_btd)))
        return tokens_btd + self.drop_path(self.mlp(self.norm2(tokens_btd)))

    def _attention(self, tokens_btd: Tensor) -> Tensor:
        qkv = self.qkv(tokens_btd).unflatten(-1, (3, self.num_heads, _HEAD_DIM))
        query_bhte, key_bhte, value_bhte = qkv.permute(2, 0, 3, 1, 4)
        attended_bhte = F.scaled_dot_product_attention(query_bhte, key_bhte, value_bhte)
        projected: Tensor = self.proj(attended_bhte.transpose(1, 2).flatten(2))
        return projected


class VisionTransformer(nn.Module):
    """Images in [-1, 1] to embeddings. AdamW with warm-up is what transformers are usually trained with.

    With `final_norm="none"` no layer looks across the batch, so a batch in parts gives what the whole batch gives: the
    network for comparisons to the last digit.

    Args:
        width: d, the dimension of a token, a multiple of 64.
        depth: number of blocks.
        embedding_dim: dimension of the embedding.
        image_size: side of the square images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels. Default: 8 for images below 160 pixels, else 16, which makes 196 tokens
            of a face of 112 pixels.
        drop_path: probability of leaving out a branch of the last block; it grows linearly from 0 at the first. Drawn
            from torch's generator of the process, so a run with it depends on the number of ranks.
        final_norm: "batch" for a batch norm on the embedding, "none" for none.

    Raises:
        ValueError: if an argument is out of its range or `final_norm` unknown.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        embedding_dim: int,
        image_size: int,
        patch_size: int | None = None,
        drop_path: float = 0.0,
        final_norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        assert width % _HEAD_DIM == 0
        if patch_size is None:
            patch_size = 8 if image_size < 160 else 16
        check_count("patch_size", patch_size)
        check_sizes(embedding_dim=embedding_dim, image_size=image_size, multiple_of=patch_size)
        check_probability("drop_path", drop_path)
        if final_norm not in ("batch", "none"):
            raise ValueError(f'final_norm is {final_norm!r}, but must be "batch" or "none"')
        self.image_size = image_size
        num_tokens = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, num_tokens, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, drop_path=drop_path * index / max(1, depth - 1)) for index in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(num_tokens * width, embedding_dim, bias=final_norm == "none")
        self.features: nn.Module = embedding_norm(embedding_dim) if final_norm == "batch" else nn.Identity()
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Draws weights from N(0, 0.02^2) cut at two deviations; the last layer keeps the variance; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position_embedding, std=0.02, a=-0.04, b=0.04)
        nn.init.normal_(self.fc.weight, std=1.0 / math.sqrt(self.fc.in_features))

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, image_size, image_size] in [-1, 1] -> [b, embedding_dim], not normalised."""
        check_images(images, self.image_size)
        tokens_btd = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position_embedding
        for block in self.blocks:
            tokens_btd = block(tokens_btd)
        return features_to_embedding(self.norm(tokens_btd).flatten(1), self.fc, self.features)
