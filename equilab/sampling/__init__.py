"""Any trained run as a function from noise to images, with its counted cost."""

from __future__ import annotations

from equilab.sampling.generators import KINDS, Generator, batches, describe, first_seed, load, load_first
from equilab.sampling.runs import Inputs, Run, Samples, solver_statistics

__all__ = [
    "KINDS",
    "Generator",
    "Inputs",
    "Run",
    "Samples",
    "batches",
    "describe",
    "first_seed",
    "load",
    "load_first",
    "solver_statistics",
]
