"""What the trainers of students share: the teacher's network as a generator of one step or a few, frozen in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.config import Params, UserError
from equilab.core.job import Job, Seed, folder_of
from equilab.data.images import Dataset
from equilab.diffusion.schedules import edm_sigmas
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, network_on_meta, parameters
from equilab.models import gdd
from equilab.models.checkpoint import load_network
from equilab.models.family import Family, family, network
from equilab.models.precond import EDM
from equilab.training import loop
from equilab.training.loop import Optimisation

Network = network("teacher")
Sigma = Annotated[float, Field(ge=1e-6, lt=1e6)]


class Student(Params):
    """How the teacher's network becomes the student."""

    start: Literal["teacher", "random"]  # its weights
    freeze: Literal[tuple(gdd.VARIANTS)]  # which layers are not trained: a row of GDD's table 2
    sigma_min: Sigma  # where the consistency function is the identity
    sigmas: tuple[Sigma, ...]  # noise levels that it steps through, falling; one: a one-step generator

    @model_validator(mode="after")
    def _fits(self):
        gdd.check_levels(self.sigma_min, self.sigmas)
        return self


class Levels(Params):
    """The noise levels between which a consistency loss compares, `steps` apart from sigma_max to sigma_min."""

    steps: int = Field(ge=1, le=100_000)
    sigma_min: Sigma
    sigma_max: Sigma
    rho: float = Field(ge=0.01, le=1000)

    @model_validator(mode="after")
    def _fits(self):
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) must be less than sigma_max ({self.sigma_max})")
        return self

    def sigmas(self) -> Float[Tensor, n]:
        """Return T(0), ..., T(steps), rising. Source: GDD (Zheng 2024), equation (5)."""
        levels = edm_sigmas(self.steps + 1, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        return levels[:-1].flip(0).float()

    def draw(self, seed: int, positions: Sequence[int]) -> tuple[Float[Tensor, b], Float[Tensor, b]]:
        """Return the level of each position and the one below it, functions of (seed, position)."""
        sigmas = self.sigmas()
        index = torch.from_numpy(rng.integers(seed, "consistency level", positions, self.steps))  # (B,)
        return sigmas[index + 1], sigmas[index]


def check_levels(student: Student, levels: Levels) -> None:
    """Refuse consistency levels that do not end where the student is the identity, or begin where it is sampled.

    Raises: ValueError if they do not fit.
    """
    if (levels.sigma_min, levels.sigma_max) != (student.sigma_min, student.sigmas[0]):
        raise ValueError(
            f"levels go from {levels.sigma_max:g} to {levels.sigma_min:g}, but the student is sampled from "
            f"{student.sigmas[0]:g} and is the identity at {student.sigma_min:g}; give the same to both"
        )


class Model(Params):
    """What sampling needs to know of a student."""

    network: Network  # the teacher's
    conditional: bool  # as the teacher
    student: Student

    @property
    def family(self) -> Family:
        """The family of models that it is of, unless its stage trains another."""
        return family("gdd")


class Config(Model):
    """What the entries of the params sections `gan` and `consistency` share."""

    seed: Seed  # of this run: the order of its images, what it draws
    optimisation: Optimisation


def check(config: Config, job: Job) -> None:
    """Refuse a student that is not the study's teacher.

    Raises: UserError naming the key that differs.
    """
    teacher, section = job.read("teacher"), f"{job.stage}.{job.run}"
    ours, theirs = config.network.arguments, teacher.network.arguments
    pairs = {f"network.{key}": (ours[key], theirs[key]) for key in theirs if key != "dropout"}
    pairs["conditional"] = (config.conditional, teacher.conditional)
    for key, (here, there) in pairs.items():
        if here != there:
            raise UserError(
                f"{section}.{key} is {here}, but the teacher's is {there}; a student has the teacher's network"
            )
    if ours["dropout"]:
        raise UserError(f"{section}.network.dropout is {ours['dropout']}; students are trained with 0")


def build(config: Config, job: Job, data: Dataset) -> tuple[nn.Module, EDM]:
    """Return the student's network as it starts, its layers frozen, and the teacher.

    Raises: UserError if the teacher's weights are missing, damaged, of another configuration or of other images.
    """
    path, shape = folder_of("teacher") / "weights.safetensors", data.images.shape[1:]
    net, about = load_network(path, job.read("teacher"))
    classes = data.classes if config.conditional else 0
    if (tuple(about["image"]), about["classes"]) != (tuple(shape), classes):
        raise UserError(
            f"{path} is a teacher of images {tuple(about['image'])} in {about['classes']} classes, the data are "
            f"{tuple(shape)} in {classes}; train it again"
        )
    own = loop.build(config.network, config.seed, "weights", shape, classes)
    if config.student.start == "teacher":
        own.load_state_dict(net.state_dict())
    gdd.prepare(own, config.student.freeze)
    device = machine.device_of(job)
    return own.to(device), EDM(net, sigma_data=about["config"]["sigma_data"]).to(device)


def student(config: Model, net: nn.Module, sigma_data: float) -> gdd.GDD:
    """Return the generator that a U-Net is."""
    return gdd.GDD(
        net, sigma_data=sigma_data, sigma_min=config.student.sigma_min, sigmas=config.student.sigmas
    )


def about(teacher: EDM, shape: tuple[int, ...], classes: int, cost: Cost) -> dict[str, object]:
    """Return what is kept with a student's weights."""
    return {
        **loop.about(shape, classes, cost),
        "sigma_data": teacher.sigma_data,
        "parameters_trained": cost.parameters_trained,
        "train_flops_image": cost.train_flops_image,
    }


def table(config: Model, image: tuple[int, ...], classes: int) -> str:
    """Return which groups of layers are trained and which are frozen, as lines of text."""
    lines = [f"# {'group':<16}{'parameters':>12}{'share':>8}"]
    for row in gdd.table(on_meta(config, image, classes)):
        state = "trained" if row.trained else "frozen"
        lines.append(f"# {row.group:<16}{row.parameters:>12,}{row.share:>8.1%}  {state}")
    return "\n".join(lines)


def cost(config: Model, image: tuple[int, ...], classes: int, train_flops_image: int | None) -> Cost:
    """Return the cost of a student, counted on the meta device; its image is a whole one, of all its steps."""
    net = on_meta(config, image, classes)
    noise, label = inputs_on_meta(image, config.conditional)
    work = flops(lambda: student(config, net, 1.0).generate(noise, label))
    count = sum(p.numel() for p in net.parameters())
    return Cost(count, parameters(net), Work(work), train_flops_image)


def on_meta(config: Model, image: tuple[int, ...], classes: int) -> nn.Module:
    """Return the student's network on the meta device, its layers frozen.

    Raises: UserError if its sizes do not fit.
    """
    net = network_on_meta(config.network, image, classes if config.conditional else 0)
    gdd.prepare(net, config.student.freeze)
    return net
