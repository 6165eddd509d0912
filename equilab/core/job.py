"""One call of a stage: which study, which run and seed, where its results lie, what it will cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import AfterValidator, Field

from equilab.core.config import Params

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
TORCHRUN_OPTIONS = (  # which have a value, and start no other program
    "nproc-per-node",
    "nnodes",
    "node-rank",
    "max-restarts",
    "rdzv-backend",
    "rdzv-endpoint",
    "rdzv-id",
    "master-addr",
    "master-port",
)
_OPTION = rf" --standalone| --({'|'.join(TORCHRUN_OPTIONS)})[= ][A-Za-z0-9][A-Za-z0-9.:_-]*"
LAUNCH = re.compile(rf"python -m equilab|torchrun({_OPTION})* -m equilab")


def checked_name(name: str) -> str:
    """Return the name of a study or a run, which becomes part of paths, of commands and of the names of DVC's stages.

    Raises: ValueError if it holds what these cannot.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name: give at most 100 letters, digits, - and _, the first a letter or a digit"
        )
    return name


def checked_launch(launch: str) -> str:
    """Return how stages are started: by Python, or by torchrun with options of its own, and by nothing else.

    Raises: ValueError if it is neither.
    """
    if not LAUNCH.fullmatch(launch):
        raise ValueError(
            f"{launch!r} is neither `python -m equilab` nor `torchrun OPTIONS -m equilab`, such as `torchrun --standalone "
            f"--nproc-per-node 8 -m equilab`; options are --standalone, "
            f"{', '.join(f'--{name}' for name in TORCHRUN_OPTIONS)}"
        )
    return launch


def _distinct(values: tuple) -> tuple:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is named twice; give each once")
    return values


Distinct = AfterValidator(_distinct)  # of a field that is a tuple: it names nothing twice
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Threads = Annotated[int, Field(ge=1, le=4096)]


class Study(Params):
    """What all stages of a study share."""

    name: Annotated[str, AfterValidator(checked_name)]
    root: str  # path from the study's folder to the repository
    seed: Seed
    threads: Threads  # of the CPU, for a stage that runs alone; part of what decides the bits
    run_threads: Threads  # the same for a stage that has runs, several of which may run at once
    device: Literal["auto", "cpu", "cuda"]
    launch: Annotated[str, AfterValidator(checked_launch)] | None = None  # how stages that share work start
    watch: Literal["tensorboard", "dvclive", "wandb"] | None = None  # to which a training also reports


@runtime_checkable
class Watcher(Protocol):
    """What a training reports to while it runs, in its first process; it changes nothing of the training."""

    def report(self, row: Mapping[str, int | float]) -> None:
        """Take a row of the log."""

    def snapshot(self, weights: Path, about: Mapping[str, Any]) -> None:
        """Take the averaged weights in a file, and what is kept with them."""

    def close(self) -> None:
        """Take nothing more."""


@dataclass(frozen=True)
class Job:
    """One call of a stage. A run is an entry of its section; of a run with several seeds a job is one replicate."""

    study: Study
    stage: str
    run: str | None
    seed: int | None  # of the replicate; None for a stage without runs
    image: tuple[int, int, int]  # channels, height, width, as params say
    classes: int  # 0: no labels
    code: str  # digest of what the modules behind the stage mean
    read: Callable[..., Any]  # (stage, run=None, seed=None) -> its config, by default of the first seed
    seeds: Callable[[str, str], tuple[int, ...]]  # (stage, run) -> the seeds of its replicates
    watcher: Callable[[Job, int], Watcher] | None = None  # (job, images seen) -> what its training reports to

    @property
    def name(self) -> str:
        """The stage, and where it has runs the run, and where these have seeds the seed: distill@get-m-0, notebook-scaling."""
        return name_of(self.stage, self.run, self.seed)

    @property
    def out(self) -> Path:
        """The folder of the job's results, relative to the study's folder."""
        return folder_of(self.stage, self.run, self.seed)


class Plan(NamedTuple):
    """What a stage will cost, before anything is spent; None where that cannot be known."""

    parameters: int | None = None
    flops: float = 0.0  # of networks, in all
    disk: int | None = 0  # bytes of results
    note: str = ""  # lines to print with it
    images: int = 0  # seen in training, or made
    teacher_calls: int = 0  # evaluations of the teacher for them
    memory: int = 0  # bytes that training holds whatever its batch


def name_of(stage: str, run: str | None = None, seed: int | str | None = None) -> str:
    """Return the name of a job, as DVC has it: teacher, notebook-scaling, distill@get-m-0."""
    if run is None:
        return stage
    return f"{stage}-{run}" if seed is None else f"{stage}@{run}-{seed}"


def folder_of(stage: str, run: str | None = None, seed: int | None = None) -> Path:
    """Return the results folder of a stage, of one of its runs, or of one replicate of a run."""
    parts = [stage, run, seed]
    return Path("results", *(str(part) for part in parts if part is not None))
