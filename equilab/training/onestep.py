"""What the trainers of students share: the teacher's network as a generator of one step or a few, frozen in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.config import Params, UserError
from equilab.core.job import Job, Seed, folder_of
from equilab.data.images import Dataset
from equilab.diffusion import losses
from equilab.diffusion.schedules import edm_sigmas
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, parameters
from equilab.models import gdd
from equilab.models.checkpoint import load_network
from equilab.models.family import network
from equilab.models.feature_networks import Lpips
from equilab.models.precond import EDM
from equilab.training import trainer
from equilab.training.optimisation import Optimisation

LPIPS_SIDE = 224  # pixels to which images are resized, as published
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

    def draw(
        self, seed: int, positions: Sequence[int], first: int
    ) -> tuple[Float[Tensor, b], Float[Tensor, b]]:
        """Return the level of each position, T(first) or above, and the one below it, functions of (seed, position)."""
        sigmas = self.sigmas()
        count = self.steps + 1 - first
        index = torch.from_numpy(rng.integers(seed, "consistency level", positions, count)) + first  # (B,)
        return sigmas[index], sigmas[index - 1]


class ConsistencyLoss(Params):
    """How a student is made to agree with itself along the teacher's trajectories."""

    levels: Levels
    metric: Literal["squared", "lpips"]  # of images: squared error, or LPIPS at 224 pixels, as published
    form: Literal["text", "published"]  # the paper's table 5, or its code: losses.published_consistency

    @model_validator(mode="after")
    def _fits(self):
        if self.form == "published" and self.levels.steps < 2:
            raise ValueError(f"levels.steps is {self.levels.steps}; the form published needs 2 or more")
        return self

    @property
    def teacher_calls(self) -> int:
        """Evaluations of the teacher for a training image."""
        return losses.CONSISTENCY_CALLS[self.form]

    def draw(self, seed: int, positions: Sequence[int]) -> tuple[Float[Tensor, b], Float[Tensor, b]]:
        """Return the level of each position and the one below it, functions of (seed, position)."""
        return self.levels.draw(seed, positions, first=2 if self.form == "published" else 1)

    def distance(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the distance between images; on the meta device, LPIPS is without its weights.

        Raises: UserError if weights of LPIPS are missing and cannot be fetched.
        """
        if self.metric == "squared":
            return losses.l2
        try:
            with device:
                return Lpips(LPIPS_SIDE, pretrained=device.type != "meta")
        except ValueError as error:
            raise UserError(f"metric is lpips: {error}") from None

    def loss(
        self,
        student: Callable,
        teacher: Callable,
        image: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigmas: tuple[Float[Tensor, b], Float[Tensor, b]],
        label: Int64[Tensor, b] | None,
        distance: Callable,
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch at the levels drawn."""
        given = student, teacher, image, noise, sigmas, label, distance
        if self.form == "text":
            return losses.consistency(*given)
        return losses.published_consistency(*given, lowest=tuple(self.levels.sigmas()[:2].tolist()))


def check_levels(student: Student, levels: Levels) -> None:
    """Refuse consistency levels that do not end where the student is the identity, or begin where it is sampled.

    Raises: ValueError if they do not fit.
    """
    if (levels.sigma_min, levels.sigma_max) != (student.sigma_min, student.sigmas[0]):
        raise ValueError(
            f"levels go from {levels.sigma_max:g} to {levels.sigma_min:g}, but the student is sampled from "
            f"{student.sigmas[0]:g} and is the identity at {student.sigma_min:g}; give the same to both"
        )


def check_metric(loss: ConsistencyLoss, image: tuple[int, ...], place: str) -> None:
    """Refuse a distance that does not take the images.

    Raises: UserError naming the key, which is at `place`.
    """
    if loss.metric == "lpips" and image[0] != 3:
        raise UserError(f"{place}.metric is lpips, which takes 3 channels, not {image[0]}; set it to squared")


class OfTeacher(trainer.Model):
    """What sampling needs to know of any student of the teacher."""

    network: Network  # the teacher's
    conditional: bool  # as the teacher


class Trained(OfTeacher):
    """What the entries of all students of the teacher share."""

    seed: Seed  # of this run: the order of its images, what it draws
    optimisation: Optimisation


class Model(OfTeacher):
    """What sampling needs to know of a generator of few steps."""

    student: Student


class Config(Trained, Model):
    """What the entries of the params sections `gan` and `consistency` share."""


def check(config: Trained, job: Job) -> None:
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
    own, teacher = networks(config, job, data, folder_of("teacher"), job.read("teacher"))
    if config.student.start == "random":
        own = untrained(config, data).to(machine.device_of(job))
    gdd.prepare(own, config.student.freeze)
    return own, teacher


def networks(
    config: Trained, job: Job, data: Dataset, folder: Path, trained: Params
) -> tuple[nn.Module, EDM]:
    """Return a student's network with its teacher's weights, and the teacher, which was trained as `trained` says.

    Raises: UserError if the weights in the folder are missing, damaged, of another configuration or of other images.
    """
    path, shape = folder / "weights.safetensors", tuple(data.images.shape[1:])
    net, about = load_network(path, trained)
    classes = config.classes_of(data.classes)
    if (tuple(about["image"]), about["classes"]) != (shape, classes):
        raise UserError(
            f"{path} is a teacher of images {tuple(about['image'])} in {about['classes']} classes, the data are "
            f"{shape} in {classes}; train it again"
        )
    own, device = untrained(config, data), machine.device_of(job)
    own.load_state_dict(net.state_dict())
    return own.to(device), EDM(net, sigma_data=job.read("teacher").sigma_data).to(device)


def untrained(config: Trained, data: Dataset) -> nn.Module:
    """Return a student's network as it is drawn by its seed."""
    classes = config.classes_of(data.classes)
    return trainer.build(config.network, config.seed, "weights", data.images.shape[1:], classes)


def student(config: Model, net: nn.Module, sigma_data: float) -> gdd.GDD:
    """Return the generator that a U-Net is."""
    return gdd.GDD(
        net, sigma_data=sigma_data, sigma_min=config.student.sigma_min, sigmas=config.student.sigmas
    )


def about(teacher: EDM, shape: tuple[int, ...], classes: int, cost: Cost) -> dict[str, object]:
    """Return what is kept with a student's weights."""
    return {
        **trainer.about(shape, classes, cost),
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
    net = config.on_meta(image, classes)
    gdd.prepare(net, config.student.freeze)
    return net
