"""Stage `evaluate@RUN`: images of a trained run at every setting, with their counted cost and their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from equilab.core.config import Params, UserError, digest, plain, read_json, unusable
from equilab.core.files import (
    new_array,
    publishing,
    require_disk,
    sha256_of,
    write_arrays,
    write_json,
    write_table,
)
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import barrier, device_of, environment, rank, to_device, total, world
from equilab.core.progress import bar
from equilab.core.settings import setting_columns
from equilab.data import latents
from equilab.data.images import require_same
from equilab.data.latents import Pixels
from equilab.data.pairset import PairSet
from equilab.metrics.fidelity import CACHE, Scorer
from equilab.sampling.generators import Generator, batches, describe, load
from equilab.sampling.runs import Run, solver_statistics
from equilab.sampling.settings import ChainSampler, Sampler, Solve
from equilab.stages.iterates import iterates

SAMPLES = "samples.npy"  # images of the headline
OTHERS = "others.npy"  # those of other settings and of snapshots, one after another
LISTS = ("sampler", "solver", "chain")  # keys that list settings
Row = dict[str, Any]


class Config(Params):
    """An entry of the params section `evaluate`."""

    of: str  # the run's folder below results/
    batch: Annotated[int, Field(ge=1, le=1_000_000)]
    precision: Literal["fp32", "tf32", "bf16"]  # of the run's networks; features and scores are float32
    # of what a run lists, the first setting is the headline, the others are its sweep
    sampler: tuple[Sampler, ...]  # of a teacher
    solver: tuple[Solve, ...]  # of an implicit generator of one step
    chain: tuple[ChainSampler, ...]  # of a denoiser of discrete timesteps

    @property
    def settings(self) -> tuple[Any, ...]:
        """The settings to evaluate; a run that has nothing to set has one, None."""
        return self.sampler or self.solver or self.chain or (None,)


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: all images at all settings and snapshots, features not counted.

    Raises: UserError if `of` names no run of the study, or one that is evaluated otherwise.
    """
    run = describe(config.of, job, job.seed)
    _check(config, job, run)

    def count() -> Plan:
        samples = images = job.read("evaluator").samples
        if run.pairs is not None:
            held_out = job.read("pairs").held_out
            images += held_out + min(held_out, run.pairs)
        flops = [run.cost(setting)["flops"] for setting in config.settings]
        along_training = flops[0] * len(run.snapshots)
        disk = samples * int(np.prod(job.image))
        made = images * (len(flops) + len(run.snapshots))
        return Plan(run.counted.parameters, float(sum(flops) + along_training) * images, disk, images=made)

    return count


def _check(config: Config, job: Job, run: Run) -> None:
    """Refuse settings that are not those of the run."""
    place = f"evaluate.{job.run}"
    if any((name == run.listed) != bool(getattr(config, name)) for name in LISTS):
        where = f"{run.listed} and leave the other lists empty" if run.listed else "no list, leave all empty"
        raise UserError(f"{place}: list the settings of a {run.family.label} in {where}")
    if run.shape != job.image and any(setting.clamp for setting in config.chain):
        raise UserError(f"{place}.chain: clamp holds images in -1..1, which latents are not; set it to false")
    for k, setting in enumerate(config.settings):
        try:
            run.check(setting)
        except ValueError as error:
            raise UserError(f"{place}.{run.listed}[{k}]: {error}") from None


def run(config: Config, job: Job) -> None:
    """Write the run's samples, and its scores and costs at every setting, along its training, and along its iterates.

    `metrics.json` (headline), `sweep.csv` (a row a setting), `curve.csv` (a row a snapshot), `iterates.npz`
    (images, norms, directions and residuals along the iteration), `samples.npy` (headline).

    Raises: UserError if a result that it reads is missing or damaged, or the settings do not fit the run.
    """
    plan(config, job)  # refuses what cannot be
    device = device_of(job)
    trained = describe(config.of, job, job.seed).config
    scorer = Scorer(folder_of("evaluator"), folder_of("data"), CACHE, device, job.read("evaluator"))
    count = _floor_samples(job)
    weights_at = partial(load, config.of, job.seed, config=trained, device=device, precision=config.precision)
    generator = weights_at()
    pixels = latents.pixels(job, generator.run.shape, generator.run.latent, device)
    pairs = None if generator.run.pairs is None else _pairs(job)
    _check_inputs(config, job, generator, pairs)
    snapshots = generator.run.snapshots
    # the headline's images, those that are being made, and the rest
    require_disk({job.out: 3 * count * int(np.prod(pixels.shape))})
    work = (len(config.settings) + len(snapshots)) * count
    with publishing(job.out) as fresh, bar(job.name, work) as progress:
        evaluation = _Evaluation(config, job.study.seed, scorer, pixels, pairs, count, fresh, progress)
        rows = [evaluation.setting(generator, setting) for setting in config.settings]
        curve = [evaluation.snapshot(weights_at(snapshot=nimg)) for nimg in snapshots]
        barrier()  # all processes have read the images
        if rank() == 0:
            (fresh / OTHERS).unlink(missing_ok=True)
            kept = iterates(config.settings, config.batch, job.study.seed, generator, pixels)
            write_arrays(fresh / "iterates.npz", kept)
            write_table(fresh / "sweep.csv", rows)
            write_table(fresh / "curve.csv", curve)
            about = {
                "run": job.run,
                "seed": job.seed,
                "of": config.of,
                "family": generator.run.family.name,
                "parameters": generator.metadata["parameters"],
                "nimg": generator.metadata["nimg"],
                "settings": len(rows),
                "samples_sha256": sha256_of(fresh / SAMPLES),
                "environment": environment(job, processes=1),
            }
            write_json(fresh / "metrics.json", {**about, **rows[0]})
            name = scorer.extractor.distance
            train, test = (f"{rows[0][f'{name}_{split}']:.4g}" for split in ("train", "test"))
            print(f"{job.name}: {name.upper()} {train} to training images, {test} to held-out images")


def _check_inputs(config: Config, job: Job, generator: Generator, pairs: PairSet | None) -> None:
    """Refuse a run that was trained on other images or other pairs than there are now."""
    stage, _, name = config.of.partition("/")
    weights = folder_of(stage, name or None, job.seed if name else None) / "weights.safetensors"
    require_same(weights, generator.metadata)
    if pairs is not None and generator.metadata["inputs"]["pairs"] != digest(pairs.meta):
        raise unusable(weights, f"was trained on other pairs than {pairs.folder} holds now")


def _floor_samples(job: Job) -> int:
    """Return how many images are scored: as many as the floor, with which scores are compared, was measured on.

    Raises: UserError if params ask for another number, or it was measured on other images.
    """
    summary = folder_of("evaluator") / "summary.json"
    floor = read_json(summary, samples=int)
    require_same(summary, floor)
    samples, wanted = floor["samples"], job.read("evaluator").samples
    if samples != wanted:
        raise UserError(
            f"evaluator.samples is {wanted}, but the floor in {summary.parent} is of {samples}; "
            "run `python -m equilab evaluator` again"
        )
    return samples


def _pairs(job: Job) -> PairSet:
    """Return the study's pairs, read in full.

    Raises: UserError if they are missing, damaged, or not those of params.
    """
    pairs = PairSet(folder_of("pairs"))
    pairs.check(job)
    pairs.verify()
    return pairs


@dataclass
class _Evaluation:
    """What all settings and snapshots of a run are evaluated with."""

    config: Config
    seed: int  # of the study
    scorer: Scorer
    pixels: Pixels
    pairs: PairSet | None
    count: int  # images in every comparison
    place: Path  # of images that are being made
    progress: tqdm

    def setting(self, generator: Generator, setting: Any) -> Row:
        """Return the row of a setting: what it is, what it costs, its scores. The images of the first one are kept."""
        headline = setting is self.config.settings[0]
        images, solved = self._images(generator, setting, SAMPLES if headline else OTHERS)
        columns = {} if setting is None else setting_columns(plain(setting))
        return {
            **columns,
            **generator.cost(setting, solved.get("iterations")),
            **self.scorer.scores(images),
            **solved,
            **self._pair_errors(generator, setting),
        }

    def snapshot(self, generator: Generator) -> Row:
        """Return the row of a snapshot of the training: its distances at the headline setting."""
        setting = self.config.settings[0]
        images, _ = self._images(generator, setting, OTHERS)
        distances, errors = self.scorer.distances(images), self._pair_errors(generator, setting)
        return {"nimg": generator.metadata["nimg"], **distances, **errors}

    def _images(self, generator: Generator, setting: Any, file: str) -> tuple[np.ndarray, Row]:
        """Return the evaluation's images (N, C, H, W) uint8, mapped from a file, and what the solver did.

        Each process makes its share of the batches: any number of them writes the same bytes.
        """
        path = self.place / file
        barrier()  # all processes have read what was in it
        if rank() == 0:
            new_array(path, np.uint8, (self.count, *self.pixels.shape))
        barrier()
        images = np.load(path, mmap_mode="r+")
        statistics = torch.zeros(self.count, 3, dtype=torch.float64)
        for indices in list(batches(self.count, self.config.batch))[rank() :: world()]:
            made = generator.generate(generator.inputs(self.seed, indices, setting), setting)
            images[indices] = self.pixels.decode(made.image).cpu().numpy()
            statistics[indices] = solver_statistics(made)
            self.progress.update(len(indices))
        images.flush()
        iterations, residual, diverged = total(statistics).unbind(1)
        if not generator.run.can_diverge:
            return images, {}
        solved = {"diverged": int(diverged.sum())}
        if iterations.any():
            means = {"iterations": iterations.mean().item(), "residual": residual.median().item()}
            solved = means | solved
        return images, solved

    def _pair_errors(self, generator: Generator, setting: Any) -> dict[str, float]:
        """Return the mean absolute error on the held-out pairs and on up to as many training pairs, in units of -1..1."""
        if self.pairs is None:
            return {}
        held_out = self.pairs.held_out
        trained = min(held_out, generator.run.pairs)
        return {
            "l1_held_out": self._mean_error(generator, setting, 0, held_out),
            "l1_train": self._mean_error(generator, setting, held_out, trained),
        }

    def _mean_error(self, generator: Generator, setting: Any, first: int, count: int) -> float:
        """Return the mean absolute error on `count` pairs from the `first` on."""
        error = 0.0
        for chosen in batches(count, self.config.batch):
            noise, image, label = to_device(self.pairs.read(chosen + first), generator.device)
            inputs = generator.inputs(self.seed, chosen, setting)
            inputs = inputs._replace(noise=noise, label=label if generator.run.classes else None)
            made = generator.generate(inputs, setting)
            error += (made.image - image).abs().mean(dim=(1, 2, 3)).double().sum().item()
        return error / count
