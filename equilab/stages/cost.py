"""Stage `cost`: seconds and memory of all runs, measured one after another on an otherwise idle machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from equilab.core.config import plain
from equilab.core.files import write_json
from equilab.core.job import Job, Plan, results
from equilab.core.machine import device_of, environment, precision
from equilab.core.progress import bar
from equilab.data.pairs import Sampler
from equilab.metrics.measuring import matmul_peak, peak_memory, timed
from equilab.sampling.generators import Denoiser, Explicit, Generator, Implicit, Solve, load
from equilab.solvers import Solver
from equilab.stages.evaluate import MAKERS, shape_of, trained_config, work_of, write_table
from equilab.training import diffusion, distill


@dataclass(frozen=True)
class Config:
    """The params section `cost`."""

    runs: tuple[str, ...]  # folders below results/
    batch: int  # images in a forward pass, and in a training step
    iterations: tuple[int, ...]  # at test time, of implicit generators
    sampler: Sampler  # of a teacher
    warmup: int  # calls before the measured ones
    repeats: int  # measured calls; median, fastest and slowest are written

    def __post_init__(self):
        if (
            min(self.batch, self.repeats, *self.iterations, len(self.iterations), len(self.runs)) < 1
            or self.warmup < 0
        ):
            raise ValueError("batch, repeats, iterations and the number of runs must be >= 1, warmup >= 0")


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost: the FLOPs of all calls and training steps, those in which memory is measured included.

    Raises: UserError if `runs` names no run of the study.
    """
    found = {name: trained_config(name, read) for name in config.runs}

    def count() -> Plan:
        size, work = 0, 0.0
        for name, trained in found.items():
            stage = name.partition("/")[0]
            shape = shape_of(name, read, job.image)
            about = MAKERS[stage].counted(trained, shape, job.classes)
            fixed = getattr(trained, "equilibrium", None) or getattr(trained, "fixed_point", None)
            settings = (
                [(1, k) for k in config.iterations]
                if fixed
                else [(config.sampler.nfe if stage == "teacher" else 1, 1)]
            )
            work += sum(work_of(name, trained, shape, job.classes, settings)) + sum(
                _steps(stage, trained, shape, job.classes)
            )
            size += about["parameters"]
        return Plan(size, work * config.batch * (config.warmup + config.repeats + 1))

    return count


def _steps(stage: str, trained: Any, shape: tuple[int, ...], classes: int) -> list[int | float]:
    """Return the FLOPs of the training steps that are measured of a run, for an image."""
    if stage == "diffusion":
        counts = (
            (trained.fixed_point.without, trained.fixed_point.steps) if trained.fixed_point else (0.0, 0.0)
        )
        return [diffusion.step_flops(trained, shape, classes, counts)]
    return (
        [distill.counted(way, shape, classes)["train_flops_image"] for way in _ways(trained)]
        if stage == "distill"
        else []
    )


def run(config: Config, job: Job) -> None:
    """Write `cost.csv`: a row for each run and way of running it; `cost.json`: the device and its matmul peak.

    Raises: UserError if the weights of a run are missing or damaged.
    """
    device = device_of(job)
    loaded = [
        (name, load(results(name) / "weights.safetensors", device, trained_config(name, job.read)))
        for name in config.runs
    ]
    peak = matmul_peak(device, torch.float32)
    rows = []
    with bar(job.name, len(loaded), unit="run") as progress:
        for name, generator in loaded:
            rows += [{"run": name.split("/")[-1], **row} for row in _rows(config, generator, peak)]
            progress.update()
    write_table(job.out / "cost.csv", rows)
    about = {"environment": environment(job), "matmul_fp32_flops_s": peak, "settings": plain(config)}
    write_json(job.out / "cost.json", about)


def _rows(config: Config, generator: Generator, peak: float) -> list[dict[str, Any]]:
    """Return the measurements of a run: sampling at each number of iterations, and its training step."""
    noise = torch.randn(config.batch, *generator.shape, device=generator.device)
    label = (
        torch.arange(config.batch, device=generator.device) % generator.classes if generator.classes else None
    )
    if isinstance(generator, Denoiser):
        return list(_denoising(config, generator, noise, label, peak))
    rows = []
    for setting in _settings(config, generator):
        cost = generator.cost(setting)
        measured = _measured(config, generator, lambda: generator.make(noise, label, None, setting))
        rows.append(
            {
                "what": "sample",
                **cost,
                **measured,
                "peak_share": _share(config, cost["flops"], measured, peak),
            }
        )
    if isinstance(generator, Explicit | Implicit):
        rows += _training(config, generator, (noise, torch.tanh(noise), label, None), peak)
    return rows


def _settings(config: Config, generator: Generator) -> list[Sampler | Solve | None]:
    if generator.settings is Solve:
        return [Solve("iterate", k, 0.0, "last", None, None, "zeros") for k in config.iterations]
    return [config.sampler if generator.settings is Sampler else None]


def _training(config: Config, generator: Generator, batch, peak: float) -> Iterator[dict[str, Any]]:
    """Yield the training step, forward and backward, as trained; of an implicit generator unrolled and in O(1) memory too."""
    ways = _ways(generator.config)
    for way, work in zip(ways, _steps("distill", generator.config, generator.shape, generator.classes)):
        about = {
            "gradient": way.equilibrium.gradient if way.equilibrium else "explicit",
            "as_trained": way is ways[0],
        }
        yield _step(config, generator, distill.loss_of(way), batch, about, work, peak)


def _ways(trained: distill.Config) -> list[distill.Config]:
    """Return the ways of training that are measured, as it was trained first."""
    if trained.equilibrium is None:
        return [trained]
    others = (replace(trained.equilibrium, gradient=gradient) for gradient in ("unrolled", "o1"))
    return [
        trained,
        *(replace(trained, equilibrium=other) for other in others if other != trained.equilibrium),
    ]


def _denoising(config: Config, generator: Generator, noise, label, peak: float) -> Iterator[dict[str, Any]]:
    """Yield a call of a denoiser, at each number of iterations of its fixed point, and its training step at the most
    iterations that training draws: what there must be memory for."""
    trained, net, fixed = generator.config, generator.net, generator.config.fixed_point
    t = torch.full((config.batch,), trained.diffusion.timesteps // 2, device=generator.device)
    for k in config.iterations if fixed else (0,):
        solve = [None, Solver("iterate", k, 0.0, "last", measure=False)] if k else []
        with torch.inference_mode():
            measured = _measured(config, generator, lambda: net(noise, t, label, *solve))
        work = diffusion.call(trained, generator.shape, generator.classes, k)
        cost = {
            "nfe": 1,
            "iterations": k or None,
            "block_evals": net.blocks(k) if k else net.blocks(),
            "flops": work,
        }
        yield {"what": "call", **cost, **measured, "peak_share": _share(config, work, measured, peak)}
    counts, gradient = ((fixed.without, fixed.steps), fixed.gradient) if fixed else (None, "explicit")
    (work,) = _steps("diffusion", trained, generator.shape, generator.classes)
    batch, about = (torch.tanh(noise), noise, t, label, counts), {"gradient": gradient, "as_trained": True}
    yield _step(config, generator, diffusion.loss_of(trained), batch, about, work, peak)


def _step(
    config: Config, generator: Generator, loss, batch, about: dict, work: int | float, peak: float
) -> dict[str, Any]:
    """Return the row of a training step, forward and backward, in the precision of the training."""
    net = generator.net.train().requires_grad_(True)

    def step():
        with precision(generator.config.optimisation.precision, generator.device)():
            value = loss(net, batch)
        value.backward()
        net.zero_grad(set_to_none=True)

    measured = _measured(config, generator, step)
    net.eval().requires_grad_(False)
    row = {"what": "train", **about, "nfe": 1, "flops": work, **measured}
    return {**row, "peak_share": _share(config, work, measured, peak)}


def _measured(config: Config, generator: Generator, call) -> dict[str, int | float]:
    """Return seconds of a call on a batch and the largest memory that it took beyond what was there."""
    seconds = timed(call, generator.device, warmup=config.warmup, repeats=config.repeats)
    memory = peak_memory(call, generator.device)
    return {
        "batch": config.batch,
        "seconds": seconds.median,
        "seconds_min": seconds.fastest,
        "seconds_max": seconds.slowest,
        "images_s": config.batch / seconds.median,
        "memory_mib": memory / 2**20,
    }


def _share(config: Config, flops: int | float, measured: dict[str, int | float], peak: float) -> float:
    return flops * config.batch / measured["seconds"] / peak
