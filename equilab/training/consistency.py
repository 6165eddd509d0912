"""Stage `consistency@RUN`: the teacher distilled instance by instance into a one-step generator, CD or CD-I."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from equilab.core import machine, rng
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, results
from equilab.data.images import load, to_float
from equilab.diffusion import losses
from equilab.metrics.counting import flops
from equilab.models.precond import EDM
from equilab.training import loop, onestep
from equilab.training.onestep import Levels, counted, table


@dataclass(frozen=True)
class Config(onestep.Config):
    """An entry of the params section `consistency`."""

    levels: Levels

    def __post_init__(self):
        super().__post_init__()
        onestep.check_levels(self.student, self.levels)


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost.

    Raises: UserError if the student is not the study's teacher.
    """
    onestep.check(config, job, read)
    onestep.meta(config, job.image, job.classes)  # refuses sizes that do not fit

    def count() -> Plan:
        about = {
            **counted(config, job.image, job.classes),
            "train_flops_image": step_flops(config, job.image, job.classes),
        }
        return loop.plan(config.optimisation, about)._replace(note=table(config, job.image, job.classes))

    return count


def run(config: Config, job: Job) -> None:
    """Train the student to agree with itself along the teacher's trajectories; write its averaged weights and log.

    Raises: UserError if the data or the teacher are missing, damaged, or not of this study.
    """
    plan(config, job, job.read)
    data = load(results("data"), "train", verify=True)
    net, teacher = onestep.build(config, job, data)
    shape, seed = data.images.shape[1:], config.seed
    if machine.rank() == 0:
        print(table(config, shape, data.classes))

    def batch_of(positions: range):
        items = rng.batch(seed, "image order", positions.start, len(positions), len(data.images))
        noise = torch.from_numpy(rng.noise(seed, "consistency noise", positions, shape))
        label = torch.from_numpy(data.labels[items]) if config.conditional else None
        return (
            to_float(torch.from_numpy(data.images[items])),
            noise,
            config.levels.draw(seed, positions),
            label,
        )

    about = {
        "image": shape,
        "classes": data.classes if config.conditional else 0,
        "sigma_data": teacher.sigma_data,
        **counted(config, shape, data.classes),
        "train_flops_image": step_flops(config, shape, data.classes),
    }
    inputs = {
        "data": sha256_of(results("data") / "meta.json"),
        "teacher": sha256_of(results("teacher") / "weights.safetensors"),
    }
    loop.train(job, config, inputs, net, batch_of, loss_of(config, teacher), about)


def loss_of(config: onestep.Config, teacher: EDM) -> loop.Loss:
    """Return loss(net, (image, noise, sigmas, label)): the consistency loss of the student that a network is."""

    def loss(net, batch):
        image, noise, sigmas, label = batch
        denoise = onestep.student(config, net, teacher.sigma_data).denoise
        return losses.consistency(denoise, teacher.denoise, image, noise, sigmas, label)

    return loss


def step_flops(config: Config, image: tuple[int, ...], classes: int) -> int:
    """Return the FLOPs by shape of a training step for an image: three calls without gradient, one with."""
    net, noise, label = onestep.meta(config, image, classes)
    with torch.device("meta"):
        levels = torch.empty(1), torch.empty(1)
    return flops(
        lambda: loss_of(config, EDM(net, sigma_data=1.0))(net, (noise, noise, levels, label)).backward()
    )
