"""Iteration budgets: how the applications of a fixed-point map are spread over the steps of a sampler.

Steps are in the order of sampling, the noisiest first. Every step gets 1 iteration or more, and all of them
together exactly the total; whether they are all applied is the solver's: tolerance 0 applies them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from equilab.solvers.record import Solution


def constant(steps: int, total: int) -> list[int]:
    """Return the iterations of each step, all alike; where they cannot be, the odd ones are evenly spread.

    Raises: ValueError if total < steps.
    """
    _check(steps, total)
    return [total * (i + 1) // steps - total * i // steps for i in range(steps)]


def increasing(steps: int, total: int) -> list[int]:
    """Return the iterations of each step, more and more of them towards the image.

    They lie on a line from half their mean to one and a half times it (from 1, if the mean is below 2),
    rounded by largest remainder.

    Raises: ValueError if total < steps.
    Source: FPDM, section 3.3 and figure 3, which gives no numbers.
    Differs: the published code has nearly this line, each step within 1, but misses some totals, and its
        names are swapped: its "increasing" gives most iterations to the noisiest steps, where the sampling
        starts.
    """
    _check(steps, total)
    rise = min(total, 2 * (total - steps))  # of the line, from the first step to the last, times their number
    denominator = 2 * steps**2
    numerators = [2 * steps * total + (2 * i + 1 - steps) * rise for i in range(steps)]
    counts = [numerator // denominator for numerator in numerators]
    largest_first = sorted(range(steps), key=lambda i: numerators[i] % denominator, reverse=True)
    for i in largest_first[: total - sum(counts)]:
        counts[i] += 1
    return counts


def decreasing(steps: int, total: int) -> list[int]:
    """Return the iterations of each step, most of them at the start, the noisiest: `increasing` reversed.

    Raises: ValueError if total < steps.
    Source: FPDM, section 3.3 and figure 3.
    """
    return increasing(steps, total)[::-1]


def adaptive(
    solutions: Sequence[Solution], steps: int, total: int
) -> tuple[int | Int64[Tensor, b], float | Float32[Tensor, b]]:
    """Return the iterations of the next step at most, and the relative residual at which it stops, of each sample.

    The first step gets an equal share. A later one goes on until its own residual is no more than the geometric
    mean of those that the steps before it were left with, or until one iteration is left for each step to come.
    The last step gets the rest. Each sample is counted by itself, so its image does not depend on others.

    Raises: ValueError if total < steps.
    Source: FPDM, section 3.3, names adaptive allocation and gives no rule; this one is ours.
    """
    _check(steps, total)
    if not solutions:
        return total // steps, 0.0
    left = total - sum(solution.iterations for solution in solutions)  # (B,)
    to_come = steps - len(solutions) - 1
    if to_come == 0:
        return left, 0.0
    residuals = torch.stack([solution.last_residual for solution in solutions])  # (steps before, B)
    positive = residuals.clamp_min(torch.finfo(residuals.dtype).tiny)
    return left - to_come, positive.log().mean(0).exp()


def _check(steps: int, total: int) -> None:
    if total < steps:
        raise ValueError(
            f"total is {total}, but each of {steps} steps needs an iteration; give {steps} or more"
        )


FIXED = {"constant": constant, "increasing": increasing, "decreasing": decreasing}


@dataclass(frozen=True)
class Budget:
    """So many iterations in total for an image; called with the solutions so far, it returns what the next step may spend.

    "constant", "increasing" and "decreasing" depend on the number of steps alone, and "adaptive" on the residuals of
    each sample; a list gives the iterations of each step.

    Raises: when called, ValueError for a total smaller than the number of steps, or a list that does not fit.
    Source: FPDM, section 3.3 and figure 3.
    """

    # "constant", "increasing", "decreasing", "adaptive", or the iterations of each step
    kind: str | Sequence[int]
    total: int  # iterations, summed over the steps

    def __call__(self, solutions: Sequence[Solution], steps: int) -> dict[str, Any]:
        """Return the fields of a `Solver` that the step after those solved has, one of `steps`."""
        if self.kind == "adaptive":
            iterations, tolerance = adaptive(solutions, steps, self.total)
            return {"iterations": iterations, "tolerance": tolerance}
        return {"iterations": self.fixed(steps)[len(solutions)]}

    def fixed(self, steps: int) -> Sequence[int]:
        """Return the iterations of each step of a budget that does not adapt.

        Raises: ValueError as when called.
        """
        if isinstance(self.kind, str):
            return FIXED[self.kind](steps, self.total)
        if len(self.kind) != steps or sum(self.kind) != self.total:
            raise ValueError(
                f"budget lists {sum(self.kind)} iterations for {len(self.kind)} steps, "
                f"but {steps} steps share {self.total}; change the list"
            )
        return self.kind
