"""Stage `evaluate@RUN`: images of a trained run at every setting, with their counted cost and their scores."""

from __future__ import annotations

import csv
import io
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from equilab.core.config import UserError, plain, read_json
from equilab.core.files import require_disk, scratch, write, write_json
from equilab.core.job import Job, Plan, results
from equilab.core.machine import barrier, device_of, environment, precision, rank, to_device, total, world
from equilab.core.progress import bar
from equilab.data import latents
from equilab.data.latents import Pixels
from equilab.data.pairs import Sampler
from equilab.data.pairset import PairSet
from equilab.diffusion.discrete import evenly
from equilab.metrics import fidelity
from equilab.sampling.generators import (
    FAMILIES,
    ChainSampler,
    Generator,
    Made,
    Solve,
    batches,
    budget,
    inputs,
    kind,
    load,
)
from equilab.training import consistency, diffusion, distill, gan, teacher

MAKERS = {
    "teacher": teacher,
    "distill": distill,
    "diffusion": diffusion,
    "gan": gan,
    "consistency": consistency,
}  # stages whose runs make images
SHOWN = 16  # samples whose every iterate is kept as an image
TRACED = 256  # samples whose every iterate is measured
TRACE = 24  # iterations of these


@dataclass(frozen=True)
class Config:
    """An entry of the params section `evaluate`."""

    of: str  # the run's folder below results/
    batch: int
    precision: Literal["fp32", "tf32", "bf16"]
    sampler: tuple[Sampler, ...]  # of a teacher; the first is the headline, the others are its sweep
    solver: tuple[Solve, ...]  # of an implicit generator, likewise
    chain: tuple[ChainSampler, ...]  # of a denoiser of discrete timesteps, likewise

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be >= 1, got {self.batch}")

    @property
    def settings(self) -> tuple[Any, ...]:
        """The settings to evaluate; an explicit generator has one, None."""
        return self.sampler or self.solver or self.chain or (None,)


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost: the FLOPs of all images at all settings and snapshots, features not counted.

    Raises: UserError if `of` names no run of the study, or one that is evaluated otherwise.
    """
    trained = trained_config(config.of, read)
    key = FAMILIES[kind(trained)].key
    if any((name == key) != bool(getattr(config, name)) for name in ("sampler", "solver", "chain")):
        raise UserError(
            f"evaluate.{job.run}: list the settings of a {kind(trained)} in "
            f"{f'{key} and leave the other lists empty' if key else 'no list, leave all empty'}"
        )
    shape = shape_of(config.of, read, job.image)
    if shape != job.image and any(setting.clamp for setting in config.chain):
        raise UserError(
            f"evaluate.{job.run}.chain: clamp holds images in -1..1, which latents are not; set it to false"
        )
    budgets = []
    for k, setting in enumerate(config.chain):
        try:
            budgets.append(budget(trained, setting))
        except ValueError as error:
            raise UserError(f"evaluate.{job.run}.chain[{k}]: {error}") from None

    def count() -> Plan:
        about = MAKERS[config.of.partition("/")[0]].counted(trained, shape, job.classes)
        samples = made = read("evaluator").samples
        settings = [(sampler.nfe, 1) for sampler in config.sampler] or [
            (1, solve.iterations) for solve in config.solver
        ]
        for given, setting in zip(budgets, config.chain):
            settings.append((setting.nfe, given.total / setting.steps if given else 0))
        work = work_of(config.of, trained, shape, job.classes, settings or [(1, 1)])
        if config.of.startswith("distill/"):
            made += read("pairs").held_out + min(read("pairs").held_out, trained.pairs)
        work = float(sum(work) + work[0] * len(trained.optimisation.snapshots)) * made
        return Plan(about["parameters"], work, samples * int(np.prod(job.image)))

    return count


def shape_of(of: str, read: Callable, image: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape of what the run `of` makes: of latents, where the study has them, or of an image."""
    return latents.shape_of(read, image) if of.startswith("diffusion/") else image


def work_of(
    of: str, trained: Any, shape: tuple[int, ...], classes: int, settings: list[tuple[int, int | float]]
) -> list[int | float]:
    """Return the FLOPs by shape of an image of the run `of`, at each setting: calls of the network (a generator makes one,
    however many steps a student takes in it), and iterations of a fixed point in each."""
    if of.startswith("distill/"):
        return distill.generation(trained, shape, classes, [iterations for _, iterations in settings])
    if of.startswith("diffusion/"):
        return [calls * diffusion.call(trained, shape, classes, iterations) for calls, iterations in settings]
    once = MAKERS[of.partition("/")[0]].counted(trained, shape, classes)["flops_image"]
    return [calls * once for calls, _ in settings]


def trained_config(of: str, read: Callable) -> Any:
    """Return the config of the run that makes images, named as its folder below results/.

    Raises: UserError if it names no run of the study.
    """
    stage, _, run = of.partition("/")
    if stage not in MAKERS:
        raise UserError(
            f"{of!r} is no run that makes images; give teacher, or RUN of a stage: {', '.join(list(MAKERS)[1:])}/RUN"
        )
    return read(stage, run or None)


def run(config: Config, job: Job) -> None:
    """Write the run's samples, and its scores and costs at every setting, along its training, and along its iterates.

    `metrics.json` (headline), `sweep.csv` (a row a setting), `curve.csv` (a row a snapshot), `iterates.npz`
    (images, norms, directions and residuals along the iteration), `samples.npy` (headline).

    Raises: UserError if a result that it reads is missing or damaged, or the settings do not fit the run.
    """
    plan(config, job, job.read)  # refuses what cannot be
    device = device_of(job)
    scorer = fidelity.Scorer(
        results("evaluator"), results("data"), fidelity.CACHE, device, job.read("evaluator")
    )
    samples = read_json(results("evaluator") / "summary.json", "samples")["samples"]
    if samples != (wanted := job.read("evaluator").samples):
        raise UserError(
            f"evaluator.samples is {wanted}, but the floor in results/evaluator is of {samples}; run the stage `evaluator` again"
        )
    folder, trained = results(config.of), trained_config(config.of, job.read)
    generator = load(folder / "weights.safetensors", device, trained)
    pixels = latents.pixels(job, generator.shape, config.of, device)
    pairs = PairSet(results("pairs")) if config.of.startswith("distill/") else None
    if pairs is not None:
        pairs.check(job)
        pairs.verify()
    curve = [folder / "snapshots" / f"{nimg:010d}.safetensors" for nimg in trained.optimisation.snapshots]
    work = (len(config.settings) + len(curve)) * samples
    require_disk(
        job.out, 3 * samples * int(np.prod(pixels.shape))
    )  # the headline's, those being made, and the rest
    with (
        scratch(job.scratch("samples")) as place,
        precision(config.precision, device)(),
        bar(job.name, work) as progress,
    ):
        rows, along = [], []
        for setting in config.settings:
            images, solved = _samples(
                config, job, generator, pixels, setting, place / f"{len(rows)}.npy", samples, progress
            )
            row = {**_settings(setting), **generator.cost(setting, solved.get("iterations"))}
            rows.append(
                {**row, **scorer.scores(images), **solved, **_errors(config, job, generator, setting, pairs)}
            )
            _done(place / f"{len(rows) - 1}.npy", keep=len(rows) == 1)
        for path in curve:
            snapshot, setting = load(path, device, trained), config.settings[0]
            images, _ = _samples(
                config,
                job,
                snapshot,
                pixels,
                setting,
                place / path.with_suffix(".npy").name,
                samples,
                progress,
            )
            errors = _errors(config, job, snapshot, setting, pairs)
            along.append({"nimg": snapshot.about["nimg"], **scorer.distances(images), **errors})
            _done(place / path.with_suffix(".npy").name, keep=False)
        if rank() == 0:
            job.out.mkdir(parents=True, exist_ok=True)
            os.replace(place / "0.npy", job.out / "samples.npy")
            write(job.out / "iterates.npz", _iterates(config, job, generator, pixels))
            write_table(job.out / "sweep.csv", rows)
            write_table(job.out / "curve.csv", along)
            kept = {key: generator.about[key] for key in ("parameters", "nimg")}
            about = {
                "run": job.run,
                "of": config.of,
                "kind": generator.kind,
                **kept,
                "environment": environment(job),
            }
            write_json(job.out / "metrics.json", {**about, **rows[0]})


def _done(path: Path, keep: bool) -> None:
    """Remove images that have been scored, when all processes have done so."""
    barrier()
    if rank() == 0 and not keep:
        path.unlink()


def _samples(
    config: Config,
    job: Job,
    generator: Generator,
    pixels: Pixels,
    setting,
    path: Path,
    samples: int,
    progress,
) -> tuple[np.ndarray, dict[str, int | float]]:
    """Return the evaluation's images (N, C, H, W) uint8, mapped from `path`, and what the solver did.

    Each process makes its share of the blocks: any number of them writes the same bytes.
    """
    if rank() == 0:
        np.lib.format.open_memmap(path, "w+", np.uint8, (samples, *pixels.shape))
    barrier()
    images, solved = np.load(path, mmap_mode="r+"), torch.zeros(samples, 3, dtype=torch.float64)
    for indices in list(batches(samples, config.batch))[rank() :: world()]:
        made = generator.make(*inputs(job.study.seed, indices, generator, setting), setting)
        images[indices] = pixels.decode(made.image).cpu().numpy()
        solved[indices] = _told(made)
        progress.update(len(indices))
    images.flush()
    iterations, residual, diverged = total(solved).unbind(1)
    if generator.key not in ("solver", "chain"):
        return images, {}
    found = (
        {"iterations": iterations.mean().item(), "residual": residual.median().item()}
        if iterations.any()
        else {}
    )
    return images, {**found, "diverged": int(diverged.sum())}


def _told(made: Made) -> Tensor:
    """Return what the solver did for each sample (B, 3): iterations of all calls, mean relative residual of their last
    applications, and whether any diverged."""
    told = torch.zeros(len(made.image), 3, dtype=torch.float64)
    for solution in made.solutions:
        last = solution.residuals.gather(1, (solution.iterations - 1).clamp_min(0)[:, None])[
            :, 0
        ]  # (B,), guided (2B,)
        each = (
            torch.stack([solution.iterations, last / len(made.solutions), solution.diverged], 1)
            .double()
            .cpu()
        )
        halves = each.unflatten(0, (-1, len(told)))
        told += torch.stack([halves[..., 0].sum(0), halves[..., 1].mean(0), halves[..., 2].amax(0)], 1)
    if made.diverged is not None:
        told[:, 2] += made.diverged.cpu()
    told[:, 2].clamp_(max=1)
    return told


def _errors(
    config: Config, job: Job, generator: Generator, setting, pairs: PairSet | None
) -> dict[str, float]:
    """Return the mean absolute error on the held-out pairs and on up to as many training pairs, in units of -1..1."""
    if pairs is None or not pairs.held_out:
        return {}
    totals = []
    seen = min(pairs.held_out, generator.about["config"]["pairs"])
    for start, count in ((0, pairs.held_out), (pairs.held_out, seen)):
        error = 0.0
        for chosen in batches(count, config.batch):
            noise, image, label = to_device(pairs.read(chosen + start), generator.device)
            init = inputs(job.study.seed, chosen, generator, setting)[2]
            made = generator.make(noise, label if generator.classes else None, init, setting)
            error += (made.image - image).abs().mean(dim=(1, 2, 3)).double().sum().item()
        totals.append(error / count)
    return {"l1_held_out": totals[0], "l1_train": totals[1]}


def _chains(config: Config, job: Job, generator: Generator, pixels: Pixels) -> dict[str, np.ndarray]:
    """Return what the chains of the same noises do, a set of arrays for each setting: `image_0` (SHOWN, C, H, W) uint8,
    `diverged_0` (SHOWN,), `t_0` (S,) its timesteps, and of an implicit network `residual_0` (3, S, K), the 10th, 50th
    and 90th percentile over TRACED samples of the relative residual after each iteration of each step."""
    found = {}
    for k, setting in enumerate(config.settings):
        images, diverged, steps = [], [], []
        whole = (
            setting.fixed_point is not None and setting.fixed_point.budget == "adaptive"
        )  # it looks at its batch, as scored
        for indices in batches(max(TRACED, config.batch) if whole else TRACED, config.batch):
            made = generator.make(*inputs(job.study.seed, indices, generator, setting), setting)
            images.append(pixels.decode(made.image[:SHOWN]).cpu().numpy())
            diverged.append(made.diverged.cpu().numpy())
            halves = [
                s.residuals.unflatten(0, (-1, len(indices))) for s in made.solutions
            ]  # two with guidance
            steps.append([each.nanmean(0)[:TRACED].cpu().numpy() for each in halves])
        found |= {
            f"image_{k}": np.concatenate(images)[:SHOWN],
            f"diverged_{k}": np.concatenate(diverged)[:SHOWN],
        }
        found[f"t_{k}"] = np.array(evenly(generator.config.diffusion.timesteps, setting.steps)[::-1])
        if steps[0]:
            most = max(one.shape[1] for batch in steps for one in batch)
            wide = [
                [np.pad(one, ((0, 0), (0, most - one.shape[1])), constant_values=np.nan) for one in batch]
                for batch in steps
            ]
            residual = np.concatenate(wide, 1)  # (S, B, K)
            with warnings.catch_warnings(
                action="ignore", category=RuntimeWarning
            ):  # iterations that no sample made
                found[f"residual_{k}"] = np.nanpercentile(residual, (10, 50, 90), axis=1).astype(np.float32)
    return found


def _iterates(config: Config, job: Job, generator: Generator, pixels: Pixels) -> bytes:
    """Return the content of iterates.npz: along the iterations (or the sampling steps) of the same noises for all runs, and
    what other settings of a sampler make of them."""
    setting, solved, images, traces = config.settings[0], generator.settings is Solve, [], []
    if solved:
        setting = replace(setting, iterations=TRACE)
    for indices in batches(TRACED if solved else SHOWN, config.batch):
        made = generator.make(*inputs(job.study.seed, indices, generator, setting), setting, every=True)
        images.append(pixels.decode(made.image[:, :SHOWN]).cpu().numpy())  # (K, B, C, H, W)
        traces += [trace(*made.solutions)] if solved else []
    found = {name: np.concatenate([t[name] for t in traces]) for name in (traces[0] if traces else ())}
    found |= _chains(config, job, generator, pixels) if config.chain else {}
    for k, sampler in enumerate(config.sampler[1:], 1):
        made = generator.make(*inputs(job.study.seed, np.arange(SHOWN), generator, sampler), sampler)
        found[f"image_{k}"] = pixels.decode(made.image).cpu().numpy()  # (SHOWN, C, H, W)
    found["images"] = np.concatenate(images, 1)[:, :SHOWN]  # (K, SHOWN, C, H, W)
    return packed(found)


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Return the content of a .npz file: the same bytes whatever the version of Python, unlike numpy's own writer."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            one = io.BytesIO()
            np.lib.format.write_array(one, np.ascontiguousarray(array))
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), one.getvalue())
    return buffer.getvalue()


def trace(solution) -> dict[str, np.ndarray]:
    """Return what the iterates z_1..z_K of each sample do: (B, K) float32 each.

    `norm`: of z_k over the square root of its size; `residual`: ||f(z) - z|| / ||f(z)|| at the k-th application;
    `direction`: cosine between the steps z_k - z_{k-1} and z_{k-1} - z_{k-2}, nan for k < 3;
    `drift`: ||z_k - z_1|| / ||z_1||.
    """
    z = torch.stack(solution.iterates, 1).flatten(2)  # (B, K, N D)
    steps = z.diff(dim=1)  # (B, K-1, N D)
    turn = torch.nn.functional.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=2)  # (B, K-2)
    found = {
        "norm": z.norm(dim=2) / z.shape[2] ** 0.5,
        "residual": solution.residuals,
        "direction": torch.cat([turn.new_full((len(z), 2), torch.nan), turn], 1),
        "drift": (z - z[:, :1]).norm(dim=2) / z[:, :1].norm(dim=2),
    }
    return {name: value.cpu().numpy().astype(np.float32) for name, value in found.items()}


def _settings(setting) -> dict[str, Any]:
    """Return the columns that tell a setting, its method first."""
    columns = plain(setting) if setting is not None else {}
    if isinstance(setting, Solve):
        columns["most_iterations"] = columns.pop("iterations")
    if isinstance(setting, ChainSampler):
        guidance, along = (columns.pop(key) or {} for key in ("guidance", "fixed_point"))
        columns |= {f"guidance_{key}": value for key, value in guidance.items()}
        columns |= {"solver" if key == "method" else key: value for key, value in along.items()}
    return columns


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV with the union of their columns; numbers in 9 digits, missing ones empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        [f"{v:.9g}" if isinstance(v, float) else v for v in (row.get(c) for c in columns)] for row in rows
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])
    write(path, text.getvalue())
