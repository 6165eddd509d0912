"""Stage `relative`: the distance between the images that runs made of the same noises, GDD's rel-FID."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from equilab.core.config import UserError, read_json
from equilab.core.job import Job, Plan, results
from equilab.core.machine import device_of
from equilab.metrics import fidelity
from equilab.stages.evaluate import write_table
from equilab.training import classify


@dataclass(frozen=True)
class Config:
    """The params section `relative`."""

    runs: tuple[str, ...]  # of the stage evaluate; each is compared with each

    def __post_init__(self):
        if len(set(self.runs)) < max(len(self.runs), 2):
            raise ValueError(f"runs must name at least two different runs of evaluate, got {list(self.runs)}")


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost: features of all images, those of Inception not counted.

    Raises: UserError if `runs` names no run of evaluate.
    """
    for name in config.runs:
        read("evaluate", name)
    if (evaluator := read("evaluator")).network is None:
        return lambda: Plan(note="# Inception's features of the images are not counted")

    def count() -> Plan:
        about = classify.counted(evaluator, job.image, job.classes)
        return Plan(about["parameters"], float(about["flops_image"]) * evaluator.samples * len(config.runs))

    return count


def run(config: Config, job: Job) -> None:
    """Write `relative.csv`: the distance between the images of each two runs, on the evaluator's features.

    Raises: UserError if the samples of a run are missing.
    Source: GDD (Zheng 2024), section 2.2, rel-FID.
    """
    plan(config, job, job.read)
    scorer, found = (
        fidelity.Scorer(
            results("evaluator"), results("data"), fidelity.CACHE, device_of(job), job.read("evaluator")
        ),
        {},
    )
    for name in config.runs:
        path = results("evaluate", name) / "samples.npy"
        if not path.exists():
            raise UserError(f"{path} is not there; run evaluate {name} first")
        run = read_json(path.with_name("metrics.json"), "of")["of"].rpartition("/")[2]
        if run in found:
            raise UserError(f"relative.runs: two of them are of runs named {run}; leave one out")
        found[run] = scorer.statistics(np.load(path, mmap_mode="r"))
    pairs = itertools.permutations(found, 2)
    rows = [{"first": a, "second": b, "distance": fidelity.frechet(found[a], found[b])} for a, b in pairs]
    write_table(job.out / "relative.csv", rows)
