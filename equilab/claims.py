"""Stage `claims`: every claim of the GET paper as a check on this study's results, with published numbers and a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from equilab.analysis import scaling
from equilab.analysis.scaling import BUDGETS, Frontier, Rule
from equilab.analysis.tables import Tables, main_regime, markdown, read, replicated, short
from equilab.config import Job, Plan
from equilab.training.state import write

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


def plan(config: Config, job: Job, read: Callable) -> Plan:
    """Return what the stage costs: nothing to speak of."""
    return Plan()


def run(config: Config, job: Job) -> None:
    """Write `results/claims.*`, and `results/measured.*` for what rests on seconds and memory, as CSV and as Markdown.

    Raises: UserError if the study has no evaluated one-step generator.
    """
    folder = Path("results")
    study = Study(config, read(folder), json.loads((folder / "pairs" / "meta.json").read_text()))
    rule = config.rule
    head = (
        f"Runs are compared at {study.regime}, unless a row says otherwise. Intervals are {rule.confidence:.0%} t-intervals over "
        f"seeds; with one seed a difference counts from {rule.margin_distance:.0%} of {study.tables.score} and "
        f"{rule.margin_l1:.0%} of L1, and the interval is that margin; distances above {rule.ranked:g} are not compared. "
        "Published numbers: CIFAR-10, FID."
    )
    counted, timed = rows(study, COUNTED), rows(study, MEASURED if len(study.tables.costs) else [])
    for name, title, table in (("claims", "Claims", counted), ("measured", "Claims that rest on seconds and memory", timed)):
        write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        write(folder / f"{name}.md", f"# {title}: {job.study.name}\n\n{head}\n\n{markdown(table)}")


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

    def points(self, budget: str, kind: str | None = None) -> pd.DataFrame:
        """Return the points of the regime at a budget, of one kind or of both."""
        found = scaling.points(self.tables, self.regime, budget, self.config.rule).assign(fastest=1.0, slowest=1.0)
        return found if kind is None else found[found["kind"] == kind]

    def averaged(self, frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
        """Return a frame with its replicates averaged."""
        return replicated(frame, keys, list(self.tables.measures), self.config.rule.confidence)

    def change(self, first: pd.Series, last: pd.Series, measure: str | None = None) -> tuple[float, float]:
        """Return between which bounds the quality of `first` over that of `last` lies: above 1, `last` is better."""
        measure = measure or self.tables.distance
        tolerance = self.config.rule.tolerance(measure, *(row[f"{measure}_half"] / row[measure] for row in (first, last)))
        ratio = first[measure] / last[measure]
        return ratio * np.exp(-tolerance), ratio * np.exp(tolerance)


class Found(NamedTuple):
    """What a test found: in words, as an interval, over how many seeds, with which verdict."""

    ours: str
    interval: str
    seeds: str
    verdict: str
    note: str = ""  # what else the study shows about the reason


class Claim(NamedTuple):
    """A claim with its test; `test` returns None where the study trains nothing that could tell."""

    id: str
    part: str
    claim: str
    where: str
    published: str
    test: Callable[[Study], Found | None]
    holds: str  # the likely reason, by verdict
    fails: str
    open: str = "the compared models are closer than seeds or the margin can tell, or the sizes trained leave it open"
    missing: str = "this study trains nothing that could tell"


def rows(study: Study, claims: list[Claim]) -> pd.DataFrame:
    """Return a row for each claim."""
    table = []
    for claim in claims:
        found = claim.test(study)
        reason = claim.missing
        if found:
            reason = {HOLDS: claim.holds, FAILS: claim.fails, OPEN: claim.open}[found.verdict] + found.note
        table.append((*claim[:5], *(found or Found("–", "–", "0", OPEN))[:4], reason))
    return pd.DataFrame(table, columns=COLUMNS)


def verdict(low: float, high: float, target: float = 1.0) -> str:
    """Return whether something that lies in low..high is at least `target`."""
    return HOLDS if low >= target else FAILS if high < target else OPEN


def _span(low: float, high: float) -> str:
    if not np.isfinite(high):
        return f"more than {low:.3g}" if low else "not bounded"
    return f"{low:.3g} to {high:.3g}" if low else f"less than {high:.3g}"


def _seeds(frame: pd.DataFrame) -> str:
    low, high = frame["n"].min(), frame["n"].max()
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _pace(study: Study) -> str:
    """Return how much the distance of both kinds still fell over the last part of their training."""
    curves, measure, told = study.tables.curves, study.tables.distance, []
    for kind in ("get", "vit"):
        falls = [rows[measure].iloc[-2] / rows[measure].iloc[-1] for _, rows in
                 curves[(curves["regime"] == study.regime) & (curves["kind"] == kind)].groupby("run") if len(rows) > 1]  # fmt: skip
        if not falls:
            return ""
        told.append(f"{np.median(falls):.2f}")
    start, end = sorted(curves.loc[curves["regime"] == study.regime, "nimg"].unique())[-2:]
    return f"; from {short(start)} to {short(end)} images GETs still improve {told[0]} times, ViTs {told[1]} times (median)"


def _times(study: Study, frame: pd.DataFrame, what: str, target: float = 1.0) -> Found | None:
    """Test that a ViT as good as some GET costs at least `target` times as much.

    The cost is in `cost`; `fastest` and `slowest` are the shares of it within which it was measured.
    """
    told = []
    for measure in study.tables.measures:
        get, vit = (scaling.ranked(frame, kind, measure, study.config.rule) for kind in ("get", "vit"))
        if get.empty or vit.empty:
            return None
        low, high = (
            scaling.equal_quality(get.assign(cost=get["cost"] * get[a]), vit.assign(cost=vit["cost"] * vit[b]), measure, study.config.rule)
            for a, b in (("slowest", "fastest"), ("fastest", "slowest"))
        )
        told.append((low["low"].max(), high["high"].max()))
    best = get.assign(low=low["low"], high=high["high"]).sort_values(["low", "high"]).iloc[-1]
    distance = study.tables.distance
    gets = get if len(get) <= 8 else best.to_frame().T
    shown = [", ".join(f"{row[distance]:.2f} at {short(row['cost'])}" for _, row in rows.sort_values("cost").iterrows()) for rows in (gets, vit)]
    ours = f"{study.tables.score} against {what}: GET {shown[0]}; ViT {shown[1]}; a ViT as good as some GET takes {_span(*told[0])} times as much"
    ours += f" (by held-out L1: {_span(*told[1])})" if len(told) > 1 else ""
    return Found(ours, _span(*told[0]), _seeds(frame), verdict(*told[0], target), _pace(study))


def _ordered(study: Study, alike: pd.DataFrame, by: str) -> Found | None:
    """Test that quality rises along `by` in models that are alike in all else: the last is better than the first."""
    if alike.empty or alike[by].nunique() < 2:
        return None
    alike = alike.sort_values(by, kind="stable")
    low, high = study.change(alike.iloc[0], alike.iloc[-1])
    told = []
    for measure in study.tables.measures:
        name = study.tables.score if measure == study.tables.distance else "held-out L1"
        told.append(f"{name} " + ", ".join(f"{_label(row[by])}: {row[measure]:.3g}" for _, row in alike.iterrows()))
    return Found("; ".join(told), f"{_span(low, high)} times", _seeds(alike), verdict(low, high) if low > 1 or high < 1 else OPEN)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}"


def _largest(groups: list[pd.DataFrame], by: str) -> pd.DataFrame:
    """Return the group with the most values of `by`; an empty frame without groups."""
    return max(groups, key=lambda group: group[by].nunique(), default=pd.DataFrame())


def sizes(study: Study) -> Found | None:
    """GET-6: GETs alike in all but size, ordered by parameters."""
    groups = [group for _, group in study.points("parameters", "get").groupby(["family", "recipe"])]
    alike = _largest(groups, "parameters")
    found = _ordered(study, alike, "parameters")
    if found is None:
        return None
    law = scaling.power_law(alike["parameters"], alike[study.tables.distance], study.config.rule.confidence)
    return found._replace(ours=f"{found.ours}; {law}")


def ablation(but: str, by: str, kind: str | None = "get") -> Callable[[Study], Found | None]:
    """Return the test of models that differ in `by` alone, told by the column `but` of the runs."""

    def test(study: Study) -> Found | None:
        models = study.averaged(study.tables.runs, "model")
        models = models if kind is None else models[models["kind"] == kind]
        return _ordered(study, _largest([group for _, group in models.groupby(but)], by), by)

    return test


def conditioning(worse: str) -> Callable[[Study], Found | None]:
    """Return the test of GET-10: additive class injection against another one, in models alike in all else."""

    def test(study: Study) -> Found | None:
        models = study.averaged(study.tables.runs, "model")
        for _, group in models.groupby("but_conditioning"):
            by = group.set_index("conditioning")
            if {"additive", worse} <= set(by.index):
                chosen = group.set_index("conditioning").loc[[worse, "additive"]].reset_index()
                low, high = study.change(chosen.iloc[0], chosen.iloc[1])
                ours = ", ".join(f"{r['conditioning']}: {r[study.tables.distance]:.2f}, {r['parameters']:,} parameters"
                                 for _, r in chosen.iterrows())  # fmt: skip
                return Found(ours, f"{_span(low, high)} times", _seeds(chosen), verdict(low, high))
        return None

    return test


def iterations(study: Study) -> Found | None:
    """GET-5: every GET at the fewest and at the most iterations that the claim names."""
    few, most = study.config.iterations
    found = study.averaged(study.tables.iterations(), "model", "most_iterations").sort_values("most_iterations", kind="stable")
    bounds, told = [], []
    for _, one in found.groupby("model", sort=False):
        within = one[one["most_iterations"].between(few, most)]
        if len(within) > 1:
            bounds.append(study.change(within.iloc[0], within.iloc[-1]))
            shown = one[one["most_iterations"].isin((1, *within["most_iterations"].iloc[[0, -1]], one["most_iterations"].max()))]
            told.append(f"{one['label'].iloc[0]} " + ", ".join(f"{r['most_iterations']:.0f}: {r[study.tables.distance]:.2f}" for _, r in shown.iterrows()))
    if not bounds:
        return None
    low, high = np.min(bounds, axis=0)
    return Found("; ".join(told), f"{_span(low, high)} times, least of all GETs", _seeds(found), verdict(low, high))


def best_size(study: Study) -> Found | None:
    """GET-7: the best size of GET at the largest training budget is larger than at the smallest, and counts."""
    found = scaling.best_size(study.tables, study.regime, study.tables.distance, study.config.rule).query("kind == 'GET'")
    if found.empty:
        return None
    first, last = found.iloc[0], found.iloc[-1]
    told = OPEN if not last["counts"] else HOLDS if last["parameters"] > first["parameters"] else FAILS
    ours = "; ".join(f"{row['budget (GFLOP)']} GFLOP: {short(row['parameters'])}, {row['ahead']:.2f} times ahead" for _, row in found.iterrows())
    return Found(ours, "–", _seeds(study.points("train_flops", "get")), told)


def teacher_calls(study: Study) -> Found | None:
    """GET-11: what the pairs cost beside what the students reach; no online distillation is trained here."""
    found = study.points("parameters", "get").sort_values(study.tables.distance)
    if found.empty:
        return None
    best = found.iloc[0]
    teacher = study.tables.teacher.iloc[0][study.tables.distance] if len(study.tables.teacher) else np.nan
    ours = (
        f"{short(study.pairs['nfe'])} teacher evaluations for {study.pairs['count']:,} pairs and {study.pairs['held_out']:,} held out; "
        f"{study.tables.score} {best[study.tables.distance]:.2f} of {best['label']}, teacher {teacher:.2f}; "
        f"{short(best['nimg'])} images seen"
    )
    return Found(ours, "–", str(best["n"]), OPEN)


def equal(budget: str, by_distance: bool) -> Callable[[Study], Found | None]:
    """Return the test of X-1: the best GET against the best ViT at the largest budget that both spend."""

    def test(study: Study) -> Found | None:
        measures, rule = list(study.tables.measures), study.config.rule
        measure = measures[0] if by_distance else measures[-1]
        kinds = [scaling.ranked(study.points(budget), kind, measure, rule) for kind in ("get", "vit")]
        if any(part.empty for part in kinds):
            return None
        fronts = [Frontier(part, measure) for part in kinds]
        ends = max(front.cheapest for front in fronts), min(front.dearest for front in fronts)
        if ends[0] > ends[1] * (1 + rule.equal_budget):
            return None
        (first, last) = ([front.at(end, rule.equal_budget) for front in fronts] for end in ends)
        (get, spread), (vit, other) = last
        tolerance = rule.tolerance(measure, spread, other)
        low, high = vit / get * np.exp(-tolerance), vit / get * np.exp(tolerance)
        ours = "; ".join(f"at {short(end)}: GET {one[0][0]:.3g}, ViT {one[1][0]:.3g}" for end, one in zip(ends, (first, last)))
        return Found(ours, f"{_span(low, high)} times, ViT / GET at the larger", _seeds(pd.concat(kinds)), verdict(low, high), _pace(study))

    return test


def _timed(study: Study, what: str, column: str) -> pd.DataFrame:
    """Return measured points of the regime, replicates averaged, with `column` as their cost and its spread over calls."""
    found = study.tables.measured(what)
    found = found[(found["regime"] == study.regime) & (found["gradient"] != "o1")]
    spread = [found[f"seconds_{end}"] / found["seconds"] if column == "seconds" else 1.0 for end in ("min", "max")]
    return study.averaged(found.assign(cost=found[column], fastest=spread[0], slowest=spread[1]), "model", "at")


def constant_memory(study: Study) -> Found | None:
    """GET-9: the share of speed and memory that O(1) memory leaves of the unrolled training step, in every GET."""
    found = study.tables.measured("train").set_index("run")
    usual, o1 = (found[found["gradient"] == gradient] for gradient in ("unrolled", "o1"))
    if o1.empty:
        return None
    usual = usual.loc[o1.index]
    speed, memory = usual["seconds"] / o1["seconds"], o1["memory_mib"] / usual["memory_mib"]
    low, high = (usual["seconds_min"] / o1["seconds_max"]).min(), (usual["seconds_max"] / o1["seconds_min"]).min()
    ours = f"keeps {_span(speed.min(), speed.max())} of the speed and {_span(memory.min(), memory.max())} of the memory"
    told = FAILS if memory.max() >= 1 else verdict(low, high, study.config.keeps)
    return Found(ours, f"{_span(low, high)} of the speed at least, over all calls", "1", told)


TYING = "tying spends the same parameters several times, and parameters are what limits quality at this size"
DEPTH = "parameters are not what limits quality here, and GET learns more slowly from the same images"
BLOCKS = "each iteration costs as much as a block, and blocks of their own turn the same compute into more quality here"
HELPS, HURTS = "the model is not at its limit at the smaller setting", "more of it needs another learning rate, or overfits"
EQUAL = "GET turns the same budget into better images", "a ViT turns the same budget into better images: blocks of their own beat one block repeated"
COUNTED = [
    Claim("GET-1", "", "fewer parameters than ViT at better FID", "table 4, figure 2b", "GET-Mini 19.2M 10.72, ViT-B 85.2M 11.49",
          lambda study: _times(study, study.points("parameters"), "parameters"), TYING, DEPTH),
    Claim("GET-2", "", "matches a ViT of five times its size", "figure 2a", "GET-Base 62.2M, ViT-L 302.6M",
          lambda study: _times(study, study.points("parameters"), "parameters", study.config.larger), TYING, DEPTH),
    Claim("GET-3", "sampling FLOPs", "less compute than ViT at better FID", "table 4", "GET-Mini 15.2G, ViT-B 23.0G",
          lambda study: _times(study, study.points("flops"), "FLOPs of an image"), "GET reaches the quality of costlier ViTs", BLOCKS),
    Claim("GET-5", "", "more test-time iterations, lower FID (2 to 6)", "figure 3a", "curves, drawn only", iterations,
          "every application brings z nearer to its fixed point, up to about the iterations of training",
          "iterations beyond those of training move z away from what the decoder has seen",
          "most of the way is gone after two iterations, for some of the models at least"),
    Claim("GET-6", "", "larger models, lower FID", "table 2", "T 15.19, M 10.72, S 8.00, B 7.42, B+ 7.19", sizes,
          "width adds capacity that the pairs can fill", "the larger model needs longer training or a learning rate of its own"),
    Claim("GET-7", "", "larger models use training compute better; a best size for a given budget", "figure 3b",
          "GET-Small best at 2^31 GFLOP", best_size, "small models learn faster and saturate earlier",
          "one size is best at the smallest and at the largest budget that two sizes share",
          "at the largest budget that two sizes share, the best two are closer than seeds or the margin can tell",
          "no two sizes share a training budget: learning rates fall to 0, so that only the end of a training stands for its budget"),
    Claim("GET-8", "training", "longer training helps", "table 2, figure 2a", "T 15.19 -> 11.47 (4 times the iterations)",
          ablation("but_nimg", "nimg"), HELPS, HURTS),
    Claim("GET-8", "batch", "a larger batch helps", "table 2", "B 7.42 -> 6.91 (twice the batch)", ablation("but_batch", "nimg"), HELPS, HURTS),
    Claim("GET-8", "pairs", "more pairs help", "text of section 4.2", "conditional B 6.25 -> 5.66 (1M to 2M pairs)",
          ablation("but_pairs", "pairs"), HELPS, HURTS),
    Claim("GET-10", "none", "additive class injection beats none", "table 6", "ViT-B at 200k: 12.43, 15.20", conditioning("none"),
          "the class says which of the data's modes the noise belongs to", "the pairs fix the image without the class"),
    Claim("GET-10", "AdaLN-Zero", "additive class injection beats AdaLN-Zero", "table 6",
          "ViT-B at 200k: 12.43 with 85.2M, 17.19 with 128.9M parameters", conditioning("adaln_zero"),
          "a class alone, without a timestep, needs no modulation of every block", "modulation uses its extra parameters here"),
    Claim("GET-11", "", "one training phase and few teacher evaluations suffice", "tables 1, 5, text",
          "35M against PD 179M, CD 409.6M; FID 6.91 against PD 9.12, KD 9.36, CD 3.55", teacher_calls, "", "",
          "one phase suffices to come this near to the teacher, but no online distillation is trained here to compare with"),
    *(Claim("X-1", f"{name}, {'distance' if by_distance else 'held-out L1'}", f"GET is better than ViT at equal {name}", "this study", "–",
            equal(budget, by_distance), *EQUAL) for budget, name in BUDGETS.items() for by_distance in (True, False)),
]  # fmt: skip
MEASURED = [
    Claim("GET-3", "training memory", "less training memory than ViT at better FID", "table 4", "GET-Mini 9.2 GB, ViT-B 10.1 GB",
          lambda study: _times(study, _timed(study, "train", "memory_mib"), "MiB of a training step"), "a GET has fewer activations than the ViT as good",
          "unrolling keeps the activations of every iteration, as many as a ViT of that depth has"),
    Claim("GET-3", "training speed", "trains faster than ViT at better FID", "table 4", "GET-Mini 5.79 it/s, ViT-B 4.83 it/s",
          lambda study: _times(study, _timed(study, "train", "seconds"), "seconds of a training step"), "GET reaches the quality of costlier ViTs", BLOCKS),
    Claim("GET-4", "", "samples faster than a larger ViT at lower FID", "figure 3a", "GET-Small 37.2M against ViT-L 302.6M, drawn only",
          lambda study: _times(study, _timed(study, "sample", "seconds"), "seconds of a batch"), "GET reaches the quality of costlier ViTs", BLOCKS),
    Claim("GET-9", "", "O(1) memory costs little speed", "table 4", "9.2 -> 5.0 GB, 5.79 -> 4.53 it/s (0.78)", constant_memory,
          "one more forward pass in three is the whole price", "the second forward pass and its overhead weigh more on models this small",
          "the calls of one model differ by more than the claim: measured beside other work, or too short"),
]  # fmt: skip
