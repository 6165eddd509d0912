"""What DVC is told of a study: its graph (dvc.yaml), and which code and params each job depends on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from equilab.core import code, files
from equilab.core.config import UserError, mapping
from equilab.core.job import folder_of
from equilab.core.stages import GENERATORS
from equilab.graph import STAGES
from equilab.study import CODE, Replicate, Sections, listings, read

HEADER = """# Written by `python -m equilab graph` from params.yaml. A stage depends on the modules that it imports, on its part of
# params.yaml and on the results that it reads. `study.root` leads to the repository. The stage `code` checks params.yaml, and
# writes the modules of each stage as one file and the params of each job as another, on which the stages depend: DVC reads a
# list of modules, and YAML, anew for every run, for seconds. What a stage wrote stays until it writes anew (persist). At the end
# stand the files that `dvc metrics` shows, and the charts of `dvc plots`.
"""
METRICS = "results/metrics"


def code_files(sections: Sections) -> dict[str, str]:
    """Return the content of the folder that the stage `code` writes, by paths from the study's folder."""
    found: dict[str, str] = {}
    for stage in filter(sections.has, STAGES):
        for job in sections.jobs(stage):
            found |= files_of(sections, stage, job)
    return found


def files_of(sections: Sections, stage: str, job: Replicate) -> dict[str, str]:
    """Return what a job depends on besides the results of others, by paths: the code that it runs, and what params say of it."""
    study = sections.section("study")
    params = {"study": {key: study.get(key) for key in ("device", "seed", STAGES[stage].threads_key)}}
    params[stage] = sections.frozen(stage, job)[0]
    params |= {name: sections.values[name] for name in STAGES[stage].params if name in sections.values}
    if path := sections.published(stage).get(job.run):
        file = sections.folder / path
        params["weights"] = files.sha256_of(file) if file.is_file() else None
    text = json.dumps(params, indent=1, default=str) + "\n"
    return {_params_file(stage, job.item): text, **listings(sections, stage, job.run)}


def _params_file(stage: str, item: str) -> str:
    return f"{CODE}/params/{f'{stage}@{item}' if item else stage}.json"


def waves(sections: Sections) -> list[list[str]]:
    """Return the names that DVC has for what a study makes, in lists, each of which needs only what those before it make: the
    stages without runs on which runs depend, in their order; then runs that are trained, those of which none is the teacher of
    another in a list; last, runs that are evaluated.

    Raises: UserError if runs are each other's teachers.
    """
    present = [name for name in STAGES if sections.has(name)]
    first = [name for name in present if STAGES[name].jobs == "one" and not _reads_runs(name)]
    found = [first]
    for jobs in ("seeds", "of"):
        left = [(name, job) for name in present if STAGES[name].jobs == jobs for job in sections.jobs(name)]
        while left:
            runs = {(name, job.run) for name, job in left}
            ready = [(name, job) for name, job in left if _source(sections, name, job) not in runs]
            if not ready:
                names = ", ".join(dict.fromkeys(f"{name}.{job.run}" for name, job in left))
                raise UserError(
                    f"{sections.where}: {names}: each waits for another as its teacher; let one have the teacher `teacher`"
                )
            found.append([job.name(name) for name, job in ready])
            left = [each for each in left if each not in ready]
    return found


def _source(sections: Sections, stage: str, job: Replicate) -> tuple[str, str | None] | None:
    """Return the stage and the run whose results a job reads, if its entry names one."""
    return sections.source(stage, job.run) if STAGES[stage].source else None


def _reads_runs(stage: str) -> bool:
    """Return whether a stage reads what runs make, or what a stage makes that does."""
    needed = [of for _, of in STAGES[stage].reads if of not in ("", stage)]
    return STAGES[stage].names != "" or any(STAGES[of].jobs != "one" or _reads_runs(of) for of in needed)


def graph(sections: Sections) -> dict[str, Any]:
    """Return the content of dvc.yaml for a study: each job is a stage of DVC's, named `distill@get-m-0`, `notebook-scaling`."""
    root = "${study.root}"
    sources = [f"{root}/{file.relative_to(code.PACKAGE.parent).as_posix()}" for file in code.files()]
    notebooks = [f"{root}/notebooks/{run}.ipynb" for run in _runs(sections, "notebook")]
    weights = [
        path for name in filter(sections.has, GENERATORS) for path in sections.published(name).values()
    ]
    stages = {
        "code": {
            "cmd": "python -m equilab code",
            "deps": ["params.yaml", *sources, *notebooks, *dict.fromkeys(weights)],
            "outs": [_kept(CODE)],
        }
    }
    for stage in filter(sections.has, STAGES):
        if STAGES[stage].jobs == "one":
            stages[stage] = _entry(sections, stage)
        elif STAGES[stage].jobs == "entries":
            stages |= {job.name(stage): _entry(sections, stage, job.run) for job in sections.jobs(stage)}
        else:
            items = {job.item: _item(sections, stage, job) for job in sections.jobs(stage)}
            stages[stage] = {"foreach": items, "do": _entry(sections, stage)}
    return {
        "stages": stages,
        "metrics": [METRICS] if sections.has("claims") else [],
        "plots": plots(sections),
    }


def plots(sections: Sections) -> list[dict[str, Any]]:
    """Return the charts of `dvc plots`, by images seen: the loss of what is trained, and distances along training, the runs of a
    stage in one chart, the first seed of each."""
    evaluator = sections.values.get("evaluator") or {}
    distance = "fid_train" if evaluator.get("network") is None else "fd_train"
    found = []
    for stage in filter(sections.has, STAGES):
        if "log.csv" in STAGES[stage].committed:
            logs = {folder / "log.csv": "loss" for folder in _first_seeds(sections, stage)}
            found.append(_chart(f"{stage}: loss", logs, "loss"))
    for stage in filter(sections.has, GENERATORS):
        curves = {folder / "curve.csv": distance for folder in _evaluated(sections, stage)}
        if curves:
            found.append(_chart(f"{stage}: {distance}", curves, "distance to training images"))
    return found


def _first_seeds(sections: Sections, stage: str) -> list[Path]:
    """Return the results folders of a stage's runs, of each that of its first seed."""
    first: dict[str | None, Replicate] = {}
    for job in sections.jobs(stage):
        first.setdefault(job.run, job)
    return [folder_of(stage, *job) for job in first.values()]


def _evaluated(sections: Sections, stage: str) -> list[Path]:
    """Return the folders of `evaluate` of those runs of a stage that keep snapshots."""
    names = [run for run in _runs(sections, "evaluate") if sections.source("evaluate", run)[0] == stage]
    kept = []
    for name in names:
        entry = sections.entry(*sections.source("evaluate", name))[0]
        if (entry.get("optimisation") or {}).get("snapshots"):
            kept.append(folder_of("evaluate", name, sections.seeds("evaluate", name)[0]))
    return kept


def _chart(title: str, columns: dict[Path, str], label: str) -> dict[str, Any]:
    """Return a chart of columns of CSV files over the images seen, as DVC has it."""
    y = {path.as_posix(): column for path, column in columns.items()}
    words = {"title": title, "x_label": "images seen", "y_label": label, "template": "runs"}
    return {title: {"x": "nimg", "y": y, **words}}


def _runs(sections: Sections, stage: str) -> list[str]:
    return sections.runs(stage) if sections.has(stage) else []


def _item(sections: Sections, stage: str, job: Replicate) -> dict[str, Any]:
    """Return what tells one job of a stage from the others, `${item}` in its entry."""
    item: dict[str, Any] = {"run": job.run}
    if job.seed is not None:
        item["seed"] = job.seed
    if STAGES[stage].family:
        (item["family"],) = sections.families(stage, job.run)
    if STAGES[stage].source:
        named, run = sections.source(stage, job.run)
        item[STAGES[stage].source] = folder_of(named, run, job.seed if run else None).as_posix()
    return item


def _entry(sections: Sections, stage: str, run: str | None = None) -> dict[str, Any]:
    """Return a stage, or a run of one without seeds, as DVC has it; of a stage with seeds all jobs, with `${item}` for what tells one
    from the others."""
    about = STAGES[stage]
    command, out, item = f"python -m equilab {stage}", f"results/{stage}", ""
    if run is not None:
        command, out, item = f"{command} {run}", f"{out}/{run}", run
    if about.jobs in ("seeds", "of"):
        command = f"{command} ${{item.run}} --seed ${{item.seed}}"
        out, item = f"{out}/${{item.run}}/${{item.seed}}", "${key}"
    reads = [path for path, of in about.reads if not of or sections.has(of)]
    reads += [read.path for read in sections.named(stage, run)]
    needed = [
        _params_file(stage, item),
        *_code(sections, stage, run),
        *reads,
        *files_of_studies(sections, stage),
    ]
    entry = {"cmd": command, "deps": list(dict.fromkeys(needed))}
    cached = [_kept(os.path.normpath(f"{out}/{file}")) for file in about.cached]
    committed = [_kept(os.path.normpath(f"{out}/{file}"), cache=False) for file in about.committed]
    return {**entry, "outs": cached + committed}


def files_of_studies(sections: Sections, stage: str) -> list[str]:
    """Return the files that a stage reads of the studies that its section lists."""
    if not STAGES[stage].of_studies:
        return []
    entry, path = sections.entry(stage, None)
    folders = mapping(entry.get("studies"), f"{path}.studies").values()
    return [os.path.normpath(f"{folder}/{file}") for folder in folders for file in STAGES[stage].of_studies]


def _code(sections: Sections, stage: str, run: str | None) -> list[str]:
    """Return the files on which a stage depends as on its code: `listings` of all its jobs, and its notebook."""
    if STAGES[stage].jobs == "entries":
        return [f"{CODE}/{stage}/{run}.txt", f"${{study.root}}/notebooks/{run}.ipynb"]
    families = sections.families(stage) if STAGES[stage].jobs == "one" else ["${item.family}"]
    return [f"{CODE}/{stage}.txt", *(f"{CODE}/families/{name}.txt" for name in families)]


def _kept(path: str, **options: Any) -> dict[str, Any]:
    return {path: {**options, "persist": True}}


def text(sections: Sections) -> str:
    """Return dvc.yaml for a study."""
    return HEADER + yaml.safe_dump(graph(sections), sort_keys=False, width=120)


def write(study: Path) -> Path:
    """Write dvc.yaml beside a study's params.yaml, and the settings of DVC; return its path.

    Every study is a repository of DVC's own, which at each start reads all graphs of a repository, for seconds. Settings that
    are there, which may name a remote, stay.
    """
    root = code.PACKAGE.parent
    for name in (".dvc/config", ".dvc/.gitignore", ".dvc/plots/runs.json", ".dvcignore"):
        if name != ".dvc/config" or not (study / name).exists():
            files.write(study / name, (root / name).read_text(encoding="utf-8"))
    files.write(study / "dvc.yaml", text(read(study / "params.yaml")))
    return study / "dvc.yaml"


def require_recorded(sections: Sections, stage: str, jobs: list[Replicate]) -> None:
    """Refuse to run jobs for DVC otherwise than it records them: with params or code that changed after its stage `code`.

    Raises: UserError with what to do.
    """
    if "DVC_STAGE" not in os.environ:
        return  # a command of its own
    for job in jobs:
        for path, current in files_of(sections, stage, job).items():
            if not Path(path).exists() or Path(path).read_text(encoding="utf-8") != current:
                raise UserError(
                    f"{path} is not of the code and params.yaml as they are; run `dvc repro code` first"
                )
