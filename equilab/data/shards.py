"""Sets too large for one file: rows in shards, made by any number of processes, continued where a stage was killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from equilab.core.files import is_intact, link, on_one_disk, require_disk, write, write_array
from equilab.core.job import Job
from equilab.core.machine import barrier, rank, total, world
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
    # the first process looks, before one is written, and all go by what it sees
    there = total(torch.tensor([rank() == 0 and is_intact(path) for path in shards], dtype=torch.int64))
    missing = [path for path, intact in zip(shards, there.tolist()) if not intact]
    rows = sum(len(shards[path]) for path in missing)
    linked = {} if on_one_disk(folder, job.out) else {job.out: count * row_bytes}
    require_disk({folder: rows * row_bytes, **linked})
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
    """Link shards into the folder of results; return their checksums by their names."""
    checksums = {}
    for path in shards:
        link(path, out)
        checksums[path.name] = path.with_suffix(".sha256").read_text(encoding="utf-8")
    return checksums
