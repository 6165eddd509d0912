"""The jobs of a study, and which of them each one needs."""

from __future__ import annotations

import graphlib
from pathlib import Path
from typing import NamedTuple

from equilab.core.config import UserError, nearest
from equilab.core.job import folder_of
from equilab.graph import STAGES, Read
from equilab.study import Replicate, Sections


class Task(NamedTuple):
    """One job of a study."""

    stage: str
    job: Replicate
    needs: tuple[str, ...]  # the names of the tasks whose results it reads

    @property
    def name(self) -> str:
        """Its name, as DVC has it: distill@get-m-0, notebook-scaling."""
        return self.job.name(self.stage)

    @property
    def command(self) -> list[str]:
        """The arguments of `python -m equilab` that run it."""
        return self.job.arguments(self.stage)

    @property
    def outputs(self) -> list[Path]:
        """The files and folders that it writes, from the study's folder."""
        return STAGES[self.stage].outputs(folder_of(self.stage, *self.job))


def tasks_of(sections: Sections) -> dict[str, Task]:
    """Return all jobs of a study by their names, each after those that it needs.

    Raises: UserError if runs are each other's teachers.
    """
    found = {}
    for stage in filter(sections.has, STAGES):
        for job in sections.jobs(stage):
            task = Task(stage, job, _needs(sections, stage, job))
            found[task.name] = task
    sorter = graphlib.TopologicalSorter({name: task.needs for name, task in found.items()})
    try:
        return {name: found[name] for name in sorter.static_order()}
    except graphlib.CycleError as error:
        circle = ", ".join(dict.fromkeys(error.args[1]))
        raise UserError(
            f"{sections.where}: {circle}: each waits for another; let one have the teacher `teacher`"
        ) from None


def _needs(sections: Sections, stage: str, job: Replicate) -> tuple[str, ...]:
    names = [name for read in STAGES[stage].reads for name in _writers(sections, stage, job, read)]
    for read in sections.named(stage, job.run):
        names += [each.name(read.stage) for each in sections.jobs(read.stage) if each.run == read.run]
    return tuple(dict.fromkeys(names))


def _writers(sections: Sections, stage: str, job: Replicate, read: Read) -> list[str]:
    """Return the names of the jobs that write what one reads."""
    if read.path.startswith("${item.") and STAGES[stage].source:
        named, run = sections.source(stage, str(job.run))
        return [Replicate(run, job.seed if run else None).name(named)]
    # what no stage writes, or what params of the stage itself name, such as the VAE of latents
    if read.of in ("", stage) or not sections.has(read.of):
        return []
    return [each.name(read.of) for each in sections.jobs(read.of)]


def asked(tasks: dict[str, Task], names: list[str]) -> dict[str, Task]:
    """Return the tasks of these stages or of these names, and what they need; all tasks if no name is given.

    Raises: UserError if there is no such stage or task.
    """
    if not names:
        return tasks
    stages = {task.stage for task in tasks.values()}
    wanted: set[str] = set()
    for name in names:
        if name not in stages and name not in tasks:
            raise UserError(f"the study has no stage or job {name!r}{nearest(name, [*stages, *tasks])}")
        wanted |= {each for each, task in tasks.items() if name in (each, task.stage)}
    for name in reversed(tasks):  # what needs others comes after them
        if name in wanted:
            wanted |= set(tasks[name].needs)
    return {name: task for name, task in tasks.items() if name in wanted}
