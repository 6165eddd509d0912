"""Stage `distill@RUN`: a one-step generator trained on the teacher's noise/image pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from equilab.core import rng
from equilab.core.config import Spec, UserError, digest
from equilab.core.job import Job, Plan, results
from equilab.data.pairset import PairSet
from equilab.diffusion import losses
from equilab.metrics.counting import counted_once, flops, parameters
from equilab.solvers import Gradient, Solver, equilibrium
from equilab.training import loop
from equilab.training.loop import Optimisation

GENERATORS = {"get": "equilab.models.get:GET", "vit": "equilab.models.vit:ViT"}


@dataclass(frozen=True)
class Equilibrium:
    """How the fixed point of an implicit generator is found and differentiated in training."""

    init: Literal[
        "zeros", "noise"
    ]  # where the iteration starts; noise: unit normal, drawn anew for every image seen
    iterations: int
    gradient: Literal["unrolled", "o1", "jfb", "implicit"]
    correction: (
        float | None
    )  # gamma of the fixed-point correction over all iterates; null: loss on the last one

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {self.iterations}")
        if self.correction is not None and not 0 < self.correction <= 1:
            raise ValueError(f"correction must lie between 0 and 1, got {self.correction}")
        if self.correction is not None and self.gradient not in ("unrolled", "o1"):
            raise ValueError(
                "correction needs every iterate's gradient: set gradient to unrolled or o1, or correction to null"
            )


@dataclass(frozen=True)
class Config:
    """An entry of the params section `distill`."""

    network: Annotated[Spec, tuple(GENERATORS.items())]
    conditional: bool  # on the pairs' classes
    equilibrium: Equilibrium | None  # null for explicit networks
    pairs: int  # the first so many training pairs are used
    loss: Literal["l1", "l2"]
    seed: int  # of this run: its weights and the order of its pairs
    optimisation: Optimisation

    def __post_init__(self):
        if (self.network.kind == "get") != (self.equilibrium is not None):
            raise ValueError(
                f"equilibrium must be given for get and null for vit (network.kind is {self.network.kind})"
            )
        if self.pairs < 1 or not 0 <= self.seed < 2**63:
            raise ValueError(f"pairs must be >= 1 and seed >= 0, got {self.pairs} and {self.seed}")

    def positional(self, image: tuple[int, ...], classes: int) -> tuple:
        """What the data determines of the network's constructor."""
        return image, classes if self.conditional else 0


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost.

    Raises: UserError if the study's pairs cannot train it.
    """
    _check(config, job, read("pairs").count, job.classes)
    _meta(config, job.image, job.classes)  # refuses sizes that do not fit
    return lambda: loop.plan(config.optimisation, counted(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the generator on the pairs and write its averaged weights, snapshots and log.

    Raises: UserError if the pairs are missing, damaged, too few or made otherwise than params say now.
    """
    pairs = PairSet(results("pairs"))
    pairs.check(job)
    pairs.verify()
    _check(config, job, pairs.count, pairs.classes)
    given = config.positional(pairs.shape, pairs.classes)
    net = loop.build(config.network, config.seed, "weights", *given)
    state_shape = net.state_shape if config.equilibrium else ()

    def batch_of(positions: range):
        items = rng.batch(config.seed, "pair order", positions.start, len(positions), config.pairs)
        noise, image, label = pairs.read(items + pairs.held_out)
        init = None
        if config.equilibrium and config.equilibrium.init == "noise":
            init = torch.from_numpy(rng.noise(config.seed, "init", positions, state_shape))
        return noise, image, label if config.conditional else None, init

    about = {"image": pairs.shape, "classes": given[1], **counted(config, pairs.shape, pairs.classes)}
    loop.train(job, config, {"pairs": digest(pairs.meta)}, net, batch_of, loss_of(config), about)


def _check(config: Config, job: Job, count: int, classes: int) -> None:
    if config.pairs > count:
        raise UserError(
            f"distill.{job.run}.pairs is {config.pairs}, the set has {count}; raise pairs.count or lower it"
        )
    if config.conditional and not classes:
        raise UserError(
            f"distill.{job.run}.conditional is true, but the pairs have no classes; set it to false"
        )


def loss_of(config: Config) -> loop.Loss:
    """Return loss(net, (noise, image, label, init)): the mean error of the last iterate, or corrected over all."""
    measure = losses.l1 if config.loss == "l1" else losses.l2
    solve = solver_of(config.equilibrium) if config.equilibrium else None

    def loss(net, batch):
        noise, image, label, init = batch
        if solve is None:
            return measure(net(noise, label).image, image)
        gamma = config.equilibrium.correction
        generated = net(noise, label, init, solve, gamma is not None).image
        if gamma is None:
            return measure(generated, image)
        return losses.fixed_point_correction(
            torch.stack([measure(iterate, image) for iterate in generated]), gamma
        )

    return loss


def solver_of(config: Equilibrium):
    """Return solve(f, init) -> Solution as training uses it: residuals are not measured."""
    solver = Solver(
        "iterate", config.iterations, 0.0, "last", record=config.correction is not None, measure=False
    )
    adjoint = Solver("iterate", config.iterations, 0.0, "last") if config.gradient == "implicit" else None
    gradient = Gradient(config.gradient, adjoint=adjoint)
    return lambda f, init: equilibrium(f, init, solver, gradient)


@counted_once
def counted(config: Config, image: tuple[int, ...], classes: int) -> dict[str, int]:
    """Return the parameters and, for an image, the FLOPs by shape of generating it and of a training step, without
    building the network in memory.

    A step is counted as its gradient takes it: what is recomputed counts again, what has no gradient has no backward
    pass. The adjoint of an implicit gradient takes a product with the Jacobian, as costly as an application, each time.
    """
    solve, adjoint = config.equilibrium, 0
    work, *more = generation(
        config, image, classes, [solve.iterations, solve.iterations + 1] if solve else [1]
    )
    if solve and solve.gradient == "implicit":
        adjoint = solve.iterations * (more[0] - work)
        config = replace(config, equilibrium=replace(solve, gradient="jfb"))
    net, noise, label = _meta(config, image, classes)
    step = flops(lambda: loss_of(config)(net, (noise, noise, label, None)).backward())
    return {"parameters": parameters(net), "flops_image": work, "train_flops_image": step + adjoint}


def generation(
    config: Config, image: tuple[int, ...], classes: int, iterations: Sequence[int | float]
) -> list[int | float]:
    """Return the FLOPs by shape of generating an image at each number of iterations; an explicit network has one."""
    once, twice = _once_and_twice(config, image, classes)
    return [once + (twice - once) * (k - 1) for k in iterations]


@counted_once
def _once_and_twice(config: Config, image: tuple[int, ...], classes: int) -> list[int]:
    """Return the FLOPs of generating an image with one iteration and with two; an explicit network makes no difference."""
    net, noise, label = _meta(config, image, classes)
    if config.equilibrium is None:
        return [flops(lambda: net(noise, label))] * 2
    return [
        flops(lambda: net(noise, label, None, Solver("iterate", k, 0.0, "last", measure=False)))
        for k in (1, 2)
    ]


def _meta(config: Config, image: tuple[int, ...], classes: int):
    with torch.device("meta"):
        label = torch.zeros(1, dtype=torch.int64) if config.conditional else None
        return config.network.build(*config.positional(image, classes)), torch.empty(1, *image), label
