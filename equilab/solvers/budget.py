"""Iteration budgets: how the applications of a fixed-point map are spread over the steps of a sampler.

Steps are in the order of sampling, the noisiest first. Every step gets 1 iteration or more, and all of them
together exactly the total; whether they are all applied is the solver's: tolerance 0 applies them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from equilab.solvers.record import Solution

FLOOR = torch.finfo(torch.float32).eps  # relative residuals below this are rounding

Trace = tuple[float, ...]  # relative residual of a batch after each iteration that a step was given


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


def adaptive(traces: Sequence[Trace], steps: int, total: int) -> int:
    """Return the iterations of the next step, given the traces of the steps before it: more where residuals are large.

    If an iteration divides residuals by exp(rate), a step with n iterations and residual r would have needed
    n + log(r) / rate of them for residual 1. The next step is taken to need as many more than the mean of the
    steps so far as the last one did. That is added to an equal share of what is left, rounded, and held
    between 1 and twice the share, and to what leaves 1 for each step to come; the last step gets the rest.
    The rate is that of all traces together; while it is unknown, not above 0, or the last residual not
    finite, the next step gets the share.

    Raises: ValueError if total < steps.
    Source: FPDM, section 3.3, names adaptive allocation; this rule is ours.
    """
    _check(steps, total)
    left = steps - len(traces)
    remaining = total - sum(len(trace) for trace in traces)
    if left == 1:
        return remaining
    share = remaining / left
    count = round(share + _further_need(traces))
    return min(max(count, 1), int(2 * share), remaining - left + 1)


def _further_need(traces: Sequence[Trace]) -> float:
    """Return how many iterations more than the mean of the steps so far the last one needed for residual 1."""
    finite = [trace for trace in traces if math.isfinite(sum(trace))]
    lasts = [math.log(max(trace[-1], FLOOR)) for trace in finite]
    fall = sum(math.log(max(trace[0], FLOOR)) - last for trace, last in zip(finite, lasts))
    iterations = sum(len(trace) - 1 for trace in finite)  # in which the residuals fell
    if fall <= 0 or iterations == 0 or not math.isfinite(sum(traces[-1])):
        return 0.0
    needs = [len(trace) + last * iterations / fall for trace, last in zip(finite, lasts)]
    return needs[-1] - sum(needs) / len(needs)


def trace(solution: Solution) -> Trace:
    """Return the relative residual after each iteration asked for, mean over the samples that have one."""
    residuals = solution.residuals
    return tuple(residuals.where(residuals.isfinite(), torch.nan).nanmean(0).tolist())  # (K,)


def _check(steps: int, total: int) -> None:
    if total < steps:
        raise ValueError(
            f"total is {total}, but each of {steps} steps needs an iteration; give {steps} or more"
        )


FIXED = {"constant": constant, "increasing": increasing, "decreasing": decreasing}


@dataclass(frozen=True)
class Budget:
    """So many iterations in total for an image; called with the traces of the steps made, it returns those of the next.

    "constant", "increasing" and "decreasing" depend on the number of steps alone; "adaptive" on the residuals
    of the batch too, so its images depend on what they are sampled with.

    Raises: when called, ValueError for a total smaller than the number of steps.
    Source: FPDM, section 3.3 and figure 3.
    """

    kind: str  # "constant", "increasing", "decreasing" or "adaptive"
    total: int  # iterations, summed over the steps

    def __call__(self, traces: Sequence[Trace], steps: int) -> int:
        """Return the iterations of the step after those in `traces`, one of `steps`."""
        if self.kind == "adaptive":
            return adaptive(traces, steps, self.total)
        return FIXED[self.kind](steps, self.total)[len(traces)]
