"""All that is wrong with a study, before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from equilab import dvc
from equilab.claims.comparisons import check_comparisons
from equilab.cluster import resources
from equilab.core.config import UserError, failures, nearest
from equilab.core.files import write
from equilab.core.stages import GENERATORS
from equilab.graph import OTHERS, STAGES
from equilab.study import CODE, Replicate, Sections, config_of, job_of, module_of, read, refuse_other_code


def checked(params: Path) -> Sections:
    """Return the params of a study without mistakes, from its folder, which becomes the current one.

    Raises: UserError with a sentence for each mistake.
    """
    sections = read(params)
    os.chdir(sections.folder)
    if found := mistakes(sections):
        raise UserError("\n".join(found))
    return sections


def write_code(sections: Sections) -> None:
    """Write what the stages of a study depend on beside results: their modules, and the params of every job."""
    found = dvc.code_files(sections)
    for path, text in found.items():
        write(Path(path), text)
    for path in Path(CODE).rglob("*"):  # of stages and runs that there were before
        if path.is_file() and path.as_posix() not in found:
            path.unlink()


def mistakes(sections: Sections) -> list[str]:
    """Return what is wrong with a study, a sentence each: what can be read off its params, what only those who build the
    networks can tell and, if all params can be read, what they say together."""
    if found := failures([partial(_refuse_nothing, sections)]):
        return found
    readings = [partial(refuse_other_code, sections)]
    readings += [partial(_refuse_unknown, sections, name) for name in sections.values]
    read = failures([*readings, *_of_every_run(sections, _read)])
    planned = failures(_of_every_run(sections, _plan))
    together = [] if read else failures(partial(check, sections) for check in AGREEMENTS)
    return list(dict.fromkeys([*read, *planned, *together]))


def _of_every_run(sections: Sections, check: Callable[..., None]) -> Iterator[Callable[[], Any]]:
    """Yield a check (sections, stage, run) for every run of every stage."""
    for stage in STAGES:
        if sections.has(stage) or not STAGES[stage].optional:
            for run in _runs(sections, stage):
                yield partial(check, sections, stage, run)


def _runs(sections: Sections, stage: str) -> list[str | None]:
    try:
        return [None] if STAGES[stage].jobs == "one" else sections.runs(stage)
    except UserError:
        return [""]  # the section is none of runs; reading any says so


def _read(sections: Sections, stage: str, run: str | None) -> None:
    config_of(sections, stage, run)
    sections.families(stage, run)


def _plan(sections: Sections, stage: str, run: str | None) -> None:
    """Let a stage check a run, of which it builds the network without memory."""
    from equilab.core.machine import device_of  # torch, which what params say does not need

    seed = None if run is None else sections.seeds(stage, run)[0]
    job = job_of(sections, stage, Replicate(run, seed))
    device_of(job)
    config = job.read(stage, run, seed)
    module_of(stage, config).plan(config, job)


def _refuse_nothing(sections: Sections) -> None:
    if sections.absent and not any(map(sections.has, GENERATORS)):
        raise UserError(
            f"{sections.where}: none of the published files that it evaluates is there; place any of them in its folder, as "
            f"docs/checkpoints.md says ({', '.join(sections.absent)}), then run `python -m equilab graph`"
        )


def _refuse_unknown(sections: Sections, name: str) -> None:
    known = [*OTHERS, *STAGES]
    if name not in known:
        raise UserError(f"{sections.where}: unknown section {name!r}{nearest(name, known)}")


def _refuse_other_graph(sections: Sections) -> None:
    path = sections.folder / "dvc.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != dvc.text(sections):
        raise UserError(f"{path.name} is not what {sections.where} gives; run `python -m equilab graph`")


def _refuse_evaluated_twice(sections: Sections) -> None:
    entries: dict[tuple[str, str | None], str] = {}
    for run in sections.runs("evaluate"):
        source = sections.source("evaluate", run)
        if source in entries:
            raise UserError(
                f"{sections.where}: evaluate: {entries[source]} and {run} are of the same run; list its settings in one entry"
            )
        entries[source] = run


def _check_claimed(sections: Sections) -> None:
    from equilab.claims.claim import read_claims, refuse_mistyped  # bring scipy along, which takes a second

    declared = check_comparisons(sections.values, f"{sections.where}: ")
    refuse_mistyped(read_claims(), declared)


# of the graph, of resources, and of what is compared and claimed
AGREEMENTS = (dvc.waves, resources.check, _refuse_other_graph, _refuse_evaluated_twice, _check_claimed)
