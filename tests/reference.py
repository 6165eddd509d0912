"""The published models and processes that reference values belong to, filled with the weights they were computed with.

Full-size weights are a function of their key (the hash rule); small ones are stored with the values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from conftest import golden, weights_of
from torch import Tensor

from equilab import published
from equilab.diffusion.discrete import Diffusion
from equilab.models import dit, vit
from equilab.models.family import family as family_of
from equilab.models.layers import sine_cosine_table
from equilab.models.precond import EDM
from equilab.models.unet import UNet


def signed_uniform(key: str, count: int) -> np.ndarray:
    """Return `count` float64 values in -1..1: splitmix64 of (element + crc32(key) * 2^32), its top 24 bits."""
    z = np.arange(count, dtype=np.uint64) + (np.uint64(zlib.crc32(key.encode())) << np.uint64(32))
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def hashed_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return float32 tensors of the given shapes by the hash rule, under the same (published) keys.

    Fixed tables (`pos_embed`, `resample_filter`) keep their normal values: leave them out and add them afterwards.
    """
    return {key: torch.from_numpy(_value(key, shape).astype(np.float32)) for key, shape in shapes.items()}


def _value(key: str, shape: Sequence[int]) -> np.ndarray:
    s = signed_uniform(key, math.prod(shape)).reshape(tuple(shape))
    if key.endswith("freqs"):
        return 16 * s
    if len(shape) >= 2:
        return s * np.sqrt(3 / math.prod(shape[1:]))
    return 1 + 0.1 * s if key.endswith("weight") else 0.1 * s


def hashed_model(family: str, image: tuple[int, int, int], classes: int, sizes: Mapping, **config):
    """Return the transformer of a family of these sizes, loaded by `config` from weights by the hash rule."""
    keys_of = vit.published_keys if family in ("get", "vit") else dit.published_keys
    with torch.device("meta"):
        model = family_of(family).network(image, classes, **sizes)
    state, names = model.state_dict(), keys_of(model)
    shapes = {key: state[ours].shape for key, ours in names.items() if key != "pos_embed"}
    table = sine_cosine_table(sizes["width"], image[1] // sizes["patch"], image[2] // sizes["patch"])
    weights = hashed_weights(shapes) | {"pos_embed": table}
    return published.load(family, weights, heads=sizes["heads"], **config).model


def hashed_unet(family: str, net: UNet):
    """Return what a family makes of the U-Net `net` (on the meta device), loaded from weights by the hash rule."""
    shapes = {f"model.{key}": value.shape for key, value in net.state_dict().items()}
    filters = [key for key in shapes if key.endswith("resample_filter")]
    side = shapes[filters[0]][-1]
    taps = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[side])
    kernel = taps.outer(taps)[None, None] / taps.sum() ** 2
    weights = hashed_weights({key: shape for key, shape in shapes.items() if key not in filters})
    return published.load(family, weights | dict.fromkeys(filters, kernel)).model


# the published U-Nets by their data, without architecture, dropout and augmentation
UNETS = {
    "cifar10": {"width": 128, "multipliers": (2, 2, 2), "blocks": 4, "attention": (16,), "head_channels": 0},
    "ffhq": {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,), "head_channels": 0},
    "imagenet": {
        "width": 192,
        "multipliers": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (32, 16, 8),
        "head_channels": 64,
    },
}


def stored_denoiser(name: str) -> tuple[dict[str, Tensor], EDM, Tensor | None]:
    """Return the reference values of `name`, its denoiser filled with their weights, and the labels as classes."""
    values, _ = golden(name)
    config = {"head_channels": 8} if name == "edm_adm" else {}
    one_hot = values.get("in.class_labels")
    label = None if one_hot is None else one_hot.argmax(1)
    return values, published.load("edm", weights_of(values), **config).model, label


def published_diffusion(prediction: str, zero_terminal_snr: bool, variance: str = "learned") -> Diffusion:
    """Return the published diffusion of 1,000 timesteps."""
    return Diffusion(
        timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        zero_terminal_snr=zero_terminal_snr,
        prediction=prediction,
        variance=variance,
    )


class DiffusionReference(NamedTuple):
    """A published diffusion, and where its reference values are: `file`, their names' `prefix`."""

    diffusion: Diffusion
    file: str
    prefix: str

    def values(self, part: str) -> dict[str, Tensor]:
        """Return the values of a part, "in" or "out", by their names without part and prefix."""
        beginning = f"{part}.{self.prefix}"
        tensors, _ = golden(self.file)
        return {key.removeprefix(beginning): tensors[key] for key in tensors if key.startswith(beginning)}


DIFFUSIONS = {
    "noise": DiffusionReference(published_diffusion("noise", False), "diffusion_eps", ""),
    "v": DiffusionReference(published_diffusion("v", False), "diffusion_v", "linear."),
    "zero": DiffusionReference(published_diffusion("v", True), "diffusion_v", "ztsnr."),
}
