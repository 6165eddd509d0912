"""Stage `progressive@RUN`: a student whose step does what two of its teacher's do, PD; it may be the teacher of the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import UserError
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, folder_of
from equilab.data.images import load
from equilab.diffusion import losses
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, parameters
from equilab.models.precond import EDM
from equilab.training import loop, onestep, trainer
from equilab.training.onestep import Levels


def _teacher(name: str) -> str:
    if name != "teacher" and not name.startswith("progressive/"):
        raise ValueError(f"{name!r} takes no steps that could be halved; give teacher, or progressive/RUN")
    return name


class Model(onestep.OfTeacher):
    """What sampling needs to know of a student that takes steps of Euler's method."""

    stage = "progressive"

    levels: Levels  # between which the student's steps lead


class Config(onestep.Trained, Model):
    """An entry of the params section `progressive`."""

    # "teacher", or "progressive/RUN": a student of twice the steps
    teacher: Annotated[str, AfterValidator(_teacher)]
    weight: Literal[tuple(losses.SNR_WEIGHTS)]  # of a noise level in the loss

    @property
    def before(self) -> str | None:
        """The run of this section that is its teacher; None for the study's teacher."""
        return None if self.teacher == "teacher" else self.teacher.partition("/")[2]


class Batch(NamedTuple):
    """What the loss needs."""

    image: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    # (B,) each: where the student's step begins, where its teacher's second begins, where both end
    sigmas: tuple[Tensor, Tensor, Tensor]
    label: Tensor | None  # (B,)


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost, that of the students before it left out.

    Raises: UserError if the student is not the study's teacher, or has not half the steps of its own.
    """
    onestep.check(config, job)
    students_before(config, job)
    config.on_meta(job.image, job.classes)  # refuses sizes that do not fit
    return lambda: trainer.plan(config.optimisation, cost(config, job.image, job.classes), teacher_calls=2)


def students_before(config: Config, job: Job) -> list[Config]:
    """Return the students between the study's teacher and this one, the nearest first.

    Raises: UserError if one of them, or this one, has not half the steps of its teacher, or a seed that its teacher lacks.
    """
    found, student, run = [], config, job.run
    while (before := student.before) is not None:
        teacher, place = job.read("progressive", before, config.seed), f"progressive.{run}"
        if teacher.levels != _halved(student.levels):
            raise UserError(
                f"{place}.levels are {_words(student.levels)}, those of its teacher {before} {_words(teacher.levels)}; "
                "give a student half the steps of its teacher, and the same noise levels at the ends"
            )
        known = job.seeds("progressive", before)
        if lacking := [seed for seed in job.seeds("progressive", run) if seed not in known]:
            raise UserError(
                f"{place}.seeds: {lacking[0]} is no seed of its teacher {before}, which has {', '.join(map(str, known))}; "
                "give both the same"
            )
        found.append(teacher)
        student, run = teacher, before
    return found


def _halved(levels: Levels) -> Levels:
    """Return the noise levels of a teacher, whose steps are half as long."""
    return levels.model_copy(update={"steps": 2 * levels.steps})


def _words(levels: Levels) -> str:
    return f"{levels.steps} steps from {levels.sigma_max:g} to {levels.sigma_min:g} (rho {levels.rho:g})"


def run(config: Config, job: Job) -> None:
    """Train the student to go in a step where its teacher goes in two; write its averaged weights and log.

    It starts from its teacher's weights. These are the averaged ones: with a half-life far below a batch, the last ones, as
    published. Noises and levels are drawn anew for each number of steps.

    Raises: UserError if the data or the weights of its teacher are missing, damaged, or not of this study.
    """
    plan(config, job)
    before = students_before(config, job)
    data = load(folder_of("data"), "train", verify=True)
    folder = folder_of("progressive", config.before, config.seed) if before else folder_of("teacher")
    trained = before[0] if before else job.read("teacher")
    net, teacher = onestep.networks(config, job, data, folder, trained)
    shape, seed, steps = data.images.shape[1:], config.seed, config.levels.steps

    def batch_of(positions: range) -> Batch:
        image, label = trainer.images_at(config, data, seed, "image order", positions)
        noise = torch.from_numpy(rng.noise(seed, f"progressive noise, {steps} steps", positions, shape))
        return Batch(image, noise, draw(config.levels, seed, positions), label)

    classes = config.classes_of(data.classes)
    about = onestep.about(teacher, shape, classes, cost(config, shape, data.classes))
    about["nimg_before"] = sum(each.optimisation.nimg for each in before)  # by the students before it
    inputs = {
        "data": sha256_of(folder_of("data") / "meta.json"),
        "teacher": sha256_of(folder / "weights.safetensors"),
    }
    trainer.train(job, config, inputs, net, batch_of, loss_of(config, teacher), about)


def draw(levels: Levels, seed: int, positions: range) -> tuple[Tensor, Tensor, Tensor]:
    """Return where a step of each position begins, where its teacher's second begins, and where both end, (B,) each.

    Source: GDD (Zheng 2024), table 5a, PD.
    """
    sigmas = _halved(levels).sigmas()  # rising
    steps = rng.integers(seed, f"progressive level, {levels.steps} steps", positions, levels.steps)
    end = 2 * torch.from_numpy(steps)  # (B,)
    return sigmas[end + 2], sigmas[end + 1], sigmas[end]


def loss_of(config: Config, teacher: EDM) -> loop.Loss:
    """Return loss(net, batch): that of the student that a network is, against two steps of its teacher."""
    weight = losses.SNR_WEIGHTS[config.weight]

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        student = EDM(net, sigma_data=teacher.sigma_data)
        return losses.progressive(
            student, teacher, batch.image, batch.noise, batch.sigmas, batch.label, weight
        )

    return loss


@trainer.counted_once
def cost(config: Config, image: tuple[int, ...], classes: int) -> Cost:
    """Return the cost of the student, counted on the meta device; its image is a whole one, of all its steps.

    An update has two calls of the teacher, without gradient, and one of the student.
    """
    net = config.on_meta(image, classes)
    noise, label = inputs_on_meta(image, config.conditional)
    sigma = torch.empty(1, device="meta")
    denoise, count = EDM(net, sigma_data=1.0), parameters(net)
    call = flops(lambda: denoise(noise, sigma, label))
    loss, batch = loss_of(config, denoise), Batch(noise, noise, (sigma, sigma, sigma), label)
    update = flops(lambda: loss(net, batch).backward())
    return Cost(count, count, Work(config.levels.steps * call), update)
