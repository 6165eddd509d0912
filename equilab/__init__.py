"""equilab: one-step and equilibrium generators on one teacher, one data path, one metric and one cost currency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from equilab.sampling import Generator, Samples
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


def load(of: str, seed: int = 0, study: Path | str = ".") -> Generator:
    """Return a trained run of a study with its weights, by its folder below results/: "distill/get-m", "teacher".

    Raises: UserError if the weights are missing or damaged.
    """
    from equilab.sampling import load  # torch, which takes seconds

    return load(of, seed, study=study)


def sample(generator: Generator, count: int = 16, seed: int = 0, setting: Any = None) -> Samples:
    """Return images (B, C, H, W) in -1..1 of a trained run, at a setting of `equilab.sampling.settings`, by default that at which the
    study scores it first; with the solutions of an implicit network.

    Raises: UserError if no setting is given and the study has none for the run.
    """
    return generator.make(count, seed, setting)
