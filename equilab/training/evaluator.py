"""Stage `evaluator`: the feature network by which generated images are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn.functional import cross_entropy

from equilab import rng
from equilab.config import Job, Plan, Spec, UserError, read_json, results
from equilab.data import Dataset, load, to_float
from equilab.files import sha256_of, write, write_json
from equilab.metrics.cost import counted_once, flops, parameters
from equilab.metrics.fidelity import CACHE, CLASSIFIERS, Scorer
from equilab.training import loop
from equilab.training.loop import Optimisation, device_of, rank
from equilab.training.state import load_network, save_tensors


@dataclass(frozen=True)
class Config:
    """The params section `evaluator`."""

    network: Annotated[Spec, tuple(CLASSIFIERS.items())] | None  # null: torch-fidelity's Inception
    samples: int  # generated images in every comparison
    optimisation: Optimisation | None  # of the classifier; null with Inception

    def __post_init__(self):
        if (self.network is None) != (self.optimisation is None):
            raise ValueError("network and optimisation must both be given (a classifier) or both be null (Inception)")
        if self.samples < 10:
            raise ValueError(f"samples must be >= 10, got {self.samples}")


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost; Inception is not counted."""
    if config.network is None:
        return Plan
    _meta(config, job.image, job.classes)  # refuses sizes that do not fit
    return lambda: loop.plan(config.optimisation, counted(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the classifier on the study's training images; write its weights, its accuracy on the test images, and
    the floor: the scores of real images.

    Raises: UserError if the data are missing, damaged or without labels.
    """
    data = load(results("data"), "train", verify=True)
    if config.network is None:
        save_tensors(job.out / "weights.safetensors", {}, {"network": "inception"})
        write(job.out / "log.csv", "nimg,loss,lr\n")
        summary = {"network": "inception"}
    else:
        summary = _train(config, job, data)
    if rank() != 0:
        return
    scorer = Scorer(job.out, results("data"), CACHE, device_of(job))
    floor = scorer.floor(config.samples, job.study.seed)
    write_json(job.out / "summary.json", {**summary, "samples": config.samples, "floor": floor})


def _train(config: Config, job: Job, data: Dataset) -> dict:
    """Train the classifier; return its summary with its accuracy on the test images."""
    if data.labels is None:
        raise UserError("evaluator.network needs labels to train on and the data have none; set network and optimisation to null")
    seed, shape = job.study.seed, data.images.shape[1:]
    net = loop.build(config.network, seed, "evaluator weights", shape, data.classes)

    def batch_of(positions: range):
        items = rng.batch(seed, "evaluator order", positions.start, len(positions), len(data.images))
        return to_float(torch.from_numpy(data.images[items])), torch.from_numpy(data.labels[items])

    def loss(net, batch):
        return cross_entropy(net(batch[0])[1], batch[1])

    about = {"image": shape, "classes": data.classes, **counted(config, shape, data.classes)}
    loop.train(job, config, {"data": sha256_of(results("data") / "meta.json")}, net, batch_of, loss, about)
    net, _ = load_network(job.out / "weights.safetensors", CLASSIFIERS)
    test = load(results("data"), "test")
    with torch.inference_mode():
        found = torch.cat([net(image)[1].argmax(1) for image in torch.from_numpy(to_float(test.images)).split(1000)])
    summary = read_json(job.out / "summary.json")
    accuracy = (found == torch.from_numpy(test.labels)).float().mean().item()
    return {**summary, "network": "classifier", "accuracy_test": accuracy}


@counted_once
def counted(config: Config, image: tuple[int, ...], classes: int) -> dict[str, int]:
    """Return the parameters, and the FLOPs for an image by shape, without building the network in memory."""
    net, given = _meta(config, image, classes)
    return {"parameters": parameters(net), "flops_image": flops(lambda: net(given))}


def _meta(config: Config, image: tuple[int, ...], classes: int):
    with torch.device("meta"):
        return config.network.build(image, classes), torch.empty(1, *image)
