"""Stage `claims`: the claims of the papers, judged by this study's results."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from equilab.claims.claim import DEPENDS, Claim, judge, judge_by_kid, read_claims, refuse_mistyped
from equilab.claims.tests import FAILS, HOLDS, INCONCLUSIVE, NONE, SEEDS, Outcome, mean
from equilab.core.config import Params
from equilab.core.files import write_json, write_together
from equilab.core.job import Job, Plan, folder_of
from equilab.tables import NotRunError, Results, results

HEAD = """\
The effect is a ratio with its {confidence:.0%} interval, and speaks for the claim above 1, or above the threshold that the claim names. Intervals are over seeds, of
logarithms (means are geometric): Welch's, or of the differences seed by seed where both sides are settings of one trained network. Of
several pairs all have to hold; their intervals are right all at once, and the pair that decides is shown. A side with fewer than {seeds} seeds
gives no verdict (–), unless the quantity is counted. A claim about images is judged against training images and against held-out images;
where the two verdicts are not the same it *depends on the reference*. By KID: the verdict that KID in place of FD would give. What
this study does not compare is not listed.
Published numbers are FID, of GET and GDD on CIFAR-10, of FPDM on ImageNet 256, unless they say otherwise."""
VERDICTS = {
    HOLDS: "hold",
    FAILS: "fail",
    INCONCLUSIVE: "inconclusive",
    DEPENDS: "depend on the reference",
    NONE: "without a verdict",
}
SECONDS = "Seconds are medians over several calls; their intervals span all calls. Memory is measured once."


class Config(Params):
    """The params section `claims`."""

    confidence: Annotated[float, Field(ge=0.5, lt=1)]  # of the intervals of a claim, together


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the claims and return the estimate of the stage's cost: no networks.

    Raises: UserError if the claims are mistaken.
    """
    read_claims()
    return Plan


def run(config: Config, job: Job) -> None:
    """Write `results/claims.md`, with a table for each paper in `results/claims`, and `measured.csv` and `measured.md` for what rests on
    seconds or memory; say how many claims are judged how, and what has not run yet. For `dvc metrics`, write the scores of every run
    into `results/metrics`.

    Raises: UserError if a claim is mistyped, or the results lack what it is about.
    """
    found, claims = results("results"), read_claims()
    refuse_mistyped(claims, found.comparisons)
    judged = judged_claims(found, config.confidence, claims)
    counted = [one for one in judged if not one.claim.measured]
    measured = [one for one in judged if one.claim.measured]
    absent = ", ".join(not_run(found, job))
    end = f"Not run yet: {absent}." if absent else ""
    head, name = HEAD.format(confidence=config.confidence, seeds=SEEDS), job.study.name
    pages = {
        Path("results/claims.md"): page(f"Claims: {name}", head, counted, end),
        Path("results/measured.md"): page(
            f"Claims on seconds and memory: {name}", f"{head} {SECONDS}", measured, end
        ),
    }
    tables = {Path("results/measured.csv"): measured}
    for paper in {claim.paper: None for claim in claims}:
        tables[Path(f"results/claims/{paper}.csv")] = [one for one in counted if one.claim.paper == paper]
    texts = {path: table(judged).to_csv(index=False, lineterminator="\n") for path, judged in tables.items()}
    write_together({**pages, **texts})
    remove_others(job.out, "*.csv", tables)  # of papers that there were before
    _tell("claims", counted)
    _tell("measured", measured)
    if unclaimed := found.comparisons.keys() - {claim.comparison for claim in claims}:
        print(f"claims: comparisons without a claim: {'; '.join(sorted(unclaimed))}")
    if absent:
        print(f"claims: not run yet: {absent}")
    write_metrics(found, Path("results/metrics"))


def write_metrics(found: Results, folder: Path) -> None:
    """Write the scores of every run at its headline setting, means over its seeds, as a file each: `distill/get-m.json`."""
    names = [name for name in (found.distance, found.distance.replace("train", "test")) if name in found.runs]
    written = []
    for of, rows in found.runs.groupby("of", sort=False):
        scores = {name: float(f"{mean(rows[name]):.6g}") for name in names if rows[name].notna().all()}
        write_json(folder / f"{of}.json", {**scores, "seeds": len(rows)})
        written.append(folder / f"{of}.json")
    remove_others(folder, "*.json", written)  # of runs that there were before


def remove_others(folder: Path, pattern: str, kept: Collection[Path]) -> None:
    """Remove the files of a folder, at any depth, whose names fit a pattern, but for those that are kept."""
    for path in folder.rglob(pattern):
        if path not in kept:
            path.unlink()


class Judged(NamedTuple):
    """A claim, what came of it in a study, the verdict by KID, and how the comparison is other than the paper's."""

    claim: Claim
    outcome: Outcome
    by_kid: str
    differs: str


def judged_claims(found: Results, confidence: float, claims: Sequence[Claim]) -> list[Judged]:
    """Return the claims that a study can judge by the results that there are."""
    judged = []
    for claim in claims:
        with contextlib.suppress(NotRunError):
            if (outcome := judge(claim, found, confidence)) is not None:
                by_kid = judge_by_kid(claim, found, confidence)
                judged.append(Judged(claim, outcome, by_kid, found.comparisons[claim.comparison].differs))
    return judged


def not_run(found: Results, job: Job) -> list[str]:
    """Return the jobs without results, as DVC names them, among those on whose results claims rest."""
    runs = [(run, seed) for run in found.params["evaluate"] for seed in job.seeds("evaluate", run)]
    needed = {
        f"evaluate@{run}-{seed}": folder_of("evaluate", run, seed) / "metrics.json" for run, seed in runs
    }
    for stage in ("relative", "activation", "cost"):
        if found.params.get(stage) is not None:
            needed[stage] = folder_of(stage) / f"{stage}.csv"
    return [name for name, path in needed.items() if not path.exists()]


def table(judged: list[Judged]) -> pd.DataFrame:
    """Return a row for each claim: what it says, the verdict, the effect with its interval, seeds, the verdict by KID, what was
    published where, and how the comparison is other than that."""
    rows = []
    for claim, outcome, by_kid, differs in judged:
        bounds = ["" if np.isnan(bound) else f"{bound:.4g}" for bound in (outcome.low, outcome.high)]
        found = outcome.verdict, outcome.effect, *bounds, _seeds(claim, outcome), by_kid
        rows.append((claim.id, claim.part, claim.claim, *found, claim.published, claim.where, differs))
    about, found = ("id", "part", "claim"), ("verdict", "effect", "low", "high", "seeds", "by_kid")
    return pd.DataFrame(rows, columns=[*about, *found, "published", "where", "differs"])


def _seeds(claim: Claim, outcome: Outcome) -> str:
    """Return over how many seeds a claim was judged, or why it needs none."""
    if outcome.seeds is None:
        return "measured, one network" if claim.measured else "counted"
    return str(outcome.seeds)


def hypotheses(judged: list[Judged]) -> str:
    """Return in Markdown why claims with a verdict might hold or fail."""
    lines = [
        f"- {claim.name} ({outcome.verdict}): {getattr(claim.hypotheses, outcome.verdict)}"
        for claim, outcome, *_ in judged
        if outcome.verdict in (HOLDS, FAILS)
    ]
    head = ["## Hypotheses", "", "Why this might be so; nothing here tests it.", ""]
    return "\n".join(head + lines) if lines else ""


def differences(judged: list[Judged]) -> str:
    """Return in Markdown how comparisons are other than those of the papers."""
    lines = [f"- {claim.name}: {differs}" for claim, _, _, differs in judged if differs]
    return "\n".join(["## Where this study compares otherwise than the paper", "", *lines]) if lines else ""


def page(title: str, head: str, judged: list[Judged], end: str) -> str:
    """Return a page of claims in Markdown."""
    parts = [f"# {title}", head, markdown(table(judged)), differences(judged), hypotheses(judged), end]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tell(name: str, judged: list[Judged]) -> None:
    """Say how many claims are judged how."""
    counts = Counter(one.outcome.verdict for one in judged)
    found = ", ".join(f"{counts[verdict]} {words}" for verdict, words in VERDICTS.items() if counts[verdict])
    print(f"results/{name}.md: {len(judged)} claims judged{f': {found}' if found else ''}")


def markdown(found: pd.DataFrame) -> str:
    """Return the table in seven columns, for a page."""
    if found.empty:
        return "This study compares nothing that such a claim is about."
    named = found["id"] + found["part"].map(lambda part: f", {part}" if part else "")
    shown = found.assign(
        id=named,
        verdict=found["verdict"].replace("", "–"),
        published=found["published"] + " (" + found["where"] + ")",
    )
    shown = shown.rename(columns={"by_kid": "by KID"})
    return shown[["id", "claim", "verdict", "by KID", "effect", "seeds", "published"]].to_markdown(
        index=False
    )
