"""A study as its params say it: its runs and their seeds, its jobs and their configs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from equilab.core import code, config, like
from equilab.core.absent import absent_runs, without
from equilab.core.config import Params, UserError, nearest
from equilab.core.job import Distinct, Job, Seed, Study, Watcher, checked_name, folder_of, name_of
from equilab.core.notebooks import code_of, parameters, read_notebook
from equilab.core.stages import GENERATORS, SHOWN, refuse_unknown
from equilab.graph import STAGES
from equilab.models.registry import FAMILIES

CODE = "results/code"  # what the stages depend on besides the results of others
PUBLISHED = "equilab.published.stage"  # runs jobs whose weights are published ones, whatever their stage


class Replicate(NamedTuple):
    """A job of a stage: its run and the run's seed, None where the stage has none."""

    run: str | None = None
    seed: int | None = None

    @property
    def item(self) -> str:
        """Its name among the jobs of its stage; "" where the stage has no runs."""
        if self.run is None:
            return ""
        return self.run if self.seed is None else f"{self.run}-{self.seed}"

    def name(self, stage: str) -> str:
        """Return its name among the jobs of all stages, as DVC has it: distill@get-m-0, or without a seed notebook-scaling."""
        return name_of(stage, self.run, self.seed)

    def arguments(self, stage: str) -> list[str]:
        """Return the arguments of `python -m equilab` that run it."""
        run = [] if self.run is None else [self.run]
        seed = [] if self.seed is None else ["--seed", str(self.seed)]
        return [stage, *run, *seed]


class Named(NamedTuple):
    """Results that a job reads because params name them, or its notebook: where they are, and what writes them."""

    path: str  # from the study's folder
    stage: str
    run: str | None = None


def results_of(stage: str, run: str | None) -> Named:
    """Return the results of a run, of all its seeds, or of a stage without runs."""
    return Named(folder_of(stage, run).as_posix(), stage, run)


class Seeds(Params):
    """What the entry of a run that is trained says of its seeds."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000), Distinct]


@dataclass(frozen=True)
class Sections:
    """The sections of a study's params, each `like` written out, and what they say of runs, seeds and families."""

    values: Mapping[str, Any]
    where: str  # the file, for messages
    folder: Path  # the study's, absolute
    absent: tuple[str, ...] = ()  # files of published weights that are not there, and whose runs are left out

    @cached_property
    def study(self) -> Study:
        """What all stages share."""
        return config.parse(Study, self.section("study"), f"{self.where}: study")

    def has(self, stage: str) -> bool:
        """Return whether the study has a stage: its section, and a run where the stage has runs."""
        section = self.values.get(stage)
        return section is not None and (STAGES[stage].jobs == "one" or section != {})

    def section(self, name: str) -> Any:
        """Return a section.

        Raises: UserError if there is none.
        """
        if self.values.get(name) is None:
            raise UserError(f"{self.where}: missing section {name!r}; give it")
        return self.values[name]

    def runs(self, stage: str) -> list[str]:
        """Return the names of a stage's runs."""
        return list(config.mapping(self.section(stage), f"{self.where}: {stage}"))

    def entry(self, stage: str, run: str | None) -> tuple[Mapping[str, Any], str]:
        """Return what params say of a run, or of a stage without runs, and its path for messages.

        Raises: UserError if there is no such run, or it has a name that it cannot have.
        """
        path = f"{self.where}: {stage}"
        if STAGES[stage].jobs == "one":
            if run is not None:
                raise UserError(f"{stage} has no runs; call it without {run!r}")
            return config.mapping(self.section(stage), path), path
        known = self.runs(stage)
        if run is None:
            raise UserError(f"{stage} needs the name of a run: {', '.join(known) or 'this study has none'}")
        if run not in known:
            raise UserError(f"{path}: no run {run!r}{nearest(run, known)}")
        try:
            checked_name(run)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return config.mapping(self.section(stage)[run], f"{path}.{run}"), f"{path}.{run}"

    def seeds(self, stage: str, run: str) -> tuple[int | None, ...]:
        """Return the seeds of a run's replicates; (None,) where the runs of the stage have none.

        Raises: UserError naming the key that does not say them.
        """
        entry, path = self.entry(stage, run)
        match STAGES[stage].jobs:
            case "seeds":
                said = {key: value for key, value in entry.items() if key in ("seed", "seeds")}
                return config.parse(Seeds, said, path).seeds
            case "of":
                named, of = self.source(stage, run)
                return (self.study.seed,) if of is None else self.seeds(named, of)
            case _:
                return (None,)

    def trained(self, name: Any, path: str) -> tuple[str, str | None]:
        """Return the stage and the run that `name` ("distill/get-m", "teacher") is of; `path` is of the key that names it.

        Raises: UserError if the study trains no such run.
        """
        known = []
        for stage in filter(self.has, GENERATORS):
            single = STAGES[stage].jobs == "one"
            known += [stage] if single else [f"{stage}/{run}" for run in self.runs(stage)]
        if name not in known:
            raise UserError(f"{path}: {name!r} is no run that makes images{nearest(name, known)}")
        stage, _, run = name.partition("/")
        return stage, run or None

    def source(self, stage: str, run: str) -> tuple[str, str | None]:
        """Return the stage and the run whose results a run of this stage reads, as its entry names them.

        Raises: UserError if the study trains no such run.
        """
        (entry, path), key = self.entry(stage, run), STAGES[stage].source
        return self.trained(entry.get(key), f"{path}.{key}")

    def named(self, stage: str, run: str | None) -> list[Named]:
        """Return the results that a job reads since its section lists the `runs` that they are of, or its notebook shows them.

        Raises: UserError if there is no such run, or the notebook shows what no stage writes.
        """
        match STAGES[stage].names:
            case "trained":
                return [results_of(*self.trained(name, path)) for name, path in self._listed(stage)]
            case "evaluated":
                return [results_of("evaluate", name) for name, _ in self._listed(stage)]
            case "shown":
                return self._shown(str(run))
            case _:
                return []

    def _listed(self, stage: str) -> list[tuple[Any, str]]:
        """Return the names of runs that a section lists, each with the path of the key that does."""
        entry, path = self.entry(stage, None)
        if not isinstance(entry.get("runs"), list):
            raise UserError(f"{path}.runs: expected a list, got {entry.get('runs')!r}")
        return [(name, f"{path}.runs") for name in entry["runs"]]

    def _shown(self, notebook: str) -> list[Named]:
        """Return the results that a notebook shows: of runs how they were trained and evaluated, measurements, claims."""
        shown = self.shown(notebook)
        found = []
        for stage in filter(self.has, [name for name in shown if name in STAGES]):
            runs = [None] if STAGES[stage].jobs == "one" else self.runs(stage)
            found += [results_of(stage, run) for run in runs]
        for run in self.runs("evaluate") if self.has("evaluate") else []:
            if self.source("evaluate", run)[0] in shown:
                found.append(results_of("evaluate", run))
        if self.has("claims"):
            tables = [name for name in shown if name not in STAGES]
            found += [Named(f"results/{name}.csv", "claims") for name in tables]
        return found

    def shown(self, notebook: str) -> list[str]:
        """Return the names of results that a notebook shows, as the list `shows` of its cell `parameters` says; without it, all of them.

        Raises: UserError if it is missing, damaged, or names what no stage writes.
        """
        path = notebook_file(self, notebook)
        shown = parameters(read_notebook(path)).get("shows", [*SHOWN])
        if not isinstance(shown, (list, tuple)):
            raise UserError(f"{path}: shows: expected a list of names, got {shown!r}")
        refuse_unknown(shown, f"{path}: shows")
        return shown

    def jobs(self, stage: str) -> list[Replicate]:
        """Return the jobs of a stage, in the order of its section."""
        if STAGES[stage].jobs == "one":
            return [Replicate()]
        return [Replicate(run, seed) for run in self.runs(stage) for seed in self.seeds(stage, run)]

    def frozen(self, stage: str, job: Replicate) -> tuple[Mapping[str, Any], str]:
        """Return what params say of one job, and its path for messages: of a run with seeds the entry with its one seed."""
        entry, path = self.entry(stage, job.run)
        if STAGES[stage].jobs != "seeds":
            return entry, path
        frozen = {("seed" if key == "seeds" else key): value for key, value in entry.items()}
        return {**frozen, "seed": job.seed}, path

    def published(self, stage: str) -> dict[str | None, str]:
        """Return the files of published weights that runs of a stage have in place of their training, by run (None: it has none)."""
        if stage not in GENERATORS:
            return {}
        runs = [None] if STAGES[stage].jobs == "one" else self.runs(stage)
        said = {run: self.entry(stage, run)[0].get("published") for run in runs}
        return {run: str(source.get("path")) for run, source in said.items() if isinstance(source, dict)}

    def families(self, stage: str, run: str | None = None) -> list[str]:
        """Return the names of the families whose code a stage runs, or one of its runs.

        Raises: UserError naming the key that names none.
        """
        said = STAGES[stage].family
        if said in ("", *FAMILIES):
            return [said] if said else []
        entry, _ = self.entry(stage, run)
        if said == "network":
            network = entry.get("network")
            if not isinstance(network, dict) or network.get("kind") not in [*FAMILIES]:
                config_of(self, stage, run)  # says what is wrong
            return [network["kind"]]
        if said == "of":
            return self.families(*self.source(stage, str(run)))
        return list(
            dict.fromkeys(name for each in self.named(stage, run) for name in self.families(*each[1:]))
        )


def read(params: Path) -> Sections:
    """Return the sections of a params file, without runs whose published weights are optional and not there.

    Raises: UserError if it is missing, or no YAML of sections.
    """
    folder, sections = params.absolute().parent, like.read(params)
    absent = absent_runs(sections, folder)
    return Sections(without(sections, absent), str(params), folder, tuple(absent.values()))


def open_study(params: Path) -> Sections:
    """Return the sections of a study's params.

    Raises: UserError if the file is missing or no YAML, or the study is of other code than runs.
    """
    sections = read(params)
    refuse_other_code(sections)
    return sections


def refuse_other_code(sections: Sections) -> None:
    """Refuse a study that does not lie in the repository whose code runs.

    Raises: UserError with what to do.
    """
    here, root = code.PACKAGE.parent.resolve(), (sections.folder / sections.study.root).resolve()
    if root != here:
        raise UserError(
            f"{sections.where}: study.root leads to {root}, but the equilab that runs is that of {here}; correct the "
            "key, or use the environment of the study's own repository (`make study` there makes one)"
        )


def job_of(sections: Sections, stage: str, job: Replicate) -> Job:
    """Return one job of a stage.

    Raises: UserError if the params that all stages share are mistaken.
    """
    data = config_of(sections, "data")
    digest = config.digest(listings(sections, stage, job.run))

    def read_config(stage: str, run: str | None = None, seed: int | None = None) -> Any:
        absent = stage == "latents" and not sections.has(stage)  # the study works in pixels
        return None if absent else config_of(sections, stage, run, seed)

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
        _watcher if sections.study.watch else None,
    )


def _watcher(job: Job, nimg: int) -> Watcher:
    """Return what a training reports to, as `study.watch` says."""
    from equilab.watching import Watched  # torch and more

    return Watched(job, nimg)


def config_of(sections: Sections, stage: str, run: str | None = None, seed: int | None = None) -> Any:
    """Return the config of a job, by default that of the run's first seed.

    Raises: UserError with a sentence for each mistake in it.
    """
    if run is not None and seed is None:
        seed = sections.seeds(stage, run)[0]
    entry, path = sections.frozen(stage, Replicate(run, seed))
    if stage in GENERATORS and "published" in entry:
        return config.parse(importlib.import_module(PUBLISHED).config_class(stage), entry, path)
    return config.parse(importlib.import_module(STAGES[stage].module).Config, entry, path)


def module_of(stage: str, config: Any) -> ModuleType:
    """Return the module that runs a job of a stage."""
    published = getattr(config, "published", None)
    return importlib.import_module(PUBLISHED if published else STAGES[stage].module)


def jobs_of(sections: Sections, stage: str, run: str | None, seed: int | None) -> list[Replicate]:
    """Return the jobs that a command asks for: those of a run, or its one of this seed.

    Raises: UserError if the study has no such job.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
    sections.entry(stage, run)
    known = sections.seeds(stage, run) if run is not None else (None,)
    if seed is not None and seed not in known:
        remedy = "call it without --seed" if known == (None,) else f"it has {', '.join(map(str, known))}"
        raise UserError(f"{stage}{f' {run}' if run else ''} has no seed {seed}; {remedy}")
    return [Replicate(run, each) for each in known if seed is None or each == seed]


def listings(sections: Sections, stage: str, run: str | None = None) -> dict[str, str]:
    """Return the files that say which code a job runs, by their paths from the study's folder: that of its stage, or of its
    notebook, and those of its families."""
    if stage == "notebook":
        modules = code.of_script(code_of(read_notebook(notebook_file(sections, str(run)))))
        return {f"{CODE}/notebook/{run}.txt": code.listing([STAGES[stage].module, *modules])}
    modules = [STAGES[stage].module, *([PUBLISHED] if sections.published(stage) else [])]
    found = {f"{CODE}/{stage}.txt": code.listing(modules)}
    for name in sections.families(stage, run):
        found[f"{CODE}/families/{name}.txt"] = code.listing([FAMILIES[name].partition(":")[0]])
    return found


def notebook_file(sections: Sections, name: str) -> Path:
    """Return the path of a notebook of the repository."""
    return sections.folder / sections.study.root / "notebooks" / f"{name}.ipynb"
