"""Losses: a function per equation. Each is a mean over samples, so a batch may be split and the losses averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from equilab.diffusion.protocols import Denoised


def edm_sigma(normal: Float[Tensor, b], mean: float, std: float) -> Float[Tensor, b]:
    """Return the noise levels (B,) of training, exp(mean + std * normal), made of unit normals.

    Source: EDM, table 1, "noise distribution" (P_mean, P_std).
    """
    return (mean + std * normal).exp()


def edm_weight(sigma: Float[Tensor, b], sigma_data: float) -> Float[Tensor, b]:
    """Return the weights (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (B,), with which all noise levels start alike.

    Source: EDM, table 1, "loss weighting" (lambda).
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm(
    denoise: Callable[..., Denoised],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, b],
    label: Int64[Tensor, b] | None,
    sigma_data: float,
) -> Float[Tensor, ""]:
    """Return edm_weight(sigma) * (D(image + sigma noise; sigma) - image)^2, its mean over pixels and samples.

    Source: EDM, equation 2, weighted as in table 1.
    Differs: the published training sums over the pixels, so its loss is C*H*W times ours (Adam hardly notices).
    """
    denoised = denoise(image + sigma[:, None, None, None] * noise, sigma, label).image
    weight = edm_weight(sigma, sigma_data)[:, None, None, None]  # (B, 1, 1, 1)
    return (weight * (denoised - image) ** 2).mean()


# evaluations of the teacher for a training image, two for each of Heun's steps, by the form of the loss
CONSISTENCY_CALLS = {"text": 2, "published": 4}
Distance = Callable[[Tensor, Tensor], Tensor]  # of images (B, C, H, W) to their targets: a mean over samples


def consistency(
    student: Callable[..., Denoised],
    teacher: Callable[..., Denoised],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    sigmas: tuple[Float[Tensor, b], Float[Tensor, b]],
    label: Int64[Tensor, b] | None,
    distance: Distance,
) -> Float[Tensor, ""]:
    """Return the distance between the student at sigma and at the level below it.

    Heun's step along the teacher leads to the state at the level below, where the student gets no gradient.
    `sigmas` are the levels of each sample and those below them, all > 0.

    Source: GDD (Zheng 2024), table 5, CD; after "Consistency models" (Song 2023), algorithm 2.
    Differs: the target is the student itself, as in table 5, not its average.
    """
    x = image + sigmas[0][:, None, None, None] * noise
    with torch.no_grad():
        below = heun_step(teacher, x, *sigmas, label)
        target = student(below, sigmas[1], label).image
    return distance(student(x, sigmas[0], label).image, target)


def published_consistency(
    student: Callable[..., Denoised],
    teacher: Callable[..., Denoised],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    sigmas: tuple[Float[Tensor, b], Float[Tensor, b]],
    label: Int64[Tensor, b] | None,
    distance: Distance,
    lowest: tuple[float, float],
) -> Float[Tensor, ""]:
    """Return the distance between the student at sigma and the state at the lowest level, reached from the level below.

    As `consistency`, but the target is the state that Euler's step along the student leads to at the lowest level; from the
    second lowest, it is Heun's step along the teacher. `lowest` are these two, in rising order.

    Source: the published code of GDD (Zheng 2024), which draws sigma from the third lowest level on.
    """
    x = image + sigmas[0][:, None, None, None] * noise
    with torch.no_grad():
        below = heun_step(teacher, x, *sigmas, label)
        level, end = sigmas[1][:, None, None, None], torch.full_like(sigmas[1], lowest[0])
        denoised = student(below, sigmas[1], label).image
        by_student = denoised + lowest[0] / level * (below - denoised)
        by_teacher = heun_step(teacher, below, sigmas[1], end, label)
        target = torch.where(level <= lowest[1], by_teacher, by_student)
    return distance(student(x, sigmas[0], label).image, target)


def heun_step(
    denoise: Callable[..., Denoised],
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, b],
    after: Float[Tensor, b],
    label: Int64[Tensor, b] | None,
) -> Float[Tensor, "b c h w"]:
    """Return the state at the level `after` of each sample, which is > 0, by Heun's step from `x` at the level `sigma`.

    Source: EDM, algorithm 1, lines 4 to 8.
    """
    before, end = (level[:, None, None, None] for level in (sigma, after))  # (B, 1, 1, 1) each
    slope = (x - denoise(x, sigma, label).image) / before
    euler = x + (end - before) * slope
    slope = (slope + (euler - denoise(euler, after, label).image) / end) / 2
    return x + (end - before) * slope


def progressive(
    student: Callable[..., Denoised],
    teacher: Callable[..., Denoised],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    sigmas: tuple[Float[Tensor, b], Float[Tensor, b], Float[Tensor, b]],
    label: Int64[Tensor, b] | None,
    weight: Callable[[Tensor], Tensor],
) -> Float[Tensor, ""]:
    """Return weight(sigma) * (student - progressive_target)^2 at image + sigma noise, its mean over pixels and samples.

    `sigmas` are the levels of each sample at which the student's step begins, its teacher's second step begins, and both
    end; `weight` is one of SNR_WEIGHTS.

    Source: "Progressive distillation" (Salimans 2022), algorithm 2; GDD (Zheng 2024), equation 2 and table 5, PD.
    Differs: noise levels and denoiser are EDM's, where theirs are of a cosine schedule that keeps the variance.
    """
    x = image + sigmas[0][:, None, None, None] * noise
    target = progressive_target(teacher, x, sigmas, label)
    error = (student(x, sigmas[0], label).image - target).square()
    return (weight(sigmas[0])[:, None, None, None] * error).mean()


@torch.no_grad()
def progressive_target(
    teacher: Callable[..., Denoised],
    x: Float[Tensor, "b c h w"],
    sigmas: tuple[Float[Tensor, b], Float[Tensor, b], Float[Tensor, b]],
    label: Int64[Tensor, b] | None,
) -> Float[Tensor, "b c h w"]:
    """Return the denoised image with which one Euler step from sigmas[0] ends where two of the teacher's end.

    These go to sigmas[1], then to sigmas[2]. If they lead to H, it is (sigmas[0] H - sigmas[2] x) / (sigmas[0] - sigmas[2]);
    written as here, by the mean of the two slopes, it loses no digits where the levels lie close together.

    Source: "Progressive distillation" (Salimans 2022), algorithm 2; GDD (Zheng 2024), table 5c.
    """
    first, middle, last = (level[:, None, None, None] for level in sigmas)  # (B, 1, 1, 1) each
    slope = (x - teacher(x, sigmas[0], label).image) / first
    between = x + (middle - first) * slope
    second_slope = (between - teacher(between, sigmas[1], label).image) / middle
    share = (middle - last) / (first - last)  # of the way that the second step goes
    return x - first * torch.lerp(slope, second_slope, share)


# weights of the error of the denoised image, by the noise level: the signal-to-noise ratio of EDM's states is 1 / sigma^2
# Source: "Progressive distillation" (Salimans 2022), section 4
SNR_WEIGHTS = {
    "truncated_snr": lambda sigma: (1 / sigma**2).clamp_min(1),
    "snr_plus_one": lambda sigma: 1 / sigma**2 + 1,
}


def l1(image: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the absolute error, mean over pixels and samples.

    Source: GET, "Offline Distillation"; there a sum over pixels.
    """
    return (image - target).abs().mean()


def l2(image: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the squared error, mean over pixels and samples."""
    return (image - target).square().mean()


def fixed_point_correction(losses: Float[Tensor, k], gamma: float) -> Float[Tensor, ""]:
    """Return the sum over k = 1..K of gamma^(K-k) * losses[k-1]: the losses of K iterates, the last one counting most.

    The sum is not divided by that of its weights; `gamma` is in 0..1, published 0.8.

    Source: GET's published training (fixed-point correction); not in the paper's equations.
    """
    k = torch.arange(len(losses) - 1, -1, -1, dtype=losses.dtype, device=losses.device)  # (K,)
    return (gamma**k * losses).sum()
