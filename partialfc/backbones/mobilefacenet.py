"""MobileFaceNet: Chen, Liu, Gao and Han, "MobileFaceNets" (CCBR 2018), table 1.

Inverted residual bottlenecks with PReLU, and a global depthwise convolution (GDC) in place of average pooling: each
channel learns what a position of an aligned face is worth.
"""

from __future__ import annotations

from torch import Tensor, nn

from partialfc.backbones.embedding import check_count, check_images, check_sizes, embedding_norm, features_to_embedding

__all__ = ["Bottleneck", "MobileFaceNet"]

# (expansion, output channels in units of the width, blocks, stride of the first block)
_STAGES = ((2, 1, 5, 2), (4, 2, 1, 2), (2, 2, 6, 1), (4, 2, 1, 2), (2, 2, 2, 1))


class Bottleneck(nn.Module):
    """Conv 1x1 to more channels, depthwise conv 3x3 (stride), linear conv 1x1; added to its input if of one shape.

    Args:
        in_channels: of the input [b, in_channels, h, w].
        channels: of the output [b, channels, h / stride, w / stride].
        expansion: channels of the depthwise convolution in units of `in_channels`.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.layers = nn.Sequential(
            *_convolution(in_channels, inner, kernel=1),
            nn.PReLU(inner),
            *_convolution(inner, inner, kernel=3, stride=stride, padding=1, groups=inner),
            nn.PReLU(inner),
            *_convolution(inner, channels, kernel=1),
        )
        self.is_residual = stride == 1 and in_channels == channels

    def forward(self, features: Tensor) -> Tensor:
        """[b, in_channels, h, w] -> [b, channels, h / stride, w / stride]."""
        result: Tensor = self.layers(features)
        return features + result if self.is_residual else result


class MobileFaceNet(nn.Module):
    """Images in [-1, 1] to embeddings.

    Args:
        embedding_dim: dimension of the embedding; the paper has 128.
        image_size: side of the square images in pixels, a multiple of 16.
        width: channels of the stem; later layers have width * (1, 2, 8).

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, *, embedding_dim: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        check_sizes(embedding_dim=embedding_dim, image_size=image_size, multiple_of=16)
        check_count("width", width)
        self.image_size = image_size
        self.stem = nn.Sequential(
            *_convolution(3, width, kernel=3, stride=2, padding=1),
            nn.PReLU(width),
            *_convolution(width, width, kernel=3, padding=1, groups=width),
            nn.PReLU(width),
        )
        bottlenecks: list[nn.Module] = []
        in_channels = width
        for expansion, multiple, num_blocks, stride in _STAGES:
            for block in range(num_blocks):
                bottlenecks.append(
                    Bottleneck(in_channels, multiple * width, expansion=expansion, stride=stride if block == 0 else 1)
                )
                in_channels = multiple * width
        self.bottlenecks = nn.Sequential(*bottlenecks)
        channels = 8 * width
        self.pool = nn.Sequential(
            *_convolution(in_channels, channels, kernel=1),
            nn.PReLU(channels),
            *_convolution(channels, channels, kernel=image_size // 16, groups=channels),
        )
        self.fc = nn.Linear(channels, embedding_dim, bias=False)
        self.features = embedding_norm(embedding_dim)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Draws each filter so that it keeps the variance of its inputs, of which a depthwise one has few."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, image_size, image_size] in [-1, 1] -> [b, embedding_dim], not normalised."""
        check_images(images, self.image_size)
        features = self.pool(self.bottlenecks(self.stem(images))).flatten(1)
        return features_to_embedding(features, self.fc, self.features)


def _convolution(
    in_channels: int, channels: int, *, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(channels)
