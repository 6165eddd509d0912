"""Stage `cost`: seconds and memory of all runs, measured one after another on an otherwise idle machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from equilab.core.config import Params, plain
from equilab.core.files import publishing, write_json, write_table
from equilab.core.job import Distinct, Job, Plan
from equilab.core.machine import device_of, environment, precision
from equilab.core.progress import bar
from equilab.metrics.measuring import matmul_peak, peak_memory, timed
from equilab.sampling.generators import Generator, describe, load, seeds_of
from equilab.sampling.runs import Inputs, Run
from equilab.sampling.settings import Count, Sampler, Solve, iterated
from equilab.training import diffusion, distill, loop

Row = dict[str, Any]


class Config(Params):
    """The params section `cost`."""

    runs: Annotated[tuple[str, ...], Field(min_length=1), Distinct]  # folders below results/
    batch: Count  # images in a forward pass, and in a training step
    iterations: Annotated[tuple[Count, ...], Field(min_length=1)]  # at test time, of implicit generators
    sampler: Sampler  # of a teacher
    warmup: Annotated[int, Field(ge=0, le=10_000)]  # calls before the measured ones
    repeats: Annotated[int, Field(ge=1, le=10_000)]  # measured calls; median, fastest and slowest are written


class Measurement(NamedTuple):
    """Something to measure of a run: what it is and costs by shape, and what makes the call that is measured."""

    columns: Row
    prepare: Callable[[Generator, Inputs], Callable[[], object]]


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: all calls and training steps, those in which memory is measured
    included.

    Raises: UserError if `runs` names no run of the study.
    """
    runs = [describe(of, job) for of in config.runs]

    def count() -> Plan:
        flops = 0.0
        for run in runs:
            flops += sum(float(each.columns["flops"]) for each in _measurements(config, run))
        calls = config.batch * (config.warmup + config.repeats + 1)
        return Plan(sum(run.counted.parameters for run in runs), flops * calls)

    return count


def run(config: Config, job: Job) -> None:
    """Write `cost.csv`: a row for each run (its first seed) and way of running it; `cost.json`: the device and its matmul peak.

    Raises: UserError if the weights of a run are missing or damaged.
    """
    device = device_of(job)
    generators = [
        load(of, seeds_of(of, job)[0], config=describe(of, job).config, device=device) for of in config.runs
    ]
    peak = matmul_peak(device, torch.float32)
    rows = []
    with bar(job.name, len(generators), unit="run") as progress:
        for generator in generators:
            of, family = generator.run.of, generator.run.family.name
            named = {"of": of, "seed": seeds_of(of, job)[0], "family": family}
            inputs = _inputs(config, generator)
            for measurement in _measurements(config, generator.run):
                row = _measured(config, measurement.prepare(generator, inputs), device)
                flops = measurement.columns["flops"] * config.batch
                share = flops / row["seconds"] / peak
                rows.append({**named, **measurement.columns, **row, "peak_share": share})
            progress.update()
    about = {"environment": environment(job), "matmul_fp32_flops_s": peak, "settings": plain(config)}
    with publishing(job.out) as fresh:
        write_table(fresh / "cost.csv", rows)
        write_json(fresh / "cost.json", about)
    print(f"cost: {len(rows)} measurements of {len(generators)} runs, in {job.out / 'cost.csv'}")


def _inputs(config: Config, generator: Generator) -> Inputs:
    """Return a batch of noises, and classes in turn."""
    device, classes = generator.device, generator.run.classes
    noise = torch.randn(config.batch, *generator.run.shape, device=device)
    return Inputs(noise, torch.arange(config.batch, device=device) % classes if classes else None)


def _measured(config: Config, call: Callable[[], object], device: torch.device) -> Row:
    """Return seconds of a call on a batch and the largest memory that it took beyond what was there."""
    seconds = timed(call, device, warmup=config.warmup, repeats=config.repeats)
    memory = peak_memory(call, device)
    return {
        "batch": config.batch,
        "seconds": seconds.median,
        "seconds_min": seconds.fastest,
        "seconds_max": seconds.slowest,
        "images_s": config.batch / seconds.median,
        "memory_mib": memory / 2**20,
    }


def _measurements(config: Config, run: Run) -> Iterator[Measurement]:
    """Yield what is measured of a run: sampling at each number of iterations (of a denoiser of timesteps, a call), and, of runs
    whose step needs one network, training."""
    if run.timesteps:
        for iterations in config.iterations if run.family.implicit else (None,):
            columns = {"what": "call", **run.counts(1, iterations)}
            yield Measurement(columns, partial(_calling, iterations))
        if run.optimisation:
            yield _denoiser_training(run)
        return
    for setting in _settings(config, run):
        yield Measurement({"what": "sample", **run.cost(setting)}, partial(_sampling, setting))
    if run.pairs:
        yield from _generator_training(run)


def _settings(config: Config, run: Run) -> list[Sampler | Solve | None]:
    """Return the settings at which a run is sampled."""
    if run.family.implicit:
        return [iterated(iterations) for iterations in config.iterations]
    return [config.sampler if run.listed else None]


def _sampling(setting: Any, generator: Generator, inputs: Inputs) -> Callable[[], object]:
    """Return the call that samples a batch."""
    return partial(generator.generate, inputs, setting)


def _calling(iterations: int | None, generator: Generator, inputs: Inputs) -> Callable[[], object]:
    """Return a call of a denoiser of timesteps, halfway, at so many iterations of its fixed point."""
    middle = generator.run.timesteps // 2
    t = torch.full((len(inputs.noise),), middle, device=generator.device)
    applied = None if iterations is None else diffusion.Iterations(0, iterations)

    @torch.inference_mode()
    def call() -> None:
        diffusion.output_of(generator.net, inputs.noise, t, inputs.label, applied)

    return call


def _denoiser_training(run: Run) -> Measurement:
    """Return the training step of a denoiser at the most iterations that training draws: what there must be memory for."""
    trained, gradient = run.config, "explicit"
    if trained.fixed_point is not None:
        gradient = trained.fixed_point.gradient
        # of multi_step every update takes the most iterations
        most = trained.fixed_point.model_copy(update={"gradient": "multi_step"})
        trained = trained.model_copy(update={"fixed_point": most})
    flops = diffusion.cost(trained, run.shape, run.classes).train_flops_image

    def prepare(generator: Generator, inputs: Inputs) -> Callable[[], object]:
        batch = diffusion.example(run.config, inputs.noise, inputs.label)
        return _update(generator, diffusion.loss_of(run.config), batch)

    columns = {"what": "train", "gradient": gradient, "as_trained": True, "nfe": 1, "flops": int(flops)}
    return Measurement(columns, prepare)


def _generator_training(run: Run) -> Iterator[Measurement]:
    """Yield the training step as the run was trained; of an implicit network unrolled and in O(1) memory too."""
    for config in _gradient_variants(run.config):
        loss = distill.loss_of(config)

        def prepare(generator: Generator, inputs: Inputs, loss: loop.Loss = loss) -> Callable[[], object]:
            batch = distill.Batch(inputs.noise, torch.tanh(inputs.noise), inputs.label, None)
            return _update(generator, loss, batch)

        columns = {
            "what": "train",
            "gradient": config.equilibrium.gradient if config.equilibrium else "explicit",
            "as_trained": config is run.config,
            "nfe": 1,
            "flops": distill.cost(config, run.shape, run.classes).train_flops_image,
        }
        yield Measurement(columns, prepare)


def _gradient_variants(trained: distill.Config) -> list[distill.Config]:
    """Return the configs of a run whose training is measured, as it was trained first."""
    variants = [trained]
    for gradient in ("unrolled", "o1") if trained.equilibrium else ():
        if gradient != trained.equilibrium.gradient:
            other = trained.equilibrium.model_copy(update={"gradient": gradient})
            variants.append(trained.model_copy(update={"equilibrium": other}))
    return variants


def _update(generator: Generator, loss: loop.Loss, batch: Any) -> Callable[[], object]:
    """Return the training step of a network, forward and backward, in the precision of its training.

    The network stays ready to be trained: nothing else is measured of it afterwards.
    """
    net = generator.net.train().requires_grad_(True)
    context = precision(generator.run.config.optimisation.precision, generator.device)

    def update() -> None:
        with context():
            loss(net, batch).backward()
        net.zero_grad(set_to_none=True)

    return update
