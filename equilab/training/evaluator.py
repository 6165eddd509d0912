"""Stage `evaluator`: the feature network by which generated images are scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from equilab.core.config import Params, UserError, read_json
from equilab.core.files import publishing, sha256_of, write, write_json
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import device_of, rank
from equilab.data.images import load
from equilab.metrics.fidelity import CACHE, SPLITS, Scorer
from equilab.models.checkpoint import save_tensors
from equilab.training import classify
from equilab.training.optimisation import Optimisation


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
    """Train the classifier on the study's training images; write its weights and its summary.

    The summary has its accuracy on the test images; `floor`, the scores of real images; and `trivial`, the distances of a model
    that makes nothing but the mean training image.

    Raises: UserError if the data are missing, damaged, without labels or too few.
    """
    data = {split: load(folder_of("data"), split, verify=True) for split in ("train", "test")}
    for split, images in data.items():
        if (count := len(images.images)) < SPLITS:
            raise UserError(
                f"results/data has {count} {split} images, scores need {SPLITS} or more; give more in data (test, test_path)"
            )

    def floor(folder: Path) -> dict[str, Any]:
        scorer = Scorer(folder, folder_of("data"), CACHE, device_of(job), config)
        mean = np.round(data["train"].images.mean(0)).astype(np.uint8)
        trivial = scorer.distances(np.repeat(mean[np.newaxis], SPLITS, axis=0))
        found = scorer.floor(config.samples, job.study.seed)
        return {"samples": config.samples, "floor": found, "trivial": trivial}

    if config.network is not None:
        classify.train(config, job, data["train"], floor)
    elif rank() == 0:
        _write_inception(job, floor)
    if rank() == 0:
        accuracy = read_json(job.out / "summary.json").get("accuracy_test")
        network = (
            "Inception's features" if accuracy is None else f"accuracy {accuracy:.1%} on held-out images"
        )
        print(f"evaluator: {network}; the floor of scores is that of {config.samples:,} real images")


def _write_inception(job: Job, floor: Callable[[Path], dict[str, Any]]) -> None:
    """Write what the stage writes where there is nothing to train."""
    with publishing(job.out) as fresh:
        save_tensors(fresh / "weights.safetensors", {}, {"network": "inception"})
        write(fresh / "log.csv", "nimg,loss,lr\n")
        inputs = {"data": sha256_of(folder_of("data") / "meta.json")}
        write_json(fresh / "summary.json", {"network": "inception", "inputs": inputs, **floor(fresh)})
