"""Samplers of a discrete diffusion: from noise to an image along a chain, a step at a time.

They call `predict(x, t, label, carry, iterations) -> (output, solution)`: t (B,) int64, the state `carry` to start a
fixed point from or None, the `iterations` for it or None; the Solution of an explicit network is None. A network
becomes one by `explicit` or `implicit`, then perhaps `guided`. The samplers draw nothing: `noises(step)` gives the
fresh unit noise of a step, steps counted from 0, the noisiest. No gradients flow through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from equilab.core import rng
from equilab.diffusion.discrete import Chain, Level, noise_of_image, posterior_mean
from equilab.solvers import Solution, Solver
from equilab.solvers.budget import Budget, trace


class Step(NamedTuple):
    """What a sampler yields after a step.

    A sample diverges where its solver does or its prediction is not finite. From then on it stands still: it keeps the
    last state that was sound.
    """

    x: Float64[Tensor, "b c h w"]  # the state that the step leads to; after the last step, the image
    t: int  # the timestep that it left
    image: Float64[Tensor, "b c h w"]  # the image predicted there; of a diverged sample, its state
    solution: Solution | None  # of an implicit network; with guidance, of twice the samples (see `guided`)
    diverged: Bool[Tensor, b]  # in this step or before
    nfe: int  # calls of predict since the start; with guidance, each is of twice the samples


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

    With `reuse`, each step starts its fixed point from the last one's solution; with `clamp`, predicted images are
    held in -1..1; `budget` says how many iterations each step gets (None: what the solver of `predict` has).

    Raises: ValueError if the budget does not fit the chain; on the way, if `predict` returns no solution to reuse or
        measure, or one of other samples.
    Source: "Denoising diffusion probabilistic models" (Ho 2020), algorithm 2; FPDM, section 3.3, for reuse and budget.
    """

    def move(x: Tensor, image: Tensor, value: Tensor | None, level: Level) -> tuple[Tensor, Tensor]:
        return posterior_mean(image, x, level), (chain.log_variance(value, level) / 2).exp()

    return _walk(predict, noise, chain, label, move, noises, reuse, clamp, budget)


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

    Raises: ValueError if eta leaves 0..1 or lacks noises; others as in `ddpm`.
    Source: "Denoising diffusion implicit models" (Song 2021), equations 12 and 16.
    """
    if not 0 <= eta <= 1 or (eta > 0 and noises is None):
        raise ValueError(f"eta is {eta}; give 0..1 and, above 0, noises, a function of the step")

    def move(x: Tensor, image: Tensor, value: Tensor | None, level: Level) -> tuple[Tensor, Tensor]:
        variance = eta**2 * (1 - level.before) / (1 - level.alpha_bar) * (1 - level.alpha_bar / level.before)
        noise = noise_of_image(x, image, level)
        mean = level.before.sqrt() * image + (1 - level.before - variance).clamp(min=0).sqrt() * noise
        return mean, variance.sqrt()

    return _walk(predict, noise, chain, label, move, noises if eta > 0 else None, reuse, clamp, budget)


def finish(steps: Iterable[Step]) -> Step:
    """Run a sampler to its end; returns its last step, whose x is the image."""
    for step in steps:
        last = step
    return last


def fresh(
    seed: int, purpose: str, indices: Sequence[int] | np.ndarray, noise: Tensor
) -> Callable[[int], Tensor]:
    """Return `noises` for a sampler: unit noise like `noise`, row i a function of (seed, purpose, step, indices[i])."""

    def noises(step: int) -> Tensor:
        return torch.from_numpy(
            rng.noise(seed, f"{purpose}, step {step}", indices, tuple(noise.shape[1:]))
        ).to(noise)

    return noises


def explicit(net: Callable) -> Callable:
    """Return the `predict` of a network `net(x, t, label) -> output`."""

    return lambda x, t, label, carry, iterations: (net(x, t, label), None)


def implicit(net: Callable, solver: Solver) -> Callable:
    """Return the `predict` of `net(x, t, label, carry, solve) -> (output, Solution)`, solved by `solver`.

    It raises ValueError for a carry of other samples, or one that samples at different timesteps would start from.
    """

    def predict(
        x: Tensor, t: Tensor, label: Tensor | None, carry: Tensor | None, iterations: int | None
    ) -> tuple[Tensor, Solution]:
        if carry is not None and len(carry) != len(x):
            raise ValueError(f"carry holds {len(carry)} states for {len(x)} samples; hand in theirs, or None")
        if carry is not None and (t != t[0]).any():
            raise ValueError(
                "t mixes timesteps, but a carry is of one; call with one timestep, or carry None"
            )
        return net(
            x, t, label, carry, solver if iterations is None else replace(solver, iterations=iterations)
        )

    return predict


def guided(predict: Callable, scale: float, null: int, channels: str) -> Callable:
    """Return `predict` with classifier-free guidance: from that of the class `null` towards the label's, and beyond.

    `scale` 0 is the null class, 1 the label, larger is guidance (1 + w in the paper).
    Both are predicted in one call of twice the samples, those with their label first; carry and Solution are of both.
    `channels` "all" guides the prediction of all image channels, "first_three" the first three, as published. The
    others, and a learned variance, are those with the label.

    Raises: ValueError for unknown channels; when called, if there is no label.
    Source: "Classifier-free diffusion guidance" (Ho 2022), equation 6; the channels from the published code of DiT.
    """
    if channels not in ("all", "first_three"):
        raise ValueError(f"channels is {channels!r}; choose 'all' or 'first_three'")

    def both(
        x: Tensor, t: Tensor, label: Tensor | None, carry: Tensor | None, iterations: int | None
    ) -> tuple[Tensor, Solution | None]:
        if label is None:
            raise ValueError("there is no label to guide towards; give one, or sample without guidance")
        labels = torch.cat([label, torch.full_like(label, null)])  # (2B,)
        output, solution = predict(torch.cat([x, x]), torch.cat([t, t]), labels, carry, iterations)
        towards, away = output.chunk(2)
        count = x.shape[1] if channels == "all" else min(3, x.shape[1])
        pull = away[:, :count] + scale * (towards[:, :count] - away[:, :count])
        return torch.cat([pull, towards[:, count:]], 1), solution

    return both


def _walk(predict, noise, chain, label, move, noises, reuse: bool, clamp: bool, budget) -> Iterator[Step]:
    """Check the budget, then step; `move` returns mean and deviation of the next state, `noises` None adds nothing."""
    if budget is not None:
        budget((), len(chain.t))
    return _steps(predict, noise, chain, label, move, noises, reuse, clamp, budget)


def _steps(predict, noise, chain, label, move, noises, reuse, clamp, budget) -> Iterator[Step]:
    x, steps, carry, traces = noise.detach().double(), len(chain.t), None, []
    diverged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step, t in enumerate(chain.t.tolist()[::-1]):
        iterations = None if budget is None else budget(traces, steps)
        with torch.no_grad():
            ts = torch.full((len(x),), t, device=x.device)
            output, solution = predict(x.to(noise.dtype), ts, label, carry, iterations)
            broken = _broken(solution, x, needed=reuse or budget is not None)
            level = chain.at(torch.full((1,), steps - 1 - step, device=x.device))
            prediction, value = chain.split(output.double(), x.shape[1])
            image = chain.image(x, prediction, level)
            image = image.clamp(-1, 1) if clamp else image
            following, deviation = move(x, image, value, level)
            if noises is not None and step < steps - 1:
                following = following + deviation * noises(step).to(x)
            unsound = ~(prediction.isfinite() & following.isfinite()).flatten(1).all(1)  # (B,)
            diverged = diverged | broken | unsound
            stopped = diverged[:, None, None, None]
            x, image = torch.where(stopped, x, following), torch.where(stopped, x, image)
        if reuse:
            carry = solution.z
        if budget is not None:
            traces.append(trace(solution))
        yield Step(x, t, image, solution, diverged, step + 1)


def _broken(solution: Solution | None, x: Tensor, needed: bool) -> Tensor:
    """Return the samples (B,) of which a part of the solution diverged."""
    if solution is None:
        if needed:
            raise ValueError(
                "predict returns no solution, as of an explicit network; sample without reuse and budget"
            )
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if len(solution.z) % len(x):
        raise ValueError(
            f"predict returns {len(solution.z)} states for {len(x)} samples; give each sample its own"
        )
    return solution.diverged.reshape(-1, len(x)).any(0)
