"""Samplers: follow a denoiser from noise to an image, a step at a time.

A sampler is a generator `sampler(denoise, noise, levels, label, ..., noises)`. It calls `denoise(x, sigma, label,
carry)`, hands each call the carry of the call before, and yields a Step after every step: progress, pictures and
stopping early are the caller's. It draws nothing: `noises(step)` gives the fresh unit noise of a step. No gradients
flow through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from equilab.diffusion.protocols import Denoised


class Step(NamedTuple):
    """What a sampler yields after a step: where it stands, and what the denoiser returned on the way."""

    x: Float64[Tensor, "b c h w"]  # the state at `sigma`
    sigma: float
    calls: tuple[Denoised, ...]  # of this step, in order; they hold the solutions of an implicit model
    nfe: int  # calls of the denoiser since the start

    @property
    def denoised(self) -> Tensor:
        """Return D(x; sigma) at the start of this step."""
        return self.calls[0].image


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
        return (
            min(self.amount / steps, math.sqrt(2) - 1) if self.sigma_min <= sigma <= self.sigma_max else 0.0
        )


def heun(
    denoise: Callable[..., Denoised],
    noise: Float[Tensor, "b c h w"],
    sigmas: Float64[Tensor, n],
    label: Int64[Tensor, b] | None,
    churn: Churn | None = None,
    noises: Callable[[int], Tensor] | None = None,
    *,
    corrected: bool = True,
) -> Iterator[Step]:
    """Follow the probability-flow ODE along `sigmas` by Heun's method; second order; yields a Step per step, float64.

    Two calls of the denoiser a step, one if it ends at sigma 0: 2 * steps - 1. With `churn`, the stochastic sampler.

    Raises: ValueError if sigmas do not fall, or churn comes without noises.
    Source: EDM, algorithm 1; with churn algorithm 2.
    """
    if len(sigmas) < 2 or not (sigmas.diff() < 0).all() or sigmas[-1] < 0:
        raise ValueError(
            f"sigmas={sigmas.tolist()} do not fall towards 0; give a schedule such as edm_sigmas"
        )
    if churn is not None and noises is None:
        raise ValueError("churn needs fresh noise; give noises, a function of the step")
    return _steps(denoise, noise.detach().double(), sigmas.tolist(), label, churn, noises, corrected)


def euler(*arguments, **named) -> Iterator[Step]:
    """Follow the ODE by Euler's method, first order: `heun` without its correction, one call of the denoiser a step.

    Source: EDM, algorithm 1 without its lines 6 to 8; with churn algorithm 2 without its lines 9 to 11.
    """
    return heun(*arguments, **named, corrected=False)


def finish(steps: Iterable[Step]) -> tuple[Float64[Tensor, "b c h w"], int]:
    """Run a sampler to its end; returns the image (B, C, H, W), float64, not clamped, and its nfe."""
    for step in steps:
        last = step
    return last.x, last.nfe


def _steps(denoise, noise, sigmas, label, churn, noises, corrected: bool) -> Iterator[Step]:
    x, carry, nfe = noise * sigmas[0], None, 0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if churn is not None:
            fresh, start = noises(i).to(x), sigma
            sigma = start + churn.gamma(start, len(sigmas) - 1) * start
            x = x + math.sqrt(sigma**2 - start**2) * churn.noise_scale * fresh
        x, calls = _step(denoise, x, sigma, sigma_next, label, carry, corrected)
        carry, nfe = calls[-1].carry, nfe + len(calls)
        yield Step(x, sigma_next, calls, nfe)


@torch.no_grad()
def _step(
    denoise, x, sigma, sigma_next, label, carry, corrected: bool
) -> tuple[Tensor, tuple[Denoised, ...]]:
    """Return the state at sigma_next and what the denoiser returned: Euler's step, then the trapezoidal correction."""
    first = denoise(x, sigma, label, carry)
    slope = (x - first.image) / sigma
    x_next = x + (sigma_next - sigma) * slope
    if not corrected or sigma_next == 0:
        return x_next, (first,)
    second = denoise(x_next, sigma_next, label, first.carry)
    slope_next = (x_next - second.image) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2, (first, second)
