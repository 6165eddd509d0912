"""A study's graph on this machine: as many jobs at a time as it has GPUs, or cores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from equilab.cluster import done
from equilab.cluster.resources import SECTION, resources_of
from equilab.cluster.tasks import Task
from equilab.cluster.worker import failure, start
from equilab.core.config import UserError
from equilab.core.progress import bar
from equilab.graph import STAGES
from equilab.study import Sections

# nothing runs beside stages that measure seconds; nor beside notebooks, whose kernels may wait for ever on a busy machine
ALONE = ("cost", "notebook")
PATIENCE = 30  # seconds that a job has to end in when it is told to


class Share(NamedTuple):
    """What a job has of the machine while it runs."""

    processes: int
    cores: int
    gpus: list[str]  # as CUDA_VISIBLE_DEVICES names them


@dataclass
class Machine:
    """What is free of a machine."""

    cores: int
    gpus: list[str]
    places: int  # for jobs

    def take(self, share: Share) -> None:
        """Let a job have its share."""
        self.cores, self.places = self.cores - share.cores, self.places - 1
        self.gpus = [gpu for gpu in self.gpus if gpu not in share.gpus]

    def give_back(self, share: Share) -> None:
        """Take the share of a job that has ended."""
        self.cores, self.places = self.cores + share.cores, self.places + 1
        self.gpus = sorted(self.gpus + share.gpus)


def this_machine(sections: Sections, at_once: int | None) -> Machine:
    """Return this machine, all of it free, with places for `at_once` jobs; by default for one a GPU or core.

    Raises: UserError if the study wants a GPU and there is none.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus() if sections.study.device != "cpu" else []
    if sections.study.device == "cuda" and not gpus:
        raise UserError("study.device is cuda, but torch sees no GPU; set it to auto or cpu")
    return Machine(cores, gpus, at_once or max(cores, len(gpus)))


def _gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(number) for number in range(count)]


def share_of(sections: Sections, task: Task, machine: Machine) -> Share:
    """Return what a job gets of a whole machine: one GPU where there are any, or as many of those as `resources` say."""
    processes, gpus = 1, min(1, len(machine.gpus))
    if sections.values.get(SECTION) is not None and machine.gpus:
        gpus = min(resources_of(sections, task.stage).gpus, len(machine.gpus))
    if STAGES[task.stage].distributed:
        processes = max(1, gpus)
    threads = getattr(sections.study, STAGES[task.stage].threads_key)
    cores = machine.cores if task.stage in ALONE else min(processes * threads, machine.cores)
    return Share(processes, cores, machine.gpus[:gpus])


class Running(NamedTuple):
    """A job that runs."""

    process: subprocess.Popen
    share: Share
    made_from: str


@dataclass
class Work:
    """What waits, what runs, and what came of the rest."""

    waiting: dict[str, Task]
    running: dict[str, Running] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # a sentence each
    skipped: list[str] = field(default_factory=list)  # they need what failed


def run(sections: Sections, tasks: dict[str, Task], at_once: int | None) -> list[str]:
    """Run jobs, each as soon as those that it needs are done; return a sentence for each that failed.

    A job whose results are of what it would be made from is not run. Interrupted, it ends those that run; each goes on
    where it was when it is run again.
    """
    machine = this_machine(sections, at_once)
    shares = {name: share_of(sections, task, machine) for name, task in tasks.items()}
    work = Work(dict(tasks))
    with bar(sections.study.name, len(tasks), unit="job") as progress, _ended(work):
        while work.waiting or work.running:
            for name in [name for name in list(work.waiting) if _is_ready(work, name)]:
                share = _free(machine, shares[name])
                if share is None:
                    continue  # without looking whether it is done, which reads files
                if done.is_done(sections, tasks[name]):
                    del work.waiting[name]
                    progress.update()
                else:
                    _begin(sections, work, work.waiting.pop(name), share)
                    machine.take(share)
                    on = f" on GPU {', '.join(share.gpus)}" if share.gpus else ""
                    progress.write(f"{name} begins{on}")
            for name in [name for name, each in work.running.items() if each.process.poll() is not None]:
                machine.give_back(work.running[name].share)
                progress.write(_end(work, tasks[name]))
                progress.update()
            time.sleep(0.05)
    skipped = [f"{', '.join(work.skipped)}: not run, since what they need failed"] if work.skipped else []
    return [*work.failed.values(), *skipped]


def _is_ready(work: Work, name: str) -> bool:
    """Return whether all that a job needs is there; one that needs what failed is skipped."""
    needs = set(work.waiting[name].needs)
    if needs & {*work.failed, *work.skipped}:
        del work.waiting[name]
        work.skipped.append(name)
        return False
    return not needs & {*work.waiting, *work.running}


def _free(machine: Machine, share: Share) -> Share | None:
    """Return such a share of what is free now; None if that is too little."""
    if not machine.places or share.cores > machine.cores or len(share.gpus) > len(machine.gpus):
        return None
    return share._replace(gpus=machine.gpus[: len(share.gpus)])


def _begin(sections: Sections, work: Work, task: Task, share: Share) -> None:
    torchrun = ["--standalone", "--nproc-per-node", str(share.processes)] if share.processes > 1 else []
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {}
    before = done.made_from(sections, task)
    work.running[task.name] = Running(start(task, torchrun, environment), share, before)


def _end(work: Work, task: Task) -> str:
    """Note how a job ended; return it in words."""
    ended = work.running.pop(task.name)
    if status := ended.process.returncode:
        work.failed[task.name] = failure(task, status)
        return work.failed[task.name]
    done.record(task, ended.made_from)
    return f"{task.name} is done"


@contextlib.contextmanager
def _ended(work: Work) -> Iterator[None]:
    """End the jobs that still run when this process ends, or is told to."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for each in work.running.values():
            each.process.terminate()
        for each in work.running.values():
            try:
                each.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                each.process.kill()
