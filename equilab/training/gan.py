"""Stage `gan@RUN`: the teacher turned into a generator of one step or a few by a GAN loss alone, GDD or GDD-I."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.config import Spec, UserError, digest
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, results
from equilab.data.images import load, to_float
from equilab.data.pairset import labels
from equilab.diffusion import losses
from equilab.metrics.counting import flops
from equilab.models import discriminators as networks
from equilab.models.checkpoint import checksum, load_network, load_tensors
from equilab.models.precond import EDM
from equilab.training import adversarial, loop, onestep
from equilab.training.classify import CLASSIFIERS
from equilab.training.onestep import Levels, counted, table

DISCRIMINATORS = {
    "features": "equilab.models.discriminators:FeatureDiscriminator",
    "stylegan2": "equilab.models.discriminators:StyleGAN2",
}
OWN = "study"  # the name of the feature network that the stage `features` trained


@dataclass(frozen=True)
class R1:
    """The penalty on the gradient at real images."""

    gamma: float  # against a loss that is a mean over samples: see equilab.training.adversarial.r1_weight for the published one
    interval: int  # updates from one to the next

    def __post_init__(self):
        if self.gamma < 0:
            raise ValueError(f"gamma must be >= 0, got {self.gamma}")
        adversarial.r1_weight(0, self.gamma, self.interval)


@dataclass(frozen=True)
class Adaptive:
    """How the probability of augmentation follows the discriminator's overfitting."""

    target: float  # of the mean sign of the logits of real images
    ramp_nimg: int  # images that it takes from 0 to 1

    def __post_init__(self):
        if self.ramp_nimg < 1:
            raise ValueError(f"ramp_nimg must be >= 1, got {self.ramp_nimg}")


@dataclass(frozen=True)
class Consistency:
    """A consistency loss beside the GAN's."""

    weight: float
    levels: Levels

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"weight must be > 0, got {self.weight}; set consistency to null for none")


@dataclass(frozen=True)
class Config(onestep.Config):
    """An entry of the params section `gan`.

    The losses do not depend on how a batch is split over devices and accumulation. Both discriminators do, as published: the
    heads over feature networks normalise over the micro-batch of a process, StyleGAN2's takes a deviation over it; and ADA
    follows each micro-batch. So `optimisation.micro_batch` and the number of processes are part of the training.
    """

    discriminator: Annotated[Spec, tuple(DISCRIMINATORS.items())]
    features: tuple[
        str, ...
    ]  # feature networks: "study", or those of equilab.models.discriminators; none for stylegan2
    discriminator_lr: float
    r1: R1 | None
    augment: Literal["none", "diffaugment", "ada"]
    adaptive: Adaptive | None  # of ada
    consistency: Consistency | None
    collapse: (
        float | None
    )  # the run stops when the discriminator's mean loss between two reports falls below this

    def __post_init__(self):
        super().__post_init__()
        if (self.discriminator.kind == "features") != bool(self.features):
            raise ValueError(
                "features must name networks for a discriminator over features, and be empty for stylegan2"
            )
        if (self.augment == "ada") != (self.adaptive is not None):
            raise ValueError("adaptive must be given for augment ada and be null elsewhere")
        if self.consistency is not None:
            onestep.check_levels(self.student, self.consistency.levels)
        if self.optimisation.compile and self.r1:
            raise ValueError(
                "optimisation.compile must be false with r1, which torch.compile cannot differentiate twice"
            )
        if not self.discriminator_lr > 0:
            raise ValueError(f"discriminator_lr must be > 0, got {self.discriminator_lr}")
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features names a network twice: {', '.join(self.features)}; give each once")
        for name in self.features:
            if name == "evaluator":
                raise ValueError(
                    "features names the evaluator, which scores the images: it would leak into the score; use study"
                )
            if name not in (OWN, *networks.NETWORKS):
                raise ValueError(
                    f"features: {name!r} is unknown, choose among {', '.join((OWN, *networks.NETWORKS))}"
                )


class Critic(nn.Module):
    """A discriminator behind its augmentation, whose probability it keeps, as training continues from it."""

    def __init__(self, discriminator: nn.Module, config: Config):
        super().__init__()
        self.discriminator, self.kind, self.adaptive = discriminator, config.augment, config.adaptive
        self.register_buffer("probability", torch.tensor(1.0 if config.augment == "diffaugment" else 0.0))

    def forward(self, image: Tensor, label: Tensor | None, draws: Tensor | None) -> tuple[Tensor, ...]:
        """Return the logits of images after augmentation."""
        if self.kind != "none":
            image = adversarial.augment(image, draws, self.probability)
        return self.discriminator(image, label)

    def adapt(self, real: tuple[Tensor, ...], nimg: int) -> None:
        """Move the probability by what the logits of `nimg` real images, those of all processes, tell."""
        if self.adaptive is not None:
            seen = (machine.total(adversarial.overfitting(real).detach().float()) / machine.world()).item()
            told = {"target": self.adaptive.target, "nimg": nimg, "ramp_nimg": self.adaptive.ramp_nimg}
            self.probability.fill_(adversarial.adapt(self.probability.item(), seen, **told))


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost.

    Raises: UserError if the student is not the study's teacher, or the discriminator cannot take the images.
    """
    onestep.check(config, job, read)
    players = _bare(config, job, read)  # refuses sizes that do not fit

    def count() -> Plan:
        about = {
            **counted(config, job.image, job.classes),
            "train_flops_image": step_flops(config, *players, job.image),
        }
        return loop.plan(config.optimisation, about)._replace(note=table(config, job.image, job.classes))

    return count


def run(config: Config, job: Job) -> None:
    """Train the student against a discriminator; write its averaged weights, snapshots and log.

    Raises: UserError if the data, the teacher or the feature network are missing, damaged or not of this study; or if
    the discriminator collapses.
    """
    onestep.check(config, job, job.read)
    data = load(results("data"), "train", verify=True)
    shape, seed, size = data.images.shape[1:], config.seed, config.optimisation.batch
    net, teacher = onestep.build(config, job, data)
    inputs = {
        "data": sha256_of(results("data") / "meta.json"),
        "teacher": sha256_of(results("teacher") / "weights.safetensors"),
    }
    if OWN in config.features:
        inputs["features"] = _refuse_leak()
    torch.manual_seed(rng.torch_seed(seed, "discriminator weights"))
    trained = lambda name: load_network(
        results("features") / "weights.safetensors", CLASSIFIERS, job.read("features")
    )[0]
    critic = critic_of(config, job.run, shape, data.classes, trained, pretrained=True).to(
        machine.device_of(job)
    )
    if set(config.features) - {OWN}:
        inputs["networks"] = checksum(critic.discriminator.networks.state_dict())
    if machine.rank() == 0:
        print(table(config, shape, data.classes))
    conditional = config.conditional

    def batch_of(positions: range):
        items = rng.batch(seed, "image order", positions.start, len(positions), len(data.images))
        image = to_float(torch.from_numpy(data.images[items]))
        label = torch.from_numpy(data.labels[items]) if conditional else None
        made = [
            _made(seed, player, positions, shape, data.classes if conditional else 0)
            for player in ("generator", "critic")
        ]
        augmented = ("generator", "critic", "real") if config.augment != "none" else ()
        draws = (
            tuple(adversarial.draws(seed, f"{name} augmentation", positions) for name in augmented)
            or (None,) * 3
        )
        weight = (
            adversarial.r1_weight(positions.start // size, config.r1.gamma, config.r1.interval)
            if config.r1
            else 0.0
        )
        along = None
        if config.consistency:
            noise = torch.from_numpy(rng.noise(seed, "consistency noise", positions, shape))
            along = (noise, config.consistency.levels.draw(seed, positions))
        return (image, label), *made, draws, weight, along

    generate, criticise = losses_of(config, net, critic, teacher)
    about = {
        "image": shape,
        "classes": data.classes if conditional else 0,
        "sigma_data": teacher.sigma_data,
        **counted(config, shape, data.classes),
        "train_flops_image": step_flops(config, *_bare(config, job, job.read), shape),
    }
    rival = ("discriminator", critic, config.discriminator_lr, criticise)
    loop.train(job, config, inputs, net, batch_of, generate, about, rival, lambda row: collapsed(config, row))


def _made(
    seed: int, player: str, positions: range, shape: tuple[int, ...], classes: int
) -> tuple[Tensor, Tensor | None]:
    """Return the noise and the labels of the images that are generated for a player, by position."""
    noise = torch.from_numpy(rng.noise(seed, f"{player} noise", positions, shape))
    return noise, labels(seed, positions, classes, f"{player} label")


def losses_of(config: Config, net: nn.Module, critic: Critic, teacher: EDM) -> tuple[loop.Loss, loop.Loss]:
    """Return the losses of generator and discriminator: of (real, made for either, draws, weight of R1, consistency).

    The features of real images are computed once in an update: R1 is taken of the logits that the loss is made of.
    """

    def generate(net, batch):
        (image, label), (noise, made_label), _, draws, _, along = batch
        student = onestep.student(config, net, teacher.sigma_data)
        value = adversarial.generator_loss(
            critic(student.generate(noise, made_label).image, made_label, draws[0])
        )
        if along is None:
            return value
        noise, sigmas = along
        matched = losses.consistency(student.denoise, teacher.denoise, image, noise, sigmas, label)
        return value + config.consistency.weight * matched

    def criticise(critic, batch):
        (image, label), _, (noise, made_label), draws, weight, _ = batch
        with torch.no_grad():
            made = onestep.student(config, net, teacher.sigma_data).generate(noise, made_label).image
        real = critic(image.requires_grad_(weight > 0), label, draws[2])
        value = adversarial.discriminator_loss(real, critic(made, made_label, draws[1]))
        critic.adapt(real, len(image) * machine.world())
        return (
            value + weight * adversarial.r1(real, image) if weight else value
        ), value  # the log shows the GAN's part

    return generate, criticise


def collapsed(config: Config, row: dict[str, int | float]) -> tuple[str, str] | None:
    """Return what to say, and what to do, of a discriminator whose loss has fallen below `collapse`: it tells all images
    apart."""
    if config.collapse is None or row["loss_discriminator"] >= config.collapse:
        return None
    return (
        f"the discriminator has collapsed (its loss is {row['loss_discriminator']:.3g}, below collapse: {config.collapse:g}, and the "
        "generator learns nothing)",
        "raise r1.gamma, lower discriminator_lr, or set collapse to null",
    )


def step_flops(config: Config, net: nn.Module, critic: Critic, image: tuple[int, ...]) -> int:
    """Return the FLOPs by shape of an update for an image, of both players: networks without memory; R1, which comes
    once in an interval, is left out."""
    size, critic = 2, copy.copy(critic)  # a batch norm needs two
    critic.adaptive = None  # no numbers here to adapt to
    with torch.device("meta"):
        made = torch.empty(size, *image), torch.zeros(size, dtype=torch.int64) if config.conditional else None
        levels = (
            (torch.empty(size, *image), (torch.empty(size), torch.empty(size)))
            if config.consistency
            else None
        )
        draws = (torch.empty(size, adversarial.DRAWS),) * 3
    batch = (made, made, made, draws, 0.0, levels)

    def update():
        for player, loss in zip((net, critic), losses_of(config, net, critic, EDM(net, sigma_data=1.0))):
            trained = [p for p in (*net.parameters(), *critic.parameters()) if p.requires_grad]
            own = {id(p) for p in player.parameters()}
            for p in trained:
                p.requires_grad_(id(p) in own)
            found = loss(player, batch)
            (found[0] if isinstance(found, tuple) else found).backward()
            for p in trained:
                p.requires_grad_()

    return flops(update) // size


def critic_of(
    config: Config,
    run: str,
    image: tuple[int, ...],
    classes: int,
    own: Callable[[str], nn.Module],
    pretrained: bool,
) -> Critic:
    """Return the discriminator with its augmentation; `own` gives the feature network that the study trained.

    Raises: UserError if it cannot take the images.
    """
    given = (tuple(image), classes if config.conditional else 0)
    try:
        if config.features:
            kinds = {OWN: lambda: networks.classifier_network(own(OWN))}
            found = [
                kinds.get(n, lambda n=n: networks.feature_network(n, pretrained=pretrained))()
                for n in config.features
            ]
            given = (found, *given)
        return Critic(config.discriminator.build(*given), config)
    except ValueError as error:
        raise UserError(f"gan.{run}.discriminator: {error}") from None


def _bare(config: Config, job: Job, read: Callable, known: dict = {}) -> tuple[nn.Module, Critic]:  # noqa: B006
    """Return both players without memory: the same ones for runs that have them alike, as building them takes seconds."""
    own = read("features").network if OWN in config.features else None

    def once(names: tuple[str, ...], build: Callable[[], nn.Module]) -> nn.Module:
        key = digest({name: getattr(config, name) for name in names}, own, job.image, job.classes)
        if key not in known:
            with torch.device("meta"):
                known[key] = build()
        return known[key]

    untrained = lambda name: own.build(job.image, job.classes)  # noqa: E731
    critic = lambda: critic_of(config, job.run, job.image, job.classes, untrained, pretrained=False)  # noqa: E731
    return (
        once(("network", "conditional", "student"), lambda: onestep.meta(config, job.image, job.classes)[0]),
        once(("conditional", "features", "discriminator", "augment", "adaptive"), critic),
    )


def _refuse_leak() -> str:
    """Return the checksum of the study's feature network.

    Raises: UserError if it is the evaluator.
    """
    path, evaluator = (results(stage) / "weights.safetensors" for stage in ("features", "evaluator"))
    weights = [load_tensors(one)[0] if one.exists() else {} for one in (path, evaluator)]
    if weights[0] and checksum(weights[0]) == checksum(weights[1]):
        raise UserError(
            f"{path} is the evaluator, which scores the images: it would leak into the score; run `features` again"
        )
    return sha256_of(path) if path.exists() else ""
