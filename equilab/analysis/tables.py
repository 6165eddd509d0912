"""Results of a study as tidy tables; runs that differ only in their seed are replicates of one model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import pandas as pd
from scipy import stats

from equilab.core.config import UserError, digest, read_json

SIZES = ("width", "depth", "heads", "expansion", "equilibrium_depth", "equilibrium_expansion")  # of a network
TUNED = ("lr", "report_nimg", "snapshots")  # may differ between runs that are compared
SOLVER = (
    "method",
    "tolerance",
    "pick",
    "memory",
    "mixing",
    "init",
)  # columns of a setting beside its iterations
SCHEDULE = (
    "nimg",
    "warmup_nimg",
    "decay_start_nimg",
    "ema_half_life_nimg",
)  # what a longer training changes as well


@dataclass(frozen=True)
class Results:
    """How a study measures quality: `distance` is the column of the distance to the training images, `floor` that of real
    images from real ones, `samples` the number of images that both are of."""

    folder: Path
    distance: str
    floor: float
    samples: int

    @property
    def score(self) -> str:
        """The distance's name as people write it: FD, or FID where Inception's features are used."""
        return self.distance.split("_")[0].upper()

    @staticmethod
    def measure(folder: Path, rows: pd.DataFrame) -> tuple[Path, str, float, int]:
        """Return the fields of Results for a results folder with these rows of measures.

        Raises: UserError naming the evaluator's summary, if it is missing or damaged.
        """
        about = read_json(folder / "evaluator" / "summary.json", "floor", "samples")
        distance = "fid_train" if "fid_train" in rows else "fd_train"
        return folder, distance, about["floor"]["bootstrap"][distance], about["samples"]


@dataclass(frozen=True)
class Tables(Results):
    """What a study found about its one-step generators, a row each.

    `runs`: trained runs at their headline setting; `curves`: their snapshots; `sweeps`: their settings at test time;
    `teacher`: settings of the teacher; `costs`: measured seconds and memory, empty if not measured.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    sweeps: pd.DataFrame
    teacher: pd.DataFrame
    costs: pd.DataFrame

    @property
    def measures(self) -> dict[str, str]:
        """The columns of quality, lower is better, with the names of their axes."""
        named = {self.distance: f"{self.score} to the training images", "l1_held_out": "L1 on held-out pairs"}
        return {
            column: name
            for column, name in named.items()
            if column in self.runs and self.runs[column].notna().any()
        }

    def iterations(self) -> pd.DataFrame:
        """Return the settings of implicit generators that differ from the headline in the number of iterations only."""
        rows = self.sweeps[(self.sweeps["kind"] == "get") & self.sweeps["as_headline"]]
        return rows.sort_values(["parameters", "run", "most_iterations"], kind="stable")

    def measured(self, what: str) -> pd.DataFrame:
        """Return what was measured ("sample": at every number of iterations `at`, 0 for explicit generators; "train")
        of a model, beside what its runs are and how good: a row for each of them.

        Raises: UserError if nothing was measured.
        """
        if self.costs.empty:
            raise UserError(f"{self.folder} holds no measured costs; run the stage cost first")
        chosen = self.sweeps["as_headline"] if what == "sample" else self.sweeps["headline"]
        about = self.sweeps[chosen].rename(columns={"most_iterations": "at"}).fillna({"at": 0})
        rows = self.costs[self.costs["what"] == what].rename(columns={"iterations": "at"}).fillna({"at": 0})
        rows = rows.assign(model=rows.pop("run").map(self.runs.set_index("run")["model"]))
        rows = rows.groupby(["model", "at", "gradient"], sort=False, dropna=False).first().reset_index()
        keys = ["model", "at"] if what == "sample" else ["model"]
        about = about.drop(columns=[c for c in about if c in rows and c not in keys])
        return rows.merge(about, on=keys)


def evaluated(folder: Path, stage: str) -> list[Path]:
    """Return the metrics.json of every evaluated run of a stage."""
    found = sorted(folder.glob("evaluate/*/metrics.json"))
    return [path for path in found if read_json(path, "of", "kind", "run")["of"].startswith(f"{stage}/")]


def read(folder: Path | str) -> Tables:
    """Return the tables of a study's results folder.

    Raises: UserError if it holds no evaluated one-step generator.
    """
    folder = Path(folder)
    rows, curves, sweeps, teacher = [], [], [], pd.DataFrame()
    for path in sorted(folder.glob("evaluate/*/metrics.json")):
        found = read_json(path, "of", "kind", "run")
        sweep = read_table(path.with_name("sweep.csv"))
        if found["of"] == "teacher":
            teacher = sweep.assign(
                run="teacher", kind=found["kind"], folder=path.parent, headline=sweep.index == 0
            )
        if not found["of"].startswith("distill/"):
            continue
        about = _about(folder / found["of"] / "summary.json")
        rows.append({**found, **about, "folder": path.parent})
        about_setting = {"headline": sweep.index == 0, "as_headline": _as_first(sweep)}
        sweeps.append(sweep.assign(**about, **about_setting, folder=path.parent))
        curves.append(
            _curve(path.with_name("curve.csv"), found).assign(
                **{k: v for k, v in about.items() if k != "nimg"}
            )
        )
    if not rows:
        raise UserError(
            f"{folder} holds no evaluated run of distill; run `dvc repro`, or give another results folder"
        )
    runs = pd.DataFrame(rows)
    first = first_seeds(runs)
    costs = (
        read_table(folder / "cost" / "cost.csv")
        if (folder / "cost" / "cost.csv").exists()
        else pd.DataFrame()
    )
    named = [t.assign(label=t["model"].map(first)) for t in (runs, pd.concat(curves), pd.concat(sweeps))]
    runs, curves, sweeps = (t.reset_index(drop=True) for t in named)
    sweeps = sweeps.reindex(
        columns=list(dict.fromkeys([*sweeps, *SOLVER, "most_iterations"]))
    )  # there may be no GET
    curves["last"] = curves["nimg"] == curves["run"].map(runs.set_index("run")["nimg"])
    curves["train_flops"] = curves["train_flops_image"] * curves["nimg"]
    return Tables(*Results.measure(folder, runs), runs, curves, sweeps, teacher, costs)


def _curve(path: Path, end: dict[str, Any]) -> pd.DataFrame:
    """Return the snapshots of a run, and its end, where no snapshot is of it."""
    rows = read_table(path)
    if not rows.empty and rows["nimg"].max() >= end["nimg"]:
        return rows
    last = {
        key: value for key, value in end.items() if key == "nimg" or key.startswith(("fd_", "fid_", "l1_"))
    }
    return pd.DataFrame([*rows.to_dict("records"), last])


def _about(path: Path) -> dict[str, Any]:
    """Return what the run of a summary is: sizes, cost and what it may be compared with.

    `model`: all of its config but the seed; `recipe`: but the sizes as well; `regime`: what runs of all families that
    are compared must share, `material`: but the images seen. Training FLOPs are forward and backward passes.
    """
    keys = ("run", "config", "parameters", "flops_image", "train_flops_image", "nimg", "image")
    summary = read_json(path, *keys)
    config = summary["config"]
    network, optimisation, solve = config["network"], config["optimisation"], config["equilibrium"] or {}
    kind, seedless = network["kind"], {**config, "seed": None}
    recipe = {**seedless, "network": {k: v for k, v in network.items() if k not in SIZES}}
    recipe["optimisation"] = {k: v for k, v in optimisation.items() if k not in TUNED}
    classes = "with classes" if config["conditional"] else "without classes"
    material = f"{config['pairs']:,} pairs {classes}, batch {optimisation['batch']}"
    return {
        "run": summary["run"],
        "model": digest(seedless),
        "recipe": digest(recipe),
        "seed": config["seed"],
        "kind": kind,
        "family": "ViT" if kind == "vit" else "GET" if network["normalise"] else "GET as published",
        "regime": f"{material}, {summary['nimg']:,} images seen",
        "material": material,
        "decays": optimisation["decay"] != "none",
        "width": network["width"],
        "depth": network["depth"],
        "patch": network["patch"],
        "image": " x ".join(map(str, summary["image"])),
        "parameters": summary["parameters"],
        "flops_image": summary["flops_image"],
        "nimg": summary["nimg"],
        "train_flops_image": summary["train_flops_image"],
        "train_flops": summary["train_flops_image"] * summary["nimg"],
        "pairs": config["pairs"],
        "trained_iterations": solve.get("iterations"),
        **_ablations(config),
        "changeable": _changeable(config),
    }


def _ablations(config: dict) -> dict[str, str]:
    """Return for each ablation of the paper the config without what the ablation changes: runs that share it differ
    in nothing else (and their seeds)."""
    network, optimisation = config["network"], config["optimisation"]
    rest = {**config, "seed": None}
    unscheduled = {k: v for k, v in optimisation.items() if k not in (*TUNED, *SCHEDULE)}
    scaled = {k: v for k, v in unscheduled.items() if k not in ("batch", "micro_batch")} | {
        "updates": optimisation["nimg"] / optimisation["batch"]
    }
    return {
        "but_nimg": digest({**rest, "optimisation": unscheduled}),
        "but_batch": digest({**rest, "optimisation": scaled}),
        "but_pairs": digest({**rest, "pairs": None}),
        "but_conditioning": digest(
            {**rest, "conditional": None, "network": {**network, "conditioning": None}}
        ),
        "conditioning": network.get("conditioning", "additive") if config["conditional"] else "none",
    }


def _changeable(config: dict) -> dict[str, Any]:
    """Return what may differ between models that are compared one change at a time, by the words of params."""
    optimisation = {
        k: v for k, v in config["optimisation"].items() if k == "nimg" or k not in (*TUNED, *SCHEDULE)
    }
    parts = (config, config["network"], config["equilibrium"] or {}, optimisation)
    return {k: v for part in parts for k, v in part.items() if k != "seed" and not isinstance(v, dict)}


def _as_first(sweep: pd.DataFrame) -> np.ndarray:
    """Return which settings differ from the first in nothing but the number of iterations."""
    shown = sweep[[column for column in SOLVER if column in sweep]].astype(object)
    return ((shown == shown.iloc[0]) | (shown.isna() & shown.iloc[0].isna())).all(axis=1).to_numpy()


def read_table(path: Path, **how: Any) -> pd.DataFrame:
    """Return a table that a stage wrote, all of it."""
    try:
        text = path.read_text()
        if text.strip() and not text.endswith("\n"):
            raise ValueError("cut short")
        return pd.read_csv(io.StringIO(text), **how) if text.strip() else pd.DataFrame()
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; run the stage that writes it again") from None


def replicated(
    frame: pd.DataFrame, keys: Sequence[str], values: Sequence[str], confidence: float
) -> pd.DataFrame:
    """Return a row for each combination of `keys`: means of `values` over seeds, `n` of them, and `VALUE_half`, half
    the t-interval at `confidence` of the mean; nan where there are no seeds. Other columns are those of the first seed.

    Three seeds tell little of a spread: it is pooled, all rows being taken to vary by the same factor. Several settings
    of the same trained models are no more degrees of freedom than one.
    """
    kept = frame.sort_values("seed", kind="stable").groupby(list(keys), sort=False)
    table = kept.first()
    table["n"] = kept.size()
    freedom = int(min((frame.groupby("model")["seed"].nunique() - 1).sum(), (table["n"] - 1).sum()))
    for value in values:
        table[value] = kept[value].mean()
        squares = np.nansum((kept[value].std(ddof=1) / table[value]) ** 2 * (table["n"] - 1))
        spread = np.sqrt(squares / max((table["n"] - 1).sum(), 1))
        reach = stats.t.ppf((1 + confidence) / 2, freedom) if freedom else np.nan
        table[f"{value}_half"] = table[value] * spread * reach / np.sqrt(table["n"])
    return table.reset_index()


def first_seeds(runs: pd.DataFrame) -> pd.Series:
    """Return by model the run of its first seed, which gives it its label."""
    return runs.sort_values(["seed", "run"]).groupby("model")["run"].first()


def main_regime(tables: Tables) -> str:
    """Return the regime in which GET and ViT can be compared at the most sizes; the longest training of those."""
    models = tables.runs.drop_duplicates("model")
    found = models.groupby("regime").agg(
        kinds=("kind", "nunique"), models=("model", "size"), nimg=("nimg", "first")
    )
    return found.sort_values(["kinds", "models", "nimg"]).index[-1]


def about(tables: Tables) -> str:
    """Return in Markdown what the study trained and how its quality is measured."""
    runs, regime = tables.runs, main_regime(tables)
    compared, reach = runs[runs["regime"] == regime], ""
    for teacher in tables.teacher.iloc[:1].itertuples():
        reach = f", its teacher {getattr(teacher, tables.distance):.3g} in {teacher.nfe} evaluations"
    return (
        f"This study: images of {runs['image'].iloc[0]} (channels, height, width); {runs['model'].nunique()} models in "
        f"{len(runs)} runs, {short(runs['parameters'].min())} to {short(runs['parameters'].max())} parameters. Figures "
        f"compare the {compared['model'].nunique()} models trained at {regime}. {tables.score} is measured on "
        f"{tables.samples:,} images against the training images; training images drawn at random reach {tables.floor:.3g}{reach}. "
        "Training FLOPs count the forward and backward passes of all images seen."
    )


def machine(tables: Tables) -> str:
    """Return in Markdown on what the seconds were measured."""
    kept = read_json(tables.folder / "cost" / "cost.json")
    found, peak = kept["environment"], kept["matmul_fp32_flops_s"]
    return (
        f"Measured on {found['device']}, {found['threads']} threads, torch {found['torch']}, batches of "
        f"{kept['settings']['batch']}; a large matrix product reaches {short(peak)[:-1]} {short(peak)[-1]}FLOP/s there."
    )


def claims(folder: Path | str, ids: Sequence[str], timed: bool = False) -> pd.DataFrame:
    """Return the rows of the claims that a notebook checks, in the order of `ids`, whose hyphens break no line there; those on
    measured seconds and memory too if `timed`.

    Raises: UserError if the stage `claims` has not run.
    """
    names = ("claims.csv", "measured.csv") if timed else ("claims.csv",)
    if missing := [name for name in names if not (Path(folder) / name).exists()]:
        raise UserError(f"{Path(folder) / missing[0]} is not there; run the stage claims first")
    found = pd.concat([read_table(Path(folder) / name, keep_default_na=False, dtype=str) for name in names])
    found = found[found["id"].isin(ids)].sort_values(
        "id", key=lambda names: names.map(list(ids).index), kind="stable"
    )
    return found.assign(id=found["id"].str.replace("-", "\u2011"))  # one that breaks no line


def findings(found: pd.DataFrame) -> str:
    """Return in Markdown what became of claims, verdict by verdict, with the likely reason, once for all that share it."""
    parts = []
    for verdict, rows in sorted(
        found.groupby("verdict"), reverse=True
    ):  # holds, does not hold, cannot be told here
        parts.append(f"**{verdict.capitalize()}**\n")
        for reason, same in rows.groupby("reason", sort=False):
            names = [row.id + (f" ({row.part})" if row.part else "") for row in same.itertuples()]
            said = f", {same['claim'].iloc[0]}" if len(names) == 1 else ""
            parts.append(f"- {', '.join(names)}{said} – {reason}.")
        parts.append("")
    return "\n".join(parts)


def short(count: SupportsFloat) -> str:
    """Return a count as people write it: 131k, 1.2M, 15G."""
    count = float(count)
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table; numbers in four digits, missing ones as a dash; a word if it is empty."""
    if frame.empty:
        return "*Nothing in this study allows the comparison.*\n"

    def cell(value) -> str:
        if isinstance(value, float | np.floating):
            return "–" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return "–" if value is None else f"{value:,}" if isinstance(value, int | np.integer) else str(value)

    rows = [[cell(value).replace("|", "\\|") for value in row] for row in frame.itertuples(index=False)]
    lines = [[str(column) for column in frame], ["---"] * len(frame.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
