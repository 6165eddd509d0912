"""Stage `consistency@RUN`: the teacher distilled instance by instance into a one-step generator, CD or CD-I."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, folder_of
from equilab.data.images import load
from equilab.metrics.counting import Cost, flops, inputs_on_meta
from equilab.models.precond import EDM
from equilab.training import loop, onestep, trainer
from equilab.training.onestep import ConsistencyLoss


class Model(onestep.Model):
    """What sampling needs to know of a generator of this stage."""

    stage = "consistency"


class Config(onestep.Config, Model, ConsistencyLoss):
    """An entry of the params section `consistency`."""

    @model_validator(mode="after")
    def _levels_fit(self):
        onestep.check_levels(self.student, self.levels)
        return self


class Batch(NamedTuple):
    """What the loss needs."""

    image: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    sigmas: tuple[Tensor, Tensor]  # (B,) each, a noise level and the one below it
    label: Tensor | None  # (B,)


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost.

    Raises: UserError if the student is not the study's teacher.
    """
    onestep.check(config, job)
    onestep.on_meta(config, job.image, job.classes)  # refuses sizes that do not fit
    onestep.check_metric(config, job.image, f"consistency.{job.run}")

    def estimate() -> Plan:
        counted = cost(config, job.image, job.classes)
        frozen = onestep.table(config, job.image, job.classes)
        return trainer.plan(config.optimisation, counted, frozen, config.teacher_calls)

    return estimate


def run(config: Config, job: Job) -> None:
    """Train the student to agree with itself along the teacher's trajectories; write its averaged weights and log.

    Raises: UserError if the data or the teacher are missing, damaged, or not of this study.
    """
    plan(config, job)
    data = load(folder_of("data"), "train", verify=True)
    net, teacher = onestep.build(config, job, data)
    shape, seed = data.images.shape[1:], config.seed
    if machine.rank() == 0:
        print(onestep.table(config, shape, data.classes))

    def batch_of(positions: range) -> Batch:
        image, label = trainer.images_at(config, data, seed, "image order", positions)
        noise = torch.from_numpy(rng.noise(seed, "consistency noise", positions, shape))
        return Batch(image, noise, config.draw(seed, positions), label)

    classes = config.classes_of(data.classes)
    about = onestep.about(teacher, shape, classes, cost(config, shape, data.classes))
    inputs = {
        "data": sha256_of(folder_of("data") / "meta.json"),
        "teacher": sha256_of(folder_of("teacher") / "weights.safetensors"),
    }
    distance = config.distance(machine.device_of(job))
    trainer.train(job, config, inputs, net, batch_of, loss_of(config, teacher, distance), about)


def loss_of(config: Config, teacher: EDM, distance: Callable) -> loop.Loss:
    """Return loss(net, batch): the consistency loss of the student that a network is."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        denoise = onestep.student(config, net, teacher.sigma_data).denoise
        return config.loss(denoise, teacher.denoise, *batch, distance)

    return loss


@trainer.counted_once
def cost(config: Config, image: tuple[int, ...], classes: int) -> Cost:
    """Return the cost of the student, counted on the meta device; an update has three calls without gradient, with the form
    published five, and one with."""
    net = onestep.on_meta(config, image, classes)
    noise, label = inputs_on_meta(image, config.conditional)
    sigma = torch.empty(1, device="meta")
    loss = loss_of(config, EDM(net, sigma_data=1.0), config.distance(sigma.device))
    update = flops(lambda: loss(net, Batch(noise, noise, (sigma, sigma), label)).backward())
    return onestep.cost(config, image, classes, update)
