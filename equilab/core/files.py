"""What is kept on disk: files written in full or not at all, their checksums, scratch folders, locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from equilab.core.config import UserError, plain


def write(path: Path, content: bytes | str) -> None:
    """Write a file in full or not at all: what was there stays until the new content is on disk.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    content = content.encode() if isinstance(content, str) else content
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


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def whole(path: Path) -> bool:
    """Return whether a file is there, with the sha256 that was written beside it."""
    stamp = path.with_suffix(".sha256")
    return path.exists() and stamp.exists() and stamp.read_bytes() == sha256_of(path).encode()


def link(path: Path, folder: Path) -> None:
    """Put a file into a folder as well, without a second copy where the disk allows it."""
    (folder / path.name).unlink(missing_ok=True)
    try:
        os.link(path, folder / path.name)
    except OSError:  # another disk
        shutil.copyfile(path, folder / path.name)


def remove_others(folder: Path, names: Collection[str], pattern: str) -> None:
    """Remove the files of a folder that fit `pattern` and are not among `names`: those of a stage as it was before."""
    for path in folder.glob(pattern):
        if path.name not in names:
            path.unlink()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a stage's run, for one process at a time (the first one of a distributed run holds it for all).

    Raises: UserError if another process holds it, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(".equilab") / "locks" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); change its permissions, or what is in its way"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working on {name}; wait for it or stop it") from None
        yield


@contextlib.contextmanager
def scratch(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Give a folder for unfinished work; removed when the work is finished, unless `keep`.

    Raises: UserError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); change its permissions, or what is in its way"
        ) from None
    yield folder
    if not keep and os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)


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
