"""Which kind of run each training stage makes, and a run with its weights: `load` it, make `inputs`, `sample`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from equilab.core.config import UserError, parse, read
from equilab.core.job import Job
from equilab.core.machine import device_of, precision
from equilab.data import latents
from equilab.models.checkpoint import load_network
from equilab.sampling.runs import (
    Counts,
    Denoiser,
    ImplicitOneStep,
    Inputs,
    OneStep,
    ProgressiveStudent,
    Run,
    Samples,
    Student,
    Teacher,
)
from equilab.sampling.settings import Setting
from equilab.training import consistency, diffusion, distill, gan, progressive, teacher


class Kind(NamedTuple):
    """A training stage, and the class of its runs: of explicit and of implicit networks."""

    training: ModuleType
    explicit: type[Run]
    implicit: type[Run] | None = None


# the stages whose runs make images
KINDS = {
    "teacher": Kind(teacher, Teacher),
    "distill": Kind(distill, OneStep, ImplicitOneStep),
    "diffusion": Kind(diffusion, Denoiser, Denoiser),
    "gan": Kind(gan, Student),
    "consistency": Kind(consistency, Student),
    "progressive": Kind(progressive, ProgressiveStudent),
}


@dataclass(frozen=True)
class Generator:
    """A run with its weights: `sample` turns noise into images at a setting."""

    run: Run
    net: nn.Module  # as it was trained
    model: nn.Module  # what sampling calls: the network, or what a run makes of it
    metadata: dict[str, Any]  # kept with the weights
    device: torch.device
    precision: str  # of its networks while it samples: fp32, tf32 or bf16
    study: Path  # the folder of the study that trained it

    def inputs(self, seed: int, indices: np.ndarray, setting: Any) -> Inputs:
        """Return what the evaluation's images at `indices` are made from: the same for every run."""
        return self.run.inputs(seed, indices, setting, self.device, self.net)

    def sample(self, inputs: Inputs, setting: Any = None, return_iterates: bool = False) -> Samples:
        """Return the images (B, C, H, W) of `inputs`; with `return_iterates`, those of all iterates or steps (K, B, C, H, W)."""
        with precision(self.precision, self.device)():
            return self.run.sample(self.model, inputs, setting, return_iterates)

    def headline(self) -> Setting | None:
        """Return the first setting at which the study evaluates the run; None of a run that takes none.

        Raises: UserError if the study's params list no setting for it.
        """
        if self.run.setting is None:
            return None
        params = self.study / "params.yaml"
        for name, entry in (read(params).get("evaluate") or {}).items():
            if entry.get("of") == self.run.of and entry.get(self.run.listed):
                place = f"{params}: evaluate.{name}.{self.run.listed}[0]"
                return parse(self.run.setting, entry[self.run.listed][0], place)
        raise UserError(f"{params} evaluates no {self.run.of}; give a setting")

    def make(self, count: int, seed: int = 0, setting: Setting | None = None) -> Samples:
        """Return images of so many noises, which are functions of the seed and their number, at a setting (None: the headline).

        Raises: UserError if no setting is given and the study's params list none.
        """
        setting = setting or self.headline()
        return self.sample(self.inputs(seed, np.arange(count), setting), setting)

    def cost(self, setting: Any = None, iterations: int | float | None = None) -> Counts:
        """Return what an image costs at a setting, and at this mean number of iterations (None: all that it allows)."""
        return self.run.cost(setting, iterations)


def describe(of: str, job: Job, seed: int | None = None) -> Run:
    """Return the run `of` as the study's params describe it; of its first seed where none is given.

    Raises: UserError if `of` names no run of the study that makes images.
    """
    stage, name = _stage_and_name(of)
    config = job.read(stage, name, seed) if name else job.read(stage)
    kind = _class(stage, config)
    shape = latents.shape_of(job.read, job.image) if kind.latent else job.image
    return kind(of, config, shape, config.classes_of(job.classes), KINDS[stage].training.cost)


def seeds_of(of: str, job: Job) -> tuple[int, ...]:
    """Return the seeds of a run; the study's for a run of a stage without runs."""
    stage, name = _stage_and_name(of)
    return job.seeds(stage, name) if name else (job.study.seed,)


def load(
    of: str,
    seed: int | None = 0,
    *,
    config: Any = None,
    snapshot: int | None = None,
    study: Path | str = ".",
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
) -> Generator:
    """Return a trained run with its averaged weights, out of the results of the study in a folder.

    `of` names it by its folder below results/: "teacher", "distill/get-m". `snapshot` takes the weights kept after so
    many training images. `config` is the run's in params, where the weights must be of that.

    Raises: UserError if the weights are missing, damaged, or not of `config`.
    """
    stage, name = _stage_and_name(of)
    folder = Path(study) / "results" / stage
    if name:
        folder = folder / name / str(seed)
    path = folder / "weights.safetensors"
    if snapshot is not None:
        path = folder / "snapshots" / f"{snapshot:010d}.safetensors"
    net, metadata = load_network(path, config)
    training = KINDS[stage].training
    if config is None:
        config = parse(training.Config, metadata["config"], f"{path}: config")
    shape, classes, counts = tuple(metadata["image"]), metadata["classes"], metadata.get("label_counts")
    run = _class(stage, config)(of, config, shape, classes, training.cost, counts)
    net = net.to(device)
    model = run.model(net, metadata)
    return Generator(run, net, model, metadata, torch.device(device), precision, Path(study))


def load_first(of: str, job: Job) -> Generator:
    """Return the first seed of a run with its weights, on the study's device.

    Raises: UserError if the weights are missing, damaged, or not of the study's params.
    """
    return load(of, seeds_of(of, job)[0], config=describe(of, job).config, device=device_of(job))


def _stage_and_name(of: str) -> tuple[str, str]:
    """Return the stage of a run and its name there, which is empty where a stage has no runs."""
    stage, _, name = of.partition("/")
    if stage not in KINDS:
        raise UserError(
            f"{of!r} is no run that makes images; give teacher, or STAGE/RUN of a stage: {', '.join(KINDS)}"
        )
    return stage, name


def _class(stage: str, config: Any) -> type[Run]:
    """Return the class of a run of a stage."""
    kind = KINDS[stage]
    return kind.implicit if config.family.implicit else kind.explicit


def batches(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the indices 0..count-1, `batch` at a time."""
    for start in range(0, count, batch):
        yield np.arange(start, min(start + batch, count))
