"""The checked readers of results, one for each kind of file; JSON is read by `equilab.core.config.read_json`, tensors by
`equilab.models.checkpoint`. Whatever is wrong with a file is one sentence that names it and the command that writes it."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equilab.core.config import unreadable, unusable
from equilab.core.files import sha256_of

if TYPE_CHECKING:
    import pandas as pd


def read_array(path: Path, shape: tuple[int, ...], dtype: Any, sha256: str | None = None) -> np.ndarray:
    """Return the array of a `.npy` file, memory-mapped, which has this shape, type and size and, where it is given, this checksum.

    Raises: UserError if it is missing or damaged, or another than expected.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # one of a dozen types, by where it is damaged
        raise unreadable(path, error) from None
    size = path.stat().st_size
    if array.shape != shape or array.dtype != dtype or size != array.offset + array.nbytes:
        found, expected = f"{array.dtype} {array.shape} in {size} bytes", f"{np.dtype(dtype)} {shape}"
        raise unusable(path, f"holds {found}, expected is {expected}")
    if sha256 is not None and sha256_of(path) != sha256:
        raise unreadable(path, "its checksum is not the one that was written with it")
    return array


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Return the arrays of a `.npz` file, `names` among them.

    Raises: UserError if it is missing, damaged or lacks one.
    """
    try:
        with np.load(path) as file:
            found = dict(file)
    except Exception as error:  # a damaged archive raises what its damage leads to
        raise unreadable(path, error) from None
    for name in names:
        if name not in found:
            raise unreadable(path, f"it has no {name}")
    return found


def read_table(
    path: Path, columns: Collection[str] = (), numbers: Collection[str] = (), least: int = 0
) -> pd.DataFrame:
    """Return a table that a stage wrote as CSV, in full: with these columns, in `numbers` nothing but numbers where it has these
    columns, and at least so many rows.

    Raises: UserError if it is missing, damaged, or lacks any of that.
    """
    import pandas as pd  # takes a second

    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("it is cut short")
        rows = list(csv.reader(io.StringIO(text), strict=True))
        if len({len(row) for row in rows}) > 1:
            raise ValueError("its rows are of different lengths")
        table = pd.read_csv(io.StringIO(text)) if text.strip() else pd.DataFrame()
    except (OSError, ValueError, csv.Error) as error:
        raise unreadable(path, error) from None
    if len(table) < least:
        raise unreadable(path, f"it has {len(table)} rows of {least}")
    for name in columns:
        if name not in table:
            raise unreadable(path, f"it has no {name}")
    for name in numbers:
        if len(table) and name in table and not pd.api.types.is_numeric_dtype(table[name]):
            raise unreadable(path, f"{name} holds what is no number")
    return table
