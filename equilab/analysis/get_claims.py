"""The claims of the GET paper, and who is better at equal cost, as tests on a study's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from equilab.analysis import scaling
from equilab.analysis.scaling import Frontier
from equilab.analysis.tables import Tables, evaluated, main_regime, replicated, short
from equilab.analysis.verdicts import FAILS, HOLDS, OPEN, Config, Found, listed, seeds_of, span, verdict
from equilab.core.config import digest, read_json


@dataclass(frozen=True)
class Study:
    """What the claims are tested on."""

    config: Config
    tables: Tables
    pairs: dict[str, Any]  # meta.json of the pairs

    @property
    def regime(self) -> str:
        """What runs share that are compared across families."""
        return main_regime(self.tables)

    def points(self, budget: str) -> pd.DataFrame:
        """Return the points of the regime at a budget; what is counted has no spread."""
        found = scaling.points(self.tables, self.regime, budget, self.config.rule)
        return found.assign(fastest=1.0, slowest=1.0)

    def timed(self, what: str, column: str) -> pd.DataFrame:
        """Return measured points of the regime with `column` as their cost, and its spread over the calls."""
        found = self.tables.measured(what)
        found = found[(found["regime"] == self.regime) & (found["as_trained"] if what == "train" else True)]
        ends = [
            found[f"seconds_{end}"] / found["seconds"] if column == "seconds" else 1.0
            for end in ("min", "max")
        ]
        return self.averaged(
            found.assign(cost=found[column], fastest=ends[0], slowest=ends[1]), "model", "at"
        )

    def averaged(self, frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
        """Return a frame with its replicates averaged."""
        return replicated(frame, keys, list(self.tables.measures), self.config.rule.confidence)

    def among(self, count: int) -> Study:
        """Return the study with intervals that hold for `count` of them at once: of the best of several, that one too."""
        rule = self.config.rule
        rule = replace(rule, confidence=1 - (1 - rule.confidence) / max(count, 1))
        return replace(self, config=replace(self.config, rule=rule))

    def gain(self, first: pd.Series, last: pd.Series) -> tuple[float, float]:
        """Return between which bounds the distance of `first` over that of `last` lies: above 1, `last` is better."""
        measure = self.tables.distance
        spreads = [row[f"{measure}_half"] / row[measure] for row in (first, last)]
        ratio, reach = first[measure] / last[measure], np.exp(self.config.rule.tolerance(measure, *spreads))
        return ratio / reach, ratio * reach


Test = Callable[[Study], Found | None]


def _pace(study: Study) -> str:
    """Return what longer trainings of both kinds gained, where the study has models that differ in nothing else."""
    models, measure, told = (
        study.averaged(study.tables.runs, "model").sort_values("nimg"),
        study.tables.distance,
        [],
    )
    for kind, name in (("get", "GET"), ("vit", "ViT")):
        alike = [
            rows
            for _, rows in models[models["kind"] == kind].groupby("but_nimg")
            if rows["nimg"].nunique() > 1
        ]
        ends = [(rows.iloc[0], rows.iloc[-1]) for rows in alike]
        told += [
            f"{end['nimg'] / start['nimg']:.3g} times the training makes {start['label']} "
            f"{start[measure] / end[measure]:.2f} times better"
            for start, end in ends
        ]
        if not ends:
            return ""
    return "; " + " and ".join(told)


def as_good(
    points: Callable[[Study], pd.DataFrame], what: str, times: Callable[[Config], float] = lambda _: 1.0
) -> Test:
    """Return the test that a ViT as good as some GET costs at least so many times as much.

    `points` gives the cost in `cost`; `fastest` and `slowest` are the shares of it within which it was measured.
    """

    def test(study: Study) -> Found | None:
        study = study.among(points(study)["model"].nunique())
        frame, rule, found = points(study).sort_values("cost"), study.config.rule, []
        for measure in study.tables.measures:
            get, vit = (scaling.ranked(frame, kind, measure, rule) for kind in ("get", "vit"))
            if get.empty or vit.empty:
                return None
            (fast, slow), (fast_vit, slow_vit) = (
                [part.assign(cost=part["cost"] * part[end]) for end in ("fastest", "slowest")]
                for part in (get, vit)
            )
            low = scaling.equal_quality(slow, fast_vit, measure, rule)
            high = scaling.equal_quality(fast, slow_vit, measure, rule)
            best = get.loc[high["high"].idxmax(), "label"]
            found.append((low["low"].max(), high["high"].max(), best, get, vit))
        (*bounds, best, get, vit), *others = found  # the distance decides
        name, get = (f"GET ({best})", get[get["label"] == best]) if len(get) > 8 else ("GET", get)
        shown = [listed(part, study.tables.distance, "cost") for part in (get, vit)]
        ours = f"{study.tables.score} against {what}: {name} {shown[0]}; ViT {shown[1]}; a ViT as good as some GET "
        ours += f"takes {span(*bounds)} times as much"
        ours += "".join(f" (by held-out L1: {span(*other[:2])})" for other in others)
        return Found(
            ours, span(*bounds), seeds_of(frame), verdict(*bounds, times(study.config)), _pace(study)
        )

    return test


def _ordered(study: Study, groups: Any, by: str, at: str) -> Found | None:
    """Test that quality rises along `by`, in the group with the most values of it: the last against the first."""
    alike = max(
        (group for _, group in groups), key=lambda group: group[by].nunique(), default=pd.DataFrame({by: []})
    )
    if alike[by].nunique() < 2:
        return None
    alike = alike.sort_values(by, kind="stable")
    bounds, distance = study.gain(alike.iloc[0], alike.iloc[-1]), study.tables.distance
    told = [
        f"{study.tables.score if measure == distance else 'held-out L1'} {listed(alike, measure, at)}"
        for measure in study.tables.measures
    ]
    if by == "parameters":
        told.append(str(scaling.power_law(alike[by], alike[distance], study.config.rule.confidence)))
    return Found("; ".join(told), f"{span(*bounds)} times", seeds_of(alike), verdict(*bounds))


def ablation(but: str, by: str) -> Test:
    """Return the test of GETs that differ in `by` alone, told by the column `but` of the runs."""

    def test(study: Study) -> Found | None:
        models = study.averaged(study.tables.runs, "model")
        return _ordered(study, models[models["kind"] == "get"].groupby(but), by, by)

    return test


def conditioning(worse: str) -> Test:
    """Return the test of additive class injection against another one, in models alike in all else."""

    def test(study: Study) -> Found | None:
        models = study.averaged(study.tables.runs, "model")
        models = models.assign(additive=models["conditioning"] == "additive")
        chosen = models[models["conditioning"].isin(("additive", worse))]
        return _ordered(study, chosen.groupby("but_conditioning"), "additive", "conditioning")

    return test


def sizes(study: Study) -> Found | None:
    """Test GETs of the regime that are alike in all but size, ordered by parameters: the largest against the smallest, which
    stays open where a larger one is surely worse than the next smaller one."""
    points = study.points("parameters").query("kind == 'get'")
    found = _ordered(study, points.groupby(["family", "recipe"]), "parameters", "parameters")
    if found is None or found.verdict != HOLDS:
        return found
    steps = study.among(len(points))
    points = steps.points("parameters").query("kind == 'get'")
    alike = max(
        (rows for _, rows in points.groupby(["family", "recipe"])),
        key=lambda rows: rows["parameters"].nunique(),
    )
    for (_, small), (_, large) in pairwise(alike.sort_values("parameters").iterrows()):
        if verdict(*steps.gain(small, large)) == FAILS:
            return found._replace(
                verdict=OPEN, note=f"; {large['label']} is worse than the smaller {small['label']}"
            )
    return found


def iterations(study: Study) -> Found | None:
    """Test every GET at the fewest and at the most iterations that the claim names; the least gain counts."""
    at, bounds, told = "most_iterations", [], []
    study = study.among(study.tables.iterations()["model"].nunique())
    found = study.averaged(study.tables.iterations(), "model", at).sort_values(
        ["parameters", at], kind="stable"
    )
    for _, one in found.groupby("model", sort=False):
        within = one[one[at].between(*study.config.iterations)]
        if len(within) > 1:
            bounds.append(study.gain(within.iloc[0], within.iloc[-1]))
            shown = one[one[at].isin((one[at].min(), within[at].min(), within[at].max(), one[at].max()))]
            told.append(f"{one['label'].iloc[0]} {listed(shown, study.tables.distance, at)}")
    if not bounds:
        return None
    low, high = np.min(bounds, axis=0)
    return Found(
        "; ".join(told), f"{span(low, high)} times, least of all", seeds_of(found), verdict(low, high)
    )


def best_size(study: Study) -> Found | None:
    """Test that the best size of GET at the largest training budget is larger than at the smallest, and counts."""
    found = scaling.best_size(study.tables, study.regime, study.tables.distance, study.config.rule)
    found = found[found["kind"] == "GET"]
    if found.empty:
        return None
    first, last = found.iloc[0], found.iloc[-1]
    counts = first["counts"] and last["counts"] and len(found) > 1
    told = OPEN if not counts else HOLDS if last["parameters"] > first["parameters"] else FAILS
    ours = "; ".join(
        f"{row['budget (GFLOP)']} GFLOP: {short(row['parameters'])}, {row['ahead']:.2f} times ahead"
        for _, row in found.iterrows()
    )
    return Found(ours, "–", seeds_of(study.points("train_flops").query("kind == 'get'")), told)


def teacher_calls(study: Study) -> Found | None:
    """Test that GET reaches what consistency distillation of the same teacher does (within the margin) with fewer calls of it;
    without any the claim stays open."""
    distance, pairs = study.tables.distance, study.pairs
    found = study.points("parameters").query("kind == 'get'").sort_values(distance)
    if found.empty or study.tables.teacher.empty:
        return None
    best, online = found.iloc[0], _online(study)
    ours = (
        f"{short(pairs['nfe'])} teacher evaluations for {pairs['count']:,} pairs and {pairs['held_out']:,} held out, "
        f"{short(best['nimg'])} images seen; {study.tables.score} {best[distance]:.3g} of {best['label']}, "
        f"{study.tables.teacher.iloc[0][distance]:.3g} of the teacher"
    )
    if online is None:
        return Found(
            ours, "–", str(best["n"]), OPEN, "no online distillation is trained here to compare with"
        )
    label, calls, value = online
    reach = 1 + study.config.rule.margin_distance
    fewer, ratio = pairs["nfe"] < calls, value / best[distance]
    told = HOLDS if fewer and ratio * reach >= 1 else FAILS if not fewer and ratio <= reach else OPEN
    note = "one of the two takes fewer evaluations, the other is better" if told == OPEN else ""
    ours += f"; consistency distillation ({label}) {value:.3g} with {short(calls)} evaluations"
    return Found(ours, f"{calls / pairs['nfe']:.2f} times the evaluations", str(best["n"]), told, note)


def _online(study: Study) -> tuple[str, int, float] | None:
    """Return the best run of consistency distillation: its label, the teacher's calls of its training, two for each image, and
    its distance, a mean over seeds."""
    folder, found = study.tables.folder, []
    for path in evaluated(folder, "consistency"):
        kept = read_json(path, "of", "run", study.tables.distance)
        about = read_json(folder / kept["of"] / "summary.json", "config", "nimg")
        found.append(
            (
                digest({**about["config"], "seed": None}),
                kept["run"],
                2 * about["nimg"],
                kept[study.tables.distance],
            )
        )
    if not found:
        return None
    rows = pd.DataFrame(found, columns=["model", "run", "calls", "value"])
    best = (
        rows.groupby("model")
        .agg(run=("run", "first"), calls=("calls", "first"), value=("value", "mean"))
        .sort_values("value")
        .iloc[0]
    )
    return best["run"], int(best["calls"]), float(best["value"])


def constant_memory(study: Study) -> Found | None:
    """Test the share of the unrolled step's speed and memory that O(1) memory leaves; the least speed counts."""
    found = study.tables.measured("train").drop_duplicates(["model", "gradient"]).set_index("model")
    o1 = found[found["gradient"] == "o1"]
    if o1.empty:
        return None
    usual = found[found["gradient"] == "unrolled"].loc[o1.index]
    speed, memory = usual["seconds"] / o1["seconds"], o1["memory_mib"] / usual["memory_mib"]
    low, high = (
        (usual[f"seconds_{a}"] / o1[f"seconds_{b}"]).min() for a, b in (("min", "max"), ("max", "min"))
    )
    ours = f"keeps {span(speed.min(), speed.max())} of the speed, {span(memory.min(), memory.max())} of the memory"
    told = FAILS if memory.max() >= 1 else verdict(low, high, study.config.keeps)
    return Found(ours, f"{span(low, high)} of the speed, least of all, over all calls", "1", told)


def equal(budget: str, measure_of: Callable[[Tables], str]) -> Test:
    """Return the test of the best GET against the best ViT at the largest budget that both spend."""

    def test(study: Study) -> Found | None:
        measure = measure_of(study.tables)
        if measure not in study.tables.measures:
            return None
        study = study.among(study.points(budget)["model"].nunique())
        rule = study.config.rule
        kinds = [scaling.ranked(study.points(budget), kind, measure, rule) for kind in ("get", "vit")]
        if any(part.empty for part in kinds):
            return None
        fronts = [Frontier(part, measure) for part in kinds]
        ends = max(front.cheapest for front in fronts), min(front.dearest for front in fronts)
        if ends[0] > ends[1] * (1 + rule.equal_budget):
            return None
        first, ((get, spread), (vit, other)) = (
            [front.at(end, rule.equal_budget) for front in fronts] for end in ends
        )
        reach = np.exp(rule.tolerance(measure, spread, other))
        ours = (
            f"at {short(ends[0])}: GET {first[0][0]:.3g}, ViT {first[1][0]:.3g}; "
            f"at {short(ends[1])}: GET {get:.3g}, ViT {vit:.3g}"
        )
        low, high = vit / get / reach, vit / get * reach
        seeds = seeds_of(pd.concat(kinds))
        return Found(ours, f"{span(low, high)} times, ViT / GET", seeds, verdict(low, high), _pace(study))

    return test


COUNTED: dict[tuple[str, str], Test] = {
    ("GET-1", ""): as_good(lambda study: study.points("parameters"), "parameters"),
    ("GET-2", ""): as_good(
        lambda study: study.points("parameters"), "parameters", lambda config: config.larger
    ),
    ("GET-3", "sampling FLOPs"): as_good(lambda study: study.points("flops"), "FLOPs of an image"),
    ("GET-5", ""): iterations,
    ("GET-6", ""): sizes,
    ("GET-7", ""): best_size,
    ("GET-8", "training"): ablation("but_nimg", "nimg"),
    ("GET-8", "batch"): ablation("but_batch", "nimg"),
    ("GET-8", "pairs"): ablation("but_pairs", "pairs"),
    ("GET-10", "none"): conditioning("none"),
    ("GET-10", "AdaLN-Zero"): conditioning("adaln_zero"),
    ("GET-11", ""): teacher_calls,
    **{
        ("X-1", f"{name}, {kind}"): equal(budget, measure_of)
        for budget, name in scaling.BUDGETS.items()
        for kind, measure_of in (
            ("distance", lambda tables: tables.distance),
            ("held-out L1", lambda _: "l1_held_out"),
        )
    },
}
MEASURED: dict[tuple[str, str], Test] = {
    ("GET-3", "training memory"): as_good(
        lambda study: study.timed("train", "memory_mib"), "MiB of a training step"
    ),
    ("GET-3", "training speed"): as_good(
        lambda study: study.timed("train", "seconds"), "seconds of a training step"
    ),
    ("GET-4", ""): as_good(lambda study: study.timed("sample", "seconds"), "seconds of a batch"),
    ("GET-9", ""): constant_memory,
}
