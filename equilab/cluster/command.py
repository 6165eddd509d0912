"""`python -m equilab submit [STAGE or JOB ...] [--cluster local|slurm]`: a study's graph, here or on a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from equilab.check import checked, write_code
from equilab.cluster import done
from equilab.cluster.tasks import Task, asked, tasks_of
from equilab.cluster.worker import LOGS
from equilab.core.files import locked
from equilab.study import Sections


def command(arguments: list[str]) -> int:
    """Run what is not done of a study's graph, or of some of its stages with what they need; return the exit status.

    Raises: UserError with a sentence for each mistake in params, or if the jobs cannot be started.
    """
    given = _arguments(arguments)
    sections = checked(given.params)
    write_code(sections)
    tasks = asked(tasks_of(sections), given.stages)
    with locked("submit"):
        done.adopt(sections, tasks)
        left = _left(sections, tasks)
        if not left:
            print("everything that was asked for is done")
            return 0
        if given.dry_run:
            _print(sections, left, given.cluster)
            return 0
        if given.cluster == "slurm":
            return _on_slurm(sections, tasks, left)
        return _here(sections, tasks, left, given.jobs)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="equilab submit", description=__doc__)
    parser.add_argument("stages", metavar="STAGE", nargs="*", help="stages or jobs; by default all")
    parser.add_argument(
        "--cluster", choices=("local", "slurm"), default="local", help="where; by default here"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=_positive, help="here, run at most so many jobs at a time"
    )
    parser.add_argument(
        "--params", metavar="FILE", type=Path, default=Path("params.yaml"), help="the study's params"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the jobs, or SLURM's scripts, alone")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _left(sections: Sections, tasks: dict[str, Task]) -> dict[str, Task]:
    """Return the jobs that are not done, and those that need their results."""
    left: dict[str, Task] = {}
    for name, task in tasks.items():
        if any(need in left for need in task.needs) or not done.is_done(sections, task):
            left[name] = task
    return left


def _print(sections: Sections, left: dict[str, Task], cluster: str) -> None:
    from equilab.cluster.slurm import scripts

    print(*(scripts(sections, left) if cluster == "slurm" else left), sep="\n")


def _here(sections: Sections, tasks: dict[str, Task], left: dict[str, Task], at_once: int | None) -> int:
    from equilab.cluster import local

    failed = local.run(sections, left, at_once)
    for sentence in failed:
        print(f"equilab: {sentence}", file=sys.stderr)
    if failed:
        print("equilab: the same command runs what is left", file=sys.stderr)
        return 1
    print(f"all is done, the logs are in {LOGS}; {_for_dvc(sections, tasks)}")
    return 0


def _on_slurm(sections: Sections, tasks: dict[str, Task], left: dict[str, Task]) -> int:
    from equilab.cluster import slurm

    submitted, queued = slurm.submit(sections, left)
    for name, number in submitted.items():
        print(f"{number}\t{name}")
    also = f", {len(queued)} were in the queue already" if queued else ""
    print(f"{len(submitted)} jobs are submitted{also}; `squeue --me` shows them, their logs are in {LOGS}")
    print(f"When all are done, {_for_dvc(sections, tasks)}")
    return 0


def _for_dvc(sections: Sections, tasks: dict[str, Task]) -> str:
    """Return what makes DVC take results in: it is told of stages, or of single jobs where not all of a stage are done."""
    everything = tasks_of(sections)
    part = {task.stage for name, task in everything.items() if name not in tasks}
    names = dict.fromkeys(name if task.stage in part else task.stage for name, task in tasks.items())
    return (
        f"let DVC take the results in: `dvc commit --force{' '.join(['', 'code', *names]) if part else ''}`"
    )
