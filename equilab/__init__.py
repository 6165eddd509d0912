"""equilab: one-step and equilibrium generators on one teacher, one data path, one metric and one cost currency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from equilab.tables import Results

__version__ = "0.1.0"


def results(folder: Path | str = "results") -> Results:
    """Return a study's results folder as tidy tables: runs, settings, snapshots, costs.

    Raises: UserError if it holds no evaluated run.
    """
    from equilab.tables import results  # pandas, needed for this alone

    return results(folder)


def published_numbers(name: str) -> pd.DataFrame:
    """Return a table of the papers' numbers by its name, such as "get_runs" (the CSV files of equilab/claims).

    Raises: UserError naming the nearest, if there is none of that name.
    """
    from equilab.claims import published

    return published(name)
