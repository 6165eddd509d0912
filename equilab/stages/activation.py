"""Stage `activation`: how active the layers of trained networks are along the noise levels, timesteps or iterations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equilab.core.config import UserError
from equilab.core.job import Job, Plan, results
from equilab.core.machine import device_of
from equilab.core.progress import bar
from equilab.diffusion import discrete_samplers as walk
from equilab.diffusion.discrete import evenly
from equilab.diffusion.samplers import euler, finish
from equilab.models.precond import EDM
from equilab.sampling.generators import Denoiser, Generator, Implicit, Solve, batches, inputs, kind, load
from equilab.solvers import Solver
from equilab.stages.evaluate import MAKERS, shape_of, trained_config, work_of, write_table
from equilab.training.onestep import Levels


@dataclass(frozen=True)
class Config:
    """The params section `activation`."""

    runs: tuple[
        str, ...
    ]  # folders below results/; students of the teacher see what the teacher sees, which must come first
    samples: int
    batch: int
    levels: Levels  # noise levels along which a U-Net samples, by Euler's method
    timesteps: int  # of a chain of FPDM or DiT
    iterations: int  # of a fixed point

    def __post_init__(self):
        if min(self.samples, self.batch, self.timesteps, len(self.runs)) < 1 or self.iterations < 2:
            raise ValueError("samples, batch, timesteps and the number of runs must be >= 1, iterations >= 2")
        names = [run.rpartition("/")[2] for run in self.runs]
        if len(set(names)) < len(names):
            raise ValueError(
                f"runs of one name cannot be told apart: {', '.join(self.runs)}; leave one out or rename it"
            )


class Activity:
    """Mean and mean square of layers' outputs at each step, over samples: nothing grows with their number."""

    def __init__(self):
        self.sums = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def tell(self, step: int, at: float, outputs: Mapping[str, Tensor]) -> None:
        """Add outputs (B, ...) by layer, made at a step, where noise level, timestep or iteration is `at`."""
        for layer, value in outputs.items():
            each = value.double().flatten(1)
            found = torch.stack([each.mean(1).sum(), each.square().mean(1).sum(), each.new_tensor(len(each))])
            self.sums[layer, step, at] += found.cpu()

    def rows(self, run: str, family: str) -> list[dict[str, Any]]:
        """Return a row for each layer and step: mean, and root mean square, over samples and all that a layer puts out."""
        depth = {layer: k for k, layer in enumerate(dict.fromkeys(layer for layer, *_ in self.sums))}
        return [
            {
                "run": run,
                "family": family,
                "layer": layer,
                "depth": depth[layer],
                "step": step,
                "at": at,
                "mean": float(total / count),
                "rms": float(squares / count) ** 0.5,
            }
            for (layer, step, at), (total, squares, count) in self.sums.items()
        ]


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost: every network along its noise levels, timesteps or iterations.

    Raises: UserError if `runs` names no run of the study, or one of a network without layers to look at.
    """
    found = {name: trained_config(name, read) for name in config.runs}
    for place, (name, trained) in enumerate(found.items()):
        family = kind(trained)
        if name.startswith("diffusion/") and not config.timesteps <= trained.diffusion.timesteps:
            raise UserError(
                f"activation.timesteps is {config.timesteps}, but {name} has {trained.diffusion.timesteps}; lower it"
            )
        if family == "vit":
            raise UserError(
                f"activation.runs: {name} is a ViT, whose layers see no noise level; leave it out"
            )
        if family == "student" and "teacher" not in config.runs[:place]:
            raise UserError(
                f"activation.runs: list the teacher before {name}, which is shown what the teacher sees"
            )

    def count() -> Plan:
        size, work = 0, 0.0
        for name, trained in found.items():
            stage = name.partition("/")[0]
            shape = shape_of(name, read, job.image)
            size += MAKERS[stage].counted(trained, shape, job.classes)["parameters"]
            if stage in ("distill", "diffusion"):
                work += sum(
                    work_of(name, trained, shape, job.classes, [(config.timesteps, config.iterations)])
                )
            else:  # the teacher's network, whoever's its weights are
                work += sum(
                    work_of("teacher", read("teacher"), job.image, job.classes, [(config.levels.steps, 1)])
                )
        return Plan(size, work * config.samples)

    return count


def run(config: Config, job: Job) -> None:
    """Write `activation.csv`: a row for each run, layer and step.

    Of a U-Net, the last convolution of each block; of a DiT, what each block adds; of an FPDM or a GET, what each
    iteration changes.

    Raises: UserError if the weights of a run are missing or damaged.
    Source: GDD (Zheng 2024), section 4.1, for U-Nets.
    """
    plan(config, job, job.read)
    device = device_of(job)
    found = {
        name: load(results(name) / "weights.safetensors", device, trained_config(name, job.read))
        for name in config.runs
    }
    unets = {name: one for name, one in found.items() if one.kind in ("unet", "student")}
    activities = {name: Activity() for name in found}
    indices = list(batches(config.samples, config.batch))
    with (
        bar("activation", config.samples * (len(found) - max(len(unets) - 1, 0))) as progress,
        torch.inference_mode(),
    ):
        for chosen in indices:
            if unets:
                _along_sigmas(config, job, unets, activities, chosen)
                progress.update(len(chosen))
            for name in (name for name in found if name not in unets):
                along = _along_chain if isinstance(found[name], Denoiser) else _along_iterations
                along(config, job, found[name], activities[name], chosen)
                progress.update(len(chosen))
    rows = [
        row for name, one in found.items() for row in activities[name].rows(name.rpartition("/")[2], one.kind)
    ]
    write_table(job.out / "activation.csv", rows)


def _along_sigmas(
    config: Config, job: Job, unets: Mapping[str, Generator], activities: Mapping[str, Activity], chosen
) -> None:
    """Sample along all noise levels by the teacher, and show what it sees to every U-Net."""
    teacher = unets["teacher"]
    noise, label, _ = inputs(job.study.seed, chosen, teacher, None)
    networks = {name: one.net if one.kind == "unet" else one.net.net for name, one in unets.items()}
    seen = []

    def told(name: str, x: Tensor, level: Tensor, label: Tensor | None, augment: None) -> Tensor:
        out, outputs = networks[name](x, level, label, augment, return_activations=True)
        activities[name].tell(len(seen), seen[-1], outputs)
        return out

    def denoise(x: Tensor, sigma: float, label: Tensor | None, carry: None):
        seen.append(float(sigma))
        made = {
            name: EDM(partial(told, name), sigma_data=teacher.config.sigma_data)(x, sigma, label)
            for name in networks
        }
        return made["teacher"]

    finish(euler(denoise, noise, config.levels.sigmas().double().flip(0), label))


def _along_chain(config: Config, job: Job, generator: Denoiser, activity: Activity, chosen) -> None:
    """Sample a denoiser along its timesteps by DDIM."""
    noise, label, _ = inputs(job.study.seed, chosen, generator, None)
    process, steps = generator.config.diffusion, []
    solver = Solver("iterate", config.iterations, 0.0, "last", record=True)

    def predict(x: Tensor, t: Tensor, label: Tensor | None, carry: Tensor | None, iterations: None):
        steps.append(float(t[0]))
        if generator.config.fixed_point is None:
            out, added = generator.net(x, t, label, return_activations=True)
            activity.tell(len(steps), steps[-1], added)
            return out, None
        out, solution = generator.net(x, t, label, None, solver)
        activity.tell(len(steps), steps[-1], _changes(solution))
        return out, solution

    chain = process.chain(evenly(process.timesteps, config.timesteps))
    pixels = generator.shape == job.image  # latents are not held in -1..1
    walk.finish(walk.ddim(predict, noise, chain, label, eta=0.0, reuse=False, clamp=pixels))


def _along_iterations(config: Config, job: Job, generator: Implicit, activity: Activity, chosen) -> None:
    """Solve an implicit generator; its steps are its iterations."""
    setting = Solve("iterate", config.iterations, 0.0, "last", None, None, "zeros")
    noise, label, init = inputs(job.study.seed, chosen, generator, setting)
    (solution,) = generator.make(noise, label, init, setting, every=True).solutions
    for k, change in enumerate(_changes(solution).values()):
        activity.tell(k + 1, float(k + 2), {"state": change})


def _changes(solution) -> dict[str, Tensor]:
    """Return what each iteration but the first changes in the state."""
    pairs = zip(solution.iterates, solution.iterates[1:])
    return {f"iteration.{k + 2}": after - before for k, (before, after) in enumerate(pairs)}
