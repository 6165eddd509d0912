"""What a claim's test found, and the rows of the claims table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from equilab.analysis.scaling import Rule
from equilab.analysis.tables import Results, short
from equilab.core import config as configs

TEXTS = Path(configs.__file__).parents[1] / "claims.yaml"
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told here"
COLUMNS = ("id", "part", "claim", "where", "published", "ours", "interval", "seeds", "verdict", "reason")


@dataclass(frozen=True)
class Config:
    """The params section `claims`."""

    rule: Rule  # when a difference counts
    larger: float  # GET-2: times the parameters of a GET that a ViT as good must need
    keeps: float  # GET-9: share of the training speed that O(1) memory must keep
    iterations: tuple[int, int]  # GET-5: fewest and most iterations of the claim

    def __post_init__(self):
        if self.larger < 1 or not 0 < self.keeps <= 1 or not 1 <= self.iterations[0] < self.iterations[1]:
            raise ValueError("larger must be >= 1, keeps between 0 and 1, iterations rising from 1 or more")


class Found(NamedTuple):
    """What a test found: in words, as an interval, over how many seeds, with which verdict."""

    ours: str
    interval: str
    seeds: str
    verdict: str
    note: str = ""  # what else the study shows about the reason


@dataclass(frozen=True)
class Comparisons:
    """What tests of distances are made on: `config` says when a difference counts, `found` is what the study found."""

    config: Config
    found: Results

    @property
    def distance(self) -> str:
        """The column of the distance."""
        return self.found.distance

    @property
    def score(self) -> str:
        """The distance's name as people write it."""
        return self.found.score

    def confidence(self, among: int) -> float:
        """Return the confidence of each of `among` intervals that hold at once."""
        return 1 - (1 - self.config.rule.confidence) / among

    def gain(self, first: pd.Series, last: pd.Series) -> tuple[float, float]:
        """Return between which bounds the distance of `first` over that of `last` lies: above 1, `last` is better."""
        measure = self.distance
        spreads = [row[f"{measure}_half"] / row[measure] for row in (first, last)]
        reach = np.exp(self.config.rule.tolerance(measure, *spreads))
        return first[measure] / last[measure] / reach, first[measure] / last[measure] * reach

    def times(self, logs: pd.Series, among: int = 1, least: float = 0.0) -> tuple[float, float]:
        """Return between which bounds a ratio lies whose logarithms seeds gave: a t-interval that holds for `among` of them at
        once, no narrower than `least` to either side; the margin where there is one seed."""
        reach = np.log1p(self.config.rule.margin_distance)
        if len(logs) > 1:
            own = (
                stats.t.ppf((1 + self.confidence(among)) / 2, len(logs) - 1)
                * logs.std(ddof=1)
                / np.sqrt(len(logs))
            )
            reach = max(own, least / np.sqrt(len(logs)))
        return float(np.exp(logs.mean() - reach)), float(np.exp(logs.mean() + reach))

    def paired(self, first: pd.DataFrame, last: pd.DataFrame, among: int = 1) -> tuple[float, float]:
        """Return between which bounds the distance of `first` over that of `last` lies, rows of two settings of the same
        trained networks and noises: compared seed by seed, of which nothing but the setting is left."""
        sides = [rows.drop_duplicates("seed").set_index("seed")[self.distance] for rows in (first, last)]
        return self.times(np.log(sides[0] / sides[1]).dropna(), among)

    def compared(self, told: str, first: pd.Series, last: pd.Series) -> Found:
        """Return what comes of the claim that `last` is better than `first`."""
        bounds = self.gain(first, last)
        seeds = seeds_of(pd.DataFrame([first, last]))
        return Found(f"{self.score} {told}", f"{span(*bounds)} times", seeds, verdict(*bounds))

    def value(self, row: pd.Series) -> str:
        """Return the distance of a row as people write it."""
        return f"{row[self.distance]:.3g}"


def rows(study: Any, tests: Mapping[tuple[str, str], Callable[[Any], Found | None]]) -> pd.DataFrame:
    """Return a row for each test, by (id, part), with the words of `claims.yaml`; a test returns None where the study
    trains nothing that could tell."""
    texts, table = {(text["id"], text["part"]): text for text in configs.read(TEXTS)["claims"]}, []
    for key, test in tests.items():
        text, found = texts[key], test(study)
        reason = (
            text[{HOLDS: "holds", FAILS: "fails", OPEN: "open"}[found.verdict]] if found else text["missing"]
        )
        found = found or Found("–", "–", "0", OPEN)
        table.append([text[column] for column in COLUMNS[:5]] + [*found[:4], reason + found.note])
    return pd.DataFrame(table, columns=COLUMNS)


def ordered(x: Any, y: Any) -> tuple[float, float]:
    """Return the rank correlation of x and y, and its two-sided p-value by permutation: over all orders of up to seven
    pairs, over 9,999 drawn ones of more. Nan where either is constant."""
    x, y = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    size = np.sqrt((x**2).sum() * (y**2).sum())
    if not size:
        return np.nan, np.nan
    draws = (
        list(itertools.permutations(y))
        if len(y) <= 7
        else np.random.default_rng(0).permuted(np.tile(y, (9999, 1)), axis=1)
    )
    rho, others = (x * y).sum() / size, np.asarray(draws) @ x / size
    as_far = (np.abs(others) >= abs(rho) - 1e-9).sum()
    return float(rho), float(as_far / len(others) if len(y) <= 7 else (as_far + 1) / (len(others) + 1))


def verdict(low: float, high: float, target: float = 1.0) -> str:
    """Return whether something that lies in low..high is at least `target`."""
    return HOLDS if low >= target else FAILS if high < target else OPEN


def span(low: float, high: float) -> str:
    """Return an interval in words."""
    if not np.isfinite(high):
        return f"more than {low:.3g}" if low else "not bounded"
    return f"{low:.3g} to {high:.3g}" if low else f"less than {high:.3g}"


def seeds_of(frame: pd.DataFrame) -> str:
    """Return over how many seeds the rows were averaged."""
    low, high = frame["n"].min(), frame["n"].max()
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def listed(frame: pd.DataFrame, measure: str, at: str) -> str:
    """Return "value at cost" of every row."""
    name = lambda value: value if isinstance(value, str) else short(value)  # noqa: E731
    return ", ".join(f"{row[measure]:.3g} at {name(row[at])}" for _, row in frame.iterrows())
