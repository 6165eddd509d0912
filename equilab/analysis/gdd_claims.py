"""The claims of the GDD paper as tests on a study's results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from equilab.analysis import activity, students
from equilab.analysis.students import Students
from equilab.analysis.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    Comparisons,
    Found,
    listed,
    ordered,
    seeds_of,
    span,
    verdict,
)


class Study(Comparisons):
    """What the claims are tested on."""

    found: Students

    def averaged(self, among: int = 1) -> pd.DataFrame:
        """Return every model, its seeds averaged, the spread pooled over all; with intervals that hold for `among` of them at
        once."""
        return self.found.averaged(self.found.rows, self.confidence(among))

    def model(self, name: str | None, among: int = 1) -> pd.Series | None:
        """Return the averaged row of a model, or None."""
        found = self.averaged(among)
        found = found[found["model"] == name]
        return None if found.empty else found.iloc[0]

    def of(self, family: str) -> pd.Series | None:
        """Return the averaged row of a family's headline, or None."""
        return self.model(self.found.headline(family))

    def variant(self, family: str) -> pd.Series | None:
        """Return the averaged row of a family that differs from GDD (or CD) in nothing else, or None."""
        return self.model(students.variant(self.found, family))

    @property
    def near(self) -> float:
        """How many times as good counts as no worse."""
        return 1 / (1 + self.config.rule.margin_distance)


Test = Callable[[Study], Found | None]  # None: the study trains nothing that could tell


def better(worse: str, best: str, near: bool = False) -> Test:
    """Return the test that the second family is better than the first, or `near`: no worse by more than the margin; they
    differ in one thing."""

    def test(study: Study) -> Found | None:
        first, last = study.variant(worse), study.variant(best)
        if first is None or last is None:
            return None
        found = study.compared(f"{worse} {study.value(first)}, {best} {study.value(last)}", first, last)
        return found._replace(verdict=verdict(*study.gain(first, last), study.near)) if near else found

    return test


def slower(study: Study) -> Found | None:
    """Test that GDD with a consistency loss beside it is worse than GDD at their first snapshot."""
    names, curves = (
        [students.variant(study.found, family) for family in ("GDD", "GDD + CD")],
        study.found.curves,
    )
    if None in names:
        return None
    found = study.found.averaged(curves, study.config.rule.confidence, ("nimg",))
    alone, beside = (found[found["model"] == name].sort_values("nimg").head(1) for name in names)
    if alone.empty or beside.empty or alone["nimg"].iloc[0] != beside["nimg"].iloc[0]:
        return None
    told = f"after {alone['nimg'].iloc[0]:,.0f} images: GDD {study.value(alone.iloc[0])}, GDD + CD {study.value(beside.iloc[0])}"
    return study.compared(told, beside.iloc[0], alone.iloc[0])


def against_instances(study: Study) -> Found | None:
    """Test that GDD-I (or GDD) is better than every one-step student of the same teacher that learns instance by instance."""
    ours = study.of("GDD-I")
    ours = study.of("GDD") if ours is None else ours
    others = study.averaged()
    count = int(others["family"].isin(("CD", "CD-I", "GET", "ViT")).sum())
    others = study.averaged(max(count, 1))
    others = others[others["family"].isin(("CD", "CD-I", "GET", "ViT"))].sort_values(study.distance)
    if ours is None or others.empty:
        return None
    best = others.drop_duplicates("family")
    told = ", ".join(
        f"{row['family']} {study.value(row)} ({row['nimg']:,.0f} images)" for _, row in best.iterrows()
    )
    told = f"{ours['family']} {study.value(ours)} ({ours['nimg']:,.0f} images); the best of each: {told}"
    return study.compared(told, others.iloc[0], ours)


def against_teacher(study: Study) -> Found | None:
    """Test that the better of GDD and GDD-I is within the margin of its teacher at its most evaluations, or past it."""
    table = study.averaged(2)
    teacher = table[table["stage"] == "teacher"].sort_values("nfe")
    found = table[table["model"].isin([study.found.headline(name) for name in ("GDD", "GDD-I")])]
    if teacher.empty or found.empty:
        return None
    last, ours = teacher.iloc[-1], found.sort_values(study.distance).iloc[0]
    told = ", ".join(f"{row['family']} {study.value(row)}" for _, row in found.iterrows())
    bounds = study.gain(last, ours)
    told = f"{study.score} {told}; teacher {study.value(last)} in {last['nfe']:.0f} evaluations"
    return Found(told, f"{span(*bounds)} times", seeds_of(found), verdict(*bounds, study.near))


def images(study: Study) -> Found | None:
    """Test that GDD is as good as CD ends after fewer images than CD itself needs for that: at snapshots, means over seeds."""
    cd, gdd = study.of("CD"), study.of("GDD")
    if cd is None or gdd is None:
        return None

    def first(row: pd.Series) -> float:
        curves = study.found.curves
        along = curves[curves["model"] == row["model"]].groupby("nimg")[study.distance].mean()
        along.loc[row["nimg"]] = row[study.distance]
        past = along[along <= cd[study.distance]].index
        return float(past.min()) if len(past) else np.inf

    ours, theirs = first(gdd), first(cd)
    told = f"as good as CD ends, {study.value(cd)}: GDD within {ours:,.0f} images, CD within {theirs:,.0f}"
    if np.isinf(ours):
        told = f"GDD has not reached CD's {study.value(cd)} after {gdd['nimg']:,.0f} images; CD had after {theirs:,.0f}"
    late = FAILS if gdd["nimg"] >= theirs else OPEN
    found = HOLDS if ours < theirs else OPEN if ours == theirs else late
    return Found(
        told,
        f"{theirs / ours:.3g} times as many for CD" if np.isfinite(ours) else "–",
        seeds_of(pd.DataFrame([gdd, cd])),
        found,
    )


def judges(study: Study) -> Found | None:
    """Test that the projected discriminator is better than every other."""
    rows = students.ablation(study.found, study.averaged(), "judge")
    if rows["judge"].nunique() < 2 or "projected" not in set(rows["judge"]):
        return None
    rows = students.ablation(study.found, study.averaged(len(rows) - 1), "judge")
    ours = rows[rows["judge"] == "projected"].iloc[0]
    next_best = rows[rows["judge"] != "projected"].sort_values(study.distance).iloc[0]
    return study.compared(listed(rows, study.distance, "judge").replace(" at ", " with "), next_best, ours)


def collapse(study: Study) -> Found | None:
    """Test that a StyleGAN2 discriminator from scratch leads nowhere: a distance too far off to order models, or a recall
    below a tenth of the projected one's."""
    rows = (
        students.ablation(study.found, study.averaged(), "judge").drop_duplicates("judge").set_index("judge")
    )
    if not {"projected", "StyleGAN2 from scratch"} <= set(rows.index):
        return None
    other, ours = rows.loc["StyleGAN2 from scratch"], rows.loc["projected"]
    gone = other[study.distance] > study.config.rule.ranked or other["recall"] < ours["recall"] / 10
    told = f"{study.score} {study.value(other)}, recall {other['recall']:.2g}; projected {study.value(ours)}, {ours['recall']:.2g}"
    return Found(told, "counted", seeds_of(rows.loc[["StyleGAN2 from scratch"]]), HOLDS if gone else FAILS)


def augmentation(study: Study) -> Found | None:
    """Test that augmentation hurts, at the same R1."""
    rows = students.ablation(study.found, study.averaged(), "penalty")
    with_, without = (rows[rows["augment"] == kind] for kind in ("diffaugment", "none"))
    gammas = sorted(set(with_["gamma"]) & set(without["gamma"]))
    if not gammas:
        return None
    first, last = (one[one["gamma"] == gammas[0]].iloc[0] for one in (with_, without))
    return study.compared(
        f"with augmentation {study.value(first)}, without {study.value(last)}, gamma {gammas[0]:g}",
        first,
        last,
    )


def penalty(study: Study) -> Found | None:
    """Test that the best R1 is better than none."""
    rows = students.ablation(study.found, study.averaged(), "penalty").query("augment == 'none'")
    tried = int((rows["gamma"] > 0).sum())
    if not tried or not (rows["gamma"] == 0).any():
        return None
    rows = students.ablation(study.found, study.averaged(tried), "penalty").query("augment == 'none'")
    bare, other = rows[rows["gamma"] == 0].iloc[0], rows[rows["gamma"] > 0]
    told = f"without R1 {study.value(bare)}; gamma " + listed(other, study.distance, "gamma")
    told += f" (of a mean loss; published: of a sum over 32 images, where they are {other['gamma'].min() * 32:.2g} and more)"
    return study.compared(told, bare, other.sort_values(study.distance).iloc[0])


def overfits(study: Study) -> Found | None:
    """Test that GDD ends further above its best snapshot than GDD-I does: ratios of each seed's last to its best."""
    worse = []
    for family in ("GDD", "GDD-I"):
        curves = study.found.curves
        curves = curves[curves["model"] == study.found.headline(family)].sort_values("nimg")
        if curves.empty or curves.groupby("run").size().min() < 3:
            return None
        by = curves.groupby("seed")[study.distance]
        worse.append(np.log(by.last() / by.min()))
    more = (worse[0] - worse[1]).dropna()
    low, high = study.times(
        more, least=np.log1p(study.config.rule.margin_distance)
    )  # seeds may all end at their best
    told = f"{study.score} at the end over the best: GDD {np.exp(worse[0].mean()):.3g}, GDD-I {np.exp(worse[1].mean()):.3g}"
    return Found(told, f"{span(low, high)} times more", str(len(more)), verdict(low, high))


def relative(x: str) -> Test:
    """Return the test that rel-FD grows with the number of steps, or falls with the middle noise level of two, by the rank
    correlation of means over seeds."""

    def test(study: Study) -> Found | None:
        found = students.relatives(study.found)
        if found.empty or found.dropna(subset=[x])[x].nunique() < 3:
            return None
        rows = students.evenly(found) if x == "steps" else found.dropna(subset=[x])
        means = rows.groupby(x)["relative"].mean()
        told = f"rel-{study.score} " + ", ".join(f"{value:.3g} at {at:g}" for at, value in means.items())
        return _order(
            study, told, *ordered(means.index, means if x == "steps" else -means), str(rows["seed"].nunique())
        )

    return test


def _order(study: Study, told: str, rho: float, p: float, seeds: str) -> Found:
    """Return what comes of the claim that an order is as published, where its rank correlation is positive."""
    if not np.isfinite(rho):
        return Found(told, "all alike", seeds, OPEN)
    sure = p < 1 - study.config.rule.confidence
    return Found(
        told,
        f"rank correlation {rho:.2f}, p = {p:.2g}",
        seeds,
        OPEN if not sure else HOLDS if rho > 0 else FAILS,
    )


def alike(study: Study) -> Found | None:
    """Test that students of several steps are as good as the one-step student like them, within the margin, and further from
    it than real images from real ones and than the difference in quality."""
    found = students.relatives(study.found)
    if found.empty:
        return None
    one = study.found.students().set_index("run")[study.distance]
    base = found["first"].map(one)
    as_good = np.abs(np.log(found[study.distance] / base)).max() <= np.log1p(
        study.config.rule.margin_distance
    )
    apart = found["relative"] > np.maximum((found[study.distance] - base).abs(), study.found.floor)
    told = (
        f"abs-{study.score} {found[study.distance].min():.3g} to {found[study.distance].max():.3g}, one step {base.mean():.3g}; "
        f"rel-{study.score} {found['relative'].min():.3g} to {found['relative'].max():.3g}, real from real {study.found.floor:.3g}"
    )
    interval = f"{apart.sum()} of {len(apart)} further apart than they differ in quality"
    return Found(
        told, interval, str(found["seed"].nunique()), FAILS if not apart.all() else HOLDS if as_good else OPEN
    )


def layers(study: Study) -> Found | None:
    """Test that the teacher's deep layers are most active at high noise levels and its shallow ones at low, by the rank
    correlation of depth and peak, of the root mean square."""
    if not (study.found.folder / "activation" / "activation.csv").exists():
        return None
    found = activity.order(activity.read(study.found.folder, "rms")).query(
        "run == 'teacher' and part == 'all'"
    )
    if found.empty:
        return None
    rho, p, count = found[["rank correlation", "p", "layers"]].iloc[0]
    return _order(study, f"{count:.0f} layers", rho, p, "1")


COUNTED: dict[tuple[str, str], Test] = {
    ("GDD-1", "alike but apart"): alike,
    ("GDD-1", "steps"): relative("steps"),
    ("GDD-1", "sigma of two steps"): relative("middle"),
    ("GDD-2", "projected"): judges,
    ("GDD-2", "collapse"): collapse,
    ("GDD-3", "augmentation"): augmentation,
    ("GDD-3", "R1"): penalty,
    ("GDD-4", ""): layers,
    ("GDD-5", "convolutions"): better("GDD", "GDD-I"),
    ("GDD-5", "QKV"): better("GDD-I, QKV frozen", "GDD-I"),
    ("GDD-5", "skips"): better("GDD-I, QKV and skips frozen", "GDD-I, QKV frozen"),
    ("GDD-6", "start"): slower,
    ("GDD-6", "GDD"): better("GDD + CD", "GDD", near=True),
    ("GDD-6", "GDD-I"): better("GDD-I + CD", "GDD-I", near=True),
    ("GDD-6", "CD"): better("CD-I", "CD"),
    ("GDD-7", "instances"): against_instances,
    ("GDD-7", "images"): images,
    ("GDD-7", "teacher"): against_teacher,
    ("GDD-8", ""): overfits,
}
