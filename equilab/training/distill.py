"""Stage `distill@RUN`: a one-step generator trained on the teacher's noise/image pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import Params, UserError, digest
from equilab.core.job import Job, Plan, Seed, folder_of
from equilab.data.pairset import PairSet
from equilab.diffusion import losses
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, parameters, work
from equilab.models.family import network
from equilab.solvers import Gradient, Solver, equilibrium
from equilab.training import loop, trainer
from equilab.training.optimisation import Optimisation

Network = network("distill")


class Equilibrium(Params):
    """How the fixed point of an implicit generator is found and differentiated in training."""

    init: Literal["zeros", "noise"]  # where it starts; noise: unit normal, drawn anew for every image seen
    iterations: int = Field(ge=1, le=10_000)
    gradient: Literal["unrolled", "o1", "jfb", "implicit"]
    # gamma of the fixed-point correction over all iterates; null: the loss is of the last one
    correction: float | None = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _fits(self):
        if self.correction is not None and self.gradient not in ("unrolled", "o1"):
            raise ValueError(
                "correction needs every iterate's gradient: set gradient to unrolled or o1, or correction to null"
            )
        return self


class Model(trainer.Model):
    """What sampling needs to know of a one-step generator."""

    stage = "distill"

    network: Network
    conditional: bool  # on the pairs' classes


class Config(Model):
    """An entry of the params section `distill`."""

    equilibrium: Equilibrium | None  # null for explicit networks
    pairs: int = Field(ge=1, le=10**10)  # the first so many training pairs are used
    loss: Literal["l1", "l2"]
    seed: Seed  # of this run: its weights and the order of its pairs
    optimisation: Optimisation

    @model_validator(mode="after")
    def _fits(self):
        if self.family.implicit != (self.equilibrium is not None):
            raise ValueError(
                "equilibrium must be given for networks with a fixed point and null for others "
                f"(network.kind is {self.network.kind})"
            )
        return self


class Batch(NamedTuple):
    """What the loss needs."""

    noise: Tensor  # (B, C, H, W)
    image: Tensor  # (B, C, H, W) that the teacher makes of it
    label: Tensor | None  # (B,)
    init: Tensor | None  # (B, N, D) where the fixed point's iteration starts; None: zeros


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost.

    Raises: UserError if the study's pairs cannot train it, or the network's sizes do not fit.
    """
    config.on_meta(job.image, job.classes)  # refuses sizes that do not fit
    _require_pairs(config, job, job.read("pairs").count, job.classes)
    return lambda: trainer.plan(config.optimisation, cost(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the generator on the pairs and write its averaged weights, snapshots and log.

    Raises: UserError if the pairs are missing, damaged, too few or made otherwise than params say now.
    """
    pairs = PairSet(folder_of("pairs"))
    pairs.check(job)
    pairs.verify()
    _require_pairs(config, job, pairs.count, pairs.classes)
    classes = config.classes_of(pairs.classes)
    net = trainer.build(config.network, config.seed, "weights", pairs.shape, classes)
    noisy = config.equilibrium is not None and config.equilibrium.init == "noise"

    def batch_of(positions: range) -> Batch:
        items = rng.batch(config.seed, "pair order", positions.start, len(positions), config.pairs)
        noise, image, label = pairs.read(items + pairs.held_out)
        init = torch.from_numpy(rng.noise(config.seed, "init", positions, net.state_shape)) if noisy else None
        return Batch(noise, image, label if config.conditional else None, init)

    counted = cost(config, pairs.shape, pairs.classes)
    iterations = config.equilibrium.iterations if config.equilibrium else 0
    about = trainer.about(pairs.shape, classes, counted, iterations)
    about["train_flops_image"] = counted.train_flops_image
    trainer.train(job, config, {"pairs": digest(pairs.meta)}, net, batch_of, loss_of(config), about)


def _require_pairs(config: Config, job: Job, count: int, classes: int) -> None:
    if config.pairs > count:
        raise UserError(
            f"distill.{job.run}.pairs is {config.pairs}, the set has {count}; raise pairs.count or lower it"
        )
    config.require_classes(job, classes)


def loss_of(config: Config) -> loop.Loss:
    """Return loss(net, batch): the mean error of the image, or of an implicit network corrected over all iterates."""
    measure = losses.l1 if config.loss == "l1" else losses.l2
    if config.equilibrium is None:

        def explicit(net: nn.Module, batch: Batch) -> Tensor:
            return measure(net(batch.noise, batch.label).image, batch.image)

        return explicit

    solve, gamma = solver_of(config.equilibrium), config.equilibrium.correction

    def implicit(net: nn.Module, batch: Batch) -> Tensor:
        generated = net(batch.noise, batch.label, batch.init, solve, gamma is not None).image
        if gamma is None:
            return measure(generated, batch.image)
        errors = torch.stack([measure(iterate, batch.image) for iterate in generated])  # (K,)
        return losses.fixed_point_correction(errors, gamma)

    return implicit


def solver_of(config: Equilibrium) -> Callable:
    """Return solve(f, init) -> Solution as training uses it: residuals are not measured."""
    record = config.correction is not None
    solver = Solver("iterate", config.iterations, 0.0, "last", record=record, measure=False)
    adjoint = Solver("iterate", config.iterations, 0.0, "last") if config.gradient == "implicit" else None
    return functools.partial(equilibrium, solver=solver, gradient=Gradient(config.gradient, adjoint=adjoint))


@trainer.counted_once
def cost(config: Model, image: tuple[int, ...], classes: int) -> Cost:
    """Return the cost of the generator, counted on the meta device; its image is a whole one.

    An update is counted as its gradient takes it: what is recomputed counts again, what has no gradient has no backward
    pass. The adjoint of an implicit gradient takes a product with the Jacobian, as costly as an application, each time.
    """
    net = config.on_meta(image, classes)
    noise, label = inputs_on_meta(image, config.conditional)
    count, batch = parameters(net), Batch(noise, noise, label, None)

    def generate(iterations: int) -> None:
        net(noise, label, None, Solver("iterate", iterations, 0.0, "last", measure=False))

    def update(trained: Config) -> int:
        return flops(lambda: loss_of(trained)(net, batch).backward())

    generated = work(generate) if config.family.implicit else Work(flops(lambda: net(noise, label)))
    if not isinstance(config, Config):
        return Cost(count, count, generated, None)
    if config.equilibrium is None or config.equilibrium.gradient != "implicit":
        return Cost(count, count, generated, update(config))
    jfb = config.equilibrium.model_copy(update={"gradient": "jfb"})  # the same, but for the adjoint
    without_adjoint = update(config.model_copy(update={"equilibrium": jfb}))
    adjoint = config.equilibrium.iterations * generated.per_iteration
    return Cost(count, count, generated, without_adjoint + adjoint)
