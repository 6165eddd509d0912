"""Stage `claims`: the claims of the papers as checks on this study's results, with verdicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from equilab.analysis import chains, fpdm_claims, gdd_claims, get_claims, students
from equilab.analysis.tables import evaluated, markdown, read
from equilab.analysis.verdicts import COLUMNS, Config, rows
from equilab.core.config import UserError, read_json
from equilab.core.files import write
from equilab.core.job import Job, Plan


def plan(config: Config, job: Job, read: Callable) -> Callable[[], Plan]:
    """Return what counts the stage's cost: nothing to speak of."""
    return Plan


def run(config: Config, job: Job) -> None:
    """Write `results/claims.*`, and `results/measured.*` for what rests on seconds and memory: CSV and Markdown.

    Raises: UserError if the study has evaluated no run but the teacher.
    """
    folder, rule, head, counted, timed = Path("results"), config.rule, "", [], []
    measured = (folder / "cost" / "cost.csv").exists()
    if evaluated(folder, "distill"):
        study = get_claims.Study(config, read(folder), read_json(folder / "pairs" / "meta.json"))
        head, score = (
            f"GETs and ViTs are compared at {study.regime}, unless a row says otherwise. ",
            study.tables.score,
        )
        counted.append(rows(study, get_claims.COUNTED))
        timed.append(rows(study, get_claims.MEASURED if measured else {}))
    if evaluated(folder, "diffusion"):
        denoisers = fpdm_claims.Study(config, chains.read(folder))
        score = denoisers.score
        counted.append(rows(denoisers, fpdm_claims.COUNTED))
        timed.append(rows(denoisers, fpdm_claims.MEASURED if measured else {}))
    if evaluated(folder, "gan") + evaluated(folder, "consistency"):
        made = gdd_claims.Study(config, students.read(folder))
        score = made.score
        counted.append(rows(made, gdd_claims.COUNTED))
    if not counted:
        raise UserError("results/evaluate holds no run that makes images but the teacher; evaluate one first")
    head += (
        f"Intervals are {rule.confidence:.0%} t-intervals over seeds, their spread pooled over all models; of the best of several, "
        f"intervals that hold for all of them at once. Where no run has a second seed a difference counts from {rule.margin_distance:.0%} of "
        f"{score} and {rule.margin_l1:.0%} of L1, and the interval is that margin. A {score} of GET or ViT above "
        f"{rule.ranked:g} is not compared. Published numbers: FID, of GET on CIFAR-10, of FPDM on ImageNet 256, of GDD on CIFAR-10 where nothing else is said. Reasons are "
        "likely ones: what was not compared is not tested. Claims on seconds and memory are in measured.md."
    )
    timed = timed or [pd.DataFrame(columns=COLUMNS)]
    for name, title, parts in (
        ("claims", "Claims", counted),
        ("measured", "Claims on seconds and memory", timed),
    ):
        table = pd.concat(parts)
        write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        write(folder / f"{name}.md", f"# {title}: {job.study.name}\n\n{head}\n\n{markdown(table)}")
