"""Samplers of a discrete diffusion: from noise to an image along a chain, a step at a time.

They call `predict(x, t, label, carry, limits) -> (output, solution)`: t (B,) int64, the state `carry` to start a
fixed point from or None, the `limits` that a budget sets to its Solver, as fields of that; the Solution of an explicit
network is None. A network becomes one by `explicit` or `implicit`, then perhaps `guided`. The samplers draw nothing:
`noises(step)` gives the fresh unit noise of a step, steps counted from 0, the noisiest. No gradients flow
through them, though they do through a single `ddpm_step` or `ddim_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from equilab.core import rng
from equilab.diffusion.discrete import Chain, Level, noise_of_image, posterior_mean
from equilab.diffusion.protocols import Step, not_finite
from equilab.solvers import Solution, Solver
from equilab.solvers.budget import Budget


def ddpm_step(
    image: Float[Tensor, "b c h w"],
    x: Float[Tensor, "b c h w"],
    level: Level,
    log_variance: Float[Tensor, "_ _ _ _"],
    noise: Float[Tensor, "b c h w"] | None,
) -> Float[Tensor, "b c h w"]:
    """Return the state one step before `x`, drawn by unit `noise` from its normal distribution given the image.

    Without noise, as in the last step of a chain, it is the mean. `log_variance` is that of `Chain.log_variance`.

    Source: "Denoising diffusion probabilistic models" (Ho 2020), equations 6 and 7 and algorithm 2, line 4.
    """
    mean = posterior_mean(image, x, level)
    return mean if noise is None else mean + (log_variance / 2).exp() * noise


def ddim_step(
    image: Float[Tensor, "b c h w"],
    x: Float[Tensor, "b c h w"],
    level: Level,
    eta: float,
    noise: Float[Tensor, "b c h w"] | None,
) -> Float[Tensor, "b c h w"]:
    """Return the state one step before `x`, along the predicted image and the noise that it leaves in `x`.

    `eta` 0 is deterministic, 1 makes room for as much fresh unit `noise` as DDPM of "small" variance adds;
    without noise, as in the last step of a chain, none is added.

    Source: "Denoising diffusion implicit models" (Song 2021), equations 12 and 16.
    """
    predicted = noise_of_image(x, image, level)
    variance = eta**2 * (1 - level.before) / (1 - level.alpha_bar) * (1 - level.alpha_bar / level.before)
    mean = level.before.sqrt() * image + (1 - level.before - variance).clamp(min=0).sqrt() * predicted
    return mean if noise is None else mean + variance.sqrt() * noise


def ddpm(
    predict: Callable,
    noise: Float[Tensor, "b c h w"],
    chain: Chain,
    label: Int64[Tensor, b] | None,
    noises: Callable[[int], Tensor],
    *,
    reuse: bool,
    clamp: bool,
    budget: Budget | None = None,
) -> Iterator[Step]:
    """Sample every step back along `chain` from its normal distribution; yields a Step per step, float64.

    With `reuse`, each step starts its fixed point from the last one's solution; with `clamp`, predicted
    images are held in -1..1; `budget` says how many iterations each step gets (None: what the solver of
    `predict` has). A sample diverges where its solver does or its prediction is not finite. From then on it
    stands still: it keeps its last finite state, which then stands for its image.

    Raises: on the way, ValueError if the budget does not fit the chain.
    Source: "Denoising diffusion probabilistic models" (Ho 2020), algorithm 2; FPDM, section 3.3, for reuse and budget.
    """

    def move(image, x, level, value, fresh_noise):
        return ddpm_step(image, x, level, chain.log_variance(value, level), fresh_noise)

    return _steps(move, predict, noise, chain, label, noises, reuse, clamp, budget)


def ddim(
    predict: Callable,
    noise: Float[Tensor, "b c h w"],
    chain: Chain,
    label: Int64[Tensor, b] | None,
    noises: Callable[[int], Tensor] | None = None,
    *,
    eta: float,
    reuse: bool,
    clamp: bool,
    budget: Budget | None = None,
) -> Iterator[Step]:
    """Follow predicted image and noise along `chain`; yields a Step per step, float64.

    `eta` 0 is deterministic, 1 adds as much fresh noise as DDPM of "small" variance. The others as in `ddpm`.

    Raises: ValueError for eta above 0 without noises; on the way, as `ddpm`.
    Source: "Denoising diffusion implicit models" (Song 2021), equations 12 and 16.
    """

    if eta > 0 and noises is None:
        raise ValueError(f"eta is {eta}, which needs fresh noise; give noises, a function of the step")

    def move(image, x, level, value, fresh_noise):
        return ddim_step(image, x, level, eta, fresh_noise)

    return _steps(move, predict, noise, chain, label, noises if eta > 0 else None, reuse, clamp, budget)


def fresh(
    seed: int, purpose: str, indices: Sequence[int] | np.ndarray, noise: Tensor
) -> Callable[[int], Tensor]:
    """Return `noises` for a sampler: unit noise like `noise`, row i a function of (seed, purpose, step, indices[i])."""
    shape = tuple(noise.shape[1:])

    def noises(step: int) -> Tensor:
        values = rng.noise(seed, f"{purpose}, step {step}", indices, shape)
        return torch.from_numpy(values).to(noise)

    return noises


def explicit(net: Callable) -> Callable:
    """Return the `predict` of a network `net(x, t, label) -> output`."""

    def predict(
        x: Tensor, t: Tensor, label: Tensor | None, carry: Tensor | None, limits: Mapping[str, Any]
    ) -> tuple[Tensor, None]:
        return net(x, t, label), None

    return predict


def implicit(net: Callable, solver: Solver) -> Callable:
    """Return the `predict` of `net(x, t, label, carry, solve) -> (output, Solution)`, solved by `solver`."""

    def predict(
        x: Tensor, t: Tensor, label: Tensor | None, carry: Tensor | None, limits: Mapping[str, Any]
    ) -> tuple[Tensor, Solution]:
        return net(x, t, label, carry, replace(solver, **limits))

    return predict


def guided(predict: Callable, scale: float, null: int, channels: str) -> Callable:
    """Return `predict` with classifier-free guidance: from that of the class `null` towards the label's, and beyond.

    `scale` 0 is the null class, 1 the label, larger is guidance (1 + w in the paper). Both are predicted in
    one call of twice the samples, those with their label first; carry and Solution are of both. `channels`
    "all" guides the prediction of all image channels, "first_three" the first three, as published. The
    others, and a learned variance, are those with the label.

    Source: "Classifier-free diffusion guidance" (Ho 2022), equation 6; the channels from the published code of DiT.
    """

    def both(
        x: Tensor, t: Tensor, label: Tensor | None, carry: Tensor | None, limits: Mapping[str, Any]
    ) -> tuple[Tensor, Solution | None]:
        labels = torch.cat([label, torch.full_like(label, null)])  # (2B,)
        output, solution = predict(torch.cat([x, x]), torch.cat([t, t]), labels, carry, limits)
        towards, away = output.chunk(2)  # (B, O, H, W) each
        count = x.shape[1] if channels == "all" else min(3, x.shape[1])
        pull = away[:, :count] + scale * (towards[:, :count] - away[:, :count])  # (B, count, H, W)
        return torch.cat([pull, towards[:, count:]], 1), solution

    return both


@torch.no_grad()
def _steps(move, predict, noise, chain, label, noises, reuse, clamp, budget) -> Iterator[Step]:
    """Yield the steps by `move(image, x, level, value, fresh noise) -> x one step before`; `noises` None adds no noise.

    The others are as of `ddpm`.
    """
    x = noise.detach().double()
    steps, carry, solutions = len(chain.t), None, []
    diverged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step, position in enumerate(reversed(range(steps))):
        limits = {} if budget is None else budget(solutions, steps)
        t = int(chain.t[position])
        ts = torch.full((len(x),), t, device=x.device)
        output, solution = predict(x.to(noise.dtype), ts, label, carry, limits)

        level = chain.at(torch.full((1,), position, device=x.device))
        prediction, value = chain.split(output.double(), x.shape[1])
        image = chain.image(x, prediction, level)
        if clamp:
            image = image.clamp(-1, 1)
        fresh_noise = None if noises is None or position == 0 else noises(step).to(x)
        following = move(image, x, level, value, fresh_noise)

        diverged = diverged | not_finite(prediction) | not_finite(following)
        if solution is not None:
            diverged = diverged | solution.diverged.reshape(-1, len(x)).any(0)  # guided, of both halves
        stopped = diverged[:, None, None, None]
        image = torch.where(stopped, x, image)
        x = torch.where(stopped, x, following)
        if reuse:
            carry = solution.z
        solutions.append(solution)
        yield Step(x, t, image, () if solution is None else (solution,), diverged, step + 1)
