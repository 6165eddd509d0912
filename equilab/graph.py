"""The graph of stages, once: what each reads and writes, and which jobs a study's params make of it; `dvc.yaml` is written
from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, field_validator

from equilab.core import code, config, files
from equilab.core.config import Params, UserError, nearest
from equilab.core.job import Seed, Study, checked_name, folder_of
from equilab.models.registry import FAMILIES

CODE = "results/code"  # what the stages depend on beside the results of others: see `code_files`
HEADER = """# Written by `python -m equilab graph` from params.yaml. A stage depends on the modules that it imports, on its part of
# params.yaml and on the results that it reads. `study.root` leads to the repository. The stage `code` checks params.yaml, and
# writes the modules of each stage as one file and params.yaml as JSON, on which the stages depend: DVC reads a list of
# modules, and YAML, anew for every run, for seconds. What a stage wrote stays until it writes anew (persist).
"""


class Read(NamedTuple):
    """A file or folder that a stage reads, from the study's folder; a study without the stage `of` has none."""

    path: str
    of: str = ""


def result(path: str) -> Read:
    """Return what a stage reads from the results of another, the first word of `path`."""
    return Read(f"results/{path}", Path(path).parts[0])


@dataclass(frozen=True)
class Stage:
    """A stage: its module, which jobs its section makes, what it reads, what it writes into its results folder.

    `jobs`: one; one for each entry; one for each seed of an entry; or one for each seed of the run that an entry is `of`.
    `family`: the family whose code it runs, or where its section names that: `network`, the run it is `of`, its `runs`.
    `cached` results are kept by DVC, `committed` ones by git; `params` are further sections that it depends on.
    """

    module: str
    jobs: Literal["one", "entries", "seeds", "of"] = "one"
    family: str = ""
    reads: tuple[Read, ...] = ()
    cached: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    optional: bool = False  # a study may do without


DATA, EVALUATOR, PAIRS = result("data"), result("evaluator"), result("pairs")
TEACHER = result("teacher/weights.safetensors")
VAE = Read("${latents.vae}", "latents")
GENERATORS = ("teacher", "distill", "diffusion", "gan", "consistency")  # stages whose runs make images
RUNS = tuple(result(name) for name in GENERATORS)
TRAINED = {"cached": ("weights.safetensors", "snapshots"), "committed": ("log.csv", "summary.json")}
CLASSIFIER = {"cached": ("weights.safetensors",), "committed": ("log.csv", "summary.json")}
TABLES = (
    result("teacher/summary.json"),
    result("pairs/meta.json"),
    result("evaluator/summary.json"),
    *RUNS[1:],
    *(result(name) for name in ("evaluate", "relative", "activation", "cost")),
)
STAGES = {
    "data": Stage("equilab.data.images", cached=("",)),
    "evaluator": Stage("equilab.training.evaluator", reads=(DATA,), **CLASSIFIER),
    "teacher": Stage("equilab.training.teacher", family="edm", reads=(DATA,), optional=True, **TRAINED),
    "pairs": Stage("equilab.training.pairs", family="edm", reads=(TEACHER,), cached=("",), optional=True),
    "latents": Stage("equilab.data.latents", reads=(DATA, VAE), cached=("",), optional=True),
    "distill": Stage(
        "equilab.training.distill", jobs="seeds", family="network", reads=(PAIRS,), optional=True, **TRAINED
    ),
    "diffusion": Stage(
        "equilab.training.diffusion",
        jobs="seeds",
        family="network",
        reads=(DATA, result("latents")),
        params=("latents",),
        optional=True,
        **TRAINED,
    ),
    "features": Stage("equilab.training.features", reads=(DATA,), optional=True, **CLASSIFIER),
    "gan": Stage(
        "equilab.training.gan",
        jobs="seeds",
        family="gdd",
        reads=(DATA, TEACHER, result("features/weights.safetensors")),
        optional=True,
        **TRAINED,
    ),
    "consistency": Stage(
        "equilab.training.consistency",
        jobs="seeds",
        family="cd",
        reads=(DATA, TEACHER),
        optional=True,
        **TRAINED,
    ),
    "evaluate": Stage(
        "equilab.stages.evaluate",
        jobs="of",
        family="of",
        reads=(DATA, EVALUATOR, PAIRS, Read("${item.of}"), VAE),
        cached=("samples.npy",),
        committed=("metrics.json", "sweep.csv", "curve.csv", "iterates.npz"),
        params=("latents",),
    ),
    "relative": Stage(
        "equilab.stages.relative",
        reads=(DATA, EVALUATOR, result("evaluate")),
        committed=("relative.csv",),
        optional=True,
    ),
    "activation": Stage(
        "equilab.stages.activation",
        family="runs",
        reads=RUNS,
        committed=("activation.csv",),
        optional=True,
    ),
    "cost": Stage("equilab.stages.cost", family="runs", reads=RUNS, committed=("cost.csv", "cost.json")),
    "claims": Stage(
        "equilab.stages.claims",
        reads=TABLES,
        committed=("../claims.csv", "../claims.md", "../measured.csv", "../measured.md"),
        params=("comparisons",),
    ),
    "notebook": Stage(
        "equilab.stages.notebook",
        jobs="entries",
        reads=(
            Read("${study.root}/notebooks/${item.run}.ipynb"),
            *TABLES,
            Read("results/claims.csv", "claims"),
            Read("results/measured.csv", "claims"),
        ),
        committed=("",),
        params=("comparisons",),
    ),
    "report": Stage(
        "equilab.stages.report",
        reads=(
            result("notebook"),
            Read("results/claims.md", "claims"),
            Read("results/measured.md", "claims"),
        ),
        committed=("index.html",),
    ),
}
OTHERS = ("study", "comparisons")  # sections that are no stage's


class Replicate(NamedTuple):
    """A job of a stage: its run and the run's seed, None where the stage has none."""

    run: str | None = None
    seed: int | None = None

    @property
    def item(self) -> str:
        """Its name among the jobs of its stage."""
        return str(self.run) if self.seed is None else f"{self.run}-{self.seed}"


class Seeds(Params):
    """What the entry of a run that is trained says of its seeds."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)]

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} holds a seed twice; give each once")
        return seeds


@dataclass(frozen=True)
class Sections:
    """The sections of a study's params as YAML gives them, and what they say of runs, seeds and families."""

    values: Mapping[str, Any]
    where: str  # the file, for messages
    folder: Path  # the study's, absolute

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
                named, of = self.trained(entry.get("of"), f"{path}.of")
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
        return {("seed" if key == "seeds" else key): value for key, value in entry.items()} | {
            "seed": job.seed
        }, path

    def families(self, stage: str, run: str | None = None) -> list[str]:
        """Return the names of the families whose code a stage runs, or one of its runs.

        Raises: UserError naming the key that names none.
        """
        said = STAGES[stage].family
        if said in ("", *FAMILIES):
            return [said] if said else []
        entry, path = self.entry(stage, run)
        if said == "network":
            name = config.mapping(entry.get("network"), f"{path}.network").get("kind")
            if name not in FAMILIES:
                raise UserError(f"{path}.network.kind: {name!r} is unknown{nearest(name, FAMILIES)}")
            return [name]
        named = [entry.get("of")] if said == "of" else entry.get("runs")
        if not isinstance(named, list):
            raise UserError(f"{path}.runs: expected a list, got {named!r}")
        found = [self.families(*self.trained(name, f"{path}.{said}")) for name in named]
        return list(dict.fromkeys(name for names in found for name in names))


def read(params: Path) -> Sections:
    """Return the sections of a params file.

    Raises: UserError if it is missing, or no YAML of sections.
    """
    return Sections(config.read(params), str(params), params.absolute().parent)


def listings(sections: Sections, stage: str, run: str | None = None) -> dict[str, str]:
    """Return the files that say which code a job runs, by their paths from the study's folder: that of its stage, or of its
    notebook, and those of its families."""
    if stage == "notebook":
        modules = code.of_script(cells(notebook_file(sections, str(run))))
        return {f"{CODE}/notebook/{run}.txt": code.listing([STAGES[stage].module, *modules])}
    found = {f"{CODE}/{stage}.txt": code.listing([STAGES[stage].module])}
    for name in sections.families(stage, run):
        found[f"{CODE}/families/{name}.txt"] = code.listing([FAMILIES[name].partition(":")[0]])
    return found


def notebook_file(sections: Sections, name: str) -> Path:
    """Return the path of a notebook of the repository."""
    return sections.folder / sections.study.root / "notebooks" / f"{name}.ipynb"


def cells(notebook: Path) -> str:
    """Return the code of a notebook.

    Raises: UserError if it is missing or damaged.
    """
    try:
        found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return "\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{notebook} is missing or no notebook ({error!r}); restore it") from None


def code_files(sections: Sections) -> dict[str, str]:
    """Return the content of the folder that the stage `code` writes, by paths from the study's folder: which code each job
    runs, and what params say of it."""
    found = {f"{CODE}/params.json": json.dumps(frozen_params(sections), indent=1) + "\n"}
    for stage in filter(sections.has, STAGES):
        for run in dict.fromkeys(job.run for job in sections.jobs(stage)):
            found |= listings(sections, stage, run)
    return found


def frozen_params(sections: Sections) -> dict[str, Any]:
    """Return the params of a study, as JSON has them, with an entry for each job of a stage that has runs."""
    params = dict(sections.values)
    for stage in filter(sections.has, STAGES):
        if STAGES[stage].jobs != "one":
            params[stage] = {job.item: sections.frozen(stage, job)[0] for job in sections.jobs(stage)}
    return json.loads(json.dumps(params, default=str))


def waves(sections: Sections) -> list[list[str]]:
    """Return the names that DVC has for what a study makes, in three lists, each of which needs only what those before it
    make: the stages without runs on which runs depend, in their order; runs that are trained; runs that are evaluated."""
    present = [name for name in STAGES if sections.has(name)]
    first = [name for name in present if STAGES[name].jobs == "one" and not _reads_runs(name)]
    found = [first]
    for jobs in ("seeds", "of"):
        names = [name for name in present if STAGES[name].jobs == jobs]
        found.append([f"{name}@{job.item}" for name in names for job in sections.jobs(name)])
    return found


def _reads_runs(stage: str) -> bool:
    return any(STAGES[read.of].jobs != "one" for read in STAGES[stage].reads if read.of)


def dvc(sections: Sections) -> dict[str, Any]:
    """Return the content of dvc.yaml for a study: each job is a stage of DVC's, named `distill@get-m-0`."""
    root = "${study.root}"
    sources = [f"{root}/{file.relative_to(code.PACKAGE.parent).as_posix()}" for file in code.files()]
    notebooks = [f"{root}/notebooks/{run}.ipynb" for run in _runs(sections, "notebook")]
    stages = {
        "code": {
            "cmd": "python -m equilab code",
            "deps": ["params.yaml", *sources, *notebooks],
            "outs": [_kept(CODE)],
        }
    }
    for stage in filter(sections.has, STAGES):
        if STAGES[stage].jobs == "one":
            stages[stage] = _entry(sections, stage)
        else:
            items = {job.item: _item(sections, stage, job) for job in sections.jobs(stage)}
            stages[stage] = {"foreach": items, "do": _entry(sections, stage)}
    return {"stages": stages}


def _runs(sections: Sections, stage: str) -> list[str]:
    return sections.runs(stage) if sections.has(stage) else []


def _item(sections: Sections, stage: str, job: Replicate) -> dict[str, Any]:
    """Return what tells one job of a stage from the others, `${item}` in its entry."""
    item: dict[str, Any] = {"run": job.run}
    if job.seed is not None:
        item["seed"] = job.seed
    if STAGES[stage].family:
        (item["family"],) = sections.families(stage, job.run)
    if STAGES[stage].jobs == "of":
        entry, path = sections.entry(stage, job.run)
        named, run = sections.trained(entry["of"], f"{path}.of")
        item["of"] = folder_of(named, run, job.seed if run else None).as_posix()
    return item


def _entry(sections: Sections, stage: str) -> dict[str, Any]:
    """Return a stage as DVC has it, or all its jobs, with `${item}` for what tells one from the others."""
    about = STAGES[stage]
    command, out, section, threads = f"python -m equilab {stage}", f"results/{stage}", stage, "threads"
    if about.jobs != "one":
        command, out = f"{command} ${{item.run}}", f"{out}/${{item.run}}"
        section, threads = f"{section}.${{key}}", "run_threads"
    if about.jobs in ("seeds", "of"):
        command, out = f"{command} --seed ${{item.seed}}", f"{out}/${{item.seed}}"
    keys = ["study.device", "study.seed", f"study.{threads}", section]
    keys += [key for key in about.params if sections.values.get(key)]
    reads = [read.path for read in about.reads if not read.of or sections.has(read.of)]
    entry: dict[str, Any] = {
        "cmd": command,
        "deps": [*_code(sections, stage), *reads],
        "params": [{f"{CODE}/params.json": keys}],
    }
    if about.cached:
        entry["outs"] = [_kept(os.path.normpath(f"{out}/{file}")) for file in about.cached]
    committed = [os.path.normpath(f"{out}/{file}") for file in about.committed]
    for kind, is_metric in (("plots", False), ("metrics", True)):
        if named := [file for file in committed if file.endswith(".json") == is_metric]:
            entry[kind] = [_kept(file, cache=False) for file in named]
    return entry


def _code(sections: Sections, stage: str) -> list[str]:
    """Return the files on which a stage depends as on its code: `listings` of all its jobs."""
    if STAGES[stage].jobs == "entries":
        return [f"{CODE}/{stage}/${{item.run}}.txt"]
    families = sections.families(stage) if STAGES[stage].jobs == "one" else ["${item.family}"]
    return [f"{CODE}/{stage}.txt", *(f"{CODE}/families/{name}.txt" for name in families)]


def _kept(path: str, **options: Any) -> dict[str, Any]:
    return {path: {**options, "persist": True}}


def text(sections: Sections) -> str:
    """Return dvc.yaml for a study."""
    return HEADER + yaml.safe_dump(dvc(sections), sort_keys=False, width=120)


def write(study: Path) -> Path:
    """Write dvc.yaml beside a study's params.yaml, and the settings of DVC; return its path.

    Every study is a repository of DVC's own, which at each start reads all graphs of a repository, for seconds.
    """
    root = code.PACKAGE.parent
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        files.write(study / name, (root / name).read_text(encoding="utf-8"))
    files.write(study / "dvc.yaml", text(read(study / "params.yaml")))
    return study / "dvc.yaml"
