"""One call of a stage: which study, which run, where its results lie, what it will cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from equilab.core.config import digest


@dataclass(frozen=True)
class Study:
    """What all stages of a study share."""

    name: str
    root: str  # path from the study's folder to the repository
    seed: int
    threads: int  # of the CPU, for a stage that runs alone; part of what decides the bits
    run_threads: int  # the same for a stage that has runs, several of which may run at once
    device: Literal["auto", "cpu", "cuda"]

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if not (1 <= self.threads <= 4096 and 1 <= self.run_threads <= 4096):
            raise ValueError(
                f"threads and run_threads must be >= 1 (within reason), got {self.threads} and {self.run_threads}"
            )


@dataclass(frozen=True)
class Job:
    """One call of a stage: which study, which run of a dictionary section, and where things lie."""

    study: Study
    stage: str
    run: str | None
    image: tuple[int, int, int]  # channels, height, width, as params say
    classes: int  # 0: no labels
    code: str  # of the modules that the stage imports: a digest
    read: Callable[..., Any]  # (stage, run) -> its config

    @property
    def name(self) -> str:
        """The stage, and the run after an @ where the section is a dictionary of runs."""
        return f"{self.stage}@{self.run}" if self.run else self.stage

    @property
    def out(self) -> Path:
        """The folder of the stage's results, relative to the study's folder."""
        return results(self.stage, self.run)

    def scratch(self, *identity: Any) -> Path:
        """The folder of unfinished work, ignored by git and DVC: another one for other code or another `identity`."""
        return Path(".equilab/scratch") / f"{self.name}-{digest(self.code, *identity)}"


class Plan(NamedTuple):
    """What a stage will cost, before anything is spent; None where it cannot be told beforehand."""

    parameters: int | None = None
    flops: float = 0.0  # of networks, in all
    disk: int | None = 0  # bytes of results
    note: str = ""  # lines to print with it


def results(stage: str, run: str | None = None) -> Path:
    """Return the results folder of a stage, or of one of its runs."""
    return Path("results") / stage / (run or "")
