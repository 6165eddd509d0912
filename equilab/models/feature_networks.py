"""Feature networks: frozen networks whose feature maps discriminators look through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from equilab.models.classifier import Classifier

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation of pixels in 0..1
HALF = (0.5,), (0.5,)
# of the maps of VGG16 in LPIPS, as the authors have them
LPIPS_WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth"


class FeatureNetwork(nn.Module):
    """A frozen network as a source of feature maps: gradients reach the images, its weights and statistics stay.

    `maps` turns images, normalised by `pixels` = (mean, standard deviation) of pixels in 0..1, into a list of
    maps, the finest first; it is taken over, and frozen.
    """

    def __init__(
        self, name: str, maps: nn.Module, channels: int, pixels: tuple[Sequence[float], Sequence[float]]
    ):
        super().__init__()
        self.name, self.channels = name, channels
        self.maps = maps.eval().requires_grad_(False)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in pixels)  # (1, C, 1, 1) each
        self.register_buffer("mean", 2 * mean - 1, persistent=False)  # of images in -1..1
        self.register_buffer("std", 2 * std, persistent=False)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Return the network, which stays in evaluation mode."""
        return super().train(False)

    def features(self, image: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Return the feature maps of images in -1..1, the finest first.

        Raises: ValueError for images of another number of channels than the network was trained on.
        """
        channels = image.shape[1]
        if channels != self.channels:
            raise ValueError(f"{self.name} takes {self.channels} channels, not {channels}; choose another")
        return list(self.maps((image - self.mean) / self.std))

    @torch.no_grad()
    def probe(self, image: tuple[int, int, int]) -> list[Tensor]:
        """Return the maps of one grey image of shape (channels, height, width), by which to build what reads them.

        Raises: ValueError if the network cannot take such images.
        """
        try:
            return self.features(torch.zeros(1, *image, device=self.mean.device))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} cannot take images of shape {image} ({_reason(error)}); change `side`"
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

    Random convolutions of fixed weights make them 1/4, 1/8, 1/16 and 1/32 as wide as the image, of D/8, D/4,
    D/2 and D channels, where the tokens have D and a patch 16 pixels.

    Source: StyleGAN-XL (Sauer 2022), section 3.3, after DPT (Ranftl 2021), section 3.1; class tokens are left out.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        d = vit.embed_dim
        self.blocks = [len(vit.blocks) * (k + 1) // 4 - 1 for k in range(4)]
        four_times = nn.Sequential(nn.Conv2d(d, d // 8, 1), nn.ConvTranspose2d(d // 8, d // 8, 4, 4))
        twice = nn.Sequential(nn.Conv2d(d, d // 4, 1), nn.ConvTranspose2d(d // 4, d // 4, 2, 2))
        same = nn.Conv2d(d, d // 2, 1)
        half = nn.Sequential(nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 3, 2, padding=1))
        self.reassemble = nn.ModuleList([four_times, twice, same, half])

    def forward(self, image: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Return the maps, the finest first."""
        options = {"indices": self.blocks, "intermediates_only": True}
        grids = self.vit.forward_intermediates(image, **options)  # (B, D, h, w) each
        return [convolve(grid) for convolve, grid in zip(self.reassemble, grids)]


def unit_length(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return x with a Euclidean length of 1 across channels."""
    return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def _vgg(name: str, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model_weights, vgg

    layers = vgg.make_layers(vgg.cfgs["D"], batch_norm=name.endswith("_bn"))
    if pretrained:
        source = get_model_weights(name)["IMAGENET1K_V1"]
        try:
            weights = source.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:
            raise _out_of_reach(name, error) from None
        prefix = "features."
        own = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
        layers.load_state_dict(own)
    return Stages(list(layers)[:-1])  # without the last pooling


def _timm(name: str, pretrained: bool, **options) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} needs timm; install it with `pip install timm`") from None
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        raise _out_of_reach(name, error) from None


def _efficientnet(name: str, pretrained: bool) -> nn.Module:
    return _timm(name, pretrained, features_only=True, out_indices=(1, 2, 3, 4))


def _deit(name: str, pretrained: bool) -> nn.Module:
    return Tokens(_timm(name, pretrained, num_classes=0))


def _out_of_reach(name: str, error: Exception) -> ValueError:
    """Return what is said whatever a library raises where weights cannot be fetched or read."""
    return ValueError(f"{name}: no weights ({_reason(error)}); go online once, or use a classifier")


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


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

    Raises: ValueError if timm is needed and missing, or if the weights cannot be fetched.
    """
    build, pixels = NETWORKS[name]
    return FeatureNetwork(name, build(name, pretrained), 3, pixels)


def classifier_network(classifier: Classifier) -> FeatureNetwork:
    """Return a classifier trained on the study's own data as a feature network; it is taken over, and frozen."""
    layers = list(classifier.body)[:-1]  # without the last, which makes a vector of the map
    return FeatureNetwork("classifier", Stages(layers), layers[0].in_channels, HALF)


class Lpips(nn.Module):
    """How different images look to VGG16: the squared differences of its maps, each of unit length across channels, weighted.

    Images are resized to `side` (published 224). Without its weights, which are VGG16's of ImageNet and those of its maps
    that people's judgements led to, both fetched once, then cached, VGG16 is random and all maps count alike.

    Raises: ValueError if the weights cannot be fetched.
    Source: "The unreasonable effectiveness of deep features as a perceptual metric" (Zhang 2018), equation (1); version 0.1.
    Differs: 1e-10 is added below the root of the length, not to it, so that maps of zeros have a gradient.
    """

    def __init__(self, side: int, *, pretrained: bool):
        super().__init__()
        self.side = side
        self.network = feature_network("vgg16", pretrained=pretrained)
        weights = _lpips_weights() if pretrained else {}
        for k, x in enumerate(self.network.probe((3, 32, 32))):
            weight = weights.get(f"lin{k}.model.1.weight", x.new_ones(x.shape[1]))
            self.register_buffer(f"weight{k}", weight.to(x.device).flatten())

    def forward(self, image: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """Return the distance of images in -1..1 to their targets, mean over samples."""
        size = self.side, self.side
        pairs = (F.interpolate(each, size, mode="bilinear") for each in (image, target))
        ours, theirs = (self.network.features(each) for each in pairs)
        distance = 0.0
        for one, other, weight in zip(ours, theirs, self.buffers(recurse=False)):
            difference = (unit_length(one) - unit_length(other)).square()  # (B, C, H, W)
            distance = distance + torch.einsum("bchw,c->bhw", difference, weight).mean((1, 2))  # (B,)
        return distance.mean()


def _lpips_weights() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(LPIPS_WEIGHTS, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a library raises where a file cannot be fetched or read
        name, folder = LPIPS_WEIGHTS.rpartition("/")[2], Path(torch.hub.get_dir(), "checkpoints")
        raise ValueError(
            f"{name} cannot be fetched or read ({_reason(error)}); place this file of torch-fidelity's releases in {folder}"
        ) from None
