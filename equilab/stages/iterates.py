"""What a run does along its iterations or its sampling steps, for the same noises as every other run: `iterates.npz`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from equilab.data.latents import Pixels
from equilab.diffusion.discrete import evenly
from equilab.sampling.generators import Generator, batches
from equilab.sampling.settings import ChainSampler, Sampler, Solve
from equilab.solvers import Solution

SHOWN = 16  # samples whose every iterate is kept as an image
TRACED = 256  # samples whose every iterate is measured
TRACE = 24  # iterations of these

Arrays = dict[str, np.ndarray]


def iterates(settings: Sequence[Any], batch: int, seed: int, generator: Generator, pixels: Pixels) -> Arrays:
    """Return what is kept of a run that is evaluated at these settings, the headline first.

    `images` (K, SHOWN, C, H, W) uint8, of all iterates or steps at the headline; of implicit generators of one step the
    arrays of `trace`, each (TRACED, TRACE). Of each setting k of a chain the arrays of `_chain`, of each further one of a
    sampler the images (SHOWN, C, H, W), as `image_k`.
    """
    given = batch, seed, generator, pixels
    if isinstance(settings[0], Solve):
        return _solved(settings[0], *given)
    found = {}
    for k, setting in enumerate(settings):
        if isinstance(setting, ChainSampler):
            found |= {f"{name}_{k}": array for name, array in _chain(setting, *given).items()}
        elif k:
            found[f"image_{k}"] = _shown(setting, seed, generator, pixels)
    found["images"] = _steps(settings[0], *given)
    return found


def _solved(setting: Solve, batch: int, seed: int, generator: Generator, pixels: Pixels) -> Arrays:
    """Return the images and the traces of TRACE iterations."""
    setting = setting.model_copy(update={"iterations": TRACE})
    images, traces = [], []
    for indices in batches(TRACED, batch):
        made = generator.generate(generator.inputs(seed, indices, setting), setting, return_iterates=True)
        images.append(pixels.decode(made.image[:, :SHOWN]).cpu().numpy())  # (K, B, C, H, W)
        traces.append(trace(made.solutions[0]))
    found = {}
    for name in traces[0]:
        found[name] = np.concatenate([each[name] for each in traces])
    found["images"] = np.concatenate(images, 1)[:, :SHOWN]
    return found


def trace(solution: Solution) -> Arrays:
    """Return what the iterates z_1..z_K of each sample do: (B, K) float32 each.

    `norm`: of z_k over the square root of its size; `residual`: ||f(z) - z|| / ||f(z)|| at the k-th application;
    `direction`: cosine between the steps z_k - z_{k-1} and z_{k-1} - z_{k-2}, nan for k < 3;
    `drift`: ||z_k - z_1|| / ||z_1||.
    """
    z = torch.stack(solution.iterates, 1).flatten(2).float()  # (B, K, N D)
    steps = z.diff(dim=1)  # (B, K-1, N D)
    turn = cosine_similarity(steps[:, 1:], steps[:, :-1], dim=2)  # (B, K-2)
    undefined = turn.new_full((len(z), 2), torch.nan)
    return {
        "norm": _array(z.norm(dim=2) / z.shape[2] ** 0.5),
        "residual": _array(solution.residuals),
        "direction": _array(torch.cat([undefined, turn], 1)),
        "drift": _array((z - z[:, :1]).norm(dim=2) / z[:, :1].norm(dim=2)),
    }


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _steps(setting: Any, batch: int, seed: int, generator: Generator, pixels: Pixels) -> np.ndarray:
    """Return the images (K, SHOWN, C, H, W) of all sampling steps, one without steps."""
    images = []
    for indices in batches(SHOWN, batch):
        made = generator.generate(generator.inputs(seed, indices, setting), setting, return_iterates=True)
        images.append(pixels.decode(made.image).cpu().numpy())  # (K, B, C, H, W)
    return np.concatenate(images, 1)


def _shown(setting: Sampler, seed: int, generator: Generator, pixels: Pixels) -> np.ndarray:
    """Return the images (SHOWN, C, H, W) at a setting."""
    made = generator.generate(generator.inputs(seed, np.arange(SHOWN), setting), setting)
    return pixels.decode(made.image).cpu().numpy()


def _chain(setting: ChainSampler, batch: int, seed: int, generator: Generator, pixels: Pixels) -> Arrays:
    """Return what a chain does: `image` (SHOWN, C, H, W) uint8, `diverged` (SHOWN,), `t` (S,) its timesteps, and of an
    implicit network `residual` (3, S, K), the 10th, 50th and 90th percentile over TRACED samples of the relative residual after
    each iteration of each step, nan where less than half of the samples made it."""
    images, diverged, residuals = [], [], []
    for indices in batches(TRACED, batch):
        made = generator.generate(generator.inputs(seed, indices, setting), setting)
        images.append(pixels.decode(made.image[:SHOWN]).cpu().numpy())
        diverged.append(made.diverged.cpu().numpy())
        residuals.append([_residuals(solution, len(indices)) for solution in made.solutions])
    found = {
        "image": np.concatenate(images)[:SHOWN],
        "diverged": np.concatenate(diverged)[:SHOWN],
        "t": np.array(evenly(generator.run.timesteps, setting.steps)[::-1]),
    }
    if residuals[0]:
        found["residual"] = _percentiles(residuals)
    return found


def _residuals(solution: Solution, samples: int) -> np.ndarray:
    """Return the residuals (B, K) of a call, the mean of both halves where there is guidance."""
    halves = solution.residuals.unflatten(0, (-1, samples))
    return halves.nanmean(0).cpu().numpy()


def _percentiles(residuals: list[list[np.ndarray]]) -> np.ndarray:
    """Return the percentiles (3, S, K) over all samples of residuals that come by batch and step, (B, K) each; nan where less than
    half of the samples have one."""
    longest = max(step.shape[1] for batch in residuals for step in batch)
    padded = [np.stack([_padded(step, longest) for step in batch]) for batch in residuals]  # each (S, B, K)
    values = np.concatenate(padded, 1)  # (S, N, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of iterations that no sample made
        found = np.nanpercentile(values, (10, 50, 90), axis=1)  # (3, S, K)
    few = 2 * (~np.isnan(values)).sum(1) < values.shape[1]  # (S, K)
    return np.where(few, np.nan, found).astype(np.float32)


def _padded(step: np.ndarray, length: int) -> np.ndarray:
    """Return residuals (B, K) of so many iterations, those that were not made nan."""
    return np.pad(step, ((0, 0), (0, length - step.shape[1])), constant_values=np.nan)
