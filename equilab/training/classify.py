"""The classifier that two stages train: `evaluator`, which scores images, and `features`, which a discriminator sees."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from equilab.core import rng
from equilab.core.config import UserError, read_json
from equilab.core.files import sha256_of
from equilab.core.job import Job, results
from equilab.data.images import Dataset, load, to_float
from equilab.metrics.counting import counted_once, flops, parameters
from equilab.models.checkpoint import load_network
from equilab.training import loop

CLASSIFIERS = {"classifier": "equilab.models.classifier:Classifier"}


def train(config: Any, job: Job, data: Dataset) -> dict[str, Any]:
    """Train the classifier of a stage's `network` and `optimisation`; return its summary with its accuracy on the test images.

    Its weights and the order of its images are functions of the study's seed and the stage.

    Raises: UserError if the data have no labels.
    """
    if data.labels is None:
        raise UserError(
            f"{job.stage}.network needs labels to train on and the data have none; set network and optimisation to null"
        )
    seed, shape = job.study.seed, data.images.shape[1:]
    net = loop.build(config.network, seed, f"{job.stage} weights", shape, data.classes)

    def batch_of(positions: range):
        items = rng.batch(seed, f"{job.stage} order", positions.start, len(positions), len(data.images))
        return to_float(torch.from_numpy(data.images[items])), torch.from_numpy(data.labels[items])

    def loss(net, batch):
        return cross_entropy(net(batch[0])[1], batch[1])

    about = {"image": shape, "classes": data.classes, **counted(config, shape, data.classes)}
    loop.train(job, config, {"data": sha256_of(results("data") / "meta.json")}, net, batch_of, loss, about)
    net, _ = load_network(job.out / "weights.safetensors", CLASSIFIERS)
    test = load(results("data"), "test")
    with torch.inference_mode():
        found = torch.cat(
            [net(image)[1].argmax(1) for image in torch.from_numpy(to_float(test.images)).split(1000)]
        )
    accuracy = (found == torch.from_numpy(test.labels)).float().mean().item()
    return {**read_json(job.out / "summary.json"), "network": "classifier", "accuracy_test": accuracy}


@counted_once
def counted(config: Any, image: tuple[int, ...], classes: int) -> dict[str, int]:
    """Return the parameters, and the FLOPs for an image by shape, without building the network in memory."""
    net = meta(config, image, classes)
    with torch.device("meta"):
        return {"parameters": parameters(net), "flops_image": flops(lambda: net(torch.empty(1, *image)))}


def meta(config: Any, image: tuple[int, ...], classes: int):
    """Return the classifier without memory."""
    with torch.device("meta"):
        return config.network.build(image, classes)
