"""Stage `diffusion@RUN`: a denoiser of discrete timesteps, FPDM or DiT, trained on the study's images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import Params
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, Seed, folder_of
from equilab.data import latents
from equilab.data.images import load, to_float
from equilab.diffusion import discrete_losses as losses
from equilab.diffusion.discrete import Diffusion, noised
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, parameters, work
from equilab.models.family import network
from equilab.solvers import Gradient, Solver, equilibrium
from equilab.training import loop, trainer
from equilab.training.optimisation import Optimisation

Network = network("diffusion")
DROPS = 1 << 20  # label dropout is drawn in so many parts


class Iterations(NamedTuple):
    """Applications of the fixed-point layer in an update: first some without gradient, then some with it."""

    no_grad: int | float
    grad: int | float


class FixedPoint(Params):
    """How the fixed point of an FPDM is found and differentiated in training.

    "s_jfb" draws both counts anew at every update, 0..no_grad_iterations and 1..grad_iterations; the others take them as
    they are.

    Source: FPDM (Bai and Melas-Kyriazi 2024), algorithm 1, where `no_grad_iterations` is N and `grad_iterations` is M.
    """

    gradient: Literal["jfb", "multi_step", "s_jfb"]
    no_grad_iterations: int = Field(ge=0, le=10_000)
    grad_iterations: int = Field(ge=1, le=10_000)  # those that follow

    @model_validator(mode="after")
    def _fits(self):
        if self.gradient == "jfb" and self.grad_iterations != 1:
            raise ValueError(
                f"gradient jfb has one iteration with gradient, got {self.grad_iterations}; set grad_iterations to 1 "
                "or gradient to multi_step"
            )
        return self

    @property
    def most(self) -> Iterations:
        """The most iterations of an update."""
        return Iterations(self.no_grad_iterations, self.grad_iterations)

    def draw(self, seed: int, update: int) -> Iterations:
        """Return the iterations of an update: a function of (seed, update)."""
        if self.gradient != "s_jfb":
            return self.most
        no_grad = rng.integers(seed, "iterations without gradient", [update], self.no_grad_iterations + 1)
        grad = rng.integers(seed, "iterations with gradient", [update], self.grad_iterations)
        return Iterations(int(no_grad[0]), 1 + int(grad[0]))

    def mean(self) -> Iterations:
        """Return the mean of both counts over updates."""
        if self.gradient != "s_jfb":
            return Iterations(float(self.no_grad_iterations), float(self.grad_iterations))
        return Iterations(self.no_grad_iterations / 2, (1 + self.grad_iterations) / 2)


class Model(trainer.Model):
    """What sampling needs to know of a denoiser of discrete timesteps."""

    stage = "diffusion"

    network: Network
    conditional: bool
    label_dropout: float = Field(ge=0, lt=1)  # share of images whose class is hidden, for guidance
    diffusion: Diffusion

    @model_validator(mode="after")
    def _predicts(self):
        learned = self.network.arguments.get("learned_variance", False)
        if learned != (self.diffusion.variance == "learned"):
            raise ValueError(
                "network.learned_variance must be true where diffusion.variance is learned, and false elsewhere"
            )
        if self.label_dropout and not self.conditional:
            raise ValueError(f"label_dropout is {self.label_dropout}, but conditional is false; set it to 0")
        return self


class Config(Model):
    """An entry of the params section `diffusion`."""

    weight: Literal["uniform", "published"]  # of the squared error at each timestep
    fixed_point: FixedPoint | None  # null for explicit networks
    seed: Seed  # of this run: its weights, the order of its images, what it draws
    optimisation: Optimisation

    @model_validator(mode="after")
    def _fits(self):
        if self.family.implicit != (self.fixed_point is not None):
            raise ValueError(
                "fixed_point must be given for networks with a fixed point and null for others "
                f"(network.kind is {self.network.kind})"
            )
        if self.weight == "published" and self.diffusion.prediction == "noise":
            raise ValueError(
                "weight published is for v; set weight to uniform where diffusion.prediction is noise"
            )
        return self


class Batch(NamedTuple):
    """What the loss needs."""

    image: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) timesteps
    label: Tensor | None  # (B,), the null class where it is hidden
    iterations: Iterations | None  # of the update; None for explicit networks


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost.

    Raises: UserError if the data have no classes to condition on, or the network's sizes do not fit.
    """
    config.require_classes(job, job.classes)
    shape = latents.shape_of(job.read, job.image)
    config.on_meta(shape, job.classes)  # refuses sizes that do not fit
    return lambda: trainer.plan(config.optimisation, cost(config, shape, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the denoiser on the study's images and write its averaged weights, snapshots and log.

    Raises: UserError if the data are missing or damaged, or have no classes to condition on.
    """
    data = load(folder_of("data"), "train", verify=True)
    config.require_classes(job, data.classes)
    inputs = {"data": sha256_of(folder_of("data") / "meta.json")}
    encoded, shape = None, data.images.shape[1:]
    if job.read("latents") is not None:
        encoded = latents.Encoded(folder_of("latents"))
        shape = encoded.shape
        inputs["latents"] = sha256_of(folder_of("latents") / "meta.json")
    seed, classes = config.seed, config.classes_of(data.classes)
    net = trainer.build(config.network, seed, "weights", shape, classes)

    def batch_of(positions: range) -> Batch:
        items = rng.batch(seed, "image order", positions.start, len(positions), len(data.images))
        label = None
        if config.conditional:
            label = with_hidden_labels(config, data.labels[items], positions, data.classes)
        update = positions.start // config.optimisation.batch
        return Batch(
            image=encoded.read(items) if encoded else to_float(torch.from_numpy(data.images[items])),
            noise=torch.from_numpy(rng.noise(seed, "noise", positions, shape)),
            t=torch.from_numpy(rng.integers(seed, "timestep", positions, config.diffusion.timesteps)),
            label=label,
            iterations=config.fixed_point.draw(seed, update) if config.fixed_point else None,
        )

    counted = cost(config, shape, data.classes)
    mean = config.fixed_point.mean() if config.fixed_point else Iterations(0.0, 0.0)
    about = trainer.about(shape, classes, counted, mean.no_grad + mean.grad)
    about["train_flops_image"] = counted.train_flops_image
    trainer.train(job, config, inputs, net, batch_of, loss_of(config), about)


def with_hidden_labels(config: Config, label: np.ndarray, positions: range, classes: int) -> Tensor:
    """Return the labels of images, some of them replaced by the null class, by position."""
    hidden = rng.integers(config.seed, "label dropout", positions, DROPS) < config.label_dropout * DROPS
    return torch.from_numpy(np.where(hidden, classes, label))


def loss_of(config: Config) -> loop.Loss:
    """Return loss(net, batch): the mean error of the prediction, and the bound that trains a learned variance."""
    chain = config.diffusion.chain()

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        level = chain.at(batch.t)
        x = noised(batch.image, batch.noise, level)
        output = output_of(net, x, batch.t, batch.label, batch.iterations)
        value = losses.error(chain, output, batch.image, batch.noise, level, config.weight)
        if config.diffusion.variance == "learned":
            value = value + losses.bound(chain, output, batch.image, batch.noise, level)
        return value.mean()

    return loss


def output_of(
    net: nn.Module, x: Tensor, t: Tensor, label: Tensor | None, iterations: Iterations | None
) -> Tensor:
    """Return the output of a denoiser, with a fixed point at these iterations of it."""
    if iterations is None:
        return net(x, t, label)
    output, _ = net(x, t, label, None, solver_of(iterations))
    return output


def example(config: Config, noise: Tensor, label: Tensor | None) -> Batch:
    """Return a batch on which training is measured: halfway to noise, with the most iterations of an update."""
    t = torch.full((len(noise),), config.diffusion.timesteps // 2, device=noise.device)
    iterations = config.fixed_point.most if config.fixed_point else None
    return Batch(noise.tanh(), noise, t, label, iterations)


def solver_of(iterations: Iterations) -> Callable:
    """Return solve(f, init) -> Solution with these iterations without and with gradient; residuals are not measured."""
    solver = Solver("iterate", 1, 0.0, "last", measure=False)
    return functools.partial(equilibrium, solver=solver, gradient=Gradient("s_jfb"), counts=tuple(iterations))


@trainer.counted_once
def cost(config: Model, image: tuple[int, ...], classes: int) -> Cost:
    """Return the cost of the denoiser, counted on the meta device; its image is that of a call, an update has the mean
    iterations of training."""
    net = config.on_meta(image, classes)
    x, label = inputs_on_meta(image, config.conditional)
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    count = parameters(net)

    def predict(iterations: int) -> None:
        output_of(net, x, t, label, Iterations(0, iterations))

    def update(iterations: Iterations | None) -> int:
        return flops(lambda: loss_of(config)(net, Batch(x, x, t, label, iterations)).backward())

    call = work(predict) if config.family.implicit else Work(flops(lambda: output_of(net, x, t, label, None)))
    if not isinstance(config, Config):
        return Cost(count, count, call, None)
    if config.fixed_point is None:
        return Cost(count, count, call, float(update(None)))
    once = update(Iterations(0, 1))
    no_grad, grad = update(Iterations(1, 1)) - once, update(Iterations(0, 2)) - once  # of an iteration more
    mean = config.fixed_point.mean()
    return Cost(count, count, call, once + no_grad * mean.no_grad + grad * (mean.grad - 1))
