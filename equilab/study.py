"""A study as its params say it: checked configs, and the jobs that they make."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from equilab import graph
from equilab.core import code, config
from equilab.core.config import UserError, nearest
from equilab.core.job import Job
from equilab.graph import STAGES, Replicate, Sections


def open_study(params: Path) -> Sections:
    """Return the sections of a study's params.

    Raises: UserError if the file is missing or no YAML, or the study lies beside other code than runs.
    """
    sections = Sections(config.read(params), str(params))
    _refuse_other_code(sections, params)
    return sections


def _refuse_other_code(sections: Sections, params: Path) -> None:
    here, beside = code.PACKAGE.parent.resolve(), params.absolute().parent / sections.study.root
    if beside.resolve() != here:
        raise UserError(
            f"{params}: study.root leads to {beside.resolve()}, but the equilab that runs is that of {here}; correct the key, or "
            "use the environment of the study's own repository (`make study` there makes one)"
        )


def job_of(sections: Sections, stage: str, job: Replicate) -> Job:
    """Return one job of a stage.

    Raises: UserError if the params that all stages share are mistaken.
    """
    data = read(sections, "data")
    digest = config.digest(graph.listings(sections, stage, job.run))

    def read_config(stage: str, run: str | None = None, seed: int | None = None) -> Any:
        return None if stage == "latents" and not sections.has(stage) else read(sections, stage, run, seed)

    return Job(
        sections.study, stage, job.run, job.seed, data.image, data.classes, digest, read_config, sections.seeds
    )


def read(sections: Sections, stage: str, run: str | None = None, seed: int | None = None) -> Any:
    """Return the config of a job, by default that of the run's first seed.

    Raises: UserError with a sentence for each mistake in it.
    """
    if run is not None and seed is None:
        seed = sections.seeds(stage, run)[0]
    entry, path = sections.frozen(stage, Replicate(run, seed))
    return config.parse(module_of(stage).Config, entry, path)


def module_of(stage: str) -> ModuleType:
    """Return the module of a stage."""
    return importlib.import_module(STAGES[stage].module)


def jobs_of(sections: Sections, stage: str, run: str | None, seed: int | None) -> list[Replicate]:
    """Return the jobs that a command asks for: those of a run, or its one of this seed.

    Raises: UserError if the study has no such job.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
    sections.entry(stage, run)
    known = sections.seeds(stage, run) if run is not None else (None,)
    if seed is not None and seed not in known:
        has = f"it has {', '.join(map(str, known))}" if known != (None,) else "it has none"
        raise UserError(f"{stage}{f' {run}' if run else ''} has no seed {seed}; {has}")
    return [Replicate(run, each) for each in known if seed is None or each == seed]


def mistakes(sections: Sections) -> list[str]:
    """Return what is wrong with a study, a sentence each: first what can be read off its params; if that is right, what only
    those who build the networks can tell."""
    found = _collect(_readings(sections)) + _unknown(sections)
    return found or _collect(_plans(sections))


def _collect(checks: Iterator[Callable[[], Any]]) -> list[str]:
    """Return the sentences of all checks that fail, each once."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found += [line for line in str(error).splitlines() if line not in found]
    return found
