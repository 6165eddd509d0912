"""What is kept on disk: files written in full or not at all, their checksums, scratch folders, locks."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from equilab.core.config import UserError, plain
from equilab.core.job import Job
from equilab.core.process import is_first

SCRATCH = Path(".equilab/scratch")  # of unfinished work, a folder a job


def write(path: Path, content: bytes | str) -> None:
    """Write a file in full or not at all: what was there stays until the new content is on disk.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
            if not _alive(int(left.name.split(".")[-2])):
                left.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free disk space or change its permissions"
        ) from None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON, atomically."""
    write(path, json.dumps(plain(value), indent=1, sort_keys=True) + "\n")


def write_array(path: Path, array: np.ndarray) -> str:
    """Write one `.npy` file atomically; return the sha256 of the file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a `.npz` file atomically: the same bytes whatever the version of Python, unlike by numpy's own writer."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array))
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
    write(path, buffer.getvalue())


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with the union of their columns, atomically; numbers in 9 digits, missing ones empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column) for column in columns]
        writer.writerow([f"{value:.9g}" if isinstance(value, float) else value for value in values])
    write(path, buffer.getvalue())


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def is_intact(path: Path) -> bool:
    """Return whether a file is there, with the sha256 that was written beside it."""
    stamp = path.with_suffix(".sha256")
    return path.exists() and stamp.exists() and stamp.read_bytes() == sha256_of(path).encode()


def replace(source: Path, target: Path) -> None:
    """Move a file or a folder to `target`, in place of what is there, in full or not at all, also onto another file system."""
    try:
        _rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _rename(_copy_beside(source, target), target)
        shutil.rmtree(source) if source.is_dir() else source.unlink()


def _rename(source: Path, target: Path) -> None:
    """Rename a file, or a folder, which cannot take the place of another: that is put aside until it can be removed."""
    if not target.is_dir():
        os.replace(source, target)
        return
    aside = target.with_name(f".{target.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


def _copy_beside(source: Path, target: Path) -> Path:
    """Return a copy of a file or a folder beside `target`, on its file system, written to the disk."""
    copy = target.with_name(f".{target.name}.copy")
    if source.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
    else:
        shutil.copyfile(source, copy)
    for path in [copy, *copy.rglob("*")]:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return copy


def link(path: Path, folder: Path) -> None:
    """Put a file into a folder as well, without a second copy where the disk allows it."""
    target = folder / path.name
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another disk, or one without links
        os.replace(_copy_beside(path, target), target)


def remove_others(folder: Path, names: Collection[str], pattern: str) -> None:
    """Remove the files of a folder that fit `pattern` and are not among `names`: those of a stage as it was before."""
    for path in folder.glob(pattern):
        if path.name not in names:
            path.unlink()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a stage's run, for one process at a time (the first one of a distributed run holds it for all).

    The lock ends with the process, however that ends.

    Raises: UserError if another process holds it, or it cannot be written.
    """
    if not is_first():
        yield
        return
    path = Path(".equilab/locks") / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is working on {name}; wait for it or stop it") from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(
            f"{path} cannot be locked ({error}); change its permissions or what is in its way, or put the study on a "
            "file system that has locks (flock)"
        ) from None
    with held:
        yield


def abandoned(names: Collection[str]) -> list[Path]:
    """Return the folders of unfinished work that is of no job of these names."""
    return sorted(path for path in SCRATCH.glob("*") if path.name not in names)


@contextlib.contextmanager
def scratch(job: Job, identity: Mapping[str, str] | None = None, keep: bool = False) -> Iterator[Path]:
    """Give the folder of a job's unfinished work; removed when the work is finished, unless `keep`.

    `identity` is what the work depends on, part by part (see `equilab.core.machine.identity`). Work of the same identity
    goes on; of another it says which parts differ, is removed, and starts anew. Without an identity the folder is empty.

    Raises: UserError if it cannot be written.
    """
    folder = SCRATCH / job.name
    if is_first():
        try:
            _prepare(folder, identity)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}); change its permissions, or what is in its way"
            ) from None
    _wait()
    yield folder
    if is_first() and not keep:
        remove(folder)


def _prepare(folder: Path, identity: Mapping[str, str] | None) -> None:
    """Make the folder, without what was begun under another identity."""
    stamp = folder / "identity.json"
    before = None
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(stamp.read_text(encoding="utf-8"))
    if identity is None or before != identity:
        if identity is not None and isinstance(before, dict):
            differing = [key for key in identity if before.get(key) != identity[key]]
            print(
                f"equilab: {folder.name}: unfinished work was begun with other {', '.join(differing)}; it starts anew",
                file=sys.stderr,
            )
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if identity is not None:
        write_json(stamp, identity)


def remove(folder: Path) -> None:
    """Remove a folder that may be looked for again at any moment: it is there in full or not at all."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _wait() -> None:
    """Wait until all processes of a distributed run are here."""
    if "RANK" in os.environ:
        from equilab.core.machine import barrier  # brings torch along

        barrier()


def require_disk(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `folder`.

    Raises: UserError if they do not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free; free disk space first"
        )
