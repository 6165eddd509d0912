"""Stage `features`: a small network trained on the study's data, for discriminators to look through.

It stands for networks trained on other images where there are no weights of these; it is never the evaluator.
"""

from __future__ import annotations

from collections.abc import Callable

from equilab.core.config import Params
from equilab.core.job import Job, Plan, folder_of
from equilab.data.images import load
from equilab.training import classify
from equilab.training.optimisation import Optimisation


class Config(Params):
    """The params section `features`."""

    network: classify.Network
    images: classify.Part  # training images that it learns from
    optimisation: Optimisation


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config against the study; return what estimates the cost.

    Raises: UserError if the network's sizes do not fit.
    """
    return classify.plan(config, job)


def run(config: Config, job: Job) -> None:
    """Train the network on the study's training images; write its weights, and its accuracy on the test images.

    Raises: UserError if the data are missing, damaged or without labels.
    """
    classify.train(config, job, load(folder_of("data"), "train", verify=True))
