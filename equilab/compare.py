"""`python -m equilab compare [REV]`: did the study give here what is committed? Scores, verdicts and machines, side by side."""

from __future__ import annotations

import argparse
import filecmp
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from equilab.core.config import UserError, difference, shown
from equilab.tables import Results, results

CONFIDENCE = 0.999  # that replicates of one run are told to be alike
UNKNOWN = 0.1  # how far scores may lie apart, relatively, in a study of which no run has several seeds
# what is made of seconds and memory, which no two machines or days have in common
MEASURED = ("cost", "measured", "notebook/sampling_speed", "notebook/reuse_smoothing", "report")
SAME, CLOSE, APART, ABSENT = "same", "within tolerance", "differs", "is not there"


def command(arguments: list[str]) -> int:
    """Compare the results in the study's folder with those of a revision of git; return 0 if they are reproduced, otherwise 1."""
    parser = argparse.ArgumentParser(prog="equilab compare", description=__doc__)
    parser.add_argument("revision", metavar="REV", nargs="?", default="HEAD", help="of git; by default HEAD")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        unpack(given.revision, Path(folder))
        found = Comparison(given.revision, results(Path(folder, "results")), results("results"))
        print(found.page())
        return 0 if found.reproduced else 1


def unpack(revision: str, folder: Path) -> None:
    """Write the params and the results that git has of the study in the current folder, at a revision, into another folder.

    Raises: UserError if git has none.
    """
    try:
        subject = ["git", "archive", "--format=tar", revision, "params.yaml", "results"]
        done = subprocess.run(subject, capture_output=True, check=False)
    except OSError:
        raise UserError("compare needs git, which is not installed; install it") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"git has no results of this study at {revision} ({reason[-1] if reason else 'no reason given'}); run in the "
            "folder of a study whose results are committed, and give a commit, tag or branch"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


@dataclass(frozen=True)
class Comparison:
    """The results of a study at a revision, and here."""

    revision: str
    there: Results
    here: Results

    @property
    def reproduced(self) -> bool:
        """Whether every run is there with the same params, every score is within tolerance, and every verdict is the same."""
        return bool(self.scores["found"].isin([SAME, CLOSE]).all() and self.verdicts.empty)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Return a row for each run: `of`, the two means of the distance that lie furthest apart, for their tolerance, of all its
        settings and references (`there`, `here`, `setting`, `score`), `found` and `why`."""
        both = self._means()
        limits = self._limits(both)
        rows = []
        for of, group in both.groupby("of", sort=False):
            why = self._why(of)
            apart = (group["log_here"] - group["log_there"]).abs()
            excess = apart / limits[group.index] if len(group) else apart
            worst = group.loc[excess.fillna(np.inf).idxmax()]
            if group[["log_here", "log_there"]].isna().any(axis=None) or why.startswith("params"):
                found = ABSENT if worst[["log_here", "log_there"]].isna().any() else APART
            elif (apart == 0).all():
                found = SAME
            else:
                found = CLOSE if (excess <= 1).all() else APART
            values = {name: np.exp(worst[f"log_{name}"]) for name in ("there", "here")}
            limit = np.exp(limits[worst.name])
            place = {"setting": worst["position"], "score": worst["score"]}
            rows.append({"of": of, "found": found, **place, **values, "ratio up to": limit, "why": why})
        return pd.DataFrame(rows)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """Return the claims whose verdicts differ: `id`, `part`, `claim`, the two verdicts."""
        keys = ["id", "part"]
        tables = [
            each.claims[[*keys, "claim", "verdict"]].replace({"verdict": {"": "none"}})
            for each in (self.there, self.here)
        ]
        both = tables[0].merge(tables[1], on=keys, how="outer", suffixes=(" there", " here"), sort=False)
        both["claim"] = both["claim there"].fillna(both["claim here"])
        both = both.fillna("not judged")
        both = both.rename(columns={"verdict there": "there", "verdict here": "here"})
        return both.loc[both["there"] != both["here"], [*keys, "claim", "there", "here"]]

    def page(self) -> str:
        """Return all of it in Markdown, the answer last."""
        scores, verdicts, (same, files) = self.scores, self.verdicts, self.files()
        counts = scores["found"].value_counts()
        told = ", ".join(f"{counts[name]} {name}" for name in (SAME, CLOSE, APART, ABSENT) if name in counts)
        differing = scores[scores["found"] != SAME].drop(columns="found" if len(counts) == 1 else [])
        parts = [
            f"# {self.here.study}: results here against {self.revision}",
            f"- machine there: {machines(self.there)}\n- machine here: {machines(self.here)}\n- files: {same} of {files} are "
            f"the same bytes, those of seconds and memory apart\n- runs: {told}\n- verdicts: "
            f"{len(self.here.claims)} here, {len(verdicts)} differ",
        ]
        if len(differing):
            head = f"Of each run the score that lies furthest apart; {self._tolerance()}"
            parts += [head, differing.to_markdown(index=False, floatfmt=".4g", missingval="–")]
        if len(verdicts):
            parts.append(verdicts.to_markdown(index=False))
        parts.append("reproduced" if self.reproduced else "not reproduced")
        return "\n\n".join(parts)

    def files(self) -> tuple[int, int]:
        """Return how many committed files are here with the same bytes, and how many there are, without what is measured."""
        there, here = self.there.folder, self.here.folder
        paths = [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]
        names = [path for path in paths if not path.startswith(MEASURED)]
        same, _, _ = filecmp.cmpfiles(there, here, names, shallow=False)
        return len(same), len(names)

    def _tolerance(self) -> str:
        """Return in words how far scores may lie apart."""
        if self._one_class():
            return "of one machine class all have to be the same."
        if not np.isfinite(self._spread()).all():
            return f"no run has several seeds, so {UNKNOWN:.0%} pass."
        return "the tolerance is how far replicates of one run lie apart, by their seeds."

    def _one_class(self) -> bool:
        return machines(self.there) == machines(self.here)

    def _logs(self) -> pd.DataFrame:
        """Return a row for each score of each replicate at each setting, there and here: its logarithm, and the `place`."""
        name, tables = self.there.score.lower(), []
        for place, each in (("there", self.there), ("here", self.here)):
            rows = each.settings.melt(["of", "position", "seed"], [f"{name}_train", f"{name}_test"], "score")
            tables.append(rows.assign(log=np.log(rows["value"].where(rows["value"] > 0)), place=place))
        return pd.concat(tables)

    def _means(self) -> pd.DataFrame:
        """Return a row for each run, setting and reference: the means of the logarithms over seeds, there and here, and how many."""
        logs = self._logs().groupby(["of", "position", "score", "place"], sort=False)["log"]
        found = logs.agg(["mean", "count"]).unstack("place")
        found.columns = [f"{'log' if kind == 'mean' else 'seeds'}_{place}" for kind, place in found.columns]
        return found.reset_index()

    def _spread(self) -> pd.Series:
        """Return for each reference the standard deviation of the logarithms of scores between the seeds of a run, over all runs
        that have several, there or here; nan if none has."""
        groups = self._logs().groupby(["place", "of", "position", "score"])["log"]
        found = groups.agg(["var", "count"]).reset_index()
        found["weight"] = (found["count"] - 1).where(found["var"].notna(), 0)
        found["sum"] = found["var"] * found["weight"]
        sums = found.groupby("score")[["sum", "weight"]].sum()
        return np.sqrt(sums["sum"] / sums["weight"].where(sums["weight"] > 0))

    def _limits(self, both: pd.DataFrame) -> pd.Series:
        """Return how far each pair of mean logarithms may lie apart."""
        if self._one_class():
            return pd.Series(1e-8, both.index)  # of what is written in nine digits
        spread = both["score"].map(self._spread())
        seeds = 1 / both["seeds_there"].clip(lower=1) + 1 / both["seeds_here"].clip(lower=1)
        limit = stats.norm.ppf((1 + CONFIDENCE) / 2) * spread * np.sqrt(seeds)
        return limit.fillna(np.log1p(UNKNOWN))

    def _why(self, of: str) -> str:
        """Return what is recorded of a run's first replicates that may make them differ; "" if nothing is."""
        there, here = _summary(self.there, of), _summary(self.here, of)
        if there is None or here is None:
            return "not run here" if there else f"not at {self.revision}"
        if found := difference(there["config"], here["config"]):
            key, before, now = found
            return f"params: {key} {shown(before)}, here {shown(now)}"
        if found := difference(there.get("environment", {}), here.get("environment", {})):
            key, before, now = found
            return f"machine: {key} {before}, here {now}"
        if found := difference(there.get("inputs", {}), here.get("inputs", {})):
            return f"what it reads: {found[0]}"
        return ""


def machines(found: Results) -> str:
    """Return the machine classes on which the runs of a study were trained, in words."""
    classes = set()
    for of, seed in found.settings[["of", "seed"]].drop_duplicates().itertuples(index=False):
        about = found.summary(of, seed).get("environment", {})
        versions = f"torch {about.get('torch', 'not known')}, numpy {about.get('numpy', 'not known')}"
        counts = ", ".join(f"{key} {about.get(key, 'not known')}" for key in ("threads", "processes"))
        classes.add(f"{about.get('device', 'not known')}, {versions}, {counts}")
    return "; ".join(sorted(classes))


def _summary(found: Results, of: str) -> Mapping[str, Any] | None:
    """Return what the first replicate of a run says of its training, None if there is none."""
    seeds = found.settings.loc[found.settings["of"] == of, "seed"]
    return None if seeds.empty else found.summary(of, int(seeds.min()))
