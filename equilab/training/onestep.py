"""What the trainers of students share: the teacher's network as a generator of one step or a few, frozen in part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.config import Spec, UserError
from equilab.core.job import Job, results
from equilab.data.images import Dataset
from equilab.diffusion.schedules import edm_sigmas
from equilab.metrics.counting import counted_once, flops, parameters
from equilab.models import gdd
from equilab.models.checkpoint import load_network
from equilab.models.precond import EDM
from equilab.training import loop
from equilab.training.loop import Optimisation

UNETS = {"unet": "equilab.models.unet:UNet"}


@dataclass(frozen=True)
class Student:
    """How the teacher's network becomes the student."""

    start: Literal["teacher", "random"]  # its weights
    freeze: Literal[tuple(gdd.VARIANTS)]  # which layers are not trained: a row of GDD's table 2
    sigma_min: float  # where the consistency function is the identity
    sigmas: tuple[float, ...]  # noise levels that it steps through, falling; one: a one-step generator

    def __post_init__(self):
        gdd.check_levels(self.sigma_min, self.sigmas)


@dataclass(frozen=True)
class Levels:
    """The noise levels between which a consistency loss compares, `steps` apart from sigma_max to sigma_min."""

    steps: int
    sigma_min: float
    sigma_max: float
    rho: float

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        self.sigmas()

    def sigmas(self) -> Tensor:
        """Return T(0), ..., T(steps), rising, float32. Source: GDD (Zheng 2024), equation (5)."""
        levels = edm_sigmas(self.steps + 1, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        return levels[:-1].flip(0).float()

    def draw(self, seed: int, positions: range) -> tuple[Tensor, Tensor]:
        """Return the level of each position and the one below it, functions of (seed, position)."""
        sigmas, index = (
            self.sigmas(),
            torch.from_numpy(rng.integers(seed, "consistency level", positions, self.steps)),
        )
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


@dataclass(frozen=True)
class Config:
    """What the entries of the params sections `gan` and `consistency` share."""

    network: Annotated[Spec, tuple(UNETS.items())]  # the teacher's
    conditional: bool  # as the teacher
    student: Student
    seed: int  # of this run: the order of its images, what it draws
    optimisation: Optimisation

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


def check(config: Config, job: Job, read: Callable) -> None:
    """Refuse a student that is not the study's teacher.

    Raises: UserError naming the key that differs.
    """
    teacher, place = read("teacher"), f"{job.stage}.{job.run}"
    for key, here, there in (
        *(
            (f"network.{k}", config.network.arguments[k], v)
            for k, v in teacher.network.arguments.items()
            if k != "dropout"
        ),
        ("conditional", config.conditional, teacher.conditional),
    ):
        if here != there:
            raise UserError(
                f"{place}.{key} is {here}, but the teacher's is {there}; a student has the teacher's network"
            )
    if config.network.arguments["dropout"]:
        raise UserError(
            f"{place}.network.dropout is {config.network.arguments['dropout']}; students are trained with 0"
        )


def build(config: Config, job: Job, data: Dataset) -> tuple[nn.Module, EDM]:
    """Return the student's network as it starts, its layers frozen, and the teacher.

    Raises: UserError if the teacher's weights are missing, damaged, of another configuration or of other images.
    """
    path, shape = results("teacher") / "weights.safetensors", data.images.shape[1:]
    net, about = load_network(path, UNETS, job.read("teacher"))
    classes = data.classes if config.conditional else 0
    if (tuple(about["image"]), about["classes"]) != (tuple(shape), classes):
        raise UserError(
            f"{path} is a teacher of images {tuple(about['image'])} in {about['classes']} classes, the data are "
            f"{tuple(shape)} in {classes}; train it again"
        )
    sigma_data = about["config"]["sigma_data"]
    own = loop.build(config.network, config.seed, "weights", shape, classes)
    if config.student.start == "teacher":
        own.load_state_dict(net.state_dict())
    gdd.prepare(own, config.student.freeze)
    device = machine.device_of(job)
    return own.to(device), EDM(net, sigma_data=sigma_data).to(device)


def student(config: Config, net: nn.Module, sigma_data: float) -> gdd.GDD:
    """Return the generator that a U-Net is."""
    return gdd.GDD(
        net, sigma_data=sigma_data, sigma_min=config.student.sigma_min, sigmas=config.student.sigmas
    )


def table(config: Config, image: tuple[int, ...], classes: int) -> str:
    """Return which groups of layers are trained and which are frozen, as lines of text."""
    net, *_ = meta(config, image, classes)
    rows = [("group", "parameters", "share", "")]
    rows += [
        (s.group, f"{s.parameters:,}", f"{s.share:.1%}", "trained" if s.trained else "frozen")
        for s in gdd.table(net)
    ]
    return "\n".join(
        f"# {group:<16}{count:>12}{share:>8}  {state}".rstrip() for group, count, share, state in rows
    )


@counted_once
def counted(config: Config, image: tuple[int, ...], classes: int) -> dict[str, int]:
    """Return the parameters, those that are trained, and the FLOPs of generating an image by shape."""
    net, noise, label = meta(config, image, classes)
    work = flops(lambda: student(config, net, 1.0).generate(noise, label))
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "parameters_trained": parameters(net),
        "flops_image": work,
    }


def meta(config: Config, image: tuple[int, ...], classes: int):
    """Return the student's network, without memory, and what it generates an image from."""
    with torch.device("meta"):
        net = config.network.build(image, classes if config.conditional else 0)
        gdd.prepare(net, config.student.freeze)
        label = torch.zeros(1, dtype=torch.int64) if config.conditional else None
        return net, torch.empty(1, *image), label
