"""A claim: an entry of the YAML files beside this one, and its judgement on a study's results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field, model_validator

from equilab.claims import HERE
from equilab.claims.tests import (
    COLUMNS,
    INCONCLUSIVE,
    NONE,
    Outcome,
    better,
    cheaper,
    no_worse,
    ordered,
    short,
)
from equilab.core.config import Params, UserError, near, nearest, parse, read

if TYPE_CHECKING:
    from equilab.tables import Results

DEPENDS = "depends on the reference"
MEASURED = ("seconds", "memory")  # words in the columns of what is measured, not counted
MISTYPED = 0.9  # so alike are a name and the same with a letter wrong


def _column(name: str) -> str:
    if name not in COLUMNS:
        raise ValueError(f"{name!r} is no column that a claim can be about{nearest(name, COLUMNS)}")
    return name


Column = Annotated[str, AfterValidator(_column)]


class Hypotheses(Params):
    """Why a claim might hold or fail: conjectures that no comparison here tests."""

    holds: str
    fails: str


class Claim(Params):
    """What a paper claims, where, with which numbers, and how a study tests it."""

    id: str
    part: str = ""  # which of several tests of the claim this is
    claim: str
    where: str  # table, figure or section of the paper
    published: str
    comparison: str  # of the params section `comparisons`; a study without it does not list the claim
    test: Literal["better", "cheaper", "no worse", "ordered"]
    # a column; fd, kid, rise and images are taken against training and against held-out images, pairs in both readings of a
    # layer's activity; null: cost alone
    measure: Column | None = "fd"
    cost: Column | None = None  # of cheaper
    times: Annotated[float, Field(ge=1)] = 1.0  # of better and cheaper: the claimed factor
    # of cheaper and no worse: relatively so much worse counts as good
    margin: Annotated[float, Field(ge=0)] = 0.0
    hypotheses: Hypotheses

    @model_validator(mode="after")
    def _fits(self) -> Claim:
        if self.test == "cheaper" and self.cost is None:
            raise ValueError("the test cheaper needs a cost: name a column, such as parameters")
        if self.test != "cheaper" and self.cost is not None:
            raise ValueError(f"the test {self.test} has no cost")
        if self.measure is None and self.test != "cheaper":
            raise ValueError("only the test cheaper can do without a measure")
        if self.margin and self.test in ("better", "ordered"):
            raise ValueError(f"the test {self.test} has no margin")
        if self.times != 1 and self.test in ("no worse", "ordered"):
            raise ValueError(f"the test {self.test} has no times")
        return self

    @property
    def name(self) -> str:
        """Its id, with its part."""
        return f"{self.id}, {self.part}" if self.part else self.id

    @property
    def paper(self) -> str:
        """The name of its paper's table of results: get of GET-1."""
        return self.id.partition("-")[0].lower()

    @property
    def measured(self) -> bool:
        """Whether it rests on seconds or memory."""
        return any(word in column for word in MEASURED for column in (self.cost, self.measure) if column)


class Claims(Params):
    """A YAML file of claims."""

    paper: str  # whose claims they are
    claims: tuple[Claim, ...]


def read_papers(folder: Path = HERE) -> dict[str, list[Claim]]:
    """Return the claims of all YAML files of a folder, by the paper that each file names.

    Raises: UserError naming the file and the key of each mistake, or two claims of the same id and part.
    """
    papers: dict[str, list[Claim]] = {}
    for path in sorted(folder.glob("*.yaml")):
        file = parse(Claims, read(path), path.name)
        papers.setdefault(file.paper, []).extend(file.claims)
    names = [claim.name for claims in papers.values() for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{folder}: there are two claims {twice[0]}; give one of them another part")
    return papers


def read_claims(folder: Path = HERE) -> list[Claim]:
    """Return the claims of all YAML files of a folder.

    Raises: UserError, as `read_papers` does.
    """
    return [claim for claims in read_papers(folder).values() for claim in claims]


def refuse_mistyped(claims: Sequence[Claim], declared: Collection[str]) -> None:
    """Refuse claims on comparisons that a study does not declare, where it declares almost the same and no claim is on that.

    Raises: UserError with a sentence for each.
    """
    left = set(declared) - {claim.comparison for claim in claims}
    wrong = [
        f"claim {claim.name}: the study declares no comparison {claim.comparison!r}; did you mean {meant!r}?"
        for claim in claims
        if claim.comparison not in declared and (meant := near(claim.comparison, left, MISTYPED))
    ]
    if wrong:
        raise UserError("\n".join(wrong))


def judge(claim: Claim, results: Results, confidence: float) -> Outcome | None:
    """Return what comes of a claim in a study; None where the study declares no such comparison, or has not measured the cost.

    Raises: NotRunError if a run, or what is measured of it, has no results yet; UserError if they lack the claim's measure.
    """
    if claim.comparison not in results.comparisons:
        return None
    rows = results.compare(claim.comparison)
    if claim.measure in ("relative", "relative_others") and results.relative.empty:  # its stage has not run
        return None
    if claim.cost and (claim.cost not in rows or rows[claim.cost].isna().any()):
        return None
    outcome = _judged(claim, rows, confidence)
    return outcome if claim.measure is None or claim.measured else of_trained(outcome, rows["of"], results)


def judge_by_kid(claim: Claim, results: Results, confidence: float) -> str:
    """Return the verdict that KID in place of FD would give a claim that `judge` judges; none where KID is not measured, or is not
    positive everywhere, as it need not be of images that can hardly be told from real ones."""
    rows = results.compare(claim.comparison)
    by_kid = claim.model_copy(update={"measure": "kid"})
    kid = rows.reindex(columns=["kid_train", "kid_test"])
    if claim.measure != "fd" or not (kid > 0).all(axis=None):
        return NONE
    return of_trained(_judged(by_kid, rows, confidence), rows["of"], results).verdict


def _judged(claim: Claim, rows: pd.DataFrame, confidence: float) -> Outcome:
    """Return what comes of a claim's test on the rows of its comparison, against all references or in all readings."""
    outcomes = [tested(claim, rows, column, confidence) for column in columns(claim, rows)]
    return agreed(outcomes, INCONCLUSIVE if claim.measure == "pairs" else DEPENDS)


def of_trained(outcome: Outcome, compared: Collection[str], results: Results) -> Outcome:
    """Return an outcome without its verdict if one of the runs compared is no better than a model that makes the mean image."""
    name, limit = results.distance, results.trivial.get(results.distance, np.inf)
    runs = results.runs[results.runs["of"].isin(compared)]
    worst = runs.groupby("of", sort=False)[name].max()  # of its seeds
    poor = [
        (of, f"{short(value)}, no better than the mean image ({short(limit)})")
        for of, value in worst.items()
        if value >= limit
    ]
    return replace(outcome, verdict=NONE, effects=(*outcome.effects, *poor)) if poor else outcome


def columns(claim: Claim, rows: pd.DataFrame) -> list[str | None]:
    """Return the columns of a claim's measure: one for each reference that images are compared with, or each reading.

    Raises: UserError if the rows lack it.
    """
    if claim.measure is None:
        return [None]
    first = "fid" if claim.measure == "fd" and "fid_train" in rows else claim.measure
    ends = {"pairs": ("mean", "rms")} | dict.fromkeys(("fd", "kid", "rise", "images"), ("train", "test"))
    found = [f"{first}_{end}" for end in ends[claim.measure]] if claim.measure in ends else [first]
    for column in found:
        if column not in rows or rows[column].isna().any():
            raise UserError(
                f"claim {claim.name}: some runs of {claim.comparison!r} have no {column}; give another measure"
            )
    return found


def tested(claim: Claim, rows: pd.DataFrame, column: str | None, confidence: float) -> Outcome:
    """Return what comes of the claim's test in one column."""
    match claim.test:
        case "better":
            return better(rows, column, confidence, claim.times)
        case "no worse":
            return no_worse(rows, column, confidence, claim.margin)
        case "cheaper":
            return cheaper(rows, column, confidence, claim.cost, claim.times, claim.margin)
        case _:
            return ordered(rows, column, confidence)


def agreed(outcomes: Sequence[Outcome], split: str = DEPENDS) -> Outcome:
    """Return what the references or readings come to together: what they agree on, or `split`."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if len(verdicts) == 1:
        verdict = outcomes[0].verdict
    elif NONE in verdicts:
        verdict = NONE
    else:
        verdict = split
    effects = tuple(effect for outcome in outcomes for effect in outcome.effects)
    low, high = np.min([(outcome.low, outcome.high) for outcome in outcomes], axis=0)
    return Outcome(verdict, low, high, effects, outcomes[0].seeds)
