"""Any trained run as a function from noise to images, with its counted cost."""

from __future__ import annotations

from equilab.sampling.generators import (
    KINDS,
    Generator,
    batches,
    describe,
    from_network,
    load,
    load_first,
    seeds_of,
)
from equilab.sampling.runs import Inputs, Outputs, Run, solver_statistics
from equilab.sampling.samples import Samples

__all__ = [
    "KINDS",
    "Generator",
    "Inputs",
    "Outputs",
    "Run",
    "Samples",
    "batches",
    "describe",
    "from_network",
    "load",
    "load_first",
    "seeds_of",
    "solver_statistics",
]
