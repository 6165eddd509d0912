"""The four tests of a claim on the rows of a declared comparison, and what comes of them.

A quantity that training or sampling leaves to chance is compared over seeds: by Welch's t-interval of the difference of logarithms, or by
that of the differences seed by seed where both sides are settings of the same trained networks. It needs three seeds on either side. What
is counted needs none; what is measured in seconds has the spread of its calls. A run that does not get somewhere within its training takes
more images than it saw, nobody knows how many: it cannot be ahead, and nothing can be behind it. Of several pairs all must hold, and their
intervals are wide enough to be right all at once (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

HOLDS, FAILS, INCONCLUSIVE, NONE = "holds", "fails", "inconclusive", ""
SEEDS = 3  # on either side of a pair, for a verdict
COUNTED = (
    "parameters",
    "parameters_trained",
    "flops",
    "train_flops",
    "nimg",
    "nfe",
    "block_evals",
    "teacher_calls",
)
MEMORY = ("memory_mib", "train_memory", "sample_memory")  # measured once, and as good as counted
SECONDS = ("seconds", "train_seconds", "sample_seconds")
SCORES = (
    "fd",
    "kid",
    "precision",
    "recall",
    "inception_score",
    "l1_held_out",
    "l1_train",
    "rise",
    "relative",
    "relative_others",
    "residual",
    "residual_ratio",
    "pairs",
    "images",
)
COLUMNS = (*SCORES, *COUNTED, *MEMORY, *SECONDS)  # what a claim can be about
# better the higher; all else is better the lower
HIGHER = ("precision", "recall", "inception_score", "pairs_mean", "pairs_rms")
NAMES = {
    "flops": "FLOPs of an image",
    "train_flops": "training FLOPs",
    "nimg": "images seen",
    "teacher_calls": "evaluations of the teacher",
    "l1_held_out": "L1 on held-out pairs",
    "l1_train": "L1 on training pairs",
    "relative": "distance to the images of the first run",
    "relative_others": "distance to the first run's images of other noises",
    "images_train": "images until the target, by training images",
    "images_test": "images until the target, by held-out images",
    "pairs_mean": "pairs of layers, by the mean of a layer's outputs",
    "pairs_rms": "pairs of layers, by their root mean square",
    "residual_ratio": "residual, less noisy over noisier half",
    "train_memory": "MiB of a training step",
    "train_seconds": "seconds of a training step",
    "sample_seconds": "seconds of a batch",
    "memory_mib": "MiB",
}
REFERENCES = {"_train": "to training images", "_test": "to held-out images"}


@dataclass(frozen=True)
class Outcome:
    """What came of a test. The ratio of baseline to runs (above 1 in favour of the claim) lies between `low` and `high`, which are nan
    without three seeds; `effects` say in words for which pair what was found."""

    verdict: str
    low: float
    high: float
    effects: tuple[tuple[str, str], ...]
    seeds: int | None  # the fewest on a side; None where nothing is left to chance

    @property
    def effect(self) -> str:
        """What was found, pair by pair, in words."""
        found: dict[str, list[str]] = {}
        for pair, effect in self.effects:
            found.setdefault(pair, []).append(effect)
        return "; ".join(f"{pair}: {'; '.join(dict.fromkeys(effects))}" for pair, effects in found.items())


@dataclass(frozen=True)
class Ratio:
    """How many times as good `runs` is as `baseline` in one pair, with its interval."""

    value: float
    low: float
    high: float
    means: tuple[float, float]  # of runs and of baseline
    points: tuple[str, str]  # of runs and of baseline, in words
    seeds: int | None
    open_ended: tuple[bool, bool]  # whether the means are the least that they can be

    def verdict(self, target: float) -> str:
        """Return whether the ratio lies above a target."""
        if self.seeds is not None and self.seeds < SEEDS:
            return NONE
        return HOLDS if self.low > target else FAILS if self.high < target else INCONCLUSIVE

    def __str__(self) -> str:
        """Both values, and the ratio with its interval if it has one."""
        interval = f", {self.low:.3g} to {self.high:.3g}" if self.low < self.high else ""
        more = [" or more" if is_open else "" for is_open in self.open_ended]
        ours, theirs = (number + end for number, end in zip(told_apart(self.means), more))
        return f"{ours} against {theirs} (ratio {self.value:.3g}{interval})"


def better(rows: pd.DataFrame, measure: str, confidence: float, times: float = 1.0) -> Outcome:
    """Return whether in every pair `runs` is more than so many times as good as `baseline`."""
    return _outcome(_ratios(rows, measure, confidence), times, measure)


def no_worse(rows: pd.DataFrame, measure: str, confidence: float, margin: float) -> Outcome:
    """Return whether in every pair `runs` is worse than `baseline` by less than the relative margin, if at all."""
    return _outcome(_ratios(rows, measure, confidence), 1 / (1 + margin), measure)


def cheaper(
    rows: pd.DataFrame,
    measure: str | None,
    confidence: float,
    cost: str,
    times: float = 1.0,
    margin: float = 0.0,
) -> Outcome:
    """Return whether in every pair `baseline` costs more than so many times as much as `runs`, and `runs` is better in `measure`, or
    worse by less than the relative margin; without a measure the cost alone counts."""
    spent = _outcome(_ratios(rows, cost, confidence), times, cost)
    if measure is None:
        return spent
    reached = _outcome(_ratios(rows, measure, confidence), 1 / (1 + margin), measure)
    verdict = _all([spent.verdict, reached.verdict])
    cost_alone_fails = spent.verdict == FAILS and reached.verdict != FAILS
    seeds = spent.seeds if cost_alone_fails else reached.seeds  # of what decides
    return Outcome(verdict, reached.low, reached.high, reached.effects + spent.effects, seeds)


def ordered(rows: pd.DataFrame, measure: str, confidence: float) -> Outcome:
    """Return whether each of `runs` is better than the one before it."""
    steps = []
    for k in range(rows["pair"].max()):
        steps.append(rows[rows["pair"] == k].assign(side="baseline"))
        steps.append(rows[rows["pair"] == k + 1].assign(side="runs", pair=k))
    found = _outcome(_ratios(pd.concat(steps), measure, confidence), 1.0, measure)
    points = ", ".join(rows.drop_duplicates("pair")["point"])
    means = ", ".join(told_apart([mean(values) for _, values in rows.groupby("pair")[measure]]))
    effects = (points, f"{named(measure)} {means}"), *found.effects
    return Outcome(found.verdict, found.low, found.high, effects, found.seeds)


def interval(
    runs: pd.DataFrame, baseline: pd.DataFrame, column: str, confidence: float
) -> tuple[float, float]:
    """Return between which bounds the ratio of `baseline` to `runs`, geometric means over seeds, lies; nan with fewer than three
    seeds, or with a value of 0, which has no logarithm; 0 and inf if any is infinite, so that nothing is known.

    Source: Welch 1947; two settings of the same run are compared seed by seed (Student 1908).
    """
    ours, theirs = (np.log(side.set_index("seed")[column]) for side in (runs, baseline))
    if min(len(ours), len(theirs)) < SEEDS:
        return np.nan, np.nan
    if np.isposinf(ours).any() or np.isposinf(theirs).any():
        return 0.0, np.inf
    same = set(runs["of"]) == set(baseline["of"])
    samples = [(theirs - ours).dropna()] if same else [theirs, -ours]
    if any(np.isinf(sample).any() for sample in samples):
        return np.nan, np.nan
    middle = sum(sample.mean() for sample in samples)
    sizes = np.array([len(sample) for sample in samples])
    squares = np.array([sample.var() for sample in samples]) / sizes  # of the standard errors
    if not squares.any():  # all seeds alike
        return float(np.exp(middle)), float(np.exp(middle))
    freedom = squares.sum() ** 2 / (squares**2 / (sizes - 1)).sum()
    reach = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(squares.sum())
    return float(np.exp(middle - reach)), float(np.exp(middle + reach))


def told_apart(values: Sequence[float]) -> list[str]:
    """Return numbers as people write them, in as many digits, up to five, as it takes to tell them apart."""
    for digits in (3, 4, 5):
        found = [short(value, digits) for value in values]
        if len(set(found)) == len(set(values)):
            break
    return found


def short(value: int | float, digits: int = 3) -> str:
    """Return a number as people write it: 0.118, 3.45, 131k, 1.2M, 15G."""
    value = float(f"{value:.{digits}g}")  # 999.9k is 1M
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _ratios(rows: pd.DataFrame, column: str, confidence: float) -> list[Ratio]:
    """Return a ratio for each pair; the intervals of all are right at once with this confidence."""
    each = 1 - (1 - confidence) / rows["pair"].nunique()
    bounds = [f"{column}_{end}" for end in ("min", "max", "least")]
    needed = ["pair", "side", "point", "of", "seed", column, *bounds]
    narrow = rows[[name for name in needed if name in rows]]  # of a hundred columns
    return [_ratio(pair, column, each) for _, pair in narrow.groupby("pair")]


def _ratio(pair: pd.DataFrame, column: str, confidence: float) -> Ratio:
    """Return the ratio of the sides of a pair.

    Of replicates that did not get there (inf) the lower bound supposes that those of `baseline` do so right after their
    training, and those of `runs` never; the upper bound the other way round.
    """
    runs, baseline = (pair[pair["side"] == side] for side in ("runs", "baseline"))
    least = [_least(side, column) for side in (runs, baseline)]
    points = runs["point"].iloc[0], baseline["point"].iloc[0]
    counted = column in COUNTED + MEMORY
    means = tuple(np.float64(side[column].mean()) if counted else mean(side[column]) for side in least)
    with np.errstate(divide="ignore", invalid="ignore"):  # a recall of 0
        value = means[0] / means[1] if column in HIGHER else means[1] / means[0]
        low, _ = interval(runs, least[1], column, confidence)
        _, high = interval(least[0], baseline, column, confidence)
        low, high = (1 / high, 1 / low) if column in HIGHER else (low, high)
    seeds = min(runs["seed"].nunique(), baseline["seed"].nunique())
    if counted:
        low, high, seeds = value, value, None
    elif f"{column}_min" in pair:
        low = baseline[f"{column}_min"].min() / runs[f"{column}_max"].max()
        high, seeds = baseline[f"{column}_max"].max() / runs[f"{column}_min"].min(), None
    open_ended = tuple(bool(np.isinf(side[column]).any()) for side in (runs, baseline))
    return Ratio(value, low, high, means, points, seeds, open_ended)


def _least(side: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rows of a side with the least that each can have taken, where the table tells it."""
    return side.assign(**{column: side.get(f"{column}_least", side[column])})


def _outcome(ratios: Sequence[Ratio], target: float, column: str) -> Outcome:
    """Return what comes of all pairs: all must hold; told is the least of those that decide."""
    verdict = _all([ratio.verdict(target) for ratio in ratios])
    deciding = [ratio for ratio in ratios if ratio.verdict(target) == verdict]
    told = min(deciding, key=lambda ratio: ratio.value if np.isnan(ratio.low) else ratio.low)
    among = f" (decisive of {len(ratios)} pairs)" if len(ratios) > 1 else ""
    effect = f"{told.points[0]} against {told.points[1]}{among}", f"{named(column)} {told}"
    low, high = np.min([(ratio.low, ratio.high) for ratio in ratios], axis=0)
    seeds = [ratio.seeds for ratio in ratios if ratio.seeds is not None]
    return Outcome(verdict, low, high, (effect,), min(seeds, default=None))


def named(column: str) -> str:
    """Return how a column is called in a sentence: FD to training images."""
    if column in NAMES:
        return NAMES[column]
    for end, reference in REFERENCES.items():
        if column.endswith(end):
            first = column.removesuffix(end)
            return f"{first.upper() if first in ('fd', 'fid', 'kid') else first} {reference}"
    return column.replace("_", " ")


def _all(verdicts: Sequence[str]) -> str:
    """Return what several verdicts come to that must all hold."""
    return next((verdict for verdict in (FAILS, NONE, INCONCLUSIVE) if verdict in verdicts), HOLDS)


def mean(values: pd.Series) -> np.float64:
    """Return the geometric mean; the mean of values that are not all positive."""
    return np.float64(stats.gmean(values) if (values > 0).all() else values.mean())
