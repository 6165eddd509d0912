"""Preconditioning: turns a network F(x; c_noise) into a denoiser D(x; sigma)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from equilab.diffusion.protocols import Denoised
from equilab.models.family import Family
from equilab.models.published_keys import Described, Published, need
from equilab.models.unet import UNet


def coefficients(sigma: Float[Tensor, "*b"], sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return c_skip, c_out, c_in and c_noise at noise levels sigma > 0, each of the shape of `sigma`.

    Source: EDM, table 1, "network and preconditioning", column "ours".
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def preconditioned(
    net: nn.Module,
    coefficients: Callable[[Tensor], tuple[Tensor, ...]],
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, b] | Float[Tensor, ""] | float,
    *conditions: Tensor | None,
) -> Denoised:
    """Return Denoised(c_skip x + c_out F(c_in x; c_noise), None, None) of a network F and its coefficients at sigma.

    Coefficients and result are float32 whatever the dtype of x: a sampler that keeps its state in float64
    converts the result.

    Source: EDM, equation 7.
    """
    x = x.float()
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))  # (B,)
    c_skip, c_out, c_in, c_noise = coefficients(sigma[:, None, None, None])  # (B, 1, 1, 1) each
    out = net(c_in * x, c_noise.flatten(), *conditions)  # (B, C, H, W)
    return Denoised(torch.addcmul(c_skip * x, c_out, out.float()), None, None)


class EDM(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) of a network F, in the denoiser protocol.

    Source: EDM, equation 7.
    """

    def __init__(self, net: nn.Module, *, sigma_data: float):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, b] | Float[Tensor, ""] | float,
        label: Int64[Tensor, b] | None,
        carry: None = None,
        augment_label: Float[Tensor, "b a"] | None = None,
    ) -> Denoised:
        """Return Denoised(D(x; sigma), None, None); sigma > 0 of the whole batch or of each sample.

        The network runs in float32 or under the caller's autocast; the rest as in `preconditioned`.
        """
        at_sigma = partial(coefficients, sigma_data=self.sigma_data)
        return preconditioned(self.net, at_sigma, x, sigma, label, augment_label)

    denoise = forward


def from_published(
    weights: Mapping[str, Tensor], *, head_channels: int | None = None, sigma_data: float = 0.5
) -> Described:
    """Return the denoiser that published weights of EDM describe.

    Every size is read from the tensors and their names, except `head_channels` (unless given: 64 for ADM, as
    published, a single head for the others) and `sigma_data` (0.5 in all published networks). Dropout is 0.

    Raises: ValueError if a tensor that determines a size is missing.
    """
    matches = [re.match(r"enc\.(\d+)x", key) for key in weights]
    heights = sorted({int(match[1]) for match in matches if match}, reverse=True)
    if not heights:
        raise ValueError("no published key starts with 'enc.'; give the state dict of an EDM network")
    stages = [f"enc.{r}x{r}_block" for r in heights]
    first_blocks = [key for key in weights if re.fullmatch(rf"{re.escape(stages[0])}\d+\.conv1\.weight", key)]
    adm = "out_conv.weight" in weights
    ncsnpp = "map_noise.freqs" in weights
    if head_channels is None:
        head_channels = 64 if adm else 0
    channels = need(weights, f"enc.{heights[0]}x{heights[0]}_conv.weight", 4).shape[1]
    width = need(weights, "map_layer0.weight", 2).shape[1] // (2 if ncsnpp else 1)
    sizes = {
        "architecture": "adm" if adm else "ncsnpp" if ncsnpp else "ddpmpp",
        "width": width,
        "multipliers": [need(weights, f"{stage}0.conv1.weight", 4).shape[0] // width for stage in stages],
        "blocks": len(first_blocks),
        "attention": [r for r, stage in zip(heights, stages) if f"{stage}0.qkv.weight" in weights],
        "head_channels": head_channels,
        "dropout": 0.0,
        "augment": _inputs(weights, "map_augment.weight"),
    }
    image = (channels, heights[0], heights[0])
    return Described(image, _inputs(weights, "map_label.weight"), sizes, {"sigma_data": float(sigma_data)})


def published_keys(network: nn.Module) -> dict[str, str]:
    """Return {published key: our key} of a U-Net: they are the same."""
    return {key: key for key in network.state_dict()}


def published_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the settings stored with published weights say of the model around the network."""
    return {"sigma_data": settings["sigma_data"]} if "sigma_data" in settings else {}


def _inputs(weights: Mapping[str, Tensor], key: str) -> int:
    return need(weights, key, 2).shape[1] if key in weights else 0


FAMILY = Family(
    name="edm",
    label="EDM",
    colour="#029e73",
    marker="D",
    stage="teacher",
    kind="unet",
    network=UNet,
    implicit=False,
    layered=True,
    published=Published(
        from_published,
        published_keys,
        ("enc.", "dec.", "map_layer0."),
        published_config,
        "EDMPrecond",
    ),
)


# the same network, of another stage
PROGRESSIVE = replace(
    FAMILY, name="pd", label="PD", colour="#882255", marker="<", stage="progressive", published=None
)
