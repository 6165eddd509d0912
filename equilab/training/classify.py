"""The classifiers that two stages train: `evaluator`, which scores images, and `features`, which a discriminator sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from equilab.core import rng
from equilab.core.config import Spec, UserError, choice
from equilab.core.files import sha256_of
from equilab.core.job import Job, Plan, folder_of
from equilab.data.images import Dataset, load, to_float
from equilab.metrics.counting import Cost, Work, flops, inputs_on_meta, network_on_meta, parameters
from equilab.models.checkpoint import load_network
from equilab.models.classifier import CLASSIFIERS
from equilab.training import trainer

BATCH = 1000  # test images through the network at once
Network = choice(lambda: CLASSIFIERS)  # of a field of params
# of the training images, in an order that the study's seed draws
Part = Literal["all", "first_half", "second_half"]


class Batch(NamedTuple):
    """What the loss needs."""

    image: Tensor  # (B, C, H, W)
    label: Tensor  # (B,)


def train(config: Any, job: Job, data: Dataset, finish: trainer.Finish | None = None) -> None:
    """Train the classifier of a stage's `network` and `optimisation`; its summary says its accuracy on the test images.

    Its weights and the order of its images are functions of the study's seed and the stage. `finish` is as of trainer.train.

    Raises: UserError if the data have no labels.
    """
    if data.labels is None:
        raise UserError(
            f"{job.stage}.network needs labels to train on and the data have none; set network and optimisation to null"
        )
    seed, shape, classes = job.study.seed, data.images.shape[1:], data.classes
    chosen = part_of(config.images, len(data.images), seed)
    net = trainer.build(config.network, seed, f"{job.stage} weights", shape, classes)

    def batch_of(positions: range) -> Batch:
        items = chosen[rng.batch(seed, f"{job.stage} order", positions.start, len(positions), len(chosen))]
        return Batch(to_float(torch.from_numpy(data.images[items])), torch.from_numpy(data.labels[items]))

    def scored(folder: Path) -> dict[str, Any]:
        trained, _ = load_network(folder / "weights.safetensors", config)
        accuracy = _accuracy(trained, load(folder_of("data"), "test", verify=True))
        found = {"network": config.network.kind, "accuracy_test": accuracy}
        return found if finish is None else found | finish(folder)

    about = trainer.about(shape, classes, cost(config.network, shape, classes))
    inputs = {"data": sha256_of(folder_of("data") / "meta.json")}
    trainer.train(job, config, inputs, net, batch_of, loss, about, finish=scored)


def part_of(part: Part, count: int, seed: int) -> Int64[np.ndarray, n]:
    """Return which of `count` training images a part holds. The halves are of a drawn order, so that both have all classes."""
    if part == "all":
        return np.arange(count)
    order = rng.generator(seed, "halves").permutation(count)
    return order[: count // 2] if part == "first_half" else order[count // 2 :]


def loss(net: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of the classes."""
    _, logits = net(batch.image)
    return cross_entropy(logits, batch.label)


@torch.inference_mode()
def _accuracy(net: nn.Module, data: Dataset) -> float:
    images = torch.from_numpy(to_float(data.images))
    found = torch.cat([net(part)[1].argmax(1) for part in images.split(BATCH)])
    return (found == torch.from_numpy(data.labels)).float().mean().item()


def plan(config: Any, job: Job) -> Callable[[], Plan]:
    """Check the classifier of a stage's `network` against the study; return what estimates the cost.

    Raises: UserError if its sizes do not fit.
    """
    network_on_meta(config.network, job.image, job.classes)  # refuses sizes that do not fit
    return lambda: trainer.plan(config.optimisation, cost(config.network, job.image, job.classes))


@functools.cache
def cost(network: Spec, image: tuple[int, ...], classes: int) -> Cost:
    """Return the cost of a classifier, counted on the meta device; its image is that of a call.

    Raises: UserError if its sizes do not fit.
    """
    net = network_on_meta(network, image, classes)
    batch = Batch(*inputs_on_meta(image, True))
    count = parameters(net)
    return Cost(
        count,
        count,
        Work(flops(lambda: net(batch.image))),
        flops(lambda: loss(net, batch).backward()),
    )
