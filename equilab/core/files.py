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
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from equilab.core.config import UserError, plain
from equilab.core.job import Job
from equilab.core.process import is_first

SCRATCH = Path(".equilab/scratch")  # of unfinished work, a folder a job
LOCK_SECONDS = 1.0  # one who only looks whether a job is at work holds its lock for a moment


def write(path: Path, content: bytes | str) -> None:
    """Write a file in full or not at all: what was there stays until the new content is on disk.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes | str]) -> None:
    """Write files, all of them in full before the first takes the place of what was there.

    Raises: UserError if a folder cannot be written or the disk is full.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    path = None
    try:
        for path, content in contents.items():
            _write(path, temporary[path], content)
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as error:
        for left in temporary.values():
            with contextlib.suppress(OSError):
                left.unlink()
        raise _unwritable(path, error) from None


def _write(path: Path, temporary: Path, content: bytes | str) -> None:
    """Write the content of a file into another beside it, down to the disk."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in its place", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
        if not _alive(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    with open(temporary, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def _unwritable(path: Path, error: OSError) -> UserError:
    """Return what to say of a file or folder that cannot be written."""
    return UserError(
        f"{path} cannot be written ({error.strerror}); free disk space, change its permissions, or remove what is in its way"
    )


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


def new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """Make a `.npy` file of zeros, to be filled as it is mapped: the disk gives all of its space now, not as it is filled.

    Raises: UserError if there is too little.
    """
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # not on every system
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise _unwritable(path, error) from None


@contextlib.contextmanager
def publishing(out: Path, own: str = "") -> Iterator[Path]:
    """Give a folder for all that a stage writes, beside its results folder; when the work is done it takes that one's place.

    The results are the former ones until then, and where the work fails; there is no moment in which they are of both.
    What lies beside the former ones stays, unless its name fits the pattern `own`: that is the stage's. The first process
    alone moves anything.

    Raises: UserError if the folder cannot be written, before any work.
    """
    out = Path(os.path.realpath(out)) if out.is_symlink() else out  # the link stays
    fresh = out.with_name(f".{out.name}.new")
    if not is_first():
        yield fresh
        return
    aside = out.with_name(f".{out.name}.removed")
    try:
        _clear(out, fresh, aside)
        fresh.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(Path(error.filename or out), error) from None
    try:
        yield fresh
        _keep_others(out, fresh, own)
        _swap(fresh, out, aside)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _clear(out: Path, fresh: Path, aside: Path) -> None:
    """Remove what a process left that was killed; if it was between the two moves of `_swap`, the former results are back."""
    if aside.exists() and not out.exists():
        os.replace(aside, out)
    for left in (fresh, aside):
        if left.exists():
            shutil.rmtree(left)


def _keep_others(out: Path, fresh: Path, own: str) -> None:
    """Copy what is in a results folder, and is not the stage's, into the one that takes its place."""
    for path in out.iterdir() if out.is_dir() else ():
        if (own and path.match(own)) or (fresh / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _swap(fresh: Path, out: Path, aside: Path) -> None:
    """Let a folder take the place of another, which is put aside, and then removed."""
    if not out.exists():
        os.replace(fresh, out)
        return
    os.replace(out, aside)
    try:
        os.replace(fresh, out)
    except BaseException:
        os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def left_over(results: Path) -> list[Path]:
    """Return the folders beside results that processes left which were killed while they wrote them."""
    return sorted(
        path for kind in ("new", "removed") for path in results.rglob(f".*.{kind}") if path.is_dir()
    )


def require_replaceable(paths: Iterable[Path]) -> None:
    """Check that results can take the places of what is there, before any work.

    Raises: UserError naming the first file or folder in the way, or that cannot be replaced.
    """
    for path in paths:
        if path.is_dir() and path.suffix:
            raise UserError(f"{path} is a folder where a file belongs; move it elsewhere")
        for each in [_existing(path.parent), path, *path.rglob("*")]:
            if each.exists() and not each.is_symlink() and _is_fixed(each):
                raise UserError(
                    f"{each} cannot be replaced; make it writable (chmod, chattr -i), or change what it lies on"
                )


def _is_fixed(path: Path) -> bool:
    """Return whether nobody may change a folder, or a file that its own permissions let be written: it is immutable, or on a
    disk that is only read."""
    if os.access(path, os.W_OK):
        return False
    return path.is_dir() or bool(path.stat().st_mode & stat.S_IWUSR)


def link(path: Path, folder: Path) -> None:
    """Put a file into a folder as well, without a second copy where the disk allows it."""
    target = folder / path.name
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


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
        held = FileLock(path).acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"another process is working on {name}; wait for it or stop it") from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(
            f"{path} cannot be locked ({error}); change its permissions or what is in its way, or put the study on a "
            "file system that has locks (flock)"
        ) from None
    with held:
        yield


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
            raise _unwritable(folder, error) from None
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


def require_disk(needed: Mapping[Path, int]) -> None:
    """Check that so many bytes fit on the disks of some folders.

    Raises: UserError if they do not.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        place, disk = _existing(folder), _disk(folder)
        disks[disk] = (place, size + disks.get(disk, (place, 0))[1])
    for place, size in disks.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise UserError(
                f"{place}: {size / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free; free disk space first"
            )


def on_one_disk(one: Path, other: Path) -> bool:
    """Return whether two folders lie on one disk, or would if they were there."""
    return _disk(one) == _disk(other)


def _disk(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
