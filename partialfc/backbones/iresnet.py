"""The residual network of face recognition, IResNet.

Deng et al., "ArcFace" (CVPR 2019), section 3.1, after He et al., "Identity mappings in deep residual networks" (ECCV
2016): a stem that keeps the resolution, four stages that halve it, PReLU, and a linear layer on the whole last map,
because aligned faces have an eye at the same place. Parameter names are those of the weights published for
`arcface_torch`, so that these load.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from partialfc.backbones.embedding import (
    check_count,
    check_images,
    check_probability,
    check_sizes,
    embedding_norm,
    features_to_embedding,
)

__all__ = ["IBasicBlock", "IResNet"]


class IBasicBlock(nn.Module):
    """BN - conv 3x3 - BN - PReLU - conv 3x3 (stride) - BN, added to its input (through a 1x1 conv and BN if resized).

    Args:
        in_channels: of the input [b, in_channels, h, w].
        channels: of the output [b, channels, h / stride, w / stride].
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """[b, in_channels, h, w] -> [b, channels, h / stride, w / stride]."""
        residual = self.prelu(self.bn2(self.conv1(self.bn1(features))))
        residual = self.bn3(self.conv2(residual))
        return residual + self.downsample(features)


class IResNet(nn.Module):
    """Images in [-1, 1] to embeddings.

    Args:
        blocks: number of blocks in each of the four stages.
        embedding_dim: dimension of the embedding.
        image_size: side of the square images in pixels, a multiple of 16.
        width: channels of the stem and the first stage; the stages have width * (1, 2, 4, 8).
        dropout: probability with which an element of the last map is dropped in training. Drawn from torch's generator
            of the process, so a run with it depends on the number of ranks.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self, blocks: Sequence[int], *, embedding_dim: int, image_size: int, width: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(embedding_dim=embedding_dim, image_size=image_size, multiple_of=16)
        check_count("width", width)
        check_probability("dropout", dropout)
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.layer1 = _stage(width, width, blocks[0])
        self.layer2 = _stage(width, 2 * width, blocks[1])
        self.layer3 = _stage(2 * width, 4 * width, blocks[2])
        self.layer4 = _stage(4 * width, 8 * width, blocks[3])
        self.bn2 = nn.BatchNorm2d(8 * width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * width * (image_size // 16) ** 2, embedding_dim)
        self.features = embedding_norm(embedding_dim)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Draws the convolutions from N(0, 0.1^2).

        A batch norm follows each of them, so their scale changes no output, only how fast a learning rate turns them.
        This is the scale that the learning rates of published recipes were tuned with.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, image_size, image_size] in [-1, 1] -> [b, embedding_dim], not normalised."""
        check_images(images, self.image_size)
        features = self.prelu(self.bn1(self.conv1(images)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        features = self.dropout(self.bn2(features)).flatten(1)
        return features_to_embedding(features, self.fc, self.features)


def _stage(in_channels: int, channels: int, num_blocks: int) -> nn.Sequential:
    """Blocks of which the first halves the resolution."""
    first = IBasicBlock(in_channels, channels, stride=2)
    return nn.Sequential(first, *(IBasicBlock(channels, channels, stride=1) for _ in range(1, num_blocks)))
