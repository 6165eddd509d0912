"""A run whose weights are published ones: in place of a training stage, whose results it writes, so that all others go on from it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import create_model, model_validator

from equilab.core.config import Params, UserError, plain
from equilab.core.files import publishing, sha256_of, write, write_json
from equilab.core.job import Job, Plan, Seed
from equilab.core.machine import environment, rank
from equilab.data import latents
from equilab.data.images import label_counts
from equilab.models.checkpoint import save_tensors
from equilab.published.files import absent
from equilab.published.loading import Loaded, load_network
from equilab.sampling.generators import KINDS


class Source(Params):
    """Where the weights of a run are: a file that the authors of a family published (docs/checkpoints.md)."""

    family: str
    path: str  # from the study's folder, or absolute
    optional: bool = False  # where the file is not there, the study does without the run


class Published(Params):
    """What params say of a run that is not trained, beside what sampling needs to know of it."""

    published: Source

    @model_validator(mode="after")
    def _is_of_its_family(self):
        if self.published.family != self.family.name:
            raise ValueError(
                f"published.family is {self.published.family}, but the entry is that of {self.family.name}; give one"
            )
        return self


@functools.cache
def config_class(stage: str) -> type[Params]:
    """Return what the entry of a stage is read as, where its weights are published."""
    seed = {} if stage == "teacher" else {"seed": (Seed, ...)}
    return create_model("Config", __base__=(Published, KINDS[stage].training.Model), **seed)


def plan(config: Any, job: Job) -> Callable[[], Plan]:
    """Check the config against the study and return the estimate of its cost, which is that of a copy.

    Raises: UserError if the file is not there, or the network's sizes do not fit.
    """
    config.require_classes(job, job.classes)
    shape, _ = _data(config, job)
    network = config.on_meta(shape, job.classes)
    if not Path(config.published.path).exists():
        raise UserError(f"{_place(job)}.published.path: {absent(Path(config.published.path))}")
    count = sum(parameter.numel() for parameter in network.parameters())
    return lambda: Plan(count, 0.0, 4 * count)


def run(config: Any, job: Job) -> None:
    """Write published weights as the stage would write those that it trained, without a log.

    Raises: UserError if the file is not there, cannot be read, or is of another network, of other images or classes, or of
        another standard deviation of the data than params say.
    """
    plan(config, job)
    if rank() != 0:
        return
    path = Path(config.published.path)
    loaded = load_network(config.published.family, path, _not_in_the_file(config))
    _check(config, job, loaded)
    about = loaded.about(job.run) | label_counts(job) | {"config": config, "nimg": 0}
    about["published"] |= {"file": path.name, "sha256": sha256_of(path)}
    if job.run is not None:
        about["seed"] = job.seed
    with publishing(job.out) as fresh:
        (fresh / "snapshots").mkdir()
        save_tensors(fresh / "weights.safetensors", loaded.network.state_dict(), about)
        write(fresh / "log.csv", "nimg,loss,lr\n")
        write_json(fresh / "summary.json", {**about, "environment": environment(job)})


def _place(job: Job) -> str:
    return f"{job.stage}.{job.run}" if job.run else job.stage


def _data(config: Any, job: Job) -> tuple[tuple[int, ...], int]:
    """Return the shape of what a run makes in this study, and the classes that it knows."""
    shape = latents.shape_of(job.read, job.image) if KINDS[job.stage].explicit.latent else job.image
    return shape, config.classes_of(job.classes)


def _not_in_the_file(config: Any) -> dict[str, Any]:
    """Return what params say of the network that the tensors do not tell."""
    describe = inspect.signature(config.family.published.describe).parameters
    return {key: value for key, value in config.network.arguments.items() if key in describe}


def _check(config: Any, job: Job, loaded: Loaded) -> None:
    """Refuse weights of another model than params describe.

    Raises: UserError with a sentence for each key that differs.
    """
    place, described = _place(job), loaded.described
    shape, classes = _data(config, job)
    compared = [("images", shape, described.image), ("classes", classes, described.classes)]
    for key, value in config.network.arguments.items():
        if key != "dropout":  # of which there is none without training
            compared.append((f"network.{key}", value, described.sizes[key]))
    if "sigma_data" in type(config).model_fields:
        compared.append(("sigma_data", config.sigma_data, described.settings["sigma_data"]))
    if "student" in type(config).model_fields:
        theirs = described.settings["student"]
        compared += [
            (f"student.{key}", getattr(config.student, key), theirs[key]) for key in ("sigma_min", "sigmas")
        ]
    differing = [
        f"{place}: {config.published.path} has {key} {plain(theirs)}, params give {plain(ours)}; correct params, or give "
        "another file"
        for key, ours, theirs in compared
        if plain(ours) != plain(theirs)
    ]
    if differing:
        raise UserError("\n".join(differing))
