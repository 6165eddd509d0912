"""Samplers of noise levels: follow a denoiser from noise to an image, a step at a time.

A sampler calls `denoise(x, sigma, label, carry)`, hands each call the carry of the call before, and yields a
Step after every step: progress, pictures and stopping early are the caller's. It draws nothing:
`noises(step)` gives the fresh unit noise of a step. No gradients flow through it, though they do through a
single `euler_step` or `heun_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from equilab.diffusion.protocols import Denoised, Step, not_finite


def euler_step(
    denoise: Callable[..., Denoised],
    x: Float[Tensor, "b c h w"],
    sigma: float,
    sigma_next: float,
    label: Int64[Tensor, b] | None,
    carry: Tensor | None = None,
) -> tuple[Float[Tensor, "b c h w"], tuple[Denoised, ...]]:
    """Return the state at sigma_next, along the slope of the ODE at sigma, and what the denoiser returned.

    Source: EDM, algorithm 1, lines 4 and 5.
    """
    denoised = denoise(x, sigma, label, carry)
    slope = (x - denoised.image) / sigma
    return x + (sigma_next - sigma) * slope, (denoised,)


def heun_step(
    denoise: Callable[..., Denoised],
    x: Float[Tensor, "b c h w"],
    sigma: float,
    sigma_next: float,
    label: Int64[Tensor, b] | None,
    carry: Tensor | None = None,
) -> tuple[Float[Tensor, "b c h w"], tuple[Denoised, ...]]:
    """Return the state at sigma_next, along the mean of the slopes at both ends, and what the denoiser returned.

    At sigma_next 0 there is no second slope: it is Euler's step.

    Source: EDM, algorithm 1, lines 4 to 8.
    """
    x_next, (denoised,) = euler_step(denoise, x, sigma, sigma_next, label, carry)
    if sigma_next == 0:
        return x_next, (denoised,)
    denoised_next = denoise(x_next, sigma_next, label, denoised.carry)
    slope = (x - denoised.image) / sigma
    slope_next = (x_next - denoised_next.image) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2, (denoised, denoised_next)


class Churn(NamedTuple):
    """How much fresh noise a stochastic sampler adds before each step, and at which noise levels.

    Source: EDM, algorithm 2.
    """

    amount: float  # S_churn, shared by all steps
    sigma_min: float  # S_min
    sigma_max: float  # S_max
    noise_scale: float  # S_noise

    def gamma(self, sigma: float, steps: int) -> float:
        """Return the relative increase of sigma before a step that starts from `sigma`, one of `steps`."""
        if not self.sigma_min <= sigma <= self.sigma_max:
            return 0.0
        return min(self.amount / steps, math.sqrt(2) - 1)


def heun(
    denoise: Callable[..., Denoised],
    noise: Float[Tensor, "b c h w"],
    sigmas: Float64[Tensor, n],
    label: Int64[Tensor, b] | None,
    churn: Churn | None = None,
    noises: Callable[[int], Tensor] | None = None,
) -> Iterator[Step]:
    """Follow the probability-flow ODE along `sigmas` by Heun's method; second order; yields a Step per step, float64.

    Two calls of the denoiser a step, one if it ends at sigma 0: 2 * steps - 1. With `churn`, the stochastic sampler.

    Raises: at the first step, ValueError if sigmas do not fall, or churn comes without noises.
    Source: EDM, algorithm 1; with churn algorithm 2.
    """
    return _steps(heun_step, denoise, noise, sigmas, label, churn, noises)


def euler(
    denoise: Callable[..., Denoised],
    noise: Float[Tensor, "b c h w"],
    sigmas: Float64[Tensor, n],
    label: Int64[Tensor, b] | None,
    churn: Churn | None = None,
    noises: Callable[[int], Tensor] | None = None,
) -> Iterator[Step]:
    """Follow the ODE by Euler's method, first order, with one call of the denoiser a step; others as in `heun`.

    Source: EDM, algorithm 1 without its lines 6 to 8; with churn algorithm 2 without its lines 9 to 11.
    """
    return _steps(euler_step, denoise, noise, sigmas, label, churn, noises)


@torch.no_grad()
def _steps(move, denoise, noise, sigmas, label, churn, noises) -> Iterator[Step]:
    """Yield the steps by `move`, which is `euler_step` or `heun_step`; the others are as of `heun`."""
    if len(sigmas) < 2 or not (sigmas.diff() < 0).all() or sigmas[-1] < 0:
        raise ValueError(
            f"sigmas={sigmas.tolist()} do not fall towards 0; give a schedule such as edm_sigmas"
        )
    if churn is not None and noises is None:
        raise ValueError("churn needs fresh noise; give noises, a function of the step")
    sigmas = sigmas.tolist()
    x = noise.detach().double() * sigmas[0]
    carry, nfe = None, 0
    diverged = not_finite(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if churn is not None:
            scheduled = sigma
            sigma = scheduled + churn.gamma(scheduled, len(sigmas) - 1) * scheduled
            x = x + math.sqrt(sigma**2 - scheduled**2) * churn.noise_scale * noises(step).to(x)
        x, calls = move(denoise, x, sigma, sigma_next, label, carry)
        carry = calls[-1].carry
        nfe += len(calls)
        diverged = diverged | not_finite(x)
        solutions = tuple(call.solution for call in calls if call.solution is not None)
        yield Step(x, sigma, calls[0].image, solutions, diverged, nfe)
