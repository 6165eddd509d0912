"""Stage `gan@RUN`: the teacher turned into a generator of one step or a few by a GAN loss alone, GDD or GDD-I."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from equilab.core import machine, rng
from equilab.core.config import Params, Spec, UserError, choice
from equilab.core.files import sha256_of
from equilab.core.job import Distinct, Job, Plan, folder_of
from equilab.data.images import Dataset, load
from equilab.data.pairset import labels
from equilab.metrics.counting import Cost, flops, inputs_on_meta
from equilab.models.checkpoint import checksum, load_network
from equilab.models.classifier import Classifier
from equilab.models.discriminators import FeatureDiscriminator, StyleGAN2
from equilab.models.feature_networks import NETWORKS, FeatureNetwork, classifier_network, feature_network
from equilab.models.precond import EDM
from equilab.training import adversarial, loop, onestep, trainer
from equilab.training.adversarial import Adaptive, AugmentedDiscriminator
from equilab.training.loop import Adversary, Halt, Lazy, Logged
from equilab.training.onestep import ConsistencyLoss
from equilab.training.optimisation import LearningRate

STUDY_FEATURES = "study"  # the name of the feature network that the stage `features` trains
Discriminator = choice(lambda: {"features": FeatureDiscriminator, "stylegan2": StyleGAN2})


class R1(Params):
    """The penalty on the gradient at real images.

    "joint" adds it to the discriminator's loss at every `interval`-th update, from the first one on. "published" moves the
    discriminator by it alone, in an update of its own after every `interval`-th but the first, at real images without
    augmentation; of all its updates, the rate is interval / (interval + 1) times as large, and the betas have that exponent.

    Source: the published code of GDD (Zheng 2024), after StyleGAN2 (Karras 2020), appendix B, "Lazy regularization".
    """

    gamma: float = Field(ge=0, le=1e6)
    interval: int = Field(ge=1, le=10**6)  # updates from one to the next
    form: Literal["joint", "published"]
    # images that the loss sums over against which gamma is set: the published code those of a device, in the paper 32;
    # 1 for a mean, as our losses are
    samples: int = Field(ge=1, le=10**6)


class Consistency(ConsistencyLoss):
    """A consistency loss beside the GAN's."""

    weight: float = Field(ge=1e-6, le=1e6)


class Model(onestep.Model):
    """What sampling needs to know of a generator of this stage."""

    stage = "gan"


class Config(onestep.Config, Model):
    """An entry of the params section `gan`.

    The losses do not depend on how a batch is split over devices and accumulation. Both discriminators do, as published: the
    heads over feature networks normalise over the micro-batch of a process, StyleGAN2's takes a deviation over it; and ADA
    follows each micro-batch. So `optimisation.micro_batch` and the number of processes are part of the training.
    """

    discriminator: Discriminator
    # feature networks: "study", or those of equilab.models.feature_networks
    features: Annotated[tuple[str, ...], Distinct]
    discriminator_lr: LearningRate
    r1: R1 | None
    augment: Literal["none", "diffaugment", "ada"]
    adaptive: Adaptive | None  # of ada
    consistency: Consistency | None
    # the run stops when the discriminator's mean loss between two reports falls below this
    collapse: Annotated[float, Field(gt=0, le=100)] | None

    @model_validator(mode="after")
    def _fits(self):
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
        known = [STUDY_FEATURES, *NETWORKS]
        for name in self.features:
            if name == "evaluator":
                raise ValueError(
                    "features names the evaluator, which scores the images: it would leak into the score; use study"
                )
            if name not in known:
                raise ValueError(f"features: {name!r} is unknown, choose among {', '.join(known)}")
        return self


class Fake(NamedTuple):
    """What images are generated from."""

    noise: Tensor  # (B, C, H, W)
    label: Tensor | None  # (B,)
    draws: Tensor | None = None  # (B, 10) for their augmentation; None without augmentation


class Batch(NamedTuple):
    """What both losses need: real images, what images are generated from, and what else is random."""

    real: Tensor  # (B, C, H, W)
    label: Tensor | None  # (B,) of the real images
    of_generator: Fake  # the images that the generator's loss is of
    of_discriminator: Fake  # those that the discriminator's loss is of
    draws: Tensor | None = None  # (B, 10) for the augmentation of real images
    r1_weight: float = 0.0  # of R1 in the discriminator's loss
    consistency_noise: Tensor | None = None  # (B, C, H, W); None without consistency loss
    consistency_sigmas: tuple[Tensor, Tensor] | None = None  # (B,) each, a noise level and the one below it


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost.

    Raises: UserError if the student is not the study's teacher, or the discriminator cannot take the images.
    """
    onestep.check(config, job)
    onestep.on_meta(config, job.image, job.classes)  # refuses sizes that do not fit
    if config.consistency:
        onestep.check_metric(config.consistency, job.image, f"gan.{job.run}.consistency")
    features = _study_features(config, job)
    try:
        _discriminator_on_meta(config, features, job.image, job.classes)  # refuses what does not fit
    except ValueError as error:
        raise UserError(f"gan.{job.run}.features: {error}") from None

    def estimate() -> Plan:
        counted = cost(config, job.image, job.classes, features)
        frozen = onestep.table(config, job.image, job.classes)
        calls = config.consistency.teacher_calls if config.consistency else 0
        return trainer.plan(config.optimisation, counted, frozen, calls)

    return estimate


def _study_features(config: Config, job: Job) -> Spec | None:
    """Return what builds the feature network that the study trains, if the run's discriminator sees it.

    Raises: UserError if it is of the evaluator's kind, or learns from images that the evaluator learns from: what the
        discriminator then knows of the score would leak into the images.
    """
    if STUDY_FEATURES not in config.features:
        return None
    features, evaluator = job.read("features"), job.read("evaluator")
    if evaluator.network is None:  # Inception, which learned from other images
        return features.network
    if features.network.kind == evaluator.network.kind:
        raise UserError(
            f"features.network.kind is {features.network.kind}, as the evaluator's, so that the discriminator would see "
            "what scores the images; give another kind"
        )
    if {features.images, evaluator.images} != {"first_half", "second_half"}:
        raise UserError(
            f"features.images is {features.images} and evaluator.images {evaluator.images}, so that they learn from the same "
            "images; give first_half to one and second_half to the other"
        )
    return features.network


def run(config: Config, job: Job) -> None:
    """Train the student against a discriminator; write its averaged weights, snapshots and log.

    Raises: UserError if the data, the teacher or the feature network are missing, damaged or not of this study; or if
    the discriminator collapses.
    """
    plan(config, job)
    data = load(folder_of("data"), "train", verify=True)
    shape = data.images.shape[1:]
    net, teacher = onestep.build(config, job, data)
    inputs = {
        "data": sha256_of(folder_of("data") / "meta.json"),
        "teacher": sha256_of(folder_of("teacher") / "weights.safetensors"),
    }
    torch.manual_seed(rng.torch_seed(config.seed, "discriminator weights"))
    classifier = None
    if STUDY_FEATURES in config.features:
        weights = folder_of("features") / "weights.safetensors"
        classifier, _ = load_network(weights, job.read("features"))
        inputs["features"] = sha256_of(weights)
    try:
        networks = feature_networks(config.features, classifier, pretrained=True)
    except ValueError as error:
        raise UserError(f"gan.{job.run}.features: {error}") from None
    discriminator = build_discriminator(config, networks, shape, data.classes).to(machine.device_of(job))
    if set(config.features) - {STUDY_FEATURES}:
        inputs["networks"] = checksum(discriminator.discriminator.networks.state_dict())
    if machine.rank() == 0:
        print(onestep.table(config, shape, data.classes))
    counted = cost(config, shape, data.classes, _study_features(config, job))
    about = onestep.about(teacher, shape, config.classes_of(data.classes), counted)
    trainer.train(
        job,
        config,
        inputs,
        net,
        functools.partial(batch_of, config, data),
        generator_loss_of(config, discriminator, teacher),
        about,
        adversary_of(config, net, teacher, discriminator),
        functools.partial(collapsed, config),
    )


def feature_networks(
    names: Sequence[str], classifier: Classifier | None, pretrained: bool
) -> list[FeatureNetwork]:
    """Return what the discriminator looks through: networks of ImageNet, and the study's `classifier`.

    Raises: ValueError if the weights of one cannot be had.
    """
    networks = []
    for name in names:
        if name == STUDY_FEATURES:
            networks.append(classifier_network(classifier))
        else:
            networks.append(feature_network(name, pretrained=pretrained))
    return networks


def build_discriminator(
    config: Config, networks: Sequence[FeatureNetwork], image: tuple[int, ...], classes: int
) -> AugmentedDiscriminator:
    """Return the discriminator over these feature networks, with its augmentation; without any, one that sees images.

    Raises: UserError if it cannot take the images.
    """
    given = image, config.classes_of(classes)
    if networks:
        given = networks, *given
    return AugmentedDiscriminator(config.discriminator.build(*given), config.augment, config.adaptive)


def _discriminator_on_meta(
    config: Config, features: Spec | None, image: tuple[int, ...], classes: int
) -> AugmentedDiscriminator:
    """Return the discriminator on the meta device, where there are no numbers that its augmentation could adapt to."""
    networks = _networks_on_meta(config.features, features, image)
    with torch.device("meta"):
        return build_discriminator(config.model_copy(update={"adaptive": None}), networks, image, classes)


@functools.cache
def _networks_on_meta(
    names: tuple[str, ...], features: Spec | None, image: tuple[int, ...]
) -> list[FeatureNetwork]:
    """Return feature networks on the meta device; kept, as large ones take seconds to build."""
    with torch.device("meta"):
        classifier = features.build(image, 2) if features else None  # its logits, one a class, are not seen
        return feature_networks(names, classifier, pretrained=False)


def batch_of(config: Config, data: Dataset, positions: range) -> Batch:
    """Return the batch at these positions; all that is random in it is a function of (seed, position)."""
    seed, shape, classes = config.seed, data.images.shape[1:], config.classes_of(data.classes)

    def draws(purpose: str) -> Tensor | None:
        if config.augment == "none":
            return None
        return adversarial.draws(seed, f"{purpose} augmentation", positions)

    def fake(purpose: str) -> Fake:
        noise = torch.from_numpy(rng.noise(seed, f"{purpose} noise", positions, shape))
        label = labels(seed, positions, classes, f"{purpose} label", data.label_counts)
        return Fake(noise, label, draws(purpose))

    real, label = trainer.images_at(config, data, seed, "image order", positions)
    # "critic" is the discriminator; renaming a purpose would draw other numbers
    batch = Batch(real, label, fake("generator"), fake("critic"), draws("real"))
    if config.r1 and config.r1.form == "joint":
        update = positions.start // config.optimisation.batch
        if update % config.r1.interval == 0:
            batch = batch._replace(r1_weight=_r1_weight(config.r1))
    if config.consistency:
        noise = torch.from_numpy(rng.noise(seed, "consistency noise", positions, shape))
        sigmas = config.consistency.draw(seed, positions)
        batch = batch._replace(consistency_noise=noise, consistency_sigmas=sigmas)
    return batch


def generator_loss_of(config: Config, discriminator: AugmentedDiscriminator, teacher: EDM) -> loop.Loss:
    """Return loss(net, batch) of the generator that `net` is: the GAN's, and a consistency loss if the run has one.

    Raises: UserError if that is by LPIPS, whose weights are missing and cannot be fetched.
    """
    if config.consistency:
        distance = config.consistency.distance(next(discriminator.parameters()).device)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        student = onestep.student(config, net, teacher.sigma_data)
        noise, label, draws = batch.of_generator
        fake = student.generate(noise, label).image
        value = adversarial.generator_loss(discriminator(fake, label, draws))
        if config.consistency is None:
            return value
        consistency = config.consistency.loss(
            student.denoise,
            teacher.denoise,
            batch.real,
            batch.consistency_noise,
            batch.consistency_sigmas,
            batch.label,
            distance,
        )
        return value + config.consistency.weight * consistency

    return loss


def adversary_of(
    config: Config, net: nn.Module, teacher: EDM, discriminator: AugmentedDiscriminator
) -> Adversary:
    """Return the discriminator as the adversary of the generator that `net` is, with its rate, losses and betas."""
    lr, betas, lazy = config.discriminator_lr, config.optimisation.betas, None
    if config.r1 and config.r1.form == "published":
        share = config.r1.interval / (config.r1.interval + 1)
        lr, betas = share * lr, tuple(beta**share for beta in betas)
        lazy = Lazy(r1_loss_of(config), config.r1.interval)
    loss = discriminator_loss_of(config, net, teacher)
    return Adversary("discriminator", discriminator, lr, loss, betas, lazy)


def r1_loss_of(config: Config) -> loop.Loss:
    """Return loss(discriminator, batch) of an update by R1 alone, at real images without augmentation."""
    weight = _r1_weight(config.r1)

    def loss(discriminator: AugmentedDiscriminator, batch: Batch) -> Tensor:
        image = batch.real.detach().requires_grad_()
        return weight * adversarial.r1(discriminator.discriminator(image, batch.label), image)

    return loss


def _r1_weight(settings: R1) -> float:
    return adversarial.r1_weight(settings.gamma, settings.interval, settings.samples)


def discriminator_loss_of(config: Config, net: nn.Module, teacher: EDM) -> loop.Loss:
    """Return loss(discriminator, batch) against the generator that `net` is: the GAN's, which the log shows, and joint R1.

    The features of real images are computed once in an update: joint R1 is taken of the logits that the loss is made of.
    """

    def loss(discriminator: AugmentedDiscriminator, batch: Batch) -> Logged:
        noise, label, draws = batch.of_discriminator
        with torch.no_grad():
            fake = onestep.student(config, net, teacher.sigma_data).generate(noise, label).image
        image = batch.real.requires_grad_(batch.r1_weight > 0)
        real = discriminator(image, batch.label, batch.draws)
        value = adversarial.discriminator_loss(real, discriminator(fake, label, draws))
        discriminator.adapt(real, len(image) * machine.world())
        if not batch.r1_weight:
            return Logged(value, value)
        return Logged(value + batch.r1_weight * adversarial.r1(real, image), value)

    return loss


def collapsed(config: Config, row: loop.Row) -> Halt | None:
    """Return why to stop if the discriminator's loss has fallen below `collapse`: it tells all images apart."""
    found = row["loss_discriminator"]
    if config.collapse is None or found >= config.collapse:
        return None
    return Halt(
        f"the discriminator has collapsed (its loss is {found:.3g}, below collapse: {config.collapse:g}, "
        "and the generator learns nothing)",
        "raise r1.gamma, lower discriminator_lr, or set collapse to null",
    )


@trainer.counted_once
def cost(config: Model, image: tuple[int, ...], classes: int, features: Spec | None = None) -> Cost:
    """Return the cost of the student, counted on the meta device; an update is one of generator and discriminator.

    R1, which comes once in an interval, is left out. `features` builds the feature network that the study trains; where the
    discriminator sees that network and it is not given, updates are not counted.
    """
    if not isinstance(config, Config) or (STUDY_FEATURES in config.features and features is None):
        return onestep.cost(config, image, classes, None)
    return onestep.cost(config, image, classes, _update_flops(config, image, classes, features))


def _update_flops(config: Config, image: tuple[int, ...], classes: int, features: Spec | None) -> int:
    """Return the FLOPs of an update for an image."""
    size = 2  # a batch norm needs two images
    net = onestep.on_meta(config, image, classes)
    discriminator = _discriminator_on_meta(config, features, image, classes)
    x, label = inputs_on_meta(image, config.conditional, size)
    draws, sigma = torch.empty(size, adversarial.DRAWS, device="meta"), torch.empty(size, device="meta")
    fake = Fake(x, label, draws)
    batch = Batch(x, label, fake, fake, draws, consistency_noise=x, consistency_sigmas=(sigma, sigma))
    teacher = EDM(net, sigma_data=1.0)
    generator_loss = generator_loss_of(config, discriminator, teacher)
    discriminator_loss = discriminator_loss_of(config, net, teacher)

    def update() -> None:
        trained = [p for p in discriminator.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        generator_loss(net, batch).backward()
        for parameter in trained:
            parameter.requires_grad_()
        discriminator_loss(discriminator, batch).loss.backward()

    return flops(update) // size
