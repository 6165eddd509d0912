"""Stage `features`: a small network trained on the study's data, for discriminators to look through.

It stands for networks trained on other images where there are no weights of these; it is never the evaluator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from equilab.core.config import Spec
from equilab.core.files import write_json
from equilab.core.job import Job, Plan, results
from equilab.core.machine import rank
from equilab.data.images import load
from equilab.training import classify, loop
from equilab.training.classify import CLASSIFIERS
from equilab.training.loop import Optimisation


@dataclass(frozen=True)
class Config:
    """The params section `features`."""

    network: Annotated[Spec, tuple(CLASSIFIERS.items())]
    optimisation: Optimisation


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost."""
    classify.meta(config, job.image, job.classes)  # refuses sizes that do not fit
    return lambda: loop.plan(config.optimisation, classify.counted(config, job.image, job.classes))


def run(config: Config, job: Job) -> None:
    """Train the network on the study's training images; write its weights, and its accuracy on the test images.

    Raises: UserError if the data are missing, damaged or without labels.
    """
    summary = classify.train(config, job, load(results("data"), "train", verify=True))
    if rank() == 0:
        write_json(job.out / "summary.json", summary)
