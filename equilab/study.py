"""A study as its params say it: checked configs, and the jobs that they make."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from equilab import graph
from equilab.claims.comparisons import check_comparisons
from equilab.core import code, config
from equilab.core.config import UserError, nearest
from equilab.core.job import Job
from equilab.graph import STAGES, Replicate, Sections


def open_study(params: Path) -> Sections:
    """Return the sections of a study's params.

    Raises: UserError if the file is missing or no YAML, or the study lies beside other code than runs.
    """
    sections = graph.read(params)
    _refuse_other_code(sections)
    return sections


def _refuse_other_code(sections: Sections) -> None:
    here, beside = code.PACKAGE.parent.resolve(), (sections.folder / sections.study.root).resolve()
    if beside != here:
        raise UserError(
            f"{sections.where}: study.root leads to {beside}, but the equilab that runs is that of {here}; correct the "
            "key, or use the environment of the study's own repository (`make study` there makes one)"
        )


def require_recorded(sections: Sections, stage: str, jobs: list[Replicate]) -> None:
    """Refuse to run jobs for DVC otherwise than it records them: with params or code that changed after its stage `code`.

    Raises: UserError with what to do.
    """
    if "DVC_STAGE" not in os.environ:
        return  # a command of its own
    recorded, current = (
        config.read_json(Path(graph.CODE) / "params.json", stage),
        graph.frozen_params(sections),
    )
    names = ["study", *STAGES[stage].params, *([stage] if STAGES[stage].jobs == "one" else [])]
    same = all(recorded.get(name) == current.get(name) for name in names)
    for job in jobs:
        same = same and (job.run is None or recorded[stage].get(job.item) == current[stage][job.item])
        for path, text in graph.listings(sections, stage, job.run).items():
            same = same and Path(path).exists() and Path(path).read_text(encoding="utf-8") == text
    if not same:
        raise UserError(
            f"{stage}: params.yaml or the code has changed since DVC looked; run `dvc repro code` first"
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
        sections.study,
        stage,
        job.run,
        job.seed,
        data.image,
        data.classes,
        digest,
        read_config,
        sections.seeds,
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
    found = _failures(_readings(sections))
    return found or _failures(_plans(sections))


def _failures(checks: Iterable[Callable[[], Any]]) -> list[str]:
    """Return the sentences of all checks that fail, each once."""
    found: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            found |= dict.fromkeys(str(error).splitlines())
    return list(found)


def _readings(sections: Sections) -> Iterator[Callable[[], Any]]:
    """Yield the checks of what params say, of every section and every run."""
    yield partial(_refuse_other_code, sections)
    for name in sections.values:
        yield partial(_refuse_unknown, sections, name)
    for stage in STAGES:
        if sections.has(stage) or not STAGES[stage].optional:
            yield from _readings_of_stage(sections, stage)
    yield partial(_refuse_other_graph, sections)


def _readings_of_stage(sections: Sections, stage: str) -> Iterator[Callable[[], Any]]:
    try:
        runs = [None] if STAGES[stage].jobs == "one" else sections.runs(stage)
    except UserError:
        runs = [""]  # the section is none of runs; reading any says so
    for run in runs:
        yield partial(read, sections, stage, run)
        yield partial(sections.families, stage, run)


def _refuse_unknown(sections: Sections, name: str) -> None:
    known = [*graph.OTHERS, *STAGES]
    if name not in known:
        raise UserError(f"{sections.where}: unknown section {name!r}{nearest(name, known)}")


def _refuse_other_graph(sections: Sections) -> None:
    path = sections.folder / "dvc.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != graph.text(sections):
        raise UserError(f"{path.name} is not what {sections.where} gives; run `python -m equilab graph`")


def _plans(sections: Sections) -> Iterator[Callable[[], Any]]:
    """Yield the checks of what is compared, and of every run by its stage, which builds its network without memory."""
    yield partial(_compare, sections)
    for stage in filter(sections.has, STAGES):
        for run in dict.fromkeys(job.run for job in sections.jobs(stage)):
            yield partial(_plan, sections, stage, run)


def _compare(sections: Sections) -> None:
    try:
        check_comparisons(sections.values)
    except UserError as error:
        raise UserError("\n".join(f"{sections.where}: {line}" for line in str(error).splitlines())) from None


def _plan(sections: Sections, stage: str, run: str | None) -> None:
    from equilab.core.machine import device_of  # torch, which what params say does not need

    seed = None if run is None else sections.seeds(stage, run)[0]
    job = job_of(sections, stage, Replicate(run, seed))
    device_of(job)
    module_of(stage).plan(job.read(stage, run, seed), job)
