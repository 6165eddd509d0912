"""Stage `relative`: the distance between the images that runs made of the same noises, GDD's rel-FID."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from equilab.core.checked import read_array
from equilab.core.config import Params, UserError, read_json
from equilab.core.files import publishing, write_table
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
        images = evaluator.samples * (len(config.runs) + 1) * len(seeds)
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
    """Write `relative.csv`: distances between the images of two runs of a seed, on the evaluator's features, and of how many
    `images` on either side, made of which `noises`:

    - "same", as published: all images of each two runs, made of the same noises;
    - "others": the first half of the first run's images against the second half of each run's, its own among them, which is what
      no difference looks like.

    Raises: UserError if the samples of a run are missing.
    Source: GDD (Zheng 2024), section 2.2, rel-FID.
    """
    plan(config, job)  # refuses what cannot be
    scorer = Scorer(folder_of("evaluator"), folder_of("data"), CACHE, device_of(job), job.read("evaluator"))
    rows = []
    for seed in _common_seeds(config, job):
        samples = {name: _samples(name, seed, job.image) for name in config.runs}
        half = len(samples[config.runs[0]]) // 2
        all_of = {name: scorer.statistics(images) for name, images in samples.items()}
        for first, second in itertools.permutations(config.runs, 2):
            distance = frechet(all_of[first], all_of[second])
            named = {"seed": seed, "first": first, "second": second}
            rows.append({**named, "distance": distance, "images": len(samples[first]), "noises": "same"})
        begun = scorer.statistics(samples[config.runs[0]][:half])
        for second, images in samples.items():
            distance = frechet(begun, scorer.statistics(images[half : 2 * half]))
            named = {"seed": seed, "first": config.runs[0], "second": second}
            rows.append({**named, "distance": distance, "images": half, "noises": "others"})
    with publishing(job.out) as fresh:
        write_table(fresh / "relative.csv", rows)
    print(f"relative: {len(rows)} distances between the images of two runs, in {job.out / 'relative.csv'}")


def _samples(name: str, seed: int, image: tuple[int, ...]) -> np.ndarray:
    folder = folder_of("evaluate", name, seed)
    about = read_json(folder / "metrics.json", n_samples=int)
    sha256 = about.get("samples_sha256")  # of images that were made before it was written there is none
    return read_array(folder / "samples.npy", (about["n_samples"], *image), np.uint8, sha256)
