"""Iteration budgets keep their totals, whatever the steps and the residuals."""

import math
import random
import re

import pytest
import torch

from equilab.solvers import Solver
from equilab.solvers.budget import Budget, adaptive, constant, decreasing, increasing, trace


def spent(budget, steps, traced):
    """Return the iterations of all steps, where `traced(step, iterations)` is the trace of a step."""
    traces = []
    for step in range(steps):
        traces.append(traced(step, budget(traces, steps)))
    return [len(each) for each in traces]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 40])
def test_budgets_that_do_not_adapt_keep_every_total_and_their_order(steps):
    for total in [*range(steps, 2 * steps + 8), 3 * steps + 1, 5 * steps, 6 * steps + 7]:
        level, rising, falling = (f(steps, total) for f in (constant, increasing, decreasing))
        for counts in (level, rising, falling):
            assert (len(counts), sum(counts), min(counts) >= 1) == (steps, total, True)
        assert max(level) - min(level) <= 1
        assert rising == sorted(rising) and falling == rising[::-1]
        for kind, counts in (("constant", level), ("increasing", rising), ("decreasing", falling)):
            assert spent(Budget(kind, total), steps, lambda _, count: (0.5,) * count) == counts


def test_the_lines_rise_from_about_half_the_mean_to_one_and_a_half_times_it():
    assert constant(4, 6) == [1, 2, 1, 2]
    assert increasing(4, 12) == [2, 3, 3, 4]
    assert increasing(5, 50) == [6, 8, 10, 12, 14]
    assert increasing(4, 6) == [1, 1, 2, 2]
    assert decreasing(100, 10_000) == [149 - i for i in range(50)] + [100 - i for i in range(50)]


def test_budgets_are_within_one_iteration_of_the_published_ones_whose_names_are_swapped(facts):
    """The published lists begin with the cleanest timestep, sampling with the noisiest; not all keep their total."""
    ours_of = {"increasing": decreasing, "decreasing": increasing, "fixed": constant}
    published = {name: entry for name, entry in facts["fpdm_iteration_allocation"].items() if name != "note"}
    missed = []
    for name, entry in published.items():
        steps, total, kind = re.fullmatch(r"steps(\d+)_budget(\d+)_(\w+)", name).groups()
        steps, total = int(steps), int(total)
        theirs = entry["list_index_order"][::-1]
        ours = ours_of[kind](steps, total)
        farthest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        assert sum(ours) == total, name
        assert farthest <= (0 if kind == "fixed" else 1), name
        if sum(theirs) != total:
            missed.append(name)
    assert missed == ["steps87_budget522_decreasing"]


DRAW = random.Random(0)
TRACES = {
    "uniform": lambda step, count: tuple(DRAW.random() for _ in range(count)),
    "of all magnitudes": lambda step, count: tuple(10.0 ** DRAW.uniform(-12, 6) for _ in range(count)),
    "zero": lambda step, count: (0.0,) * count,
    "not finite": lambda step, count: (math.inf if step % 2 else math.nan,) * count,
    "growing": lambda step, count: tuple(2.0**k for k in range(count)),
}


@pytest.mark.parametrize("residuals", TRACES)
@pytest.mark.parametrize("steps", [1, 2, 5, 13])
def test_an_adaptive_budget_keeps_every_total_whatever_the_residuals(residuals, steps):
    for total in range(steps, 9 * steps):
        counts = spent(Budget("adaptive", total), steps, TRACES[residuals])
        assert (len(counts), sum(counts), min(counts) >= 1) == (steps, total, True)


def contraction(start, rate):
    """Return traces of steps whose residuals begin at start(step) and fall by exp(-rate) an iteration."""
    return lambda step, count: tuple(start(step) * math.exp(-rate * k) for k in range(count))


def test_an_adaptive_budget_spreads_evenly_where_all_steps_are_alike():
    counts = spent(Budget("adaptive", 83), 20, contraction(lambda step: 0.3, 0.7))
    assert set(counts) == {4, 5}


def test_an_adaptive_budget_spends_where_residuals_are_large():
    traced = contraction(lambda step: 0.5 if 8 <= step < 16 else 0.02, 0.7)
    counts = spent(Budget("adaptive", 120), 24, traced)
    assert min(counts[9:16]) > max(counts[1:8] + counts[17:-1])
    largest = [max(traced(i, n[i])[-1] for i in range(24) if i != 8) for n in (counts, constant(24, 120))]
    assert largest[0] < 0.7 * largest[1]  # the step where they rise cannot know


def test_the_rule_of_the_adaptive_budget_is_the_one_described():
    traces = [(0.8, 0.4, 0.2), (1.6, 0.8, 0.4)]  # an iteration halves; the second step needs one more
    # 50 left for 10 steps, and half of one more than their mean, rounded
    assert adaptive(traces, 12, 56) == 5 + 1
    assert adaptive(traces[::-1], 12, 56) == 4
    assert adaptive(traces, 12, 2 + 6 + 10) == 2
    assert adaptive(traces, 3, 30) == 24
    assert adaptive([*traces, (409.6, 204.8, 102.4)], 12, 45) == 8  # at most twice the share, 4
    assert adaptive([(0.8,), (0.1,)], 4, 12) == 5  # no rate known
    assert adaptive([(0.1, 0.2), (0.1, 0.4)], 4, 12) == 4  # no rate above 0
    assert adaptive([(0.4, 0.2), (math.nan, math.nan)], 4, 12) == 4
    assert adaptive((), 4, 12) == 3


@pytest.mark.parametrize("kind", ["constant", "increasing", "decreasing", "adaptive"])
def test_a_budget_with_less_than_one_iteration_a_step_is_refused(kind):
    for total in (0, 9):
        with pytest.raises(ValueError, match=f"total is {total}.* 10 steps"):
            Budget(kind, total)([], 10)


def test_a_trace_is_the_mean_over_the_samples_that_were_measured():
    solution = Solver("iterate", 3, 0.0, "last")(lambda z, rows: 0.5 * z, torch.ones(2, 1, 2))
    assert trace(solution) == pytest.approx((1.0, 1.0, 1.0))
    residuals = torch.tensor([[0.5, 0.25, math.nan], [0.1, math.inf, math.nan]])
    first, second, third = trace(solution._replace(residuals=residuals))
    assert (first, second, math.isnan(third)) == (pytest.approx(0.3), 0.25, True)
    assert trace(solution._replace(residuals=torch.empty(2, 0))) == ()
