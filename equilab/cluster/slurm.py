"""A study's graph on SLURM, through submitit: one job a run, runs that are alike as an array, dependencies as in the graph."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilab.cluster import done
from equilab.cluster.resources import Resources, resources_of, torchrun_options
from equilab.cluster.tasks import Task, tasks_of
from equilab.cluster.worker import LOGS, failure, start
from equilab.core.config import UserError, read_json
from equilab.core.files import write_json
from equilab.graph import STAGES
from equilab.study import Sections, open_study

FOLDER = LOGS / "slurm"  # scripts, and what SLURM and submitit say
SUBMITTED = FOLDER / "submitted.json"  # the number that SLURM gave each job
WARNING = 60  # seconds before its time is over in which a job is told, and requeues itself
REQUEUES = 10_000


@dataclass(frozen=True)
class Command:
    """What a job on SLURM does: run one job of a study, in all processes of all its nodes. It is called on each node."""

    folder: Path  # the study's, absolute
    name: str  # of the job
    resources: Resources

    def __call__(self) -> None:
        """Run the job if it is not done.

        Raises: SystemExit if it fails.
        """
        from submitit import JobEnvironment

        os.chdir(self.folder)
        job = JobEnvironment()
        sections = open_study(Path("params.yaml"))
        task = tasks_of(sections)[self.name]
        if done.is_done(sections, task):
            print(f"{task.name} is done already")
            return
        torchrun = []
        if self.resources.nodes * self.resources.on_a_node > 1:
            torchrun = torchrun_options(self.resources, job.job_id, job.node, job.hostnames[0])
        before = done.made_from(sections, task)
        process = start(task, torchrun, node=job.node)
        process.join()
        status = process.exitcode
        if status == -signal.SIGUSR2:
            time.sleep(WARNING)  # submitit has the signal as well, and ends this process
        if status:
            sys.exit(f"equilab: {failure(task, status, job.node)}")
        if job.node == 0:
            done.record(task, before)

    def checkpoint(self) -> Any:
        """Return what a job that was told to end is to do when it begins again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(sections: Sections, tasks: dict[str, Task]) -> tuple[dict[str, str], dict[str, str]]:
    """Submit jobs, but for those that are in the queue; return the numbers that SLURM gave the new ones, and has of those.

    Raises: UserError if params do not say what a job takes, or SLURM refuses one.
    """
    queued = queue()
    submitted: dict[str, str] = {}
    left = {name: task for name, task in tasks.items() if name not in queued}
    for group in alike(left):
        numbers = {**queued, **submitted}
        needs = [numbers[name] for name in group[0].needs if name in numbers]
        resources = resources_of(sections, group[0].stage)
        executor = executor_for(sections, group, needs, submitit().SlurmExecutor)
        try:
            jobs = executor.submit_array([Command(sections.folder, task.name, resources) for task in group])
        except (OSError, RuntimeError, submitit().core.utils.FailedJobError) as error:
            said = " ".join(str(error).split()) or repr(error)
            raise UserError(
                f"SLURM refuses {group[0].stage}: {said}; correct resources.{group[0].stage} in {sections.where}, and "
                "submit again (what is in the queue stays)"
            ) from None
        submitted |= {task.name: job.job_id for task, job in zip(group, jobs)}
        write_json(SUBMITTED, {**queued, **submitted})
    return submitted, queued


def scripts(sections: Sections, tasks: dict[str, Task]) -> Iterator[str]:
    """Yield the scripts that `submit` would hand to sbatch; a job that is needed is named instead of numbered."""
    for group in alike(tasks):
        needs = [f"<{name}>" for name in group[0].needs if name in tasks]
        executor = executor_for(sections, group, needs, _anywhere())
        if len(group) > 1:
            executor.parameters["map_count"] = len(group)
        names = " ".join(task.name for task in group)
        text = executor._make_submission_file_text(executor._submitit_command_str, "")  # what submitit writes
        yield f"# {names}\n{text}"


def alike(tasks: dict[str, Task]) -> list[list[Task]]:
    """Return jobs in groups, each one array: those of a stage that need the same jobs; needed ones come first."""
    groups: dict[tuple, list[Task]] = {}
    for task in tasks.values():
        groups.setdefault((task.stage, task.needs), []).append(task)
    return list(groups.values())


def executor_for(sections: Sections, group: list[Task], needs: list[str], kind: type) -> Any:
    """Return submitit's executor for a group of jobs; `needs` are the numbers of those that must succeed before."""
    stage = group[0].stage
    resources = resources_of(sections, stage)
    name = group[0].name if len(group) == 1 else stage
    executor = kind(FOLDER, max_num_timeout=REQUEUES)
    head = {
        "job_name": f"{sections.study.name}:{name}",
        "time": math.ceil(60 * resources.hours),
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": resources.gpus or None,
        "mem": f"{math.ceil(1024 * resources.memory)}MB",
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "dependency": ":".join(["afterok", *needs]) if needs else None,
        "exclusive": STAGES[stage].measures or None,
    }
    executor.update_parameters(
        **{key: value for key, value in head.items() if value is not None},
        signal_delay_s=WARNING,
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=1"],  # one node that ends ends all
        additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes"},
    )
    return executor


def queue() -> dict[str, str]:
    """Return the numbers of the study's jobs that are waiting or running, by their names.

    Raises: UserError if SLURM does not answer.
    """
    try:
        known = read_json(SUBMITTED) if SUBMITTED.exists() else {}
        listed = subprocess.run(
            ["squeue", "--noheader", "--array", "--format", "%i"], capture_output=True, text=True, check=True
        ).stdout.split()
    except FileNotFoundError:
        raise UserError(
            "there is no SLURM here (no command squeue); use --cluster local, or --dry-run"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"SLURM does not answer: {' '.join(error.stderr.split())}") from None
    return {name: number for name, number in known.items() if number in listed}


def submitit() -> Any:
    """Return the package submitit.

    Raises: UserError if it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--cluster slurm needs the package submitit; run `pip install submitit`") from None
    return submitit


def _anywhere() -> type:
    """Return submitit's executor for machines without SLURM, which only writes scripts."""

    class Executor(submitit().SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    return Executor
