"""Any trained run as a function from noise to images, with its counted cost."""

from __future__ import annotations

from equilab.sampling.generators import KINDS, Generator, batches, describe, load, load_first, seeds_of
from equilab.sampling.runs import Inputs, Run, Samples, solver_statistics

__all__ = [
    "KINDS",
    "Generator",
    "Inputs",
    "Run",
    "Samples",
    "batches",
    "describe",
    "load",
    "load_first",
    "seeds_of",
    "solver_statistics",
]
