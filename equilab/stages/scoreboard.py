"""Stage `scoreboard`: every claim once, with what each study of the repository found and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field, model_validator

from equilab.claims.claim import DEPENDS, MISTYPED, read_claims, read_papers
from equilab.claims.tests import FAILS, HOLDS, INCONCLUSIVE, NONE, SEEDS
from equilab.core import like
from equilab.core.config import Params, UserError, near, nearest
from equilab.core.files import write_together
from equilab.core.job import Distinct, Job, Plan

KEYS = ["id", "part"]
ABOUT = ["paper", *KEYS, "claim", "where", "published"]
FOUND = ["verdict", "effect", "low", "high", "seeds", "by_kid", "differs"]
EFFECTS = "## Effects"  # a heading
HEAD = f"""\
Every claim once, with a column for each study that tests a claim of its paper. A verdict needs {SEEDS} seeds on either side, or a
counted quantity: – marks numbers without a verdict, an empty cell a study that does not make the comparison. What the verdicts mean
is said in docs/figures.md. Under the tables stand the effects, by FD unless they say otherwise, with the verdict that KID would give, how
a comparison is other than the paper's, and why a verdict might be so, which nothing here tests; scoreboard.csv has their intervals.
Published numbers are FID, of GET and GDD on CIFAR-10, of FPDM on ImageNet 256, unless they say otherwise."""

EARLIER = """\
\\* This study has not been run since its params, the evaluator and the discriminators' feature network were revised. Its verdicts are
those of before, when these networks shared images; claims that have been put in other words since are left out of its column."""


class Config(Params):
    """The params section `scoreboard`: one study of a repository has it, for all of them."""

    # their folders, from this study's, by their names
    studies: Annotated[dict[str, str], Field(min_length=1)]
    # those whose results are of earlier params, and wait to be run again
    earlier: Annotated[tuple[str, ...], Distinct]

    @model_validator(mode="after")
    def _known(self):
        for name in self.earlier:
            if name not in self.studies:
                raise ValueError(
                    f"earlier names {name!r}, which is none of studies{nearest(name, self.studies)}"
                )
        return self


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: no networks.

    Raises: UserError if there is no study where one is said to be.
    """
    for name, folder in config.studies.items():
        if not Path(folder, "params.yaml").exists():
            raise UserError(
                f"scoreboard.studies.{name}: {folder} holds no params.yaml; correct the path or take it out"
            )
    return Plan


def run(config: Config, job: Job) -> None:
    """Write `results/scoreboard.csv` and `scoreboard.md` from what every study has written of its claims.

    Raises: UserError if a study has not judged its claims, or judged one that there is not.
    """
    found = scoreboard(config.studies, config.earlier)
    text, path = found.to_csv(index=False, lineterminator="\n"), Path("results/scoreboard.md")
    write_together({path.with_suffix(".csv"): text, path: markdown(found, config)})
    for sentence in overlooked(found, config.studies):
        print(f"scoreboard: {sentence}")


def overlooked(found: pd.DataFrame, studies: Mapping[str, str]) -> list[str]:
    """Return sentences about claims that a study could judge and has not, and about those whose comparison may be mistyped: none
    declares it, and one declares almost the same."""
    sections = {name: like.read(Path(folder, "params.yaml")) for name, folder in studies.items()}
    declared = {name: set(each.get("comparisons") or {}) for name, each in sections.items()}
    judged = set(zip(found["id"], found["part"], found["study"]))
    sentences = []
    for claim in read_claims():
        by = [name for name, comparisons in declared.items() if claim.comparison in comparisons]
        meant = near(claim.comparison, set().union(*declared.values()), MISTYPED)
        if not by and meant:
            sentences.append(f"no study declares the comparison of {claim.name}; did you mean {meant!r}?")
        for name in by:
            if (claim.id, claim.part, name) not in judged:
                remedy = f"run `python -m equilab claims` in {studies[name]}, or what it says has not run"
                sentences.append(
                    f"{name} compares what {claim.name} is about, and has not judged it; {remedy}"
                )
    return sentences


def scoreboard(studies: Mapping[str, str], earlier: Collection[str] = ()) -> pd.DataFrame:
    """Return a row for each claim and each study that tests it, in the order of both; of a claim that none tests, one without a study.

    `studies` are the folders of studies by their names; of those that are `earlier`, claims that have changed since are left out. All
    columns are words: `paper`, `id`, `part`, `claim`, `where`, `published`, `study`, `verdict`, `effect`, `low`, `high`, `seeds`.

    Raises: UserError if a study has not judged its claims, or judged one that there is not.
    """
    papers = read_papers()
    claims = [
        (paper, *(getattr(claim, name) for name in ABOUT[1:]))
        for paper, entries in papers.items()
        for claim in entries
    ]
    about = pd.DataFrame(claims, columns=ABOUT)
    known = pd.MultiIndex.from_frame(about[KEYS])
    judged = [_judged(name, Path(folder), known, name in earlier) for name, folder in studies.items()]
    return about.merge(pd.concat(judged), on=KEYS, how="left").fillna("")


def _judged(name: str, folder: Path, known: pd.MultiIndex, earlier: bool) -> pd.DataFrame:
    """Return what a study has found of the claims that it tests."""
    remedy, results = f"run `dvc repro claims` in {folder}", folder / "results"
    try:
        paths = [*sorted((results / "claims").iterdir()), results / "measured.csv"]
        found = pd.concat([pd.read_csv(path, keep_default_na=False, dtype=str) for path in paths])
        found = found[[*KEYS, *FOUND]]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{results / 'claims'} or measured.csv is missing, damaged or of another version; {remedy}"
        ) from None
    keys = pd.MultiIndex.from_frame(found[KEYS])
    unknown = keys.difference(known)
    if earlier:
        found = found[keys.isin(known)]
    elif len(unknown):
        raise UserError(f"{results} judges {', '.join(unknown[0])}, which is no claim now; {remedy}")
    return found.assign(study=name)[[*KEYS, "study", *FOUND]]


def together(verdicts: Mapping[str, str]) -> str:
    """Return in a sentence what all studies say of a claim, by the verdict of each that tests it."""
    if not verdicts:
        return "Not tested by any study here."
    studies: dict[str, list[str]] = {}
    for study, verdict in verdicts.items():
        studies.setdefault(verdict, []).append(study)
    given = [verdict for verdict in (HOLDS, FAILS, DEPENDS, INCONCLUSIVE) if verdict in studies]
    parts = [f"{verdict} in {_listed(studies[verdict])}" for verdict in given]
    sentence = "; ".join(parts or [f"too few seeds in {_listed(studies[NONE])}"]) + "."
    if HOLDS in given and FAILS in given:
        return f"The studies disagree: {sentence}"
    if HOLDS not in given and FAILS not in given:
        return f"Open: {sentence}"
    return sentence[0].upper() + sentence[1:]


def _listed(words: list[str]) -> str:
    """Return words as a list in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def markdown(found: pd.DataFrame, config: Config) -> str:
    """Return the scoreboard as a page: for each paper a table of verdicts, with a column for each study that tests one of its
    claims; then all effects in a list."""
    parts = ["# Scoreboard", HEAD]
    if config.earlier:
        parts.append(EARLIER)
    for paper, rows in found.groupby("paper", sort=False):
        columns = [study for study in config.studies if study in set(rows["study"])]
        marked = {study: f"{study} *" for study in config.earlier}
        parts += [f"## {paper}", _verdicts(rows, columns).rename(columns=marked).to_markdown(index=False)]
    return "\n\n".join([*parts, EFFECTS, _effects(found)]) + "\n"


def _verdicts(rows: pd.DataFrame, studies: Sequence[str]) -> pd.DataFrame:
    """Return a row for each claim of a paper, with a column for each of the studies."""
    table = []
    for (name, claim), of_claim in rows.groupby([_names(rows), "claim"], sort=False):
        verdicts = {row.study: row.verdict for row in of_claim.itertuples() if row.study}
        first = of_claim.iloc[0]
        table.append(
            {
                "claim": f"{name}: {claim}",
                "published": f"{first['published']} ({first['where']})",
                **{study: (verdicts[study] or "–") if study in verdicts else "" for study in studies},
                "together": together(verdicts),
            }
        )
    return pd.DataFrame(table)


def _effects(rows: pd.DataFrame) -> str:
    """Return a line for each claim and study that tests it."""
    tested = rows[rows["study"] != ""]
    why = {claim.name: claim.hypotheses for claims in read_papers().values() for claim in claims}
    lines = []
    for name, row in zip(_names(tested), tested.itertuples()):
        seeds = f"{row.seeds} seed{'s' * (row.seeds != '1')}" if row.seeds.isdigit() else row.seeds
        line = f"- **{name}**, {row.study}: {row.effect} ({seeds})."
        if row.by_kid:
            line += f" By KID: {row.by_kid}."
        if row.differs:
            line += f" Other than in the paper: {row.differs}."
        if row.verdict in (HOLDS, FAILS):
            line += f" Perhaps because {getattr(why[name], row.verdict)}."
        lines.append(line)
    return "\n".join(lines)


def _names(rows: pd.DataFrame) -> pd.Series:
    """Return the ids of claims with their parts."""
    return rows["id"] + rows["part"].map(lambda part: f", {part}" if part else "")
