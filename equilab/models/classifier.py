"""Small convolutional classifiers of two kinds: feature networks of studies in which no weights of ImageNet are used."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from equilab.core.config import Size

FINAL = 4  # pixels; the grid is halved until no side is longer


class Classifier(nn.Module):
    """Convolutions that halve the grid to at most 4x4 while they double the width, then `features`, then the logits.

    `width`: channels of the first convolution, a multiple of 8 (normalisation is over groups of 8 channels).
    `features`: length of the feature vector that distances between distributions are measured on.

    Raises: ValueError for data without classes, or a width that is not a multiple of 8.
    """

    def __init__(self, image: tuple[int, int, int], classes: int, *, width: Size, features: Size):
        super().__init__()
        if classes < 2:
            raise ValueError(
                f"a classifier needs at least 2 classes, the data has {classes}; use Inception's features"
            )
        if width < 8 or width % 8 or features < 1:
            raise ValueError(
                f"width is {width} and features {features}; give a multiple of 8 and a positive number"
            )
        layers, length = self.layers(image, width)
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(length, features)
        self.logits = nn.Linear(features, classes)

    @staticmethod
    def layers(image: tuple[int, int, int], width: int) -> tuple[list[nn.Module], int]:
        """Return the layers, of which the last makes a vector of the map, and its length."""
        channels, *grid = image
        layers = _convolution(channels, width, stride=1)
        while max(grid) > FINAL:
            layers += _convolution(width, 2 * width, stride=2) + _convolution(2 * width, 2 * width, stride=1)
            width, grid = 2 * width, [-(-side // 2) for side in grid]
        return [*layers, nn.Flatten()], width * grid[0] * grid[1]

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Return the features (B, features) and the logits (B, classes) of images in -1..1."""
        features = self.features(self.body(image))  # (B, features)
        return features, self.logits(F.silu(features))  # (B, features), (B, classes)


class ResidualClassifier(Classifier):
    """A residual block at each size of the grid, which pooling halves to at most 4x4; `features` are of the mean over the grid.

    It shares no kind of layer with `Classifier` but the convolution: averages halve the grid, not strides, and normalisation is
    over all channels. A discriminator that looks through one kind is judged by the other.

    Source: He et al. 2016, "Identity mappings in deep residual networks", figure 1b.
    """

    @staticmethod
    def layers(image: tuple[int, int, int], width: int) -> tuple[list[nn.Module], int]:
        """Return the layers, of which the last makes a vector of the map, and its length."""
        channels, *grid = image
        layers = [nn.Conv2d(channels, width, 3, padding=1), _Residual(width)]
        while max(grid) > FINAL:
            layers += [nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(width, 2 * width, 1), _Residual(2 * width)]
            width, grid = 2 * width, [-(-side // 2) for side in grid]
        return [*layers, _Mean()], width


CLASSIFIERS = {"classifier": Classifier, "residual": ResidualClassifier}  # by their kind in params


def _convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(width // 8, width), nn.SiLU()]


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv0 = nn.Conv2d(width, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.conv0(F.relu(self.norm0(x)))  # (B, C, H, W)
        return x + self.conv1(F.relu(self.norm1(h)))  # (B, C, H, W)


class _Mean(nn.Module):
    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return F.relu(x).mean((2, 3))  # (B, C)
