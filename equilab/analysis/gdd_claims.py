"""The claims of the GDD paper as tests on a study's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from equilab.analysis import activity, students
from equilab.analysis.students import Students
from equilab.analysis.verdicts import FAILS, HOLDS, OPEN, Comparisons, Config, Found, listed, seeds_of, span, verdict


@dataclass(frozen=True)
class Study(Comparisons):
    """What the claims are tested on."""

    config: Config
    students: Students

    @property
    def distance(self) -> str:
        """The column of the distance."""
        return self.students.distance

    @property
    def score(self) -> str:
        """The distance's name as people write it."""
        return self.students.score

    def averaged(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return rows with their seeds averaged."""
        return self.students.averaged(rows, self.config.rule.confidence)

    def of(self, family: str) -> pd.Series | None:
        """Return the averaged row of a family's headline, or None."""
        rows = self.students.rows[self.students.rows["model"] == self.students.headline(family)]
        return None if rows.empty else self.averaged(rows).iloc[0]

    def variant(self, family: str) -> pd.Series | None:
        """Return the averaged row of a family that differs from GDD (or CD) in nothing else, or None."""
        rows = self.students.rows[self.students.rows["model"] == students.variant(self.students, family)]
        return None if rows.empty else self.averaged(rows).iloc[0]


Test = Callable[[Study], Found | None]  # None: the study trains nothing that could tell


def better(worse: str, best: str) -> Test:
    """Return the test that the second family is better than the first, which it differs from in one thing."""

    def test(study: Study) -> Found | None:
        first, last = study.variant(worse), study.variant(best)
        if first is None or last is None:
            return None
        return study.compared(f"{worse} {study.value(first)}, {best} {study.value(last)}", first, last)

    return test


def against_instances(study: Study) -> Found | None:
    """Test that GDD-I (or GDD) is better than every one-step student of the same teacher that learns instance by instance."""
    ours = study.of("GDD-I")
    ours = study.of("GDD") if ours is None else ours
    others = [(name, study.of(name)) for name in ("CD", "CD-I", "GET", "ViT")]
    others = [(name, row) for name, row in others if row is not None]
    if ours is None or not others:
        return None
    name, best = min(others, key=lambda other: other[1][study.distance])
    told = ", ".join(f"{name} {study.value(row)} ({row['nimg']:,.0f} images)" for name, row in others)
    return study.compared(f"{ours['family']} {study.value(ours)} ({ours['nimg']:,.0f} images); {told}", best, ours)


def against_teacher(study: Study) -> Found | None:
    """Test that the better of GDD and GDD-I is within the margin of its teacher at its most evaluations, or past it."""
    teacher = study.students.rows.query("stage == 'teacher'").sort_values("nfe")
    found = [row for row in (study.of("GDD"), study.of("GDD-I")) if row is not None]
    if teacher.empty or not found:
        return None
    last = study.averaged(teacher.iloc[-1:]).iloc[0]
    ours = min(found, key=lambda row: row[study.distance])
    told = ", ".join(f"{row['family']} {study.value(row)}" for row in found)
    bounds, near = study.gain(last, ours), 1 / (1 + study.config.rule.margin_distance)
    told = f"{study.score} {told}; teacher {study.value(last)} in {last['nfe']:.0f} evaluations"
    return Found(told, f"{span(*bounds)} times", seeds_of(pd.DataFrame([ours])), verdict(*bounds, near))


def images(study: Study) -> Found | None:
    """Test that GDD needs fewer images than CD sees to be as good as CD ends."""
    cd, gdd = study.of("CD"), study.of("GDD")
    if cd is None or gdd is None:
        return None
    curves = study.students.curves
    curve = curves[curves["model"] == gdd["model"]].groupby("nimg")[study.distance].mean()
    past = curve[curve <= cd[study.distance]]
    if past.empty:
        return Found(f"GDD does not reach CD's {study.value(cd)} of {cd['nimg']:,.0f} images", "counted", seeds_of(pd.DataFrame([gdd])), FAILS)
    told = f"GDD passes {study.value(cd)}, where CD ends after {cd['nimg']:,.0f} images, within {past.index[0]:,.0f}"
    return Found(told, f"{cd['nimg'] / past.index[0]:.3g} times fewer", seeds_of(pd.DataFrame([gdd, cd])),
                 HOLDS if past.index[0] < cd["nimg"] else FAILS)  # fmt: skip


def judges(study: Study) -> Found | None:
    """Test that the projected discriminator is better than every other."""
    rows = students.ablation(study.students, study.config.rule.confidence, "judge")
    if rows["judge"].nunique() < 2 or "projected" not in set(rows["judge"]):
        return None
    ours = rows[rows["judge"] == "projected"].iloc[0]
    next_best = rows[rows["judge"] != "projected"].sort_values(study.distance).iloc[0]
    return study.compared(listed(rows, study.distance, "judge").replace(" at ", " with "), next_best, ours)


def penalties(augmented: bool) -> Test:
    """Return the test that augmentation hurts, or that the best R1 is better than none."""

    def test(study: Study) -> Found | None:
        rows = students.ablation(study.students, study.config.rule.confidence, "penalty")
        if rows.empty:
            return None
        plain = rows[(rows["augment"] == "none") & (rows["gamma"] == 0)]
        other = rows[rows["augment"] == "diffaugment"] if augmented else rows[(rows["augment"] == "none") & (rows["gamma"] > 0)]
        if plain.empty or other.empty:
            return None
        if augmented:
            same = plain[plain["gamma"].isin(other["gamma"])]
            told = f"with augmentation {study.value(other.iloc[0])}, without {study.value(plain.iloc[0])}"
            return study.compared(told, other.iloc[0], (same if len(same) else plain).iloc[0])
        told = f"without R1 {study.value(plain.iloc[0])}; gamma " + listed(other, study.distance, "gamma")
        return study.compared(told, plain.iloc[0], other.sort_values(study.distance).iloc[0])

    return test


def overfits(study: Study) -> Found | None:
    """Test that GDD ends further above its best snapshot than GDD-I does: ratios of each seed's last to its best."""
    worse = []
    for family in ("GDD", "GDD-I"):
        curves = study.students.curves
        curves = curves[curves["model"] == study.students.headline(family)].sort_values("nimg")
        if curves.groupby("run").size().min() < 3 if len(curves) else True:
            return None
        by = curves.groupby("seed")[study.distance]
        worse.append(np.log(by.last() / by.min()))
    more, rule = (worse[0] - worse[1]).dropna(), study.config.rule
    reach = np.log1p(rule.margin_distance)
    if len(more) > 1:
        reach = stats.t.ppf((1 + rule.confidence) / 2, len(more) - 1) * more.std(ddof=1) / np.sqrt(len(more))
    low, high = np.exp(more.mean() - reach), np.exp(more.mean() + reach)
    told = f"{study.score} at the end over the best: GDD {np.exp(worse[0].mean()):.3g}, GDD-I {np.exp(worse[1].mean()):.3g}"
    return Found(told, f"{span(low, high)} times more", str(len(more)), verdict(low, high))


def relative(x: str) -> Test:
    """Return the test that rel-FD grows with the number of steps, or falls with the middle noise level of two, by a rank
    correlation over the runs."""

    def test(study: Study) -> Found | None:
        found = students.relatives(study.students)
        if found.empty or found.dropna(subset=[x])[x].nunique() < 3:
            return None
        rows = students.evenly(found) if x == "steps" else found.dropna(subset=[x])
        rho, p = stats.spearmanr(rows[x], rows["relative"])
        means = rows.groupby(x)["relative"].mean()
        told = f"rel-{study.score} " + ", ".join(f"{value:.3g} at {at:g}" for at, value in means.items())
        sure = p < 1 - study.config.rule.confidence
        wanted = rho > 0 if x == "steps" else rho < 0
        return Found(told, f"rank correlation {rho:.2f}, p = {p:.2g}", str(rows["seed"].nunique()),
                     OPEN if not sure else HOLDS if wanted else FAILS)  # fmt: skip

    return test


def alike(study: Study) -> Found | None:
    """Test that students of several steps differ more from the one-step student than in their distance to real images."""
    found = students.relatives(study.students)
    if found.empty:
        return None
    one = study.students.rows[study.students.rows["run"].isin(found["first"])].set_index("run")[study.distance]
    apart = (found[study.distance] - found["first"].map(one)).abs()
    ratio = np.log(found["relative"] / apart.clip(lower=1e-6))
    told = (f"abs-{study.score} {found[study.distance].min():.3g} to {found[study.distance].max():.3g}, one step {one.mean():.3g}; "
            f"rel-{study.score} {found['relative'].min():.3g} to {found['relative'].max():.3g}")  # fmt: skip
    least = float(np.exp(ratio.min()))
    return Found(told, f"at least {least:.3g} times the difference of the abs-{study.score}", str(found["seed"].nunique()),
                 HOLDS if least > 1 else FAILS)  # fmt: skip


def layers(study: Study) -> Found | None:
    """Test that the teacher's deep layers are most active at high noise levels and its shallow ones at low, by the rank
    correlation of depth and peak, of the root mean square."""
    if not (study.students.folder / "activation" / "activation.csv").exists():
        return None
    found = activity.order(activity.read(study.students.folder, "rms")).query("run == 'teacher' and part == 'all'")
    if found.empty or not np.isfinite(found["rank correlation"].iloc[0]):
        return None
    rho, p, count = found[["rank correlation", "p", "layers"]].iloc[0]
    sure = p < 1 - study.config.rule.confidence
    return Found(f"{count:.0f} layers", f"rank correlation {rho:.2f}, p = {p:.2g}", "1", OPEN if not sure else HOLDS if rho > 0 else FAILS)


COUNTED: dict[tuple[str, str], Test] = {
    ("GDD-1", "alike but apart"): alike,
    ("GDD-1", "steps"): relative("steps"),
    ("GDD-1", "sigma of two steps"): relative("middle"),
    ("GDD-2", ""): judges,
    ("GDD-3", "augmentation"): penalties(True),
    ("GDD-3", "R1"): penalties(False),
    ("GDD-4", ""): layers,
    ("GDD-5", "convolutions"): better("GDD", "GDD-I"),
    ("GDD-5", "QKV"): better("GDD-I, QKV frozen", "GDD-I"),
    ("GDD-5", "skips"): better("GDD-I, QKV and skips frozen", "GDD-I, QKV frozen"),
    ("GDD-6", "GDD-I"): better("GDD-I + CD", "GDD-I"),
    ("GDD-6", "CD"): better("CD-I", "CD"),
    ("GDD-7", "instances"): against_instances,
    ("GDD-7", "images"): images,
    ("GDD-7", "teacher"): against_teacher,
    ("GDD-8", ""): overfits,
}
