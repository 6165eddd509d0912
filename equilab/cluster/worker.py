"""One job as a process of its own: how it is started, where its log goes, how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from equilab.cluster.tasks import Task
from equilab.core.config import UserError

LOGS = Path(".equilab/logs")  # a file a job, in the study's folder


def log_of(task: Task, node: int = 0) -> Path:
    """Return the file to which a job writes what it says; of several nodes each has its own."""
    return LOGS / (f"{task.name}.log" if node == 0 else f"{task.name}.node-{node}.log")


def start(
    task: Task,
    torchrun: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    node: int = 0,
) -> subprocess.Popen:
    """Start a job in the current folder, which is the study's: by torchrun where options of it are given, or else as one
    process, whatever `study.launch` says.

    Raises: UserError if its log cannot be written.
    """
    by = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    words = [*task.command, *([] if torchrun else ["--alone"])]
    command = [sys.executable, *by, "-m", "equilab", *words]
    path = log_of(task, node)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as log:
            log.write(f"$ python -m equilab {' '.join(words)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); change its permissions") from None


def failure(task: Task, status: int, node: int = 0) -> str:
    """Return the sentence about a job that ended with a status other than 0."""
    path = log_of(task, node)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    said = [line for line in lines if line.startswith("equilab: ")][-1:]
    how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    told = f": {said[0].removeprefix('equilab: ')}" if said else ""
    return f"{task.name} {how}{told} (log: {path})"
