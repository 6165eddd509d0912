"""Stage `diffusion@RUN`: a denoiser of discrete timesteps, FPDM or DiT, trained on the study's images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from equilab.core import rng
from equilab.core.config import Spec, UserError
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, results
from equilab.data import latents
from equilab.data.images import load, to_float
from equilab.diffusion import discrete_losses as losses
from equilab.diffusion.discrete import Diffusion, noised
from equilab.metrics.counting import counted_once, flops, parameters
from equilab.solvers import Gradient, Solver, equilibrium
from equilab.training import loop
from equilab.training.loop import Optimisation

DENOISERS = {"dit": "equilab.models.dit:DiT", "fpdm": "equilab.models.fpdm:FPDM"}
DROPS = 1 << 20  # label dropout is drawn in so many parts


@dataclass(frozen=True)
class FixedPoint:
    """How the fixed point of an FPDM is found and differentiated in training.

    "s_jfb" draws both counts anew at every update, 0..without and 1..steps; the others take them as they are.

    Source: FPDM (Bai and Melas-Kyriazi 2024), algorithm 1, where `without` is N and `steps` is M.
    """

    gradient: Literal["jfb", "multi_step", "s_jfb"]
    without: int  # iterations without gradient
    steps: int  # iterations with gradient that follow

    def __post_init__(self):
        if self.without < 0 or self.steps < 1:
            raise ValueError(f"without must be >= 0 and steps >= 1, got {self.without} and {self.steps}")
        if self.gradient == "jfb" and self.steps != 1:
            raise ValueError(
                f"gradient jfb has one step, got {self.steps}; set steps to 1 or gradient to multi_step"
            )

    def counts(self, seed: int, update: int) -> tuple[int, int]:
        """Return the iterations without and with gradient of an update: a function of (seed, update)."""
        if self.gradient != "s_jfb":
            return self.without, self.steps
        drawn = [
            rng.integers(seed, f"iterations {name} gradient", [update], high)
            for name, high in (("without", self.without + 1), ("with", self.steps))
        ]
        return int(drawn[0][0]), 1 + int(drawn[1][0])

    @property
    def mean(self) -> tuple[float, float]:
        """The mean of both counts."""
        return (
            (self.without / 2, (1 + self.steps) / 2)
            if self.gradient == "s_jfb"
            else (float(self.without), float(self.steps))
        )


@dataclass(frozen=True)
class Config:
    """An entry of the params section `diffusion`."""

    network: Annotated[Spec, tuple(DENOISERS.items())]
    conditional: bool
    label_dropout: float  # share of images whose class is hidden, for guidance
    diffusion: Diffusion
    weight: Literal["uniform", "published"]  # of the squared error at each timestep
    fixed_point: FixedPoint | None  # null for explicit networks
    seed: int  # of this run: its weights, the order of its images, what it draws
    optimisation: Optimisation

    def __post_init__(self):
        if (self.network.kind == "fpdm") != (self.fixed_point is not None):
            raise ValueError(
                f"fixed_point must be given for fpdm and null for dit (network.kind is {self.network.kind})"
            )
        if self.network.arguments["learned_variance"] != (self.diffusion.variance == "learned"):
            raise ValueError(
                "network.learned_variance must be true where diffusion.variance is learned, and false elsewhere"
            )
        if self.weight == "published" and self.diffusion.prediction == "noise":
            raise ValueError(
                "weight published is for v; set weight to uniform where diffusion.prediction is noise"
            )
        if not 0 <= self.label_dropout < 1 or (self.label_dropout and not self.conditional):
            raise ValueError(
                f"label_dropout is {self.label_dropout}; give 0..1 (1 excluded), and 0 if conditional is false"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    def positional(self, image: tuple[int, ...], classes: int) -> tuple:
        """What the data determines of the network's constructor."""
        return image, classes if self.conditional else 0


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost.

    Raises: UserError if the data have no classes to condition on.
    """
    _check(config, job, job.classes)
    shape = latents.shape_of(read, job.image)
    _meta(config, shape, job.classes)  # refuses sizes that do not fit
    return lambda: loop.plan(config.optimisation, counted(config, shape, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the denoiser on the study's images and write its averaged weights, snapshots and log.

    Raises: UserError if the data are missing or damaged, or have no classes to condition on.
    """
    data = load(results("data"), "train", verify=True)
    _check(config, job, data.classes)
    encoded = None if job.read("latents") is None else latents.Encoded(results("latents"))
    shape, seed = encoded.shape if encoded else data.images.shape[1:], config.seed
    given = config.positional(shape, data.classes)
    net = loop.build(config.network, seed, "weights", *given)

    def batch_of(positions: range):
        items = rng.batch(seed, "image order", positions.start, len(positions), len(data.images))
        image = encoded.read(items) if encoded else to_float(torch.from_numpy(data.images[items]))
        noise = torch.from_numpy(rng.noise(seed, "noise", positions, shape))
        t = torch.from_numpy(rng.integers(seed, "timestep", positions, config.diffusion.timesteps))
        label = _labels(config, data.labels[items], positions, data.classes) if config.conditional else None
        update = positions.start // config.optimisation.batch
        return image, noise, t, label, config.fixed_point.counts(seed, update) if config.fixed_point else None

    about = {"image": shape, "classes": given[1], **counted(config, shape, data.classes)}
    inputs = {
        name: sha256_of(results(name) / "meta.json") for name in ("data", *(["latents"] if encoded else []))
    }
    loop.train(job, config, inputs, net, batch_of, loss_of(config), about)


def _check(config: Config, job: Job, classes: int) -> None:
    if config.conditional and not classes:
        raise UserError(
            f"diffusion.{job.run}.conditional is true, but the data have no labels; set it to false"
        )


def _labels(config: Config, label: np.ndarray, positions: range, classes: int) -> torch.Tensor:
    """Return the labels of images, some of them replaced by the null class, by position."""
    hidden = rng.integers(config.seed, "label dropout", positions, DROPS) < config.label_dropout * DROPS
    return torch.from_numpy(np.where(hidden, classes, label))


def loss_of(config: Config) -> loop.Loss:
    """Return loss(net, (image, noise, t, label, counts)): the mean error of the prediction, and the bound that trains a
    learned variance."""
    chain = config.diffusion.chain()

    def loss(net, batch):
        image, noise, t, label, counts = batch
        level = chain.at(t)
        x = noised(image, noise, level)
        output = net(x, t, label) if counts is None else net(x, t, label, None, solver_of(counts))[0]
        value = losses.error(chain, output, image, noise, level, config.weight)
        if config.diffusion.variance == "learned":
            value = value + losses.bound(chain, output, image, noise, level)
        return value.mean()

    return loss


def solver_of(counts: tuple[int, int]) -> Callable:
    """Return solve(f, init) -> Solution with these iterations without and with gradient; residuals are not measured."""
    solver, gradient = Solver("iterate", 1, 0.0, "last", measure=False), Gradient("s_jfb")
    return lambda f, init: equilibrium(f, init, solver, gradient, counts)


@counted_once
def counted(config: Config, image: tuple[int, ...], classes: int) -> dict[str, int]:
    """Return the parameters and, for an image, the FLOPs by shape of a call of the network (at the mean iterations of
    training) and of a training step (likewise), without building the network in memory."""
    mean = config.fixed_point.mean if config.fixed_point else (0.0, 0.0)
    work = {
        "flops_image": call(config, image, classes, sum(mean)),
        "train_flops_image": step_flops(config, image, classes, mean),
    }
    return {"parameters": parameters(_meta(config, image, classes)[0]), **work}


def step_flops(
    config: Config, image: tuple[int, ...], classes: int, counts: tuple[int | float, int | float]
) -> int | float:
    """Return the FLOPs by shape of a training step for an image, at so many iterations without and with gradient."""
    base, without, more = _steps(config, image, classes)
    return base + (without - base) * counts[0] + (more - base) * (counts[1] - 1)


@counted_once
def _steps(config: Config, image: tuple[int, ...], classes: int) -> list[int]:
    """Return the FLOPs of a training step: with one iteration, one more without gradient, or one more with."""
    net, batch = _meta(config, image, classes)
    counts = [(0, 1), (1, 1), (0, 2)] if config.fixed_point else [None]
    found = [flops(lambda: loss_of(config)(net, (*batch, one)).backward()) for one in counts]
    return found if config.fixed_point else found * 3


def call(config: Config, image: tuple[int, ...], classes: int, iterations: int | float) -> int | float:
    """Return the FLOPs by shape of a call of the network for an image, at so many iterations of its fixed point."""
    once, twice = _calls(config, image, classes)
    return once + (twice - once) * (iterations - 1)


@counted_once
def _calls(config: Config, image: tuple[int, ...], classes: int) -> list[int]:
    """Return the FLOPs of a call with one iteration and with two; an explicit network makes no difference."""
    net, (x, _, t, label) = _meta(config, image, classes)
    if config.fixed_point is None:
        return [flops(lambda: net(x, t, label))] * 2
    return [flops(lambda: net(x, t, label, None, solver_of((0, k)))) for k in (1, 2)]


def _meta(config: Config, image: tuple[int, ...], classes: int):
    with torch.device("meta"):
        x, t = torch.empty(1, *image), torch.zeros(1, dtype=torch.int64)
        label = torch.zeros(1, dtype=torch.int64) if config.conditional else None
        return config.network.build(*config.positional(image, classes)), (x, x, t, label)
