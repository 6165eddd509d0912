"""Stage `activation`: how active the layers of trained networks are along the noise levels, timesteps or iterations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count, pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from equilab.core.config import Params, UserError
from equilab.core.files import publishing, write_table
from equilab.core.job import Distinct, Job, Plan
from equilab.core.machine import device_of
from equilab.core.progress import bar
from equilab.diffusion import discrete_samplers
from equilab.diffusion.discrete import evenly
from equilab.diffusion.protocols import Denoised, finish
from equilab.diffusion.samplers import euler
from equilab.models.precond import EDM
from equilab.sampling.generators import Generator, batches, describe, load, seeds_of
from equilab.sampling.runs import Run
from equilab.sampling.settings import Count, iterated
from equilab.solvers import Solution, Solver
from equilab.training.onestep import Levels


class Config(Params):
    """The params section `activation`."""

    # folders below results/; students of the teacher are shown what the teacher sees, which must come first
    runs: Annotated[tuple[str, ...], Field(min_length=1), Distinct]
    samples: Count
    batch: Count
    levels: Levels  # noise levels along which a U-Net samples, by Euler's method
    # the order of a U-Net's layers is judged by the noise levels up to this one; above, almost all are active at times
    judged_up_to: Annotated[float, Field(gt=0, le=1e6)]
    timesteps: Count  # of a chain of FPDM or DiT
    iterations: Annotated[int, Field(ge=2, le=10_000)]  # of a fixed point


class Activity:
    """Mean and mean square of layers' outputs at each step, over samples: nothing grows with their number."""

    def __init__(self):
        self.sums = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def update(self, step: int, at: float, outputs: Mapping[str, Float[Tensor, "b ..."]]) -> None:
        """Add outputs by layer, made at a step, where noise level, timestep or iteration is `at`."""
        for layer, value in outputs.items():
            samples = value.double().flatten(1)
            means, squares = samples.mean(1).sum(), samples.square().mean(1).sum()
            self.sums[layer, step, at] += torch.stack([means, squares, means.new_tensor(len(samples))]).cpu()

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer and step: mean, and root mean square, over samples and all that a layer puts out."""
        layers = list(dict.fromkeys(layer for layer, _, _ in self.sums))
        rows = []
        for (layer, step, at), (total, squares, samples) in self.sums.items():
            mean, rms = float(total / samples), float(squares / samples) ** 0.5
            place = {"layer": layer, "depth": layers.index(layer), "step": step, "at": at}
            rows.append({**place, "mean": mean, "rms": rms})
        return rows


class Seen(NamedTuple):
    """A replicate of a run, and how active its layers are."""

    generator: Generator
    seed: int
    activity: Activity


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: every replicate along its noise levels, timesteps or iterations.

    Raises: UserError if `runs` names no run of the study, or one of a network without layers to look at.
    """
    runs = [describe(of, job) for of in config.runs]
    for place, run in enumerate(runs):
        _check(config, run, config.runs[:place])

    def estimate() -> Plan:
        flops = sum(float(_flops(config, job, run)) * len(seeds_of(run.of, job)) for run in runs)
        parameters = sum(run.counted.parameters for run in runs)
        return Plan(parameters, flops * config.samples)

    return estimate


def _check(config: Config, run: Run, before: tuple[str, ...]) -> None:
    """Refuse a run that cannot be looked at, or not after the runs `before` it."""
    if not run.family.layered:
        raise UserError(
            f"activation.runs: the layers of {run.of}, a {run.family.label}, see no noise level; leave it out"
        )
    if run.teachers_network and "teacher" not in (*before, run.of):
        raise UserError(
            f"activation.runs: list the teacher before {run.of}, which is shown what the teacher sees"
        )
    if run.timesteps and config.timesteps > run.timesteps:
        raise UserError(
            f"activation.timesteps is {config.timesteps}, but {run.of} has {run.timesteps}; lower it"
        )


def _flops(config: Config, job: Job, run: Run) -> int | float:
    """Return the FLOPs of looking at a run, for an image."""
    if run.teachers_network:
        return describe("teacher", job).counted.image.flops(calls=config.levels.steps)
    if run.timesteps:
        return run.counted.image.flops(config.timesteps * config.iterations, calls=config.timesteps)
    return run.counted.image.flops(config.iterations)


def run(config: Config, job: Job) -> None:
    """Write `activation.csv`: a row for each run, seed, layer and step.

    Of a U-Net, the last convolution of each block, which in a block with attention is the projection after it; of a DiT,
    what each block adds; of an FPDM or a GET, what each iteration changes.

    Raises: UserError if the weights of a run are missing or damaged.
    Source: GDD (Zheng 2024), section 4.1, for U-Nets; its min-max normalisation, over the noise levels of a layer, is left to
        who reads the table.
    """
    plan(config, job)  # refuses what cannot be
    seen = [
        Seen(load(of, seed, config=describe(of, job, seed).config, device=device_of(job)), seed, Activity())
        for of in config.runs
        for seed in seeds_of(of, job)
    ]
    unets = [each for each in seen if each.generator.run.teachers_network]
    others = [each for each in seen if each not in unets]
    looks = [partial(_along_noise_levels, config, job, unets)] if unets else []
    for each in others:
        along = _along_chain if each.generator.run.timesteps else _along_iterations
        looks.append(partial(along, config, job, each.generator, each.activity))
    with bar("activation", config.samples * len(looks)) as progress, torch.inference_mode():
        for indices in batches(config.samples, config.batch):
            for look in looks:
                look(indices)
                progress.update(len(indices))
    rows = []
    for each in seen:
        run = each.generator.run
        named = {"of": run.of, "seed": each.seed, "family": run.family.name}
        judged = {"judged_up_to": config.judged_up_to} if each in unets else {}
        rows += [{**named, **row, **judged} for row in each.activity.rows()]
    with publishing(job.out) as fresh:
        write_table(fresh / "activation.csv", rows)
    print(f"activation: the layers of {len(config.runs)} runs, in {job.out / 'activation.csv'}")


class _Recorded(nn.Module):
    """A U-Net whose layers are looked at, at a step where the noise level is `sigma`."""

    def __init__(self, net: nn.Module, activity: Activity, step: int, sigma: float):
        super().__init__()
        self.net, self.activity, self.step, self.sigma = net, activity, step, sigma

    def forward(self, x: Tensor, noise_label: Tensor, label: Tensor | None, augment: None) -> Tensor:
        """Return the output of the U-Net."""
        out, outputs = self.net(x, noise_label, label, augment, return_activations=True)
        self.activity.update(self.step, self.sigma, outputs)
        return out


def _along_noise_levels(config: Config, job: Job, unets: list[Seen], indices: np.ndarray) -> None:
    """Sample along all noise levels by the teacher, the first of the U-Nets, and show what it sees to all."""
    teacher, steps = unets[0].generator, count(1)
    inputs = teacher.inputs(job.study.seed, indices, None)

    def denoise(x: Tensor, sigma: float, label: Tensor | None, carry: None) -> Denoised:
        step = next(steps)
        denoised = []
        for unet in unets:
            net = _Recorded(unet.generator.net, unet.activity, step, float(sigma))
            denoised.append(EDM(net, sigma_data=teacher.run.config.sigma_data)(x, sigma, label))
        return denoised[0]

    sigmas = config.levels.sigmas().double().flip(0)
    finish(euler(denoise, inputs.noise, sigmas, inputs.label))


def _along_chain(
    config: Config, job: Job, generator: Generator, activity: Activity, indices: np.ndarray
) -> None:
    """Sample a denoiser along its timesteps by DDIM."""
    run, steps = generator.run, count(1)
    inputs = generator.inputs(job.study.seed, indices, None)
    solver = Solver("iterate", config.iterations, 0.0, "last", record=True)

    def predict(x: Tensor, t: Tensor, label: Tensor | None, carry: None, limits: Mapping):
        if run.family.implicit:
            out, solution = generator.net(x, t, label, None, solver)
            activity.update(next(steps), float(t[0]), _changes(solution))
            return out, solution
        out, added = generator.net(x, t, label, return_activations=True)
        activity.update(next(steps), float(t[0]), added)
        return out, None

    process = run.config.diffusion
    chain = process.chain(evenly(process.timesteps, config.timesteps))
    pixels = run.shape == job.image  # latents are not held in -1..1
    steps_back = discrete_samplers.ddim(
        predict, inputs.noise, chain, inputs.label, eta=0.0, reuse=False, clamp=pixels
    )
    finish(steps_back)


def _along_iterations(
    config: Config, job: Job, generator: Generator, activity: Activity, indices: np.ndarray
) -> None:
    """Solve an implicit generator; its steps are its iterations."""
    setting = iterated(config.iterations)
    inputs = generator.inputs(job.study.seed, indices, setting)
    (solution,) = generator.generate(inputs, setting, return_iterates=True).solutions
    for step, change in enumerate(_changes(solution).values(), 1):
        activity.update(step, float(step + 1), {"state": change})


def _changes(solution: Solution) -> dict[str, Tensor]:
    """Return what each iteration but the first changes in the state."""
    changes = {}
    for iteration, (before, after) in enumerate(pairwise(solution.iterates), 2):
        changes[f"iteration.{iteration}"] = after - before
    return changes
