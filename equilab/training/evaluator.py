"""Stage `evaluator`: the feature network by which generated images are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from equilab.core.config import Spec, UserError
from equilab.core.files import write, write_json
from equilab.core.job import Job, Plan, results
from equilab.core.machine import device_of, rank
from equilab.data.images import load
from equilab.metrics.fidelity import CACHE, SPLITS, Scorer
from equilab.models.checkpoint import save_tensors
from equilab.training import classify, loop
from equilab.training.classify import CLASSIFIERS
from equilab.training.loop import Optimisation

MOST = 10_000_000  # samples, within reason


@dataclass(frozen=True)
class Config:
    """The params section `evaluator`."""

    network: Annotated[Spec, tuple(CLASSIFIERS.items())] | None  # null: torch-fidelity's Inception
    samples: int  # generated images in every comparison
    optimisation: Optimisation | None  # of the classifier; null with Inception

    def __post_init__(self):
        if (self.network is None) != (self.optimisation is None):
            raise ValueError(
                "network and optimisation must both be given (a classifier) or both be null (Inception)"
            )
        if not SPLITS <= self.samples <= MOST:
            raise ValueError(f"samples must be {SPLITS} to {MOST:,}, got {self.samples}")


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost; Inception is not counted."""
    if config.network is None:
        return Plan
    classify.meta(config, job.image, job.classes)  # refuses sizes that do not fit
    return lambda: loop.plan(config.optimisation, classify.counted(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the classifier on the study's training images; write its weights, its accuracy on the test images, and
    the floor: the scores of real images.

    Raises: UserError if the data are missing, damaged, without labels or too few.
    """
    data = load(results("data"), "train", verify=True)
    for split in ("train", "test"):
        if (count := len(load(results("data"), split).images)) < SPLITS:
            raise UserError(
                f"results/data has {count} {split} images, scores need {SPLITS} or more; give more in data (test, test_path)"
            )
    if config.network is None:
        save_tensors(job.out / "weights.safetensors", {}, {"network": "inception"})
        write(job.out / "log.csv", "nimg,loss,lr\n")
        summary = {"network": "inception"}
    else:
        summary = classify.train(config, job, data)
    if rank() != 0:
        return
    scorer = Scorer(job.out, results("data"), CACHE, device_of(job))
    floor = scorer.floor(config.samples, job.study.seed)
    write_json(job.out / "summary.json", {**summary, "samples": config.samples, "floor": floor})
