"""Who is better at equal cost, and how quality changes with size and compute: fits, frontiers and their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from equilab.analysis.tables import Tables, replicated, short

BUDGETS = {"parameters": "parameters", "train_flops": "training FLOPs", "flops": "sampling FLOPs"}


@dataclass(frozen=True)
class Rule:
    """When a difference counts: beyond the interval over seeds, or beyond a margin where there is one seed."""

    confidence: float  # of every interval
    margin_distance: float  # relative; of FD or FID, where there are no seeds
    margin_l1: float  # relative; of L1 on held-out pairs, likewise
    equal_budget: float  # budgets that differ by no more than this share count as equal
    ranked: float  # distances above this are not compared: that far off, they do not order models

    def __post_init__(self):
        if not 0 < self.confidence < 1 or min(self.margin_distance, self.margin_l1, self.equal_budget) < 0:
            raise ValueError("confidence must lie between 0 and 1, margins and equal_budget must be >= 0")

    def tolerance(self, measure: str, *spreads: float) -> float:
        """Return how large |log(a / b)| must be to count; `spreads` are the relative half-intervals of a and b."""
        margin = self.margin_l1 if measure.startswith("l1") else self.margin_distance
        return float(np.log1p(margin) if np.isnan(spreads).any() else np.linalg.norm(spreads))


class Fit(NamedTuple):
    """y = factor * x^exponent through `points` points; the exponent's interval is nan with fewer than three."""

    factor: float
    exponent: float
    low: float
    high: float
    points: int

    def __str__(self) -> str:
        """The exponent with its interval, or why there is none."""
        if self.points < 3:
            return f"exponent {self.exponent:.2f} through {self.points} points: too few for an interval"
        return f"exponent {self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}], {self.points} points"


def power_law(x: pd.Series | np.ndarray, y: pd.Series | np.ndarray, confidence: float) -> Fit:
    """Return the power law through (x, y) by least squares in logarithms, its exponent with a t-interval."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    exponent, constant = np.polyfit(x, y, 1)
    half = np.nan
    if len(x) > 2:
        error = np.sum((y - constant - exponent * x) ** 2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2)
        half = stats.t.ppf((1 + confidence) / 2, len(x) - 2) * np.sqrt(error)
    return Fit(
        float(np.exp(constant)), float(exponent), float(exponent - half), float(exponent + half), len(x)
    )


def fits(tables: Tables, regime: str, measure: str, rule: Rule, over: str = "parameters") -> dict[str, Fit]:
    """Return for each family the power law of `measure` over a budget, through the largest set of its models that differ in
    nothing else: over "parameters", in size alone; over "train_flops", in the length of training alone, so that the exponent
    over images seen is the same. Families with one point have none."""
    found = {}
    models = points(tables, regime, over, rule)
    models = (
        models[models["last"]] if over == "train_flops" else models
    )  # snapshots of one training are no points of their own
    for family, rows in models.groupby("family", sort=False):
        groups = rows.groupby({"parameters": "recipe", "train_flops": "but_nimg"}[over])
        alike = max((group for _, group in groups), key=lambda group: group["cost"].nunique())
        if alike["cost"].nunique() > 1:
            found[family] = power_law(alike["cost"], alike[measure], rule.confidence)
    return found


def points(tables: Tables, regime: str, budget: str, rule: Rule) -> pd.DataFrame:
    """Return what was measured at which cost, replicates averaged, cheapest first, with the cost in `cost`.

    parameters: every model; flops: every model at every number of iterations at test time; train_flops: every model
    trained on the same material for any length, at its end, and on the way if its learning rate does not fall.
    """
    explicit = tables.sweeps[tables.sweeps["kind"] == "vit"]
    frame, key = {
        "parameters": (tables.runs, "nimg"),
        "train_flops": (tables.curves[~tables.curves["decays"] | tables.curves["last"]], "nimg"),
        "flops": (pd.concat([tables.iterations(), explicit]), "flops"),
    }[budget]
    alike = "material" if budget == "train_flops" else "regime"
    kept = frame[frame[alike] == tables.runs.loc[tables.runs["regime"] == regime, alike].iloc[0]]
    found = replicated(kept, ["model", key], list(tables.measures), rule.confidence)
    return (
        found.assign(cost=found[budget].astype(float))
        .sort_values("cost", kind="stable")
        .reset_index(drop=True)
    )


def ranked(frame: pd.DataFrame, kind: str, measure: str, rule: Rule) -> pd.DataFrame:
    """Return the points of a kind ("get" or "vit") that `measure` can order."""
    limit = np.inf if measure.startswith("l1") else rule.ranked
    return frame[(frame["kind"] == kind) & (frame[measure] <= limit)]


class Frontier:
    """The best value of a measure at each cost among points, interpolated in logarithms; it never rises."""

    def __init__(self, frame: pd.DataFrame, measure: str):
        self.cheapest, self.dearest = frame["cost"].min(), frame["cost"].max()
        frame = frame.sort_values(["cost", measure])
        frame = frame[frame[measure] < frame[measure].cummin().shift(fill_value=np.inf)]
        self.cost, self.value = frame["cost"].to_numpy(), frame[measure].to_numpy()
        self.spread = (frame[f"{measure}_half"] / frame[measure]).to_numpy()

    def at(self, cost: float, equal: float) -> tuple[float, float]:
        """Return the value at `cost` and its relative spread; nan below the cheapest point, and above the dearest
        one by more than the share `equal`."""
        if not self.cheapest / (1 + equal) <= cost <= self.dearest * (1 + equal):
            return np.nan, np.nan
        value = np.exp(np.interp(np.log(cost), np.log(self.cost), np.log(self.value)))
        return float(value), float(np.interp(np.log(cost), np.log(self.cost), self.spread))

    def reaches(self, value: float) -> tuple[float, float]:
        """Return between which costs `value` is reached: the same twice, or (0, cheapest), or (dearest, infinity)."""
        if value >= self.value[0]:
            return (0.0 if value > self.value[0] else self.cost[0]), self.cost[0]
        if value < self.value[-1]:
            return self.cost[-1], np.inf
        cost = float(np.exp(np.interp(-np.log(value), -np.log(self.value), np.log(self.cost))))
        return cost, cost


def equal_budget(tables: Tables, regime: str, budget: str, measure: str, rule: Rule) -> pd.DataFrame:
    """Return for every GET the `ratio` of its value to the best of a ViT at the same cost (below 1: GET is better),
    with its interval `low`, `high`; nan where no ViT is that small or large."""
    found = points(tables, regime, budget, rule)
    explicit, implicit = (ranked(found, kind, measure, rule) for kind in ("vit", "get"))
    if explicit.empty or implicit.empty:
        return pd.DataFrame(columns=[*found, "other", "ratio", "low", "high"])
    front = Frontier(explicit, measure)
    other = np.array([front.at(cost, rule.equal_budget) for cost in implicit["cost"]])
    implicit = implicit.assign(other=other[:, 0], ratio=implicit[measure] / other[:, 0])
    spreads = zip(implicit[f"{measure}_half"] / implicit[measure], other[:, 1])
    tolerance = np.array([rule.tolerance(measure, *pair) for pair in spreads])
    return implicit.assign(
        low=implicit["ratio"] * np.exp(-tolerance), high=implicit["ratio"] * np.exp(tolerance)
    )


def equal_quality(implicit: pd.DataFrame, explicit: pd.DataFrame, measure: str, rule: Rule) -> pd.DataFrame:
    """Return for each row of `implicit` how many times its `cost` a ViT of the same quality needs, between `low` and
    `high`; 0 and infinity stand where the ViTs leave it open."""
    front, bounds = Frontier(explicit, measure), []
    for _, row in implicit.iterrows():
        spread = row[f"{measure}_half"] / row[measure]
        other = np.interp(
            -np.log(row[measure]), -np.log(front.value), front.spread
        )  # of the ViTs nearest in quality
        tolerance = rule.tolerance(measure, spread, float(other))
        worse, better = row[measure] * np.exp(tolerance), row[measure] * np.exp(-tolerance)
        bounds.append((front.reaches(worse)[0] / row["cost"], front.reaches(better)[1] / row["cost"]))
    low, high = zip(*bounds)
    return implicit.assign(low=low, high=high)


def best_size(tables: Tables, regime: str, measure: str, rule: Rule) -> pd.DataFrame:
    """Return the best size of each kind at every training budget that was spent and at which two sizes can be compared.

    `ahead` is the value of the second best size over that of the best; `counts` tells whether that is a difference.
    Where the learning rate falls to 0, a snapshot on the way is no training of that budget and is not used.
    """
    found, rows = points(tables, regime, "train_flops", rule), []
    for kind, name in (("get", "GET"), ("vit", "ViT")):
        of_kind = ranked(found, kind, measure, rule)
        fronts = [(size, Frontier(part, measure)) for size, part in of_kind.groupby("parameters")]
        spent = 0.0
        for cost in sorted(of_kind["cost"]):
            values = [(*front.at(cost, rule.equal_budget), size) for size, front in fronts]
            values = sorted((v for v in values if not np.isnan(v[0])), key=lambda v: v[0])
            if len(values) > 1 and cost > spent * (1 + rule.equal_budget):
                spent = cost
                (best, spread, size), (second, other, _) = values[:2]
                counts = bool(np.log(second / best) > rule.tolerance(measure, spread, other))
                rows.append((name, f"{cost / 1e9:.4g}", size, best, second / best, counts))
    return pd.DataFrame(rows, columns=["kind", "budget (GFLOP)", "parameters", measure, "ahead", "counts"])


def changes(tables: Tables, rule: Rule) -> pd.DataFrame:
    """Return every pair of models that differ in one thing: `what` was changed, and `ratio_MEASURE` of the changed to
    the unchanged (below 1: better), with its interval `low_`, `high_`; and how many times its parameters and FLOPs.

    The unchanged model is that of the smaller value, or the one without normalisation; among three values, neighbours.
    """
    found, rows = replicated(tables.runs, ["model"], list(tables.measures), rule.confidence), []
    for kind, models in found.sort_values(["kind", "parameters"], kind="stable").groupby("kind", sort=False):
        for key in sorted(set().union(*models["changeable"])):
            rest = models["changeable"].map(lambda one: str({k: v for k, v in one.items() if k != key}))
            values = models["changeable"].map(lambda one: one.get(key))
            for _, alike in models.assign(value=values).groupby(rest, sort=False):
                alike = alike.sort_values(
                    "value", key=lambda v: v if v.map(type).ne(str).all() else v.astype(str)
                )
                for (_, first), (_, last) in pairwise(alike.iterrows()):
                    if first["value"] != last["value"]:
                        rows.append(_change(kind, key, first, last, tables, rule))
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["kind", "what"])


def _change(
    kind: str, key: str, first: pd.Series, last: pd.Series, tables: Tables, rule: Rule
) -> dict[str, object]:
    words = {False: "off", True: "on"}
    value = [
        words[v] if isinstance(v, bool) else f"{v:,}" if isinstance(v, int) else v
        for v in (first["value"], last["value"])
    ]
    row = {
        "kind": {"get": "GET", "vit": "ViT"}[kind],
        "what": f"{key.replace('_', ' ')} {value[0]} to {value[1]}",
        "unchanged": first["label"],
        "changed": last["label"],
    }
    for measure in tables.measures:
        ratio = last[measure] / first[measure]
        reach = np.exp(
            rule.tolerance(measure, *(one[f"{measure}_half"] / one[measure] for one in (first, last)))
        )
        row |= {f"ratio_{measure}": ratio, f"low_{measure}": ratio / reach, f"high_{measure}": ratio * reach}
    row |= {f"times_{column}": last[column] / first[column] for column in BUDGETS if column in last}
    return row | {"times_flops": last["flops_image"] / first["flops_image"], "n": min(first["n"], last["n"])}


def sizes_table(tables: Tables, rule: Rule) -> pd.DataFrame:
    """Return the paper's table 2 of this study: a row for each model of all regimes, with half-intervals over seeds."""
    found = replicated(tables.runs, ["model"], list(tables.measures), rule.confidence)
    found = found.sort_values(["kind", "parameters", "nimg"])
    for measure in tables.measures:
        half = found[f"{measure}_half"].map(
            lambda value: "" if np.isnan(value) else f"\u00a0±\u00a0{value:.2g}"
        )
        found[measure] = found[measure].map("{:.4g}".format) + half
    found[["parameters", "flops_image"]] = found[["parameters", "flops_image"]].map(short)
    shown = {
        "label": "run",
        "family": "family",
        "width": "width",
        "parameters": "parameters",
        "pairs": "pairs",
        "flops_image": "FLOPs of an image",
        "nimg": "images seen",
        tables.distance: tables.score,
        "l1_held_out": "held-out L1",
        "inception_score": "inception score",
        "precision": "precision",
        "recall": "recall",
        "n": "seeds",
    }
    return found[list(shown)].rename(columns=shown)


def fits_table(tables: Tables, regime: str, rule: Rule) -> pd.DataFrame:
    """Return the exponents of quality over parameters and over training, a row for each family and measure."""
    names = {"parameters": "parameters", "train_flops": "training FLOPs or images, one model"}
    rows = [
        (name, words, family, str(law))
        for measure, name in tables.measures.items()
        for over, words in names.items()
        for family, law in fits(tables, regime, measure, rule, over).items()
    ]
    return pd.DataFrame(rows, columns=["measure", "over", "family", "power law"])
