"""Training losses of a discrete diffusion: a function per equation, a number for each sample.

`image`, `noise`, the output of the network for `noised(image, noise, level)`, and the level go in; the
network is the caller's.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from equilab.diffusion.discrete import Chain, Level, noised, posterior_mean, velocity


def error(
    chain: Chain,
    output: Float[Tensor, "b o h w"],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    level: Level,
    weight: str,
) -> Float[Tensor, b]:
    """Return the squared error of the prediction, mean over pixels, times `v_weight` if `weight` is "published".

    The weight is for v; "uniform" is 1 for all timesteps, as it is for noise.

    Source: DiT, section 3.1, for noise; FPDM, section 4.1, for v, which does not speak of weights.
    """
    predicts_noise = chain.diffusion.prediction == "noise"
    prediction, _ = chain.split(output, image.shape[1])
    target = noise if predicts_noise else velocity(image, noise, level)
    squares = (prediction.to(image.dtype) - target).square().mean((1, 2, 3))  # (B,)
    return squares * v_weight(level).to(image.dtype) if weight == "published" else squares


def v_weight(level: Level) -> Float[Tensor, b]:
    """Return the published weights alpha_bar sqrt(1 - alpha_bar) of the squared error of v.

    They are SNR sqrt(1 - alpha_bar) for the error of the image that v implies. At SNR 0 the weight is exactly
    0: with zero terminal SNR the prediction that every sampling starts from is not trained.

    Source: the published code of FPDM; not in the paper.
    """
    return (level.alpha_bar * (1 - level.alpha_bar).sqrt()).flatten()  # (B,)


def bound(
    chain: Chain,
    output: Float[Tensor, "b o h w"],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    level: Level,
) -> Float[Tensor, b]:
    """Return the variational bound of a step back in bits per pixel, which trains the learned variance.

    Divergence of the step from the true one, the image known; at the cleanest timestep, minus the log
    likelihood of the image. The prediction is held constant, so that only the variance gets a gradient.

    Source: "Improved denoising diffusion probabilistic models" (Nichol 2021), equations 4 to 7 and section 3.1.
    Differs: as in the published code it is not multiplied by the number of timesteps or a weight of its own.
    """
    prediction, value = chain.split(output, image.shape[1])
    clean, x = image.double(), noised(image.double(), noise, level)
    mean = posterior_mean(chain.image(x, prediction.detach().double(), level), x, level)
    log_variance = chain.log_variance(value.double(), level)
    gap = (posterior_mean(clean, x, level) - mean) ** 2
    divergence = (log_variance - level.log_small + (level.log_small - log_variance).exp() - 1) / 2
    divergence = divergence + gap * (-log_variance).exp() / 2
    nats = torch.where(level.before == 1, -log_likelihood(clean, mean, log_variance), divergence)
    return (nats.mean((1, 2, 3)) / math.log(2)).to(image.dtype)  # (B,)


def log_likelihood(
    image: Float[Tensor, "b c h w"], mean: Float[Tensor, "b c h w"], log_variance: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Return the log probability of each pixel's bin of 256 in -1..1 under a normal distribution; the last are open.

    Source: "Denoising diffusion probabilistic models" (Ho 2020), equation 13.
    Differs: as in the published code the normal distribution function is its tanh approximation, off by up to
        0.0002, and a probability below 1e-12 counts as 1e-12.
    """
    scale = (-log_variance / 2).exp()
    below = _normal_cdf(scale * (image - mean - 1 / 255))
    above = _normal_cdf(scale * (image - mean + 1 / 255))
    above = torch.where(image > 0.999, torch.ones_like(above), above)
    below = torch.where(image < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
