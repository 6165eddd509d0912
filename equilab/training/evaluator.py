"""Stage `evaluator`: the feature network by which generated images are scored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field, model_validator

from equilab.core.config import Params, UserError
from equilab.core.files import sha256_of, write, write_json
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import device_of, rank
from equilab.data.images import load
from equilab.metrics.fidelity import CACHE, SPLITS, Scorer
from equilab.models.checkpoint import save_tensors
from equilab.training import classify
from equilab.training.loop import Optimisation


class Config(Params):
    """The params section `evaluator`."""

    network: classify.Network | None  # null: torch-fidelity's Inception
    images: classify.Part | None  # training images that the classifier learns from; null with Inception
    samples: int = Field(ge=SPLITS, le=10_000_000)  # generated images in every comparison
    optimisation: Optimisation | None  # of the classifier; null with Inception

    @model_validator(mode="after")
    def _fits(self):
        given = {each is None for each in (self.network, self.images, self.optimisation)}
        if len(given) > 1:
            raise ValueError(
                "network, images and optimisation must all be given (a classifier) or all be null (Inception)"
            )
        return self


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost; Inception is not counted.

    Raises: UserError if the network's sizes do not fit.
    """
    return Plan if config.network is None else classify.plan(config, job)


def run(config: Config, job: Job) -> None:
    """Train the classifier on the study's training images; write its weights, its accuracy on the test images, the floor: the
    scores of real images, and what is trivial: the distances of a model that makes their mean, and nothing else.

    Raises: UserError if the data are missing, damaged, without labels or too few.
    """
    data = load(folder_of("data"), "train", verify=True)
    for split in ("train", "test"):
        count = len(load(folder_of("data"), split).images)
        if count < SPLITS:
            raise UserError(
                f"results/data has {count} {split} images, scores need {SPLITS} or more; give more in data (test, test_path)"
            )
    if config.network is None:
        save_tensors(job.out / "weights.safetensors", {}, {"network": "inception"})
        write(job.out / "log.csv", "nimg,loss,lr\n")
        summary = {"network": "inception", "inputs": {"data": sha256_of(folder_of("data") / "meta.json")}}
    else:
        summary = classify.train(config, job, data)
    if rank() != 0:
        return
    scorer = Scorer(job.out, folder_of("data"), CACHE, device_of(job), config)
    floor = scorer.floor(config.samples, job.study.seed)
    mean = np.round(data.images.mean(0)).astype(np.uint8)
    trivial = scorer.distances(np.repeat(mean[np.newaxis], SPLITS, axis=0))
    about = {"samples": config.samples, "floor": floor, "trivial": trivial}
    write_json(job.out / "summary.json", {**summary, **about})
    accuracy = summary.get("accuracy_test")
    network = "Inception's features" if accuracy is None else f"accuracy {accuracy:.1%} on held-out images"
    print(f"evaluator: {network}; the floor of scores is that of {config.samples:,} real images")
