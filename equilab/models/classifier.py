"""A small convolutional classifier: the feature network of studies in which Inception's weights are not used."""

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
        channels, *grid = image
        layers = _convolution(channels, width, stride=1)
        while max(grid) > FINAL:
            layers += _convolution(width, 2 * width, stride=2) + _convolution(2 * width, 2 * width, stride=1)
            width, grid = 2 * width, [-(-side // 2) for side in grid]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(width * grid[0] * grid[1], features)
        self.logits = nn.Linear(features, classes)

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Return the features (B, features) and the logits (B, classes) of images in -1..1."""
        features = self.features(self.body(image))  # (B, features)
        return features, self.logits(F.silu(features))  # (B, features), (B, classes)


def _convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(width // 8, width), nn.SiLU()]
