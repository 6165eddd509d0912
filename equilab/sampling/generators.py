"""Which kind of run each training stage makes, and a run with its weights: `load` it, then `sample`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equilab.core.config import UserError, nearest, parse, shown
from equilab.core.job import Job
from equilab.core.machine import precision
from equilab.core.progress import bar
from equilab.data import latents
from equilab.data.images import to_uint8
from equilab.data.latents import Pixels
from equilab.models.checkpoint import load_network
from equilab.models.family import Family, family
from equilab.models.registry import FAMILIES
from equilab.sampling.runs import (
    Counts,
    Denoiser,
    ImplicitOneStep,
    Inputs,
    OneStep,
    Outputs,
    ProgressiveStudent,
    Run,
    Student,
    Teacher,
    solver_statistics,
)
from equilab.sampling.samples import Samples, joined
from equilab.sampling.settings import Setting, changed
from equilab.training import consistency, diffusion, distill, gan, progressive, teacher

Label = int | Sequence[int] | np.ndarray | Tensor | None
PRECISIONS = ("fp32", "tf32", "bf16")


class Kind(NamedTuple):
    """A training stage, and the class of its runs: of explicit and of implicit networks."""

    # its `Config` is all that params say of a run, its `Model` what sampling needs to know
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
    """A trained or published model with its weights: `sample` draws images from it.

    >>> model = equilab.load("results/distill/get-m")
    >>> model.sample(16, label=3, seed=0, iterations=6).images.shape
    (16, 1, 8, 8)
    """

    run: Run
    net: nn.Module  # as it was trained
    model: nn.Module  # what sampling calls: the network, or what a run makes of it
    metadata: dict[str, Any]  # kept with the weights
    device: torch.device
    precision: str  # of its networks while it samples: fp32, tf32 or bf16
    setting: Setting | None = None  # at which it is sampled unless told otherwise; None: as its paper does
    vae: Path | None = None  # the folder of what turns its latents into pixels, where it makes latents

    def __repr__(self) -> str:
        """Return in a line what model it is."""
        size = " x ".join(map(str, self.run.shape))
        parameters = sum(each.numel() for each in self.net.parameters())
        return (
            f"<Generator {self.run.of}: {self.run.family.label}, {parameters:,} parameters, {size}, "
            f"{self.run.classes or 'no'} classes, {self.precision} on {self.device}>"
        )

    def sample(
        self, count: int = 16, *, label: Label = None, seed: int = 0, batch: int = 64, **options: Any
    ) -> Samples:
        """Return so many images, `batch` at a time, with what was done for them.

        `label` is a class for all of them, or one for each; without it they are drawn as in the evaluation. An image is
        a function of `seed` and of its place among the images, up to rounding. `options` are those of `self.options` (`iterations`,
        `steps`, `budget`, ...), which change the setting of the study or, where that has none, of the paper.

        >>> model.sample(16, label=3, seed=0, iterations=6)

        Raises: UserError for an option that the model does not take, with the nearest, or a value that it cannot have.
        """
        _require_counts(count=count, batch=batch, seed=seed)
        setting, chosen = self._changed_setting(options), self._label(label, count)
        parts = []
        with bar(self.run.of, count, delay=5) as progress:
            for indices in batches(count, batch):
                inputs = self.inputs(seed, indices, setting)
                if chosen is not None:
                    inputs = inputs._replace(label=chosen[indices].to(self.device))
                outputs = self.generate(inputs, setting)
                if "published" in self.metadata and outputs.image.isnan().any():
                    raise UserError(
                        f"{self.run.of} makes pixels that are not numbers; give other options, or precision fp32"
                    )
                images = self.pixels.decode(outputs.image).cpu().numpy()
                parts.append(self._samples(images, inputs.label, outputs, setting))
                progress.update(len(indices))
        return joined(parts)

    @property
    def options(self) -> list[str]:
        """The names of what `sample` can be told beside the count, the label, the seed and the batch."""
        return self.run.options(self.run.family)

    def _changed_setting(self, options: Mapping[str, Any]) -> Setting | None:
        """Return the setting that options make of the usual one.

        Raises: UserError for an option that does not fit.
        """
        for name in options:
            if name not in self.options:
                raise UserError(_foreign_option(name, self.run.family, self.options))
        setting = self.setting or self.run.usual()
        if setting is None:
            return None
        setting = changed(setting, options)
        try:
            self.run.check(setting)
        except ValueError as error:
            raise UserError(f"{self.run.family.label}: {error}") from None
        return setting

    def _label(self, label: Label, count: int) -> Tensor | None:
        """Return the classes (N,) that are asked for, None where they are left to be drawn.

        Raises: UserError if the model has no such classes.
        """
        if label is None:
            return None
        classes = self.run.classes
        if not classes:
            raise UserError(f"label is {label!r}, but the model knows no classes; leave it out")
        labels = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
        if labels.dtype.kind not in "iu" or labels.shape not in ((), (count,)):
            given = shown(labels.tolist())
            raise UserError(
                f"label is {given}; give a class as a whole number, or one for each of the {count} images"
            )
        if outside := [each for each in labels.flatten() if not 0 <= each < classes]:
            raise UserError(
                f"label is {outside[0]}, but classes go from 0 to {classes - 1}; give one of them"
            )
        return torch.from_numpy(np.full(count, labels, dtype=np.int64))

    def _samples(
        self, images: np.ndarray, label: Tensor | None, outputs: Outputs, setting: Setting | None
    ) -> Samples:
        """Return the record of a batch."""
        labels = None if label is None else label.cpu().numpy()
        nfe = self.run.nfe(setting)
        if not self.run.can_diverge:
            return Samples(images, labels, nfe)
        iterations, _, diverged = solver_statistics(outputs).unbind(1)
        if not outputs.solutions:
            return Samples(images, labels, nfe, diverged=diverged.bool().numpy())
        residuals = [each.residuals.unflatten(0, (-1, len(images))).nanmean(0) for each in outputs.solutions]
        return Samples(
            images,
            labels,
            nfe,
            iterations.long().numpy(),
            torch.cat(residuals, 1).float().cpu().numpy(),
            diverged.bool().numpy(),
        )

    @cached_property
    def pixels(self) -> Pixels:
        """How what the model makes becomes pixels.

        Raises: UserError if it makes latents, and nothing that decodes them is known.
        """
        if self.vae is not None:
            return latents.decoder(self.vae, self.run.shape, self.device)
        if self.run.in_latents:
            raise UserError(
                f"{self.run.of} makes latents of shape {self.run.shape}, not images; load it with vae=FOLDER, of the "
                "AutoencoderKL whose latents they are, as diffusers saves it"
            )
        return Pixels(self.run.shape, to_uint8)

    def inputs(self, seed: int, indices: np.ndarray, setting: Any) -> Inputs:
        """Return what the evaluation's images at `indices` are made from: the same for every run."""
        return self.run.inputs(seed, indices, setting, self.device, self.net)

    def generate(self, inputs: Inputs, setting: Any = None, return_iterates: bool = False) -> Outputs:
        """Return the images (B, C, H, W) of `inputs`; with `return_iterates`, those of all iterates or steps (K, B, C, H, W)."""
        with precision(self.precision, self.device)():
            return self.run.sample(self.model, inputs, setting, return_iterates)

    def cost(self, setting: Any = None, iterations: int | float | None = None) -> Counts:
        """Return what an image costs at a setting, and at this mean number of iterations (None: all that it allows)."""
        return self.run.cost(setting, iterations)


def describe(of: str, job: Job, seed: int | None = None) -> Run:
    """Return the run `of` as the study's params describe it; of its first seed where none is given.

    Raises: UserError if `of` names no run of the study that makes images.
    """
    stage, name = _stage_and_name(of)
    config = job.read(stage, name, seed) if name else job.read(stage)
    kind = _class(stage, config.family)
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
    return from_network(*load_network(path, config), str(path), config, device, precision)


def from_network(
    net: nn.Module,
    metadata: Mapping[str, Any],
    where: str,
    config: Any = None,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
) -> Generator:
    """Return a network with what is kept with its weights, in a file `where`, as what samples from it.

    Raises: UserError if the config that is kept is none of its stage, or there is no such precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; give one of {', '.join(PRECISIONS)}")
    stage = metadata["stage"]
    training = KINDS[stage].training
    if config is None:
        known, values = training.Config, metadata["config"]
        if "published" in metadata:  # its training is not ours
            known = training.Model
            values = {key: values[key] for key in known.model_fields if key in values}
        config = parse(known, values, f"{where}: config")
    of = f"{stage}/{metadata['run']}" if metadata.get("run") else stage
    shape, classes, counts = tuple(metadata["image"]), metadata["classes"], metadata.get("label_counts")
    run = _class(stage, config.family)(of, config, shape, classes, training.cost, counts)
    run.network = net = net.to(device)  # in place of one without numbers, which takes seconds to build
    return Generator(run, net, run.model(net, metadata), dict(metadata), torch.device(device), precision)


def _stage_and_name(of: str) -> tuple[str, str]:
    """Return the stage of a run and its name there, which is empty where a stage has no runs."""
    stage, _, name = of.partition("/")
    if stage not in KINDS:
        raise UserError(
            f"{of!r} is no run that makes images; give teacher, or STAGE/RUN of a stage: {', '.join(KINDS)}"
        )
    return stage, name


def _class(stage: str, family: Family) -> type[Run]:
    """Return the class of a family's runs of a stage."""
    kind = KINDS[stage]
    return kind.implicit if family.implicit else kind.explicit


def _foreign_option(name: str, of: Family, options: list[str]) -> str:
    """Return the sentence about an option that a family does not take."""
    takers = [each for each in map(family, FAMILIES) if name in _class(each.stage, each).options(each)]
    if takers:
        labels = ", ".join(each.label for each in takers)
        return (
            f"{name} is an option of {labels}, not of {of.label}, which takes {', '.join(options) or 'none'}"
        )
    return f"{of.label} takes no option {name!r}{nearest(name, options) or '; it takes none'}"


def _require_counts(**counts: int) -> None:
    """Refuse numbers of images, or a seed, that are none."""
    for name, value in counts.items():
        least = 0 if name == "seed" else 1
        if not isinstance(value, (int, np.integer)) or not least <= value < 2**63:
            raise UserError(f"{name} is {value!r}; give a whole number from {least} to 2**63 - 1")


def batches(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the indices 0..count-1, `batch` at a time."""
    for start in range(0, count, batch):
        yield np.arange(start, min(start + batch, count))
