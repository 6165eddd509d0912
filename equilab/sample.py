"""Any trained run as a function from noise to images, with its counted cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equilab import rng
from equilab.diffusion.samplers import finish
from equilab.models.precond import EDM
from equilab.pairs import Sampler
from equilab.pairset import labels
from equilab.solvers import Solution, Solver
from equilab.training import distill
from equilab.training.state import load_network
from equilab.training.teacher import UNETS

NOISE, LABEL, INIT = "evaluation noise", "evaluation label", "evaluation init"  # purposes, the same for every run


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
        return Solver(self.method, self.iterations, self.tolerance, self.pick, record=record, memory=self.memory,
                      mixing=self.mixing)  # fmt: skip


class Made(NamedTuple):
    """Images (B, C, H, W) in -1..1, the Solution of an implicit generator or None, and the calls of the network."""

    image: Tensor
    solution: Solution | None
    nfe: int


class Generator:
    """A trained run: what all families share. `make` turns noise into images at a setting, `cost` counts what that takes.

    A family names the settings that it takes: their class, and the key of `evaluate` that lists them (none: "").
    """

    settings: type = type(None)
    key = ""

    def __init__(self, net: nn.Module, about: dict[str, Any], device: torch.device, config: Any):
        self.net, self.about, self.device, self.config = net.to(device), about, device, config
        self.kind, self.shape, self.classes = config.network.kind, tuple(about["image"]), about["classes"]

    def make(
        self, noise: Tensor, label: Tensor | None, init: Tensor | None, setting: Any, every: bool = False
    ) -> Made:
        """Return the images of `noise` (B, C, H, W); with `every`, those of all steps or iterates (K, B, C, H, W)."""
        raise NotImplementedError

    def cost(self, setting: Any, iterations: float | None = None) -> dict[str, float | None]:
        """Return what an image costs by shape: nfe, iterations, block_evals, flops; solver arithmetic is not counted.

        `iterations` is the mean number that was applied, where samples stop by themselves.
        """
        raise NotImplementedError


class Teacher(Generator):
    """A denoiser of noise levels, followed by a Sampler."""

    settings, key = Sampler, "sampler"

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, or the states of all steps."""
        steps = setting.run(EDM(self.net, sigma_data=self.config.sigma_data), noise, label)
        if every:
            return Made(torch.stack([step.x.float() for step in steps]), None, setting.nfe)
        image, nfe = finish(steps)
        return Made(image.float(), None, nfe)

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        work = self.about["flops_image"] * setting.nfe
        return {"nfe": setting.nfe, "iterations": None, "block_evals": None, "flops": work}


class Explicit(Generator):
    """One forward pass of a network."""

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, as the one iterate there is with `every`."""
        image, solution = self.net(noise, label)
        return Made(image[None] if every else image, solution, 1)

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        return {"nfe": 1, "iterations": None, "block_evals": self.net.blocks(), "flops": self.about["flops_image"]}


class Implicit(Generator):
    """One call of a network whose state is solved for, as a Solve says."""

    settings, key = Solve, "solver"

    @torch.inference_mode()
    def make(self, noise, label, init, setting, every=False):
        """Return the images of `noise`, or of all iterates."""
        return Made(*self.net(noise, label, init, setting.solver(every), every), 1)

    def cost(self, setting, iterations=None):
        """Return what an image costs."""
        iterations = iterations or setting.iterations
        (work,) = distill.generation(self.config, self.shape, self.classes, [iterations])
        return {"nfe": 1, "iterations": iterations, "block_evals": self.net.blocks(iterations), "flops": work}


FAMILIES = {"unet": Teacher, "vit": Explicit, "get": Implicit}  # of the kinds of networks


def load(weights: Path, device: torch.device, config: Any) -> Generator:
    """Return the trained run of these weights; `config` is the run's in the study's params.

    Raises: UserError if the weights are missing, damaged or not of `config`.
    """
    net, about = load_network(weights, UNETS | distill.GENERATORS, config)
    return FAMILIES[config.network.kind](net, about, device, config)


def inputs(
    seed: int, indices: np.ndarray, generator: Generator, setting: Sampler | Solve | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return noise, label and initial state of the evaluation's images at `indices`: the same for every run."""
    device = generator.device
    noise = torch.from_numpy(rng.noise(seed, NOISE, indices, generator.shape)).to(device)
    label = labels(seed, indices, generator.classes, LABEL)
    init = None
    if isinstance(setting, Solve) and setting.init == "noise":
        init = torch.from_numpy(rng.noise(seed, INIT, indices, generator.net.state_shape)).to(device)
    return noise, label if label is None else label.to(device), init


def batches(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the indices 0..count-1, `batch` at a time."""
    for start in range(0, count, batch):
        yield np.arange(start, min(start + batch, count))
