"""Stage `teacher`: an EDM denoiser trained on the study's images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, folder_of
from equilab.data.images import load
from equilab.diffusion import losses
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, parameters
from equilab.models.family import network
from equilab.models.precond import EDM
from equilab.training import loop, trainer
from equilab.training.optimisation import Optimisation

Network = network("teacher")


class Model(trainer.Model):
    """What sampling needs to know of a denoiser of noise levels."""

    stage = "teacher"

    network: Network
    conditional: bool  # on the data's classes
    sigma_data: float = Field(ge=1e-3, le=1e3)  # standard deviation of the images in -1..1


class Config(Model):
    """The params section `teacher`."""

    sigma_mean: float = Field(ge=-10, le=10)  # of log sigma in training
    sigma_std: float = Field(ge=1e-3, le=10)
    optimisation: Optimisation


class Batch(NamedTuple):
    """What the loss needs."""

    image: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    normal: Tensor  # (B,) unit normals, which noise levels are made from
    label: Tensor | None  # (B,)


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost.

    Raises: UserError if the network's sizes do not fit.
    """
    config.on_meta(job.image, job.classes)  # refuses sizes that do not fit
    return lambda: trainer.plan(config.optimisation, cost(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the denoiser on the study's images and write its averaged weights, snapshots and log.

    Raises: UserError if the data are missing or damaged, or have no classes to condition on.
    """
    data = load(folder_of("data"), "train", verify=True)
    config.require_classes(job, data.classes)
    shape, seed = data.images.shape[1:], job.study.seed
    classes = config.classes_of(data.classes)
    net = trainer.build(config.network, seed, "teacher weights", shape, classes)

    def batch_of(positions: range) -> Batch:
        image, label = trainer.images_at(config, data, seed, "teacher order", positions)
        drawn = torch.from_numpy(rng.noise(seed, "teacher", positions, (1 + math.prod(shape),)))
        return Batch(image, drawn[:, 1:].reshape(image.shape), drawn[:, 0], label)

    about = trainer.about(shape, classes, cost(config, shape, data.classes))
    inputs = {"data": sha256_of(folder_of("data") / "meta.json")}
    trainer.train(job, config, inputs, net, batch_of, loss_of(config), about)


def loss_of(config: Config) -> loop.Loss:
    """Return loss(net, batch): EDM's weighted squared error of the denoised image."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        sigma = losses.edm_sigma(batch.normal, config.sigma_mean, config.sigma_std)
        denoise = EDM(net, sigma_data=config.sigma_data)
        return losses.edm(denoise, batch.image, batch.noise, sigma, batch.label, config.sigma_data)

    return loss


@trainer.counted_once
def cost(config: Model, image: tuple[int, ...], classes: int) -> Cost:
    """Return the cost of the denoiser, counted on the meta device; its image is that of a call."""
    net = config.on_meta(image, classes)
    x, label = inputs_on_meta(image, config.conditional)
    sigma = torch.empty(1, device="meta")
    count, call = parameters(net), Work(flops(lambda: net(x, sigma, label)))
    if not isinstance(config, Config):
        return Cost(count, count, call, None)
    update = flops(lambda: loss_of(config)(net, Batch(x, x, sigma, label)).backward())
    return Cost(count, count, call, update)
