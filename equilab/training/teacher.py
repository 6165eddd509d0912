"""Stage `teacher`: an EDM denoiser trained on the study's images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch

from equilab.core import rng
from equilab.core.config import Spec, UserError
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, results
from equilab.data.images import load, to_float
from equilab.diffusion import losses
from equilab.metrics.counting import counted_once, flops, parameters
from equilab.models.precond import EDM
from equilab.training import loop
from equilab.training.loop import Optimisation

UNETS = {"unet": "equilab.models.unet:UNet"}


@dataclass(frozen=True)
class Config:
    """The params section `teacher`."""

    network: Annotated[Spec, tuple(UNETS.items())]
    conditional: bool  # on the data's classes
    sigma_data: float  # standard deviation of the images in -1..1
    sigma_mean: float  # of log sigma in training
    sigma_std: float
    optimisation: Optimisation

    def __post_init__(self):
        if not self.sigma_data > 0 or not self.sigma_std > 0:
            raise ValueError(
                f"sigma_data and sigma_std must be > 0, got {self.sigma_data} and {self.sigma_std}"
            )

    def positional(self, image: tuple[int, ...], classes: int) -> tuple:
        """What the data determines of the network's constructor."""
        return image, classes if self.conditional else 0


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost."""
    _meta(config, job.image, job.classes)  # refuses sizes that do not fit
    return lambda: loop.plan(config.optimisation, counted(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the denoiser on the study's images and write its averaged weights, snapshots and log.

    Raises: UserError if the data are missing or damaged, or have no classes to condition on.
    """
    data = load(results("data"), "train", verify=True)
    if config.conditional and not data.classes:
        raise UserError("teacher.conditional is true, but the data have no labels; set it to false")
    shape, seed = data.images.shape[1:], job.study.seed
    given = config.positional(shape, data.classes)
    net = loop.build(config.network, seed, "teacher weights", *given)

    def batch_of(positions: range):
        items = rng.batch(seed, "teacher order", positions.start, len(positions), len(data.images))
        drawn = torch.from_numpy(rng.noise(seed, "teacher", positions, (1 + math.prod(shape),)))
        image = to_float(torch.from_numpy(data.images[items]))
        label = torch.from_numpy(data.labels[items]) if config.conditional else None
        return image, drawn[:, 1:].reshape(image.shape), drawn[:, 0], label

    def loss(net, batch):
        image, noise, normal, label = batch
        sigma = losses.edm_sigma(normal, config.sigma_mean, config.sigma_std)
        return losses.edm(
            EDM(net, sigma_data=config.sigma_data), image, noise, sigma, label, config.sigma_data
        )

    about = {"image": shape, "classes": given[1], **counted(config, shape, data.classes)}
    loop.train(job, config, {"data": sha256_of(results("data") / "meta.json")}, net, batch_of, loss, about)


@counted_once
def counted(config: Config, image: tuple[int, ...], classes: int) -> dict[str, int]:
    """Return the parameters, and the FLOPs of a call for an image by shape, without building the network in memory."""
    net, given = _meta(config, image, classes)
    return {"parameters": parameters(net), "flops_image": flops(lambda: net(*given))}


def _meta(config: Config, image: tuple[int, ...], classes: int):
    with torch.device("meta"):
        label = torch.zeros(1, dtype=torch.int64) if config.conditional else None
        net = config.network.build(*config.positional(image, classes)).eval()
        return net, (torch.empty(1, *image), torch.empty(1), label)
