"""Discriminators: heads over frozen feature networks, and StyleGAN2's from scratch.

The protocol: `discriminate(image, label)` returns a tuple of logits (B, K), one for each feature network.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils import parametrize, spectral_norm

from equilab.models.classifier import Classifier
from equilab.models.layers import check_label
from equilab.models.unet import ConvDown, Resample

MIXINGS = ("projected", "each", "last")
LEVELS = 4  # maps of a network that are projected, the coarsest ones
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation of pixels in 0..1
HALF = (0.5,), (0.5,)
TAPS = (1, 3, 3, 1)


class FeatureNetwork(nn.Module):
    """A frozen network as a source of feature maps: gradients reach the images, its weights and statistics stay.

    `maps` turns images, normalised by `pixels` = (mean, standard deviation) of pixels in 0..1, into a list of maps, the
    finest first; it is taken over, and frozen.
    """

    def __init__(
        self, name: str, maps: nn.Module, channels: int, pixels: tuple[Sequence[float], Sequence[float]]
    ):
        super().__init__()
        self.name, self.channels = name, channels
        self.maps = maps.eval().requires_grad_(False)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in pixels)
        self.register_buffer("mean", 2 * mean - 1, persistent=False)  # of images in -1..1
        self.register_buffer("std", 2 * std, persistent=False)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Return the network, which stays in evaluation mode."""
        return super().train(False)

    def features(self, image: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Return the feature maps of images in -1..1, the finest first.

        Raises: ValueError for images of another number of channels than the network was trained on.
        """
        if image.shape[1] != self.channels:
            given = image.shape[1]
            raise ValueError(
                f"{self.name} takes {self.channels} channels and the images have {given}; choose another"
            )
        return list(self.maps((image - self.mean) / self.std))

    @torch.no_grad()
    def probe(self, image: tuple[int, int, int]) -> list[Tensor]:
        """Return the maps of one grey image of shape (channels, height, width), by which to build what reads them.

        Raises: ValueError if the network cannot take such images.
        """
        try:
            return self.features(torch.zeros(1, *image, device=self.mean.device))
        except (AssertionError, RuntimeError) as error:
            reason = _first(error)
            raise ValueError(
                f"{self.name} cannot take images of shape {image} ({reason}); change `side`"
            ) from None


class Stages(nn.Module):
    """A chain of layers that returns its map before each layer that halves the grid, and the last one."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        stages = [[]]
        for layer in layers:
            if getattr(layer, "stride", 1) in (2, (2, 2)):
                stages.append([])
            stages[-1].append(layer)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)

    def forward(self, image: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Return the maps, the finest first."""
        maps = [image]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class Tokens(nn.Module):
    """The tokens of a vision transformer after a quarter, half, three quarters and all of its blocks, as four maps.

    Random convolutions of fixed weights make them 1/4, 1/8, 1/16 and 1/32 as wide as the image, of D/8, D/4, D/2 and D
    channels, where the tokens have D and a patch 16 pixels.

    Source: StyleGAN-XL (Sauer 2022), section 3.3, after DPT (Ranftl 2021), section 3.1; class tokens are left out.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, d = vit, vit.embed_dim
        self.blocks = [len(vit.blocks) * (k + 1) // 4 - 1 for k in range(4)]
        self.reassemble = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(d, d // 8, 1), nn.ConvTranspose2d(d // 8, d // 8, 4, 4)),
                nn.Sequential(nn.Conv2d(d, d // 4, 1), nn.ConvTranspose2d(d // 4, d // 4, 2, 2)),
                nn.Conv2d(d, d // 2, 1),
                nn.Sequential(nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 3, 2, padding=1)),
            ]
        )

    def forward(self, image: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Return the maps, the finest first."""
        grids = self.vit.forward_intermediates(
            image, indices=self.blocks, intermediates_only=True
        )  # each (B, D, h, w)
        return [convolve(grid) for convolve, grid in zip(self.reassemble, grids)]


def _vgg(name: str, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model_weights, vgg

    layers = vgg.make_layers(vgg.cfgs["D"], batch_norm=name.endswith("_bn"))
    if pretrained:
        source = get_model_weights(name)["IMAGENET1K_V1"]
        weights = _fetched(name, lambda: source.get_state_dict(check_hash=True, weights_only=True))
        part = "features."
        layers.load_state_dict(
            {key.removeprefix(part): w for key, w in weights.items() if key.startswith(part)}
        )
    return Stages(list(layers)[:-1])  # without the last pooling


def _timm(name: str, pretrained: bool, **options) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"feature network {name!r} needs timm, which is not there; install it with `pip install timm`"
        ) from None
    return _fetched(name, lambda: timm.create_model(name, pretrained=pretrained, **options))


def _fetched(name: str, fetch: Callable[[], object]):
    try:
        return fetch()
    except Exception as error:  # each library has its own errors for a network or a file that fails
        reason = _first(error)
        raise ValueError(
            f"weights of {name} cannot be had ({reason}); go online once, or use a classifier"
        ) from None


def _efficientnet(name: str, pretrained: bool) -> nn.Module:
    return _timm(name, pretrained, features_only=True, out_indices=(1, 2, 3, 4))


def _deit(name: str, pretrained: bool) -> nn.Module:
    return Tokens(_timm(name, pretrained, num_classes=0))


# name -> its builder and the pixels it was trained on
NETWORKS: dict[str, tuple[Callable[[str, bool], nn.Module], tuple]] = {
    "vgg16": (_vgg, IMAGENET),
    "vgg16_bn": (_vgg, IMAGENET),
    "tf_efficientnet_lite0": (_efficientnet, HALF),
    "deit_base_distilled_patch16_224": (_deit, IMAGENET),
}


def feature_network(name: str, *, pretrained: bool) -> FeatureNetwork:
    """Return the named network, with its weights of ImageNet (fetched once, then cached) or random ones.

    Published: vgg16_bn with tf_efficientnet_lite0 for CIFAR-10, DeiT with it for the other data.

    Raises: ValueError for an unknown name, if timm is needed and missing, or if the weights cannot be fetched.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 1, 0)[0]
        raise ValueError(
            f"feature network {name!r} is unknown, choose one of {', '.join(NETWORKS)} (nearest: {near})"
        )
    build, pixels = NETWORKS[name]
    return FeatureNetwork(name, build(name, pretrained), 3, pixels)


def classifier_network(classifier: Classifier) -> FeatureNetwork:
    """Return a classifier trained on the study's own data as a feature network, which takes it over, and freezes it."""
    layers = list(classifier.body)[:-1]  # without the last, which flattens
    return FeatureNetwork("classifier", Stages(layers), layers[0].in_channels, HALF)


class Projector(nn.Module):
    """Fixed random 1x1 convolutions that mix maps across channels, then, from coarse to fine, across scales.

    Of n maps, the result i has channels * (1, 1, 2, 4, ...)[i] channels and twice the side of map i.

    Source: Projected GANs (Sauer 2021), section 3.2; weights are drawn as torch's layers draw them.
    Differs: convolves before it interpolates instead of after, which is the same for a quarter of the work.
    """

    def __init__(self, widths: Sequence[int], channels: int):
        super().__init__()
        mixed = [channels * 2**level for level in range(len(widths))]
        self.across_channels = nn.ModuleList(nn.Conv2d(cin, cout, 1) for cin, cout in zip(widths, mixed))
        self.across_scales = nn.ModuleList(nn.Conv2d(c, out, 1) for c, out in zip(mixed, [channels, *mixed]))
        self.requires_grad_(False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the projected maps, the finest first."""
        sizes = [[2 * side for side in maps[0].shape[2:]], *(x.shape[2:] for x in maps)]
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
        """Return the logits of the classes."""
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
        widths = [channels, *(max(width >> k, width // 8) for k in reversed(range(halvings)))]
        self.halve = nn.Sequential(
            *(
                nn.Sequential(
                    spectral_norm(nn.Conv2d(cin, cout, 4, 2, 1)),
                    nn.BatchNorm2d(cout),
                    nn.LeakyReLU(0.2, True),
                )
                for cin, cout in zip(widths, widths[1:])
            )
        )
        self.logits = spectral_norm(nn.Conv2d(widths[-1], condition if classes else 1, 4, bias=False))
        self.condition = Condition(classes, embedding, condition) if classes else None

    def forward(
        self, x: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None
    ) -> Float[Tensor, "b 1 h2 w2"]:
        """Return the logits of a map."""
        logits = self.logits(self.halve(x))
        return self.condition(logits, label) if self.condition else logits


class FeatureDiscriminator(nn.Module):
    """Heads over the maps of frozen feature networks; (B, K) logits for each network.

    `mixing`: "projected", the four coarsest maps of each network after a Projector (Projected GAN); "each", every map,
    scaled to unit length across channels as LPIPS compares them; "last", the coarsest map alone (plain VGG16).
    Images are resized to `side` once for all networks (published 224). A head halves its map until it is no larger than
    the network's coarsest. `channels` is the Projector's (published 64), `width` the heads' (published 512);
    `embedding` and `condition` (published 320, 64) are the sizes of class embeddings and of what these multiply.

    Raises: ValueError for sizes that do not fit, or if a network cannot take the images.
    Source: GDD (Zheng 2024), section 3.2, equation (4) and table 1a.
    Differs: of VGG16 and LPIPS discriminators the paper says which features they see, not what judges these; here the
        same heads do.
    """

    def __init__(
        self,
        networks: Sequence[FeatureNetwork],
        image: tuple[int, int, int],
        classes: int,
        *,
        mixing: str,
        side: int,
        channels: int,
        width: int,
        embedding: int,
        condition: int,
    ):
        super().__init__()
        if mixing not in MIXINGS:
            raise ValueError(f"mixing {mixing!r} is unknown; choose one of {', '.join(MIXINGS)}")
        if width < 8 or min(side, channels, embedding, condition, len(networks)) < 1:
            raise ValueError(
                f"width is {width}, give at least 8; and at least 1 for the other sizes and the networks"
            )
        self.classes, self.mixing, self.side = classes, mixing, side
        self.networks, self.projectors, self.heads = nn.ModuleList(networks), nn.ModuleList(), nn.ModuleList()
        for network in networks:
            maps = network.probe((image[0], side, side))
            coarsest = maps[-1].shape[3]
            if coarsest < 4:
                raise ValueError(
                    f"the maps of {network.name} end at {coarsest}x{coarsest}, give a `side` to reach 4x4"
                )
            if mixing == "projected":
                self.projectors.append(Projector([x.shape[1] for x in maps[-LEVELS:]], channels))
            sizes = [
                (x.shape[1], (x.shape[3] // coarsest).bit_length() - 1)
                for x in self._mix(len(self.heads), maps)
            ]
            options = {"width": width, "embedding": embedding, "condition": condition}
            self.heads.append(nn.ModuleList(Head(*size, classes, **options) for size in sizes))

    def forward(self, image: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None) -> tuple[Tensor, ...]:
        """Return the logits (B, K) of images in -1..1, for each feature network.

        Raises: ValueError if a label is missing, or given to an unconditional discriminator.
        """
        check_label(label, self.classes)
        if image.shape[2:] != (self.side, self.side):
            image = F.interpolate(image, (self.side, self.side), mode="bilinear")  # (B, C, side, side)
        logits = []
        for k, (network, heads) in enumerate(zip(self.networks, self.heads)):
            maps = self._mix(k, network.features(image))
            logits.append(torch.cat([head(x, label).flatten(1) for head, x in zip(heads, maps)], 1))  # (B, K)
        return tuple(logits)

    def _mix(self, network: int, maps: list[Tensor]) -> list[Tensor]:
        if self.mixing == "projected":
            return self.projectors[network](maps[-LEVELS:])
        if self.mixing == "last":
            return maps[-1:]
        return [x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt() for x in maps]


class StyleGAN2(nn.Module):
    """StyleGAN2's residual discriminator, to be trained from scratch; one logit (B, 1).

    `width` channels at every resolution, as published for images of up to 64 pixels, where it is 512.

    Raises: ValueError for images that are not square or cannot be halved down to 4x4.
    Source: StyleGAN2 (Karras 2020), section 4.1, "residual" discriminator; equalised learning rates and the standard
        deviation over minibatches of progressive GANs (Karras 2018), sections 3 and 4.1.
    """

    def __init__(
        self, image: tuple[int, int, int], classes: int, *, width: int, embedding: int, condition: int
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
        return (self.condition(logits[:, :, None, None], label).flatten(1) if self.condition else logits,)


class Residual(nn.Module):
    """Two 3x3 convolutions, the second blurred and with stride 2, beside a 1x1 skip connection; halves the side."""

    def __init__(self, width: int):
        super().__init__()
        self.conv0 = equalised(nn.Conv2d(width, width, 3, padding=1))
        self.conv1 = equalised(ConvDown(width, width, 3, "down", TAPS))
        self.skip = nn.Sequential(Resample("down", TAPS), equalised(nn.Conv2d(width, width, 1, bias=False)))

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Return the map at half the side."""
        return (_activate(self.conv1(_activate(self.conv0(x)))) + self.skip(x)) * math.sqrt(
            0.5
        )  # (B, D, H/2, W/2)


def minibatch_deviation(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d+1 h w"]:
    """Return x with a channel more: the standard deviation over groups of samples, averaged over the whole map.

    A group has 4 samples (as published), or 2 or 1 where the batch is not a multiple: sample i, i + B/4, ...

    Source: progressive GANs (Karras 2018), section 3; groups as StyleGAN2.
    """
    groups = x.unflatten(0, (math.gcd(len(x), 4), -1))  # (G, B/G, D, H, W)
    deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (B/G,)
    return torch.cat([x, deviation.repeat(len(groups))[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


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


def _first(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")
