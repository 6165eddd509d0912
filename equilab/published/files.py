"""Which files are published: their names, where they are, and how large what is read of them is (files.csv)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from equilab.core.config import near

TABLE = Path(__file__).with_name("files.csv")


class PublishedFile(NamedTuple):
    """A row of the table."""

    file: str
    family: str
    place: str  # an address, or where one is linked
    megabytes: int  # of its weights, in float32; a file with the state of the training is larger
    content: str


def published_files() -> list[PublishedFile]:
    """Return what is known to be published."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [PublishedFile(**{**row, "megabytes": int(row["megabytes"])}) for row in rows]


def absent(path: Path) -> str:
    """Return the sentence about a file of weights that is not there: where it is published, its size, where to put it."""
    known = {each.file.lower(): each for each in published_files()}
    if (found := known.get(path.name.lower())) is None:
        meant = near(path.name.lower(), known, 0.3)
        hint = f"; the nearest is {known[meant].file!r}" if meant else ""
        return f"{path} is not there; docs/checkpoints.md says which files are published, and where{hint}"
    return (
        f"{path} is not there: {found.file}, {found.megabytes:,} MB of weights, is published at {found.place}; place it "
        "there, or correct the path"
    )
