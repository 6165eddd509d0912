"""One job as a process of its own: how it is started, where its log goes, how it ends."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from equilab.cluster.tasks import Task
from equilab.core.config import UserError

LOGS = Path(".equilab/logs")  # a file a job, in the study's folder
CAN_FORK = sys.platform == "linux"  # macOS's own libraries do not stand it


def log_of(task: Task, node: int = 0) -> Path:
    """Return the file to which a job writes what it says; of several nodes each has its own."""
    return LOGS / (f"{task.name}.log" if node == 0 else f"{task.name}.node-{node}.log")


def start(
    task: Task,
    torchrun: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    node: int = 0,
    imported: bool = False,
) -> BaseProcess:
    """Start a job in the current folder, which is the study's: by torchrun where options of it are given, or else as one
    process, whatever `study.launch` says.

    `imported`: as a fork of a process, kept for that, which has imported what jobs need, and computed nothing. Imports take
    seconds, and a study of many small jobs as long for them as for its networks.

    Raises: UserError if its log cannot be written.
    """
    words = [*task.command, *([] if torchrun else ["--alone"])]
    path = log_of(task, node).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as log:
            log.write(f"$ python -m equilab {' '.join(words)}\n")
    except OSError as error:
        raise UserError(
            f"{log_of(task, node)} cannot be written ({error.strerror}); free disk space, change its permissions, or remove "
            "what is in its way"
        ) from None
    context = _context_of_forks() if imported and CAN_FORK else multiprocessing.get_context("spawn")
    process = context.Process(target=_work, args=(words, torchrun, dict(environment or {}), path, Path.cwd()))
    process.start()
    return process


def _context_of_forks() -> BaseContext:
    """Return what starts processes as forks of one that has imported what jobs need, which is begun if it does not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["equilab.cluster.imported"])
    resource_tracker.ensure_running()  # which multiprocessing needs; where it begins, signals are let through
    # Ctrl-C is for the jobs and for this process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _work(
    words: list[str], torchrun: Sequence[str], environment: dict[str, str], log: Path, folder: Path
) -> None:
    """Do a job in this process, which has been started for it, and end as its command does."""
    from tqdm import tqdm

    from equilab.launching import processes

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_others, daemon=True).start()
    # its own is shared among processes, and left behind by one that is killed
    tqdm.set_lock(threading.RLock())
    os.environ |= environment
    os.chdir(folder)
    with open(log, "ab") as file:
        for output in (1, 2):  # what it prints, and its errors
            os.dup2(file.fileno(), output)
    if torchrun:
        sys.exit(processes(" ".join(["torchrun", *torchrun, "-m", "equilab"]), words))
    sys.argv = ["equilab", *words]
    runpy.run_module("equilab", run_name="__main__")  # as `python -m equilab` does


def _end_with_others() -> None:
    """End this process when the one that asked for it ends, in whatever way, or the one that it was forked from."""
    forked_from = os.getppid()
    while multiprocessing.parent_process().is_alive() and os.getppid() == forked_from:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def failure(task: Task, status: int, node: int = 0) -> str:
    """Return the sentence about a job that ended with a status other than 0."""
    path = log_of(task, node)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    said = [line for line in lines if line.startswith("equilab: ")][-1:]
    how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    told = f": {said[0].removeprefix('equilab: ')}" if said else ""
    return f"{task.name} {how}{told} (log: {path})"
