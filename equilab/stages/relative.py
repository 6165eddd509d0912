"""Stage `relative`: the distance between the images that runs made of the same noises, GDD's rel-FID."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from equilab.core.config import Params, UserError
from equilab.core.files import write_table
from equilab.core.job import Distinct, Job, Plan, folder_of
from equilab.core.machine import device_of
from equilab.metrics.fidelity import CACHE, Scorer, frechet
from equilab.training import classify


class Config(Params):
    """The params section `relative`."""

    runs: Annotated[tuple[str, ...], Field(min_length=2), Distinct]  # of evaluate, compared each with each


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: features of all images, those of Inception not counted.

    Raises: UserError if `runs` names no run of evaluate, or they have no seed in common.
    """
    seeds = _common_seeds(config, job)
    evaluator = job.read("evaluator")
    if evaluator.network is None:
        return lambda: Plan(note="# Inception's features of the images are not counted")

    def count() -> Plan:
        cost = classify.cost(evaluator.network, job.image, job.classes)
        images = evaluator.samples * len(config.runs) * len(seeds)
        return Plan(cost.parameters, float(cost.image.flops()) * images)

    return count


def _common_seeds(config: Config, job: Job) -> list[int]:
    """Return the seeds that all runs have, in the order of the first run's."""
    first, *others = (job.seeds("evaluate", name) for name in config.runs)
    common = set(first).intersection(*others)
    if not common:
        raise UserError(
            f"relative.runs: {', '.join(config.runs)} have no seed in common; give their runs the same seeds"
        )
    return [seed for seed in first if seed in common]


def run(config: Config, job: Job) -> None:
    """Write `relative.csv`: the distance between the images of each two runs of a seed, on the evaluator's features.

    Raises: UserError if the samples of a run are missing.
    Source: GDD (Zheng 2024), section 2.2, rel-FID.
    """
    plan(config, job)  # refuses what cannot be
    scorer = Scorer(folder_of("evaluator"), folder_of("data"), CACHE, device_of(job), job.read("evaluator"))
    rows = []
    for seed in _common_seeds(config, job):
        statistics = {name: scorer.statistics(_samples(name, seed)) for name in config.runs}
        for first, second in itertools.permutations(config.runs, 2):
            distance = frechet(statistics[first], statistics[second])
            rows.append({"seed": seed, "first": first, "second": second, "distance": distance})
    write_table(job.out / "relative.csv", rows)


def _samples(name: str, seed: int) -> np.ndarray:
    path = folder_of("evaluate", name, seed) / "samples.npy"
    if not path.exists():
        raise UserError(f"{path} is not there; run evaluate {name} --seed {seed} first")
    return np.load(path, mmap_mode="r")
