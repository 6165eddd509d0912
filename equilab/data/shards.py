"""Sets too large for one file: rows in shards, made by any number of processes, continued where a stage was killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from equilab.core.files import is_intact, link, require_disk, write, write_array
from equilab.core.job import Job
from equilab.core.machine import barrier, rank, world
from equilab.core.progress import bar


def make(
    job: Job,
    folder: Path,
    name: str,
    rows_at: Callable[[np.ndarray], np.ndarray],
    *,
    count: int,
    shard: int,
    batch: int,
    row_bytes: int,
) -> list[Path]:
    """Write the rows 0..count-1 into files of `shard` rows and return their paths; files that are there already stay.

    `rows_at(indices)` returns the rows at up to `batch` indices. Each process makes its share of the files.

    Raises: UserError if there is too little disk.
    """
    shards = {}
    for start in range(0, count, shard):
        shards[folder / f"{name}-{start:010d}.npy"] = range(start, min(start + shard, count))
    missing = [path for path in shards if not is_intact(path)]
    barrier()  # before one is written: the same are missing to every process
    rows = sum(len(shards[path]) for path in missing)
    require_disk(folder, rows * row_bytes)
    with bar(job.name, count, done=count - rows) as progress:
        for path in missing[rank() :: world()]:
            blocks = []
            for start in shards[path][::batch]:
                indices = np.arange(start, min(start + batch, shards[path].stop))
                blocks.append(rows_at(indices))
                progress.update(len(indices))
            write(path.with_suffix(".sha256"), write_array(path, np.concatenate(blocks)))
    barrier()
    return list(shards)


def publish(shards: list[Path], out: Path) -> dict[str, str]:
    """Link shards into a results folder; return their checksums by their names."""
    out.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for path in shards:
        link(path, out)
        checksums[path.name] = path.with_suffix(".sha256").read_text(encoding="utf-8")
    return checksums
