"""Any trained run as a function from noise to images, with its counted cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equilab.core import rng
from equilab.data.pairs import Sampler
from equilab.data.pairset import labels
from equilab.diffusion import discrete_samplers as walk
from equilab.diffusion.discrete import evenly
from equilab.diffusion.samplers import finish
from equilab.models.checkpoint import load_network
from equilab.models.precond import EDM
from equilab.solvers import Solution, Solver
from equilab.solvers.budget import Budget
from equilab.training import diffusion, distill, onestep
from equilab.training.teacher import UNETS

# purposes, the same for every run
NOISE, LABEL, INIT, FRESH = (
    "evaluation noise",
    "evaluation label",
    "evaluation init",
    "evaluation fresh noise",
)


@dataclass(frozen=True)
class Solve:
    """How an implicit generator is solved at test time."""

    method: Literal["iterate", "anderson", "broyden", "torchdeq_iterate", "torchdeq_anderson"]
    iterations: int  # at most
    tolerance: float  # relative residual at which a sample stops; 0: never
    pick: Literal["last", "lowest"]  # iterate that is returned: the last, or that of lowest absolute residual
    memory: int | None  # of Anderson
    mixing: float | None  # of Anderson
    init: Literal["zeros", "noise"]

    def __post_init__(self):
        self.solver()

    def solver(self, record: bool = False) -> Solver:
        """Return the solver."""
        return Solver(
            self.method,
            self.iterations,
            self.tolerance,
            self.pick,
            record=record,
            memory=self.memory,
            mixing=self.mixing,
        )


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: away from no class, towards the label, `scale` times."""

    scale: float
    channels: Literal["all", "first_three"]  # of the image; the first three as published


@dataclass(frozen=True)
class Along:
    """How the fixed points along a chain are solved, and what they may cost."""

    blocks: int  # of a chain without guidance (which takes two): over all steps, explicit layers included
    budget: Literal[
        "constant", "increasing", "decreasing", "adaptive"
    ]  # how the iterations are spread over the steps
    reuse: bool  # each step starts from the solution of the one before
    method: Literal["iterate", "anderson", "broyden", "torchdeq_iterate", "torchdeq_anderson"]
    tolerance: float  # relative residual at which a sample stops; 0: never
    memory: int | None  # of Anderson
    mixing: float | None  # of Anderson

    def __post_init__(self):
        self.solver()

    def solver(self) -> Solver:
        """Return the solver; its iterations are those that the budget gives a step."""
        return Solver(self.method, 1, self.tolerance, "last", memory=self.memory, mixing=self.mixing)


@dataclass(frozen=True)
class ChainSampler:
    """How a denoiser of discrete timesteps is sampled: along evenly spaced timesteps, noisiest first."""

    method: Literal["ddpm", "ddim"]
    steps: int
    eta: float | None  # of ddim: 0 adds no fresh noise, 1 as much as ddpm; null for ddpm
    clamp: bool  # hold predicted images in -1..1
    guidance: Guidance | None
    fixed_point: Along | None  # null for explicit networks

    def __post_init__(self):
        if (self.method == "ddim") != (self.eta is not None) or not 0 <= (self.eta or 0) <= 1:
            raise ValueError(f"eta is {self.eta}; give 0..1 for ddim and null for ddpm")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")

    @property
    def nfe(self) -> int:
        """Predictions for an image: one each step, with guidance two."""
        return self.steps * (2 if self.guidance else 1)


def budget(config: diffusion.Config, setting: ChainSampler) -> Budget | None:
    """Return the iterations that the fixed points of a chain may take; None for explicit networks.

    Raises: ValueError if `setting` does not fit the network of `config`, or its blocks are too few.
    """
    along = setting.fixed_point
    if (along is None) != (config.fixed_point is None):
        raise ValueError(
            f"fixed_point must be given for fpdm and null for dit, this is a {config.network.kind}"
        )
    evenly(config.diffusion.timesteps, setting.steps)
    if setting.guidance and not config.label_dropout:
        raise ValueError(
            "guidance needs a run with conditional true and label_dropout above 0; set guidance to null"
        )
    if along is None:
        return None
    explicit = config.network.arguments["pre"] + config.network.arguments["post"]
    iterations = along.blocks - setting.steps * explicit
    if iterations < setting.steps:
        raise ValueError(
            f"blocks is {along.blocks}, but {setting.steps} steps of {explicit} explicit layers and at least one iteration "
            f"need {setting.steps * (explicit + 1)}; raise blocks or lower steps"
        )
    return Budget(along.budget, iterations)


class Made(NamedTuple):
    """Images (B, C, H, W) in -1..1, the Solution of each call of an implicit generator, and the calls of the network."""

    image: Tensor
    solutions: tuple[Solution, ...]
    nfe: int
    diverged: Tensor | None = None  # (B,), of a chain


class Generator(ABC):
    """A trained run: what all families share. `make` turns noise into images at a setting, `cost` counts what that takes.

    A family names the settings that it takes: their class, and the key of `evaluate` that lists them (none: "").
    """

    settings: type = type(None)
    key = ""

    def __init__(self, net: nn.Module, about: dict[str, Any], device: torch.device, config: Any):
        self.net, self.about, self.device, self.config = net.to(device), about, device, config
        self.kind, self.shape, self.classes = kind(config), tuple(about["image"]), about["classes"]

    @abstractmethod
    def make(
        self, noise: Tensor, label: Tensor | None, init: Tensor | None, setting: Any, every: bool = False
    ) -> Made:
        """Return the images of `noise` (B, C, H, W); with `every`, those of all steps or iterates (K, B, C, H, W)."""

    @abstractmethod
    def cost(self, setting: Any, iterations: float | None = None) -> dict[str, float | None]:
        """Return what an image costs by shape: nfe, iterations, block_evals, flops; solver arithmetic is not counted.

        `iterations` is the mean number that was applied, where samples stop by themselves.
        """


class Teacher(Generator):
    """A denoiser of noise levels, followed by a Sampler."""

    settings, key = Sampler, "sampler"

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, or the states of all steps."""
        steps = setting.run(EDM(self.net, sigma_data=self.config.sigma_data), noise, label)
        if every:
            return Made(torch.stack([step.x.float() for step in steps]), (), setting.nfe)
        image, nfe = finish(steps)
        return Made(image.float(), (), nfe)

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        work = self.about["flops_image"] * setting.nfe
        return {"nfe": setting.nfe, "iterations": None, "block_evals": None, "flops": work}


class Explicit(Generator):
    """One forward pass of a network."""

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, as the one iterate there is with `every`."""
        image = self.net(noise, label).image
        return Made(image[None] if every else image, (), 1)

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        return {
            "nfe": 1,
            "iterations": None,
            "block_evals": self.net.blocks(),
            "flops": self.about["flops_image"],
        }


class Implicit(Generator):
    """One call of a network whose state is solved for, as a Solve says."""

    settings, key = Solve, "solver"

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, or of all iterates."""
        image, solution = self.net(noise, label, init, setting.solver(every), every)
        return Made(image, (solution,), 1)

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        iterations = iterations or setting.iterations
        (work,) = distill.generation(self.config, self.shape, self.classes, [iterations])
        return {"nfe": 1, "iterations": iterations, "block_evals": self.net.blocks(iterations), "flops": work}


class Student(Generator):
    """The teacher's network as a generator of few steps."""

    def __init__(self, net: nn.Module, about: dict[str, Any], device: torch.device, config: onestep.Config):
        super().__init__(onestep.student(config, net, about["sigma_data"]), about, device, config)

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, or those that it predicts at all its steps."""
        return Made(self.net(noise, label, every).image, (), len(self.net.sigmas))

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        return {
            "nfe": len(self.net.sigmas),
            "iterations": None,
            "block_evals": None,
            "flops": self.about["flops_image"],
        }


class Denoiser(Generator):
    """A denoiser of discrete timesteps, followed along a chain as a ChainSampler says."""

    settings, key = ChainSampler, "chain"

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, or the images predicted at all steps; `init(step)` is the fresh noise of a step."""
        along, process = setting.fixed_point, self.config.diffusion
        predict = walk.implicit(self.net, along.solver()) if along else walk.explicit(self.net)
        if setting.guidance:
            predict = walk.guided(predict, setting.guidance.scale, self.classes, setting.guidance.channels)
        how = {
            "reuse": bool(along and along.reuse),
            "clamp": setting.clamp,
            "budget": budget(self.config, setting),
        }
        sampler = walk.ddpm if setting.method == "ddpm" else partial(walk.ddim, eta=setting.eta)
        chain, images, solutions = process.chain(evenly(process.timesteps, setting.steps)), [], []
        for step in sampler(predict, noise, chain, label, init, **how):
            images += [step.image.float()] if every else []
            solutions += [step.solution] if along else []
        image = torch.stack(images) if every else step.x.float()
        return Made(image, tuple(solutions), setting.nfe, step.diverged)

    def cost(self, setting, iterations=None):
        """Return what an image costs; `iterations` over all steps, with guidance those of both halves."""
        calls, given = setting.nfe, budget(self.config, setting)
        if given is None:
            blocks, work = self.net.blocks() * calls, self.about["flops_image"] * calls
            return {"nfe": calls, "iterations": None, "block_evals": blocks, "flops": work}
        iterations = iterations or given.total * calls // setting.steps
        work = diffusion.call(self.config, self.shape, self.classes, iterations / calls) * calls
        return {
            "nfe": calls,
            "iterations": iterations,
            "block_evals": self.net.blocks(0) * calls + iterations,
            "flops": work,
        }


# of the kinds of networks
FAMILIES = {
    "unet": Teacher,
    "student": Student,
    "vit": Explicit,
    "get": Implicit,
    "dit": Denoiser,
    "fpdm": Denoiser,
}


def kind(config: Any) -> str:
    """Return the family of the run of this config: that of its network, or "student" for a teacher's made into one."""
    return "student" if isinstance(config, onestep.Config) else config.network.kind


def load(weights: Path, device: torch.device, config: Any) -> Generator:
    """Return the trained run of these weights; `config` is the run's in the study's params.

    Raises: UserError if the weights are missing, damaged or not of `config`.
    """
    net, about = load_network(weights, UNETS | distill.GENERATORS | diffusion.DENOISERS, config)
    return FAMILIES[kind(config)](net, about, device, config)


def inputs(
    seed: int, indices: np.ndarray, generator: Generator, setting: Any
) -> tuple[Tensor, Tensor | None, Tensor | Callable | None]:
    """Return noise, label and initial state of the evaluation's images at `indices`: the same for every run.

    Of a chain, the fresh noise of each step stands for the initial state.
    """
    device = generator.device
    noise = torch.from_numpy(rng.noise(seed, NOISE, indices, generator.shape)).to(device)
    label = labels(seed, indices, generator.classes, LABEL)
    init = None
    if isinstance(setting, Solve) and setting.init == "noise":
        init = torch.from_numpy(rng.noise(seed, INIT, indices, generator.net.state_shape)).to(device)
    if isinstance(setting, ChainSampler):
        init = walk.fresh(seed, FRESH, indices, noise)
    return noise, label if label is None else label.to(device), init


def batches(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the indices 0..count-1, `batch` at a time."""
    for start in range(0, count, batch):
        yield np.arange(start, min(start + batch, count))
