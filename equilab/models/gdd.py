"""GDD: the U-Net of a diffusion teacher as a one-step generator, and which of its layers are trained."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from equilab.diffusion.protocols import Denoised, Generated
from equilab.models import precond
from equilab.models.family import Family
from equilab.models.published_keys import Described, Published
from equilab.models.unet import UNet

# group -> the last part of the names of its layers in a U-Net
GROUPS = {
    "embedding": r"map_\w+",
    "input": r"\d+x\d+_conv",
    "residual input": r"\d+x\d+_aux_residual",
    "norm": r"(\d+x\d+_aux_|out_)?norm\d?",
    "affine": r"affine",
    "convolution": r"conv[01]",
    "projection": r"proj",
    "qkv": r"qkv",
    "skip": r"skip",
    "output": r"(\d+x\d+_aux|out)_conv",
}
# the rows of GDD (Zheng 2024), table 2: the groups that are frozen. The output projection of the attention is among its
# convolutions: the published code freezes it, and only with it they are 85.9% of the blocks' parameters (printed 85.8).
VARIANTS = {
    "gdd": (),
    "gdd_i": ("convolution", "projection"),
    "gdd_i_qkv": ("convolution", "projection", "qkv"),
    "gdd_i_qkv_skip": ("convolution", "projection", "qkv", "skip"),
}


def check_levels(sigma_min: float, sigmas: Sequence[float]) -> None:
    """Raise unless a student can step through these noise levels.

    Raises: ValueError unless they fall and 0 < sigma_min < the last of them.
    """
    levels = [*sigmas, sigma_min, 0.0]
    if not sigmas or any(a <= b for a, b in zip(levels, levels[1:])):
        raise ValueError(
            f"sigmas is {list(sigmas)} and sigma_min {sigma_min}; give levels that fall and stay above sigma_min > 0"
        )


def coefficients(
    sigma: Float[Tensor, "*b"], *, sigma_data: float, sigma_min: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return c_skip, c_out, c_in and c_noise at noise levels sigma >= sigma_min, each of the shape of `sigma`.

    At sigma_min they make any network the identity: c_skip = 1, c_out = 0.

    Source: GDD (Zheng 2024), appendix B.4, "Parameterization"; c_in and c_noise as in EDM.
    Differs: the paper says that c_out is about 1 at sigma_max; by its equation it is about sigma_data.
    """
    above = sigma - sigma_min
    total = (sigma**2 + sigma_data**2).sqrt()
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    return c_skip, sigma_data * above / total, 1 / total, sigma.log() / 4


class GDD(nn.Module):
    """A generator of few steps: the consistency function f of the teacher's network `net`, applied at `sigmas` in turn.

    One noise level makes it a one-step generator. From a level t to the next, s, it goes to f + s/t (x - f),
    after the last to f. Build `net` with dropout 0, as published. `generate` is the generator protocol,
    `denoise` the denoiser's, for losses that compare the consistency function at several noise levels.

    Raises: ValueError unless `sigmas` fall and 0 < sigma_min < the last of them.
    Source: GDD (Zheng 2024), section 3.1 and appendix B.4; several steps as section 2.2 and table 5.
    Differs: the last step of several ends at 0, as the only step of one does, not at sigma_min.
    """

    def __init__(self, net: nn.Module, *, sigma_data: float, sigma_min: float, sigmas: Sequence[float]):
        super().__init__()
        check_levels(sigma_min, sigmas)
        self.net, self.sigmas = net, tuple(sigmas)
        self.sigma_data, self.sigma_min = sigma_data, sigma_min

    def forward(
        self, noise: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None, return_iterates: bool = False
    ) -> Generated:
        """Return Generated(image, None): where the steps from sigmas[0] * noise lead.

        With `return_iterates`, the images (S, B, C, H, W) that the consistency function predicts at all steps.

        Raises: ValueError for a label given to an unconditional network.
        """
        x = self.sigmas[0] * noise  # (B, C, H, W)
        images = []
        for sigma, after in zip(self.sigmas, (*self.sigmas[1:], 0.0)):
            image = self.denoise(x, sigma, label).image  # (B, C, H, W)
            x = image + after / sigma * (x - image) if after else image
            images.append(image)
        return Generated(torch.stack(images) if return_iterates else x, None)

    generate = forward

    def denoise(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, b] | Float[Tensor, ""] | float,
        label: Int64[Tensor, b] | None,
        carry: None = None,
    ) -> Denoised:
        """Return Denoised(c_skip x + c_out F(c_in x; c_noise), None, None); sigma of the batch or of each sample."""
        at_sigma = partial(coefficients, sigma_data=self.sigma_data, sigma_min=self.sigma_min)
        return precond.preconditioned(self.net, at_sigma, x, sigma, label)


class Share(NamedTuple):
    """A row of the table of layers: a group, its parameters, their share of the network's (0..1), trained or frozen."""

    group: str
    parameters: int
    share: float
    trained: bool


def layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a U-Net that have parameters of their own, each after its group of GROUPS.

    Raises: ValueError for a layer that belongs to no group.
    """
    for name, module in net.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        last = name.rpartition(".")[2]
        groups = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, last)]
        if not groups:
            raise ValueError(
                f"layer {name!r} belongs to no group of a U-Net's layers; give an equilab.models.unet"
            )
        yield groups[0], module


def prepare(net: nn.Module, variant: str) -> None:
    """Freeze and train the layers of a U-Net as `variant` of VARIANTS does."""
    for group, layer in layers(net):
        layer.requires_grad_(group not in VARIANTS[variant])


def table(net: nn.Module) -> list[Share]:
    """Return what each group of layers holds, in the order of GROUPS; a group frozen in part has two rows."""
    counts = Counter()
    for group, layer in layers(net):
        for parameter in layer.parameters(recurse=False):
            counts[group, parameter.requires_grad] += parameter.numel()
    rows = []
    for group, trained in itertools.product(GROUPS, (True, False)):
        parameters = counts[group, trained]
        if parameters:
            rows.append(Share(group, parameters, parameters / counts.total(), trained))
    return rows


def from_published(
    weights: Mapping[str, Tensor],
    *,
    head_channels: int | None = None,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Described:
    """Return the generator that published weights of GDD describe.

    Sizes are read as those of EDM's networks; the noise levels are the published ones unless given.

    Raises: ValueError if a tensor that determines a size is missing.
    """
    teacher = precond.from_published(weights, head_channels=head_channels, sigma_data=sigma_data)
    levels = {"sigma_min": float(sigma_min), "sigmas": [float(sigma_max)]}
    student = {"start": "teacher", "freeze": "gdd", **levels}  # what was frozen, the weights do not tell
    return teacher._replace(settings=teacher.settings | {"student": student})


def published_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the settings stored with published weights say of the generator around the network."""
    names = {"sigma_data": "sigma_data", "eps": "sigma_min"}
    return {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}


FAMILY = Family(
    name="gdd",
    label="GDD",
    colour="#56b4e9",
    marker="s",
    stage="gan",
    kind="unet",
    network=UNet,
    implicit=False,
    layered=True,
    published=Published(
        from_published,
        precond.published_keys,
        ("enc.", "dec.", "map_layer0."),
        published_config,
        "GDDPrecond",
    ),
)


# the same network, of another stage
CONSISTENCY = replace(
    FAMILY, name="cd", label="CD", colour="#cc78bc", marker="v", stage="consistency", published=None
)
