"""The one way to ask for a fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from equilab.solvers.library import propose
from equilab.solvers.methods import anderson, iterate
from equilab.solvers.record import Record, Solution

METHODS = ("iterate", "anderson", "broyden", "torchdeq_iterate", "torchdeq_anderson")


@dataclass(frozen=True)
class Solver:
    """How z = f(z) is solved, per sample; calling it with f and a start returns a Solution.

    f(z, rows) -> z is applied to the samples that still run: `rows` is None (all) or their int64 indices.
    "iterate" is transparent to autograd, the other methods run without gradient (see `Gradient`).
    `iterations` and `tolerance` are of all samples, or tensors with those of each.

    Raises: ValueError for a field out of its range, or one that the method does not take.
    """

    method: str  # one of METHODS
    iterations: int | Tensor  # applications of f at most, 1 or more; of each sample (B,) int64
    tolerance: float | Tensor  # a sample stops at this relative residual, 0: never; of each sample (B,)
    pick: str  # "last" iterate, or the one of "lowest" absolute residual
    record: bool = False  # keep all iterates
    measure: bool = True  # compute residuals, and stop samples that converge or diverge
    memory: int | None = None  # Anderson: states combined, 2 or more
    mixing: float | None = None  # Anderson: weight of the residual, above 0, at most 1

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        each = isinstance(self.iterations, Tensor) or isinstance(self.tolerance, Tensor)
        if _least(self.iterations) < 1:
            raise ValueError(f"iterations is {self.iterations}; give 1 or more")
        if not _least(self.tolerance) >= 0:
            raise ValueError(f"tolerance is {self.tolerance}; give a relative residual of 0 or more")
        if self.pick not in ("last", "lowest"):
            raise ValueError(f"pick is {self.pick!r}; choose 'last' or 'lowest'")
        if not self.measure and (each or (self.method, self.tolerance, self.pick) != ("iterate", 0, "last")):
            raise ValueError(
                "measure is false; that needs method 'iterate', tolerance 0, pick 'last' and no tensors"
            )
        if not self.method.endswith("anderson"):
            if self.memory is not None or self.mixing is not None:
                raise ValueError(f"memory and mixing are given; leave them out for method {self.method!r}")
        elif self.memory is None or self.memory < 2:
            raise ValueError(f"memory is {self.memory}; Anderson acceleration needs 2 or more")
        elif self.mixing is None or not 0 < self.mixing <= 1:
            raise ValueError(f"mixing is {self.mixing}; Anderson acceleration needs above 0, at most 1")

    def __call__(self, f: Callable, init: Float[Tensor, "b n d"]) -> Solution:
        """Solve z = f(z) from `init` and return the Solution."""
        record = Record(init, self.iterations, self.tolerance, self.pick, self.record, self.measure)
        if self.method == "iterate":
            return iterate(f, record)
        if self.method == "anderson":
            return anderson(f, record, self.memory, self.mixing)
        return propose(self.method, f, record, self.memory, self.mixing)


def _least(value: int | float | Tensor) -> int | float | Tensor:
    return value.min() if isinstance(value, Tensor) else value
