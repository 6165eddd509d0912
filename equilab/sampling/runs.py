"""Trained runs as functions from noise to images: one class for each kind, which says what it takes and what an image costs.

A run is named by its folder below results/: "teacher", "distill/get-m". What it costs follows from its config alone; images need its
weights, which `equilab.sampling.load` brings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.machine import to_device
from equilab.data.pairset import labels
from equilab.diffusion import discrete_samplers
from equilab.diffusion.discrete import evenly
from equilab.diffusion.protocols import Step, finish
from equilab.diffusion.samplers import euler
from equilab.metrics.counting import Cost, network_on_meta
from equilab.models.family import Family
from equilab.models.precond import EDM
from equilab.sampling.settings import (
    ChainSampler,
    FixedPointAlongChain,
    Sampler,
    Setting,
    Solve,
    iterated,
    options_of,
)
from equilab.solvers import Solution
from equilab.solvers.budget import Budget
from equilab.training import onestep
from equilab.training.optimisation import Optimisation

# purposes of random numbers: the same noises for every run
NOISE, LABEL = "evaluation noise", "evaluation label"
INIT, FRESH = "evaluation init", "evaluation fresh noise"

Counts = dict[str, int | float | None]


class Inputs(NamedTuple):
    """What images are made from."""

    noise: Float[Tensor, "b c h w"]
    label: Int64[Tensor, b] | None
    init: Float[Tensor, "b n d"] | None = None  # where an implicit generator starts; None: at zeros
    fresh_noise: Callable[[int], Tensor] | None = None  # of a chain: the unit noise added at each step


class Outputs(NamedTuple):
    """Images in -1..1, float32, and what was done for them."""

    image: Float[Tensor, "*k b c h w"]  # one more dimension where iterates or all steps were asked for
    solutions: tuple[Solution, ...] = ()  # of each call of an implicit network
    diverged: Bool[Tensor, b] | None = None  # of a chain


class Run(ABC):
    """A run by its config, without its weights.

    `of` is its folder below results/, `shape` that of what it makes, an image or a latent (C, H, W), `classes` the number of those
    that it knows, 0 for none; `count(config, shape, classes)` returns its Cost.
    """

    setting: ClassVar[type[Setting] | None] = None  # what it takes as a setting; None: nothing
    listed: ClassVar[str] = ""  # the key of `evaluate` that lists its settings; "" where it takes none
    latent: ClassVar[bool] = False  # works in latents where the study has them
    teachers_network: ClassVar[bool] = False  # its network is the teacher's, which sees noise levels
    can_diverge: ClassVar[bool] = False  # its solver or its chain says which samples broke

    def __init__(
        self,
        of: str,
        config: Any,
        shape: tuple[int, int, int],
        classes: int,
        count: Callable[..., Cost],
        label_counts: Sequence[int] | None = None,
    ):
        self.of, self.config, self.shape, self.classes = of, config, shape, classes
        self.label_counts = label_counts  # of training images, where labels are as frequent as there
        self.family = config.family
        self._count = count

    @property
    def optimisation(self) -> Optimisation | None:
        """How it was trained; None where its weights are published ones."""
        return getattr(self.config, "optimisation", None)

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The counts of images at which its weights were kept along its training."""
        return self.optimisation.snapshots if self.optimisation else ()

    @property
    def pairs(self) -> int | None:
        """On how many of the study's pairs it was trained; None of what is not trained on pairs."""
        return getattr(self.config, "pairs", None)

    @property
    def timesteps(self) -> int | None:
        """The timesteps that its network knows; None of one that is no denoiser of timesteps."""
        return None

    @property
    def in_latents(self) -> bool:
        """Whether what it makes cannot be an image: it has neither one channel nor three."""
        return self.latent and self.shape[0] not in (1, 3)

    @cached_property
    def counted(self) -> Cost:
        """Parameters and FLOPs, counted by shape."""
        return self._count(self.config, self.shape, self.classes)

    def check(self, setting: Any) -> None:  # noqa: B027, most kinds take every setting
        """Refuse a setting that does not fit the run.

        Raises: ValueError saying what does not fit.
        """

    @classmethod
    def options(cls, family: Family) -> list[str]:
        """Return the names of what can be set, one by one, where runs of a family are sampled."""
        return options_of(cls.setting) if cls.setting else []

    def usual(self) -> Setting | None:
        """Return the setting of the paper, for a run of which a study says none; None where there is nothing to set."""
        return None

    def model(self, net: nn.Module, metadata: dict[str, Any]) -> nn.Module:
        """Return what `sample` calls: the trained network, or what the run makes of it by what was kept with its weights."""
        return net

    @abstractmethod
    def sample(self, model: nn.Module, inputs: Inputs, setting: Any, return_iterates: bool) -> Outputs:
        """Return the images of `inputs.noise`; with `return_iterates`, those of all iterates or steps (K, B, C, H, W)."""

    def inputs(
        self, seed: int, indices: np.ndarray, setting: Any, device: torch.device, net: nn.Module
    ) -> Inputs:
        """Return what the evaluation's images at `indices` are made from: the same for every run."""
        noise = torch.from_numpy(rng.noise(seed, NOISE, indices, self.shape))
        label = labels(seed, indices, self.classes, LABEL, self.label_counts)
        return Inputs(*to_device((noise, label), device))

    def nfe(self, setting: Any) -> int:
        """Return the calls of the network for an image."""
        return 1

    def iterations(self, setting: Any) -> int | None:
        """Return the applications of the fixed-point map for an image, at most; None without one."""
        return None

    def cost(self, setting: Any, iterations: int | float | None = None) -> Counts:
        """Return what an image costs at a setting, as `counts` does.

        `iterations` is the mean number that was applied, where samples stop by themselves.
        """
        return self.counts(self.nfe(setting), iterations or self.iterations(setting))

    def counts(self, calls: int, iterations: int | float | None) -> Counts:
        """Return what so many calls of the network, and iterations in all of them, cost by shape: nfe, iterations, block_evals,
        flops; solver arithmetic is not counted."""
        return {
            "nfe": calls,
            "iterations": iterations,
            "block_evals": self._block_evals(calls, iterations),
            "flops": self._flops(calls, iterations),
        }

    def _flops(self, calls: int, iterations: int | float | None) -> int | float:
        return self.counted.image.flops(iterations or 0, calls)

    def _block_evals(self, calls: int, iterations: int | float | None) -> int | float | None:
        """Return the transformer blocks applied; None of a network that is not made of blocks."""
        blocks = getattr(self.network, "blocks", None)
        if blocks is None:
            return None
        return calls * blocks() if iterations is None else (calls - 1) * blocks(0) + blocks(iterations)

    @cached_property
    def network(self) -> nn.Module:
        """The network, on the meta device where it has no numbers."""
        return network_on_meta(self.config.network, self.shape, self.classes)


class Teacher(Run):
    """A denoiser of noise levels, followed by a Sampler."""

    setting, listed = Sampler, "sampler"
    teachers_network = True

    def usual(self):
        """Return Heun's method in 18 steps, in 40 for images larger than 32 x 32.

        Source: EDM, tables 1 and 2.
        """
        steps = 18 if max(self.shape[1:]) <= 32 else 40
        return Sampler(method="heun", steps=steps, sigma_min=0.002, sigma_max=80.0, rho=7.0)

    def model(self, net, metadata):
        """Return the denoiser that the network is."""
        return EDM(net, sigma_data=self.config.sigma_data)

    @torch.inference_mode()
    def sample(self, model, inputs, setting, return_iterates):
        """Return the images, or the states of all steps."""
        return _followed(setting.start(model, inputs.noise, inputs.label), return_iterates)

    def nfe(self, setting: Sampler) -> int:
        """Return the calls of the denoiser for an image."""
        return setting.nfe


def _followed(steps: Iterator[Step], return_iterates: bool) -> Outputs:
    """Return where the steps of a sampler of noise levels lead; with `return_iterates`, its states after all of them."""
    if return_iterates:
        return Outputs(torch.stack([step.x.float() for step in steps]))
    return Outputs(finish(steps).x.float())


class OneStep(Run):
    """One forward pass of an explicit network."""

    @torch.inference_mode()
    def sample(self, model, inputs, setting, return_iterates):
        """Return the images, which are the one iterate there is."""
        image = model(inputs.noise, inputs.label).image.float()
        return Outputs(image[None] if return_iterates else image)


class ImplicitOneStep(OneStep):
    """One call of a network whose state is solved for, as a Solve says."""

    setting, listed = Solve, "solver"
    can_diverge = True

    def usual(self):
        """Return as many plain iterations as in training, from where they start there; of published weights 6, from noise.

        Source: GET (Geng 2023), section 4.
        """
        trained = getattr(self.config, "equilibrium", None)
        count, init = (trained.iterations, trained.init) if trained else (6, "noise")
        return iterated(count).model_copy(update={"init": init})

    @torch.inference_mode()
    def sample(self, model, inputs, setting, return_iterates):
        """Return the images, or those of all iterates."""
        solver = setting.solver(record=return_iterates)
        image, solution = model(inputs.noise, inputs.label, inputs.init, solver, return_iterates)
        return Outputs(image.float(), (solution,))

    def inputs(self, seed, indices, setting, device, net):
        """Return what images are made from, with the state to start from where the setting draws it."""
        inputs = super().inputs(seed, indices, setting, device, net)
        if setting.init == "zeros":
            return inputs
        init = torch.from_numpy(rng.noise(seed, INIT, indices, net.state_shape)).to(device)
        return inputs._replace(init=init)

    def iterations(self, setting: Solve) -> int:
        """Return the iterations for an image, at most."""
        return setting.iterations


class Student(Run):
    """The teacher's network as a generator of few steps."""

    teachers_network = True

    def model(self, net, metadata):
        """Return the generator that the network is."""
        return onestep.student(self.config, net, metadata["sigma_data"])

    @torch.inference_mode()
    def sample(self, model, inputs, setting, return_iterates):
        """Return the images, or those that are predicted at all steps."""
        return Outputs(model(inputs.noise, inputs.label, return_iterates).image.float())

    def nfe(self, setting: None) -> int:
        """Return the calls of the network for an image: one for each noise level that it steps through."""
        return len(self.config.student.sigmas)

    def _flops(self, calls, iterations):
        return self.counted.image.flops()  # of all steps


class ProgressiveStudent(Student):
    """A denoiser that was distilled to take Euler's steps between noise levels of its own."""

    def model(self, net, metadata):
        """Return the denoiser that the network is."""
        return EDM(net, sigma_data=metadata["sigma_data"])

    @torch.inference_mode()
    def sample(self, model, inputs, setting, return_iterates):
        """Return the images, or the states of all steps."""
        sigmas = self.config.levels.sigmas().double().flip(0)
        return _followed(euler(model, inputs.noise, sigmas, inputs.label), return_iterates)

    def nfe(self, setting: None) -> int:
        """Return the calls of the network for an image: one for each step."""
        return self.config.levels.steps


class Denoiser(Run):
    """A denoiser of discrete timesteps, followed along a chain as a ChainSampler says."""

    setting, listed = ChainSampler, "chain"
    latent = True
    can_diverge = True

    @classmethod
    def options(cls, family):
        """Return the names of what can be set; without a fixed point, nothing of one."""
        return options_of(ChainSampler, without=() if family.implicit else ("fixed_point",))

    def usual(self):
        """Return 250 steps of DDPM; of an implicit network 28 of DDIM, of 8 iterations each.

        Source: DiT (Peebles and Xie 2023), section 4; FPDM (Bai and Melas-Kyriazi 2024), table 1, for 280 blocks.
        """
        clamp = not self.in_latents
        if not self.family.implicit:
            steps = min(250, self.timesteps)
            return ChainSampler(
                method="ddpm", steps=steps, eta=None, clamp=clamp, guidance=None, fixed_point=None
            )
        steps = min(28, self.timesteps)
        along = FixedPointAlongChain(
            blocks=steps * (self.network.blocks(0) + 8),
            budget="constant",
            reuse=True,
            method="iterate",
            tolerance=0.0,
            memory=None,
            mixing=None,
        )
        return ChainSampler(
            method="ddim", steps=steps, eta=0.0, clamp=clamp, guidance=None, fixed_point=along
        )

    @property
    def timesteps(self) -> int:
        """The timesteps that its network knows."""
        return self.config.diffusion.timesteps

    def check(self, setting: ChainSampler) -> None:
        """Refuse a setting that does not fit the network, or whose blocks are too few.

        Raises: ValueError saying what does not fit.
        """
        if (setting.fixed_point is not None) != self.family.implicit:
            needed = "given" if self.family.implicit else "null"
            raise ValueError(f"fixed_point must be {needed} for a {self.family.label}")
        evenly(self.timesteps, setting.steps)
        if setting.guidance and not self.config.label_dropout:
            raise ValueError(
                "guidance needs a run with conditional true and label_dropout above 0; draw without guidance"
            )
        if setting.fixed_point is not None and self._unguided_iterations(setting) < setting.steps:
            explicit = self.network.blocks(0)
            raise ValueError(
                f"blocks is {setting.fixed_point.blocks}, but {setting.steps} steps of {explicit} explicit layers and at "
                f"least one iteration need {setting.steps * (explicit + 1)}; raise blocks or lower steps"
            )
        if setting.fixed_point is not None and setting.fixed_point.budget != "adaptive":
            self._budget(setting).fixed(setting.steps)  # a list must fit

    def _unguided_iterations(self, setting: ChainSampler) -> int:
        """Return the iterations of a chain without guidance, over all its steps."""
        return setting.fixed_point.blocks - setting.steps * self.network.blocks(0)

    def _budget(self, setting: ChainSampler) -> Budget:
        return Budget(setting.fixed_point.budget, self._unguided_iterations(setting))

    @torch.inference_mode()
    def sample(self, model, inputs, setting, return_iterates):
        """Return the images, or those predicted at all steps."""
        images, solutions = [], []
        for step in self._steps(model, inputs, setting):
            if return_iterates:
                images.append(step.image.float())
            solutions.extend(step.solutions)
        image = torch.stack(images) if return_iterates else step.x.float()
        return Outputs(image, tuple(solutions), step.diverged)

    def _steps(self, model, inputs: Inputs, setting: ChainSampler):
        """Return the sampler, started: it yields a Step a step."""
        process, fixed_point = self.config.diffusion, setting.fixed_point
        if fixed_point is None:
            predict, budget = discrete_samplers.explicit(model), None
        else:
            predict = discrete_samplers.implicit(model, fixed_point.solver())
            budget = self._budget(setting)
        if setting.guidance:
            scale, channels = setting.guidance.scale, setting.guidance.channels
            predict = discrete_samplers.guided(predict, scale, self.classes, channels)
        sampler = discrete_samplers.ddpm
        if setting.method == "ddim":
            sampler = partial(discrete_samplers.ddim, eta=setting.eta)
        return sampler(
            predict,
            inputs.noise,
            process.chain(evenly(process.timesteps, setting.steps)),
            inputs.label,
            inputs.fresh_noise,
            reuse=fixed_point is not None and fixed_point.reuse,
            clamp=setting.clamp,
            budget=budget,
        )

    def inputs(self, seed, indices, setting, device, net):
        """Return what images are made from, with the fresh noise of each step."""
        inputs = super().inputs(seed, indices, setting, device, net)
        return inputs._replace(fresh_noise=discrete_samplers.fresh(seed, FRESH, indices, inputs.noise))

    def nfe(self, setting: ChainSampler) -> int:
        """Return the predictions for an image."""
        return setting.nfe

    def iterations(self, setting: ChainSampler) -> int | None:
        """Return the iterations over all steps, with guidance those of both halves; None of an explicit network."""
        if setting.fixed_point is None:
            return None
        return self._unguided_iterations(setting) * setting.nfe // setting.steps


def solver_statistics(samples: Outputs) -> Float64[Tensor, "b 3"]:
    """Return what the solver did for each image: iterations of all calls, mean relative residual of the calls' last
    applications, and whether any call diverged (1) or none (0)."""
    batch = samples.image.shape[-4]
    statistics = torch.zeros(batch, 3, dtype=torch.float64)
    for solution in samples.solutions:
        residual = solution.last_residual / len(samples.solutions)  # (B,), with guidance (2B,)
        call = torch.stack([solution.iterations, residual, solution.diverged], 1).double().cpu()
        halves = call.unflatten(0, (-1, batch))  # (1 or 2, B, 3)
        iterations, residual, diverged = halves.unbind(2)
        statistics += torch.stack([iterations.sum(0), residual.mean(0), diverged.amax(0)], 1)
    if samples.diverged is not None:
        statistics[:, 2] += samples.diverged.cpu()
    statistics[:, 2].clamp_(max=1)
    return statistics
