"""Which jobs are done: what each was made from, and what it made, by checksums, in a record a job."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from equilab import dvc
from equilab.cluster.tasks import Task
from equilab.core.config import digest
from equilab.core.files import sha256_of, write_json
from equilab.graph import STAGES
from equilab.study import Sections, notebook_file

RECORDS = Path(".equilab/done")  # a file a job, in the study's folder
UNKNOWN = ""  # what results are made from that are of another code, or of other params


def is_done(sections: Sections, task: Task) -> bool:
    """Return whether the results of a job are those that it made from what params, code and other results are now."""
    record = _record(task.name)
    if record is None or record["made_from"] != made_from(sections, task):
        return False
    return record["outputs"] == _checksum(task.outputs)


def record(task: Task, before: str) -> None:
    """Note that a job is done; `before` is what `made_from` said when it began."""
    write_json(RECORDS / f"{task.name}.json", {"made_from": before, "outputs": _checksum(task.outputs)})


def made_from(sections: Sections, task: Task) -> str:
    """Return a digest of all that a job is made from: its code, its params, the results of others, and other files."""
    needed = {}
    for name in task.needs:
        there = _record(name)
        needed[name] = there and there["outputs"]
    files = {str(path): _checksum([path]) for path in _other_files(sections, task)}
    return digest(dvc.files_of(sections, task.stage, task.job), needed, files)


def adopt(sections: Sections, tasks: dict[str, Task]) -> None:
    """Note what DVC holds to be up to date as done, and of other results what they are."""
    changed = _changed(tasks)
    for task in tasks.values():
        if not all(path.exists() for path in task.outputs):
            continue
        if task.name not in changed and not is_done(sections, task):
            record(task, made_from(sections, task))
        elif _record(task.name) is None:
            record(task, UNKNOWN)


def _changed(tasks: dict[str, Task]) -> Collection[str]:
    """Return the names of the jobs that DVC would run, all of them where it cannot tell."""
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True, encoding="utf-8"
    )
    try:
        return json.loads(status.stdout)
    except ValueError:
        if Path(".dvc").exists():
            said = (status.stderr.strip().splitlines() or ["it says nothing"])[-1]
            print(f"equilab: DVC cannot say which results are up to date: {said}", file=sys.stderr)
        return tasks


def _record(name: str) -> dict[str, str] | None:
    try:
        found = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
        return {"made_from": found["made_from"], "outputs": found["outputs"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None  # as good as none


def _other_files(sections: Sections, task: Task) -> list[Path]:
    """Return what a job reads that no other job of the study writes."""
    found = []
    if task.stage == "notebook":
        found.append(notebook_file(sections, str(task.job.run)))
    if sections.has("latents") and any(read.of == "latents" for read in STAGES[task.stage].reads):
        found.append(Path(sections.section("latents")["vae"]))
    return [*found, *map(Path, dvc.files_of_studies(sections, task.stage))]


def _checksum(paths: Iterable[Path]) -> str:
    """Return a checksum of files, and of all files in folders; what is not there counts as well."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.as_posix()}\n".encode())
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in filter(Path.is_file, files):
            total.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return total.hexdigest()
