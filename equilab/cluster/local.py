"""A study's graph on this machine: as many jobs at a time as it has GPUs, or cores."""

from __future__ import annotations

import contextlib
import graphlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from equilab.cluster import done
from equilab.cluster.resources import SECTION, resources_of
from equilab.cluster.tasks import Task
from equilab.cluster.worker import failure, start
from equilab.core import code
from equilab.core.config import UserError, digest
from equilab.core.files import sha256_of
from equilab.core.progress import bar
from equilab.graph import STAGES
from equilab.study import Sections

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

    def free(self, share: Share) -> Share | None:
        """Return such a share of what is free now; None if that is too little."""
        if not self.places or share.cores > self.cores or len(share.gpus) > len(self.gpus):
            return None
        return share._replace(gpus=self.gpus[: len(share.gpus)])

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
    cores = machine.cores if STAGES[task.stage].measures else min(processes * threads, machine.cores)
    return Share(processes, cores, machine.gpus[:gpus])


class Running(NamedTuple):
    """A job that runs."""

    process: BaseProcess
    share: Share
    made_from: str


def run(sections: Sections, tasks: dict[str, Task], at_once: int | None) -> list[str]:
    """Run jobs, each as soon as those that it needs are done; return a sentence for each that failed.

    A job whose results are of what it would be made from is not run. Interrupted, it ends those that run; each goes on
    where it was when it is run again.
    """
    machine = this_machine(sections, at_once)
    shares = {name: share_of(sections, task, machine) for name, task in tasks.items()}
    order = graphlib.TopologicalSorter({name: tasks.keys() & {*task.needs} for name, task in tasks.items()})
    order.prepare()
    running: dict[str, Running] = {}
    failed: dict[str, str] = {}  # a sentence each
    left, ready = list(tasks), [*order.get_ready()]
    code_before = _code()
    with bar(sections.study.name, len(tasks), unit="job") as progress, _ended(running):
        while ready or running:
            # what needs most cores goes first, while they are free
            for name in sorted(ready, key=lambda name: shares[name].cores, reverse=True):
                share = machine.free(shares[name])
                if share is None:
                    continue  # without looking whether it is done, which reads files
                ready.remove(name)
                left.remove(name)
                if done.is_done(sections, tasks[name]):
                    order.done(name)
                    progress.update()
                    continue
                try:
                    running[name] = _begun(sections, tasks[name], share, imported=_code() == code_before)
                except UserError as error:
                    failed[name] = f"{name}: {error}"
                    progress.write(failed[name])
                    progress.update()
                    continue
                machine.take(share)
                on = f" on GPU {', '.join(share.gpus)}" if share.gpus else ""
                progress.write(f"{name} begins{on}")
            for name in [name for name, each in running.items() if each.process.exitcode is not None]:
                ended = running.pop(name)
                machine.give_back(ended.share)
                if status := ended.process.exitcode:
                    failed[name] = failure(tasks[name], status)  # what needs it never gets ready
                else:
                    done.record(tasks[name], ended.made_from)
                    order.done(name)
                progress.write(failed.get(name, f"{name} is done"))
                progress.update()
            ready += order.get_ready()
            time.sleep(0.05)
    skipped = [f"{', '.join(left)}: not run, since what they need failed"] if left else []
    return [*failed.values(), *skipped]


def _begun(sections: Sections, task: Task, share: Share, imported: bool) -> Running:
    """Start a job; `imported`: the code is still that of which a process with all imports is kept."""
    torchrun = ["--standalone", "--nproc-per-node", str(share.processes)] if share.processes > 1 else []
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)}
    before = done.made_from(sections, task)
    can_fork = imported and not (torchrun or share.gpus or STAGES[task.stage].measures)
    return Running(start(task, torchrun, environment, imported=can_fork), share, before)


def _code() -> str:
    """Return a digest of the files of the package as they are now."""
    return digest({str(path): sha256_of(path) for path in code.files()})


@contextlib.contextmanager
def _ended(running: dict[str, Running]) -> Iterator[None]:
    """End the jobs that still run when this process ends, or is told to."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for each in running.values():
            each.process.terminate()
        for each in running.values():
            each.process.join(PATIENCE)
            each.process.kill()
