"""Discriminators: heads over frozen feature networks, and StyleGAN2's from scratch.

The protocol: `discriminate(image, label)` returns a tuple of logits (B, K), one for each feature network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize, spectral_norm

from equilab.core.config import Size
from equilab.models.feature_networks import FeatureNetwork, unit_length
from equilab.models.layers import check_label
from equilab.models.unet import ConvDown, Resample

LEVELS = 4  # maps of a network that are projected, the coarsest ones
TAPS = (1, 3, 3, 1)


class Projector(nn.Module):
    """Fixed random 1x1 convolutions that mix maps across channels, then, from coarse to fine, across scales.

    Of n maps, the result i has channels * (1, 1, 2, 4, ...)[i] channels and twice the side of map i.

    Source: Projected GANs (Sauer 2021), section 3.2; weights are drawn as torch's layers draw them.
    Differs: convolves before it interpolates instead of after, which is the same for a quarter of the work.
    """

    def __init__(self, widths: Sequence[int], channels: int):
        super().__init__()
        mixed = [channels * 2**level for level in range(len(widths))]
        outputs = [channels, *mixed[:-1]]
        self.across_channels = nn.ModuleList(nn.Conv2d(cin, cout, 1) for cin, cout in zip(widths, mixed))
        self.across_scales = nn.ModuleList(nn.Conv2d(cin, cout, 1) for cin, cout in zip(mixed, outputs))
        self.requires_grad_(False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the projected maps, the finest first."""
        height, width = maps[0].shape[2:]
        sizes = [(2 * height, 2 * width)]
        sizes += [x.shape[2:] for x in maps[:-1]]
        projected, coarser = [], 0
        for k in reversed(range(len(maps))):
            x = self.across_scales[k](self.across_channels[k](maps[k]) + coarser)  # (B, C', H, W)
            coarser = F.interpolate(x, sizes[k], mode="bilinear", align_corners=True)  # (B, C', 2H, 2W)
            projected.insert(0, coarser)
        return projected


class Condition(nn.Module):
    """Turns `channels` maps of logits into one by an inner product with a projected class embedding.

    Source: projection discriminator (Miyato 2018), equation (3); sizes as StyleGAN-XL (Sauer 2022), section 3.2.
    Differs: the published embeddings start at EfficientNet's of ImageNet's classes, whatever the data; ours at normals.
    """

    def __init__(self, classes: int, embedding: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.projection = equalised(nn.Linear(embedding, channels))

    def forward(self, logits: Float[Tensor, "b c h w"], label: Int64[Tensor, b]) -> Float[Tensor, "b 1 h w"]:
        """Return the logits of the labels' classes."""
        weight = _activate(self.projection(self.embedding(label)))[:, :, None, None]  # (B, C, 1, 1)
        return (logits * weight).sum(1, keepdim=True) / math.sqrt(logits.shape[1])  # (B, 1, H, W)


class Head(nn.Module):
    """Logits of a map: `halvings` convolutions of stride 2, spectrally and batch-normalised, then one of 4x4.

    The last convolution of stride 2 has `width` channels, each before it half of that, down to an eighth.

    Source: Projected GANs (Sauer 2021), section 4.1 and appendix: discriminator architecture; published width 512.
    """

    def __init__(
        self, channels: int, halvings: int, classes: int, *, width: int, embedding: int, condition: int
    ):
        super().__init__()
        self.halve = nn.Sequential()
        for k in reversed(range(halvings)):
            halved = max(width >> k, width // 8)
            convolution = spectral_norm(nn.Conv2d(channels, halved, 4, 2, 1))
            self.halve.append(nn.Sequential(convolution, nn.BatchNorm2d(halved), nn.LeakyReLU(0.2, True)))
            channels = halved
        self.logits = spectral_norm(nn.Conv2d(channels, condition if classes else 1, 4, bias=False))
        self.condition = Condition(classes, embedding, condition) if classes else None

    def forward(
        self, x: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None
    ) -> Float[Tensor, "b 1 h2 w2"]:
        """Return the logits of a map."""
        logits = self.logits(self.halve(x))  # (B, 1 or condition, H', W')
        return self.condition(logits, label) if self.condition else logits


class FeatureDiscriminator(nn.Module):
    """Heads over the maps of frozen feature networks; (B, K) logits for each network.

    `mixing`: "projected", the four coarsest maps of each network after a Projector (Projected GAN); "each",
    every map, scaled to unit length across channels as LPIPS compares them; "last", the coarsest map alone
    (plain VGG16). Images are resized to `side` once for all networks (published 224). A head halves its map
    until it is no larger than the network's coarsest. `channels` is the Projector's (published 64), `width`
    the heads' (published 512); `embedding` and `condition` (published 320, 64) are the sizes of class
    embeddings and of what these multiply.

    Raises: ValueError for sizes that do not fit, or if a network cannot take the images.
    Source: GDD (Zheng 2024), section 3.2, equation (4) and table 1a.
    Differs: the paper says which features VGG16 and LPIPS discriminators see, not what classifies them; here
        the same heads do.
    """

    def __init__(
        self,
        networks: Sequence[FeatureNetwork],
        image: tuple[int, int, int],
        classes: int,
        *,
        mixing: Literal["projected", "each", "last"],
        side: Size,
        channels: Size,
        width: Annotated[int, Field(ge=8, le=16_384)],
        embedding: Size,
        condition: Size,
    ):
        super().__init__()
        self.classes, self.mixing, self.side = classes, mixing, side
        sizes = {"width": width, "embedding": embedding, "condition": condition}
        self.networks = nn.ModuleList(networks)
        self.projectors = nn.ModuleList()
        self.heads = nn.ModuleList()
        for k, network in enumerate(networks):
            maps = network.probe((image[0], side, side))
            coarsest = maps[-1].shape[3]
            if coarsest < 4:
                raise ValueError(
                    f"the maps of {network.name} end at {coarsest}x{coarsest}, give a `side` to reach 4x4"
                )
            if mixing == "projected":
                self.projectors.append(Projector([x.shape[1] for x in maps[-LEVELS:]], channels))
            heads = nn.ModuleList()
            for x in self.mix(k, maps):
                halvings = (x.shape[3] // coarsest).bit_length() - 1
                heads.append(Head(x.shape[1], halvings, classes, **sizes))
            self.heads.append(heads)

    def forward(self, image: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None) -> tuple[Tensor, ...]:
        """Return the logits (B, K) of images in -1..1, for each feature network.

        Raises: ValueError if a label is missing, or given to an unconditional discriminator.
        """
        check_label(label, self.classes)
        if image.shape[2:] != (self.side, self.side):
            image = F.interpolate(image, (self.side, self.side), mode="bilinear")  # (B, C, side, side)
        logits = []
        for k, (network, heads) in enumerate(zip(self.networks, self.heads)):
            maps = self.mix(k, network.features(image))
            each = [head(x, label).flatten(1) for head, x in zip(heads, maps)]
            logits.append(torch.cat(each, 1))  # (B, K)
        return tuple(logits)

    def mix(self, network: int, maps: list[Tensor]) -> list[Tensor]:
        """Return what the heads see of the maps of a network, given by its position."""
        if self.mixing == "projected":
            return self.projectors[network](maps[-LEVELS:])
        if self.mixing == "last":
            return maps[-1:]
        return [unit_length(x) for x in maps]


class StyleGAN2(nn.Module):
    """StyleGAN2's residual discriminator, to be trained from scratch; one logit (B, 1).

    `width` channels at every resolution, as published for images of up to 64 pixels, where it is 512.

    Raises: ValueError for images that are not square or cannot be halved down to 4x4.
    Source: StyleGAN2 (Karras 2020), section 4.1, "residual" discriminator; equalised learning rates and the
        standard deviation over minibatches of progressive GANs (Karras 2018), sections 3 and 4.1.
    """

    def __init__(
        self, image: tuple[int, int, int], classes: int, *, width: Size, embedding: Size, condition: Size
    ):
        super().__init__()
        halvings = (image[1] // 4).bit_length() - 1
        if image[1] != image[2] or image[1] != 4 << max(halvings, 0):
            raise ValueError(
                f"image is {image}, which cannot be halved down to 4x4; give a square of 4, 8, 16, 32..."
            )
        self.classes = classes
        self.stem = equalised(nn.Conv2d(image[0], width, 1))
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(halvings)))
        self.mix = equalised(nn.Conv2d(width + 1, width, 3, padding=1))
        self.linear = equalised(nn.Linear(16 * width, width))
        self.logits = equalised(nn.Linear(width, condition if classes else 1))
        self.condition = Condition(classes, embedding, condition) if classes else None

    def forward(self, image: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None) -> tuple[Tensor]:
        """Return the logit (B, 1) of images, as a tuple of one.

        Raises: ValueError if a label is missing, or given to an unconditional discriminator.
        """
        check_label(label, self.classes)
        x = self.blocks(_activate(self.stem(image)))  # (B, D, 4, 4)
        x = _activate(self.mix(minibatch_deviation(x)))  # (B, D, 4, 4)
        logits = self.logits(_activate(self.linear(x.flatten(1))))  # (B, 1 or condition)
        if self.condition:
            logits = self.condition(logits[:, :, None, None], label).flatten(1)  # (B, 1)
        return (logits,)


class Residual(nn.Module):
    """Two 3x3 convolutions, the second blurred and with stride 2, and a 1x1 skip connection; halves the side."""

    def __init__(self, width: int):
        super().__init__()
        self.conv0 = equalised(nn.Conv2d(width, width, 3, padding=1))
        self.conv1 = equalised(ConvDown(width, width, 3, "down", TAPS))
        self.skip = nn.Sequential(Resample("down", TAPS), equalised(nn.Conv2d(width, width, 1, bias=False)))

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Return the map at half the side."""
        h = _activate(self.conv1(_activate(self.conv0(x))))  # (B, D, H/2, W/2)
        return (h + self.skip(x)) * math.sqrt(0.5)


def minibatch_deviation(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d+1 h w"]:
    """Return x with a channel more: the standard deviation over groups of samples, averaged over the whole map.

    A group has 4 samples (as published), or 2 or 1 where the batch is not a multiple: sample i, i + B/4, ...

    Source: progressive GANs (Karras 2018), section 3; groups as StyleGAN2.
    """
    groups = x.unflatten(0, (math.gcd(len(x), 4), -1))  # (G, B/G, D, H, W)
    deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (B/G,)
    deviation = deviation.repeat(len(groups))[:, None, None, None]  # (B, 1, 1, 1)
    return torch.cat([x, deviation.expand(-1, 1, *x.shape[2:])], 1)  # (B, D + 1, H, W)


class Scaled(nn.Module):
    """Multiplies a weight by a constant."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the scaled weight."""
        return self.scale * weight


def equalised(layer: nn.Module) -> nn.Module:
    """Return the layer with a weight that is a unit normal over sqrt(fan-in) and learns as the normal: equal rates.

    Source: progressive GANs (Karras 2018), section 4.1.
    """
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    parametrize.register_parametrization(layer, "weight", Scaled(layer.weight[0].numel() ** -0.5))
    return layer


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)
