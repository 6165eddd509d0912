"""Adversarial training: losses, R1 and augmentation. Logits are a tuple: (B, K) for each feature network.

Each loss is a mean over samples, so a batch may be split into equal parts and the losses averaged, as long as the
discriminator treats each sample alone (batch normalisation and minibatch statistics do not).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.config import Params

Logits = tuple[Float[Tensor, "b _"], ...]
DRAWS = 10  # uniform numbers that `augment` needs for an image


class Adaptive(Params):
    """How the probability of augmentation follows the discriminator's overfitting."""

    target: float = Field(ge=-1, le=1)  # of the mean sign of the logits of real images
    ramp_nimg: int = Field(ge=1, le=10**10)  # images that it takes from 0 to 1


def generator_loss(fake: Logits) -> Float[Tensor, ""]:
    """Return softplus(-logit) of generated images: its mean over logits and samples, summed over feature networks.

    Source: GDD (Zheng 2024), equations (3) and (4), min over G: softplus(-l) = -log sigmoid(l).
    Differs: the published code sums over the samples of a device, so its loss is their number times ours.
    """
    return torch.stack([F.softplus(-logits.float()).mean() for logits in fake]).sum()


def discriminator_loss(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """Return softplus(-logit) of real and softplus(logit) of generated images, reduced as `generator_loss`.

    Source: GDD (Zheng 2024), equations (3) and (4), max over D, where "1 - log D" is read as log(1 - D).
    Differs: the published code sums over the samples of a device, so its loss is their number times ours.
    """
    return generator_loss(real) + generator_loss(tuple(-logits for logits in fake))


def r1(logits: Logits, image: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the squared norm of the gradient of the sum of an image's logits by the image, its mean over samples.

    `logits` are those of `image`, which requires a gradient: no further pass through the discriminator is made. The
    result can be differentiated by the discriminator's parameters.

    Source: Mescheder 2018, equation (9), for GDD's many logits; multiply by `r1_weight`.
    """
    total = torch.stack([each.sum() for each in logits]).sum()
    (gradient,) = torch.autograd.grad(total, image, create_graph=True)  # (B, C, H, W)
    return gradient.square().flatten(1).sum(1).mean()


def r1_weight(gamma: float, interval: int, samples: int) -> float:
    """Return the weight of `r1` at every `interval`-th update: gamma/2 on average, against a loss that is a mean.

    `samples` is how many images the loss sums over that gamma was set against: 1 for a mean such as `discriminator_loss`.
    In the published code of GDD the loss is a sum over the images of a device, though R1 is a mean over them: the
    paper's gamma of 1e-4 at a batch of 256 on 8 devices, 32 images each, is one of 1e-4 / 32 here.

    A gamma also belongs to a discriminator: `r1` is of the sum of an image's logits, of which the loss is a mean. With n
    logits it is n times as large where their gradients are independent, and n^2 times where they agree. The published
    heads over VGG16-BN and EfficientNet have 548 for images of 224 pixels.

    Source: Mescheder 2018, equation (9); lazily as StyleGAN2 (Karras 2020), section 3.1.
    """
    return gamma / 2 * interval / samples


def overfitting(real: Logits) -> Float[Tensor, ""]:
    """Return the sign of real images' logits, its mean over logits, samples and networks: 1 if D knows them all.

    Source: ADA (Karras 2020), equation (1), r_t.
    """
    return torch.stack([logits.sign().mean() for logits in real]).mean()


def adapt(probability: float, overfitting: float, settings: Adaptive, nimg: int) -> float:
    """Return the augmentation probability after `nimg` more images: up if `overfitting` is above the target, else down.

    Source: ADA (Karras 2020), section 3.1.
    Differs: bounded by 1 too, so that the way down begins at once.
    """
    moved = probability + float(np.sign(overfitting - settings.target)) * nimg / settings.ramp_nimg
    return min(max(moved, 0.0), 1.0)


def draws(seed: int, purpose: str, indices: rng.Indices) -> Float[Tensor, "b 10"]:
    """Return the uniform numbers in 0..1 for `augment`; row i depends on (seed, purpose, indices[i]) alone."""
    rows = [rng.generator(seed, purpose, int(index)).random(DRAWS, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(rows))  # (B, 10)


def augment(
    image: Float[Tensor, "b c h w"], draws: Float[Tensor, "b 10"], probability: float | Float[Tensor, ""]
) -> Float[Tensor, "b c h w"]:
    """Return images after colour, translation and cutout, each with `probability` for each image; differentiable.

    The first three draws decide whether, the others how: brightness, saturation, contrast, rows and columns of the
    translation (up to an eighth), row and column of the cutout (half the height, half the width). Both fill with 0.

    Source: DiffAugment (Zhao 2020), section 3.2: probability 1. ADA (Karras 2020), section 3: its probability.
    Differs: ADA's probability here gates these three in place of its 18 transformations.
    """
    gates, amounts = draws[:, :3] < probability, draws[:, 3:]  # (B, 3), (B, 7)
    transformations = (_colour, amounts[:, :3]), (_translation, amounts[:, 3:5]), (_cutout, amounts[:, 5:])
    for gate, (transformation, amount) in zip(gates.T, transformations):
        image = torch.where(gate[:, None, None, None], transformation(image, amount), image)
    return image


def _colour(image: Tensor, amount: Tensor) -> Tensor:
    brightness, saturation, contrast = amount.T[..., None, None, None]  # (B, 1, 1, 1) each
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)  # (B, 1, H, W)
    image = torch.lerp(grey, image, 2 * saturation)
    return torch.lerp(image.mean((1, 2, 3), keepdim=True), image, contrast + 0.5)


def _translation(image: Tensor, amount: Tensor) -> Tensor:
    for axis, uniform in zip((2, 3), amount.T):
        size = image.shape[axis]
        most = (size + 4) // 8
        shift = _integer(uniform, 2 * most + 1) - most  # (B,)
        source = torch.arange(size, device=image.device) - shift[:, None]  # (B, size)
        index = _along(source.clamp(0, size - 1), axis).expand_as(image)
        image = image.gather(axis, index) * _along((source >= 0) & (source < size), axis)
    return image


def _cutout(image: Tensor, amount: Tensor) -> Tensor:
    inside = []
    for axis, uniform in zip((2, 3), amount.T):
        size = image.shape[axis]
        hole = (size + 1) // 2
        start = _integer(uniform, size + 1 - hole % 2) - hole // 2  # (B,)
        offset = torch.arange(size, device=image.device) - start[:, None]  # (B, size)
        inside.append(_along((offset >= 0) & (offset < hole), axis))
    return image * ~(inside[0] & inside[1])


def _integer(uniform: Float[Tensor, b], count: int) -> Int64[Tensor, b]:
    return (uniform * count).long().clamp(max=count - 1)


def _along(values: Int64[Tensor, "b n"] | Bool[Tensor, "b n"], axis: int) -> Tensor:
    """Return (B, n) values as (B, 1, n, 1) or (B, 1, 1, n)."""
    return values[:, None, :, None] if axis == 2 else values[:, None, None, :]


class AugmentedDiscriminator(nn.Module):
    """A discriminator behind an augmentation, whose probability is a buffer: a training that is resumed goes on from it."""

    def __init__(self, discriminator: nn.Module, augment: str, adaptive: Adaptive | None):
        super().__init__()
        self.discriminator, self.augment, self.adaptive = discriminator, augment, adaptive
        self.register_buffer("probability", torch.tensor(1.0 if augment == "diffaugment" else 0.0))

    def forward(
        self,
        image: Float[Tensor, "b c h w"],
        label: Int64[Tensor, b] | None,
        draws: Float[Tensor, "b 10"] | None,
    ) -> Logits:
        """Return the logits of images after augmentation."""
        if self.augment != "none":
            image = augment(image, draws, self.probability)
        return self.discriminator(image, label)

    def adapt(self, real: Logits, nimg: int) -> None:
        """Move the probability by the logits of `nimg` real images, those of all processes."""
        if self.adaptive is None:
            return
        known = machine.total(overfitting(real).detach().float()) / machine.world()
        self.probability.fill_(adapt(self.probability.item(), known.item(), self.adaptive, nimg))
