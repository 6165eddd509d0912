"""Denoisers followed along chains: quality by blocks, smoothing, budgets, reuse, and how their fixed points converge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from equilab.analysis import figures, paper
from equilab.analysis.figures import BLUE, ORANGE, axes, curve, legend, logarithmic
from equilab.analysis.tables import (
    SCHEDULE,
    TUNED,
    Results,
    evaluated,
    first_seeds,
    read_table,
    replicated,
    short,
)
from equilab.core.config import UserError, digest, read_json

SETTING = (
    "method",
    "steps",
    "eta",
    "clamp",
    "guidance_scale",
    "guidance_channels",
    "blocks",
    "budget",
    "reuse",
    "solver",
    "tolerance",
    "memory",
    "mixing",
)
FREE = (
    "method",
    "eta",
    "steps",
    "blocks",
    "budget",
    "reuse",
)  # what the analyses vary; all else is as in the headline
MEASURED = ["run", "what", "batch", "memory_mib", "seconds", "images_s"]  # columns of cost.csv
METHODS = {"ddpm": "DDPM", "ddim": "DDIM"}
LOOKS = {
    "FPDM": {"color": BLUE, "marker": "o", "label": "FPDM"},
    "DiT": {"color": ORANGE, "marker": "^", "label": "DiT"},
}
REUSE = {
    True: {"color": BLUE, "marker": "o", "label": "with reuse"},
    False: {
        "color": BLUE,
        "marker": "s",
        "markerfacecolor": "white",
        "linestyle": (0, (4, 2)),
        "label": "without",
    },
}
KINDS = ("constant", "increasing", "decreasing", "adaptive")


@dataclass(frozen=True)
class Chains(Results):
    """What a study found about its denoisers: `rows`, one for each run and setting; `position` is the setting's in
    the run's list, `each` the iterations of a step, `model` all of a run's config but the seed."""

    rows: pd.DataFrame

    def averaged(self, rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
        """Return rows with the seeds of a model and setting averaged."""
        filled = rows.assign(
            **{name: rows[name].astype(object).where(rows[name].notna(), "-") for name in SETTING}
        )
        filled = filled.drop_duplicates(["run", *SETTING])
        found = replicated(filled, ["model", *SETTING], [self.distance], confidence)
        return found.sort_values(["family", "parameters", "block_evals", "steps"], kind="stable").reset_index(
            drop=True
        )


def read(folder: Path | str) -> Chains:
    """Return what a study found about its denoisers of discrete timesteps.

    Raises: UserError if it has evaluated none.
    """
    folder, parts = Path(folder), []
    for path in evaluated(folder, "diffusion"):
        sweep = read_table(path.with_name("sweep.csv"))
        sweep = sweep.reindex(columns=list(dict.fromkeys([*SETTING, *sweep])))
        about = _about(folder / read_json(path, "of")["of"] / "summary.json")
        parts.append(sweep.assign(position=sweep.index, folder=path.parent, **about))
    if not parts:
        raise UserError(
            f"{folder} holds no evaluated run of diffusion; run `dvc repro`, or give another results folder"
        )
    rows = pd.concat(parts, ignore_index=True)
    rows["each"] = rows["block_evals"] / rows["nfe"] - rows["explicit"]
    rows = rows.assign(label=rows["model"].map(first_seeds(rows)), plain=_plain(rows))
    return Chains(*Results.measure(folder, rows), rows)


def _plain(rows: pd.DataFrame) -> pd.Series:
    """Return which rows differ from their run's headline in nothing but what the analyses vary, and add little noise."""
    kept = rows[[name for name in SETTING if name not in FREE]].astype(object)
    kept = kept.where(kept.notna(), "-")
    first = kept[rows["position"] == 0].set_index(rows.loc[rows["position"] == 0, "run"])
    return (kept.to_numpy() == first.loc[rows["run"]].to_numpy()).all(1) & (rows["eta"].fillna(0) == 0)


def _about(path: Path) -> dict[str, Any]:
    """Return what the run of a summary is; `explicit` are its layers beside the fixed point."""
    summary = read_json(path, "run", "config", "parameters", "nimg", "train_flops_image")
    config = summary["config"]
    network, fixed = config["network"], config["fixed_point"] or {}
    layers = network["depth"] if network["kind"] == "dit" else network["pre"] + network["post"]
    seedless = {**config, "seed": None}
    unscheduled = {
        **seedless,
        "optimisation": {k: v for k, v in config["optimisation"].items() if k not in (*TUNED, *SCHEDULE)},
    }
    return {
        "run": summary["run"],
        "seed": config["seed"],
        "model": digest(seedless),
        "nimg": summary["nimg"],
        "family": {"dit": "DiT", "fpdm": "FPDM"}[network["kind"]],
        "parameters": summary["parameters"],
        "explicit": layers,
        "pre": network.get("pre"),
        "post": network.get("post"),
        "gradient": fixed.get("gradient"),
        "weight": config["weight"],
        "without": fixed.get("without"),
        "with": fixed.get("steps"),
        "train_flops": summary["train_flops_image"] * summary["nimg"],
        "but_layers": digest({**unscheduled, "network": {**network, "pre": None, "post": None}}),
        "but_training": digest({**unscheduled, "fixed_point": None}),
    }


def usual(study: Chains) -> pd.DataFrame:
    """Return the rows at the usual setting, whatever the number of steps and blocks: DiT's, and FPDM's with as many
    iterations a step as the headline, reuse and a constant budget."""
    rows = study.rows[study.rows["plain"]]
    head = rows[(rows["family"] == "FPDM") & (rows["position"] == 0)].groupby("model")["each"].first()
    near = (rows["each"] - rows["model"].map(head)).abs() <= 0.5
    constant = (rows["budget"] == "constant") & (rows["reuse"] == True)  # noqa: E712
    return rows[(rows["family"] == "DiT") | (near & constant)]


def trained_alike(study: Chains) -> pd.DataFrame:
    """Return the rows of the FPDMs that were trained for as many FLOPs as the base (within a tenth) or as many images: if some
    differ in both from it, those of equal FLOPs."""
    rows = study.rows[study.rows["family"] == "FPDM"]
    head = rows[rows["model"] == base(study)].iloc[:1]
    work = np.abs(np.log(rows["train_flops"] / head["train_flops"].sum())) <= np.log(1.1)
    images = rows["nimg"] == head["nimg"].sum()
    return (
        rows[work]
        if rows.loc[work, "model"].nunique() > rows.loc[images, "model"].nunique()
        else rows[images]
    )


def budgets(study: Chains, confidence: float) -> tuple[Figure, pd.DataFrame]:
    """Return quality against blocks for DDPM and DDIM, beside the paper's (table 1), and its numbers."""
    rows = usual(study)
    found = study.averaged(rows[(rows["family"] == "DiT") | (rows["model"] == base(study))], confidence)
    figure, grid = axes(1, 3, 2.9)
    for name, rows in paper.FPDM_BLOCKS.groupby("model", sort=False):
        for method, line in (("DDPM", ":"), ("DDIM", "-")):
            grid[0, 0].plot(
                rows["blocks"], rows[method], linestyle=line, **{**LOOKS[name], "label": f"{name}, {method}"}
            )
    grid[0, 0].set(title="paper: ImageNet 256", xlabel="transformer blocks for an image", ylabel="FID")
    for ax, method in zip(grid[0, 1:], ("ddpm", "ddim")):
        for model, rows in found[found["method"] == method].groupby("model", sort=False):
            look = {**LOOKS[rows["family"].iloc[0]], "label": _named(rows.iloc[0])}
            look |= (
                {}
                if model in (base(study), base(study, "DiT"))
                else {"markerfacecolor": "white", "linestyle": _lines(study)[model]}
            )
            curve(ax, rows.sort_values("block_evals"), "block_evals", study.distance, look)
        ax.set(
            title=f"ours: {METHODS[method]}, {study.samples:,} images",
            xlabel="transformer blocks for an image",
            ylabel=study.score,
        )
    for ax in grid[0]:
        if ax.has_data():
            logarithmic(ax)
    legend(figure, grid)
    return figure, _numbers(study, found)


def smoothing(study: Chains, confidence: float) -> tuple[Figure, pd.DataFrame]:
    """Return quality against iterations a step at a fixed number of blocks, with and without reuse (figures 4 and 6a),
    beside a DiT that spends as much, and its numbers."""
    rows, blocks = fixed(study)
    found = study.averaged(rows, confidence)
    figure, grid = axes(1, 1, 3.0)
    ax = grid[0, 0]
    for reuse, look in REUSE.items():
        curve(ax, found[found["reuse"] == reuse].sort_values("each"), "each", study.distance, look)
    dit = study.averaged(usual(study), confidence).query(
        "family == 'DiT' and method == 'ddim' and block_evals == @blocks"
    )
    for _, row in dit.iterrows():
        name = f"{_named(row)}: {row['steps']} steps of {row['explicit']}"
        ax.axhline(
            row[study.distance],
            color=ORANGE,
            linewidth=0.9,
            linestyle=_lines(study)[row["model"]],
            label=name,
        )
    ax.set(
        title=f"ours: {blocks:.0f} blocks, DDIM, {study.samples:,} images",
        xlabel="iterations of a step (fewer: more steps)",
        ylabel=study.score,
    )
    logarithmic(ax)
    legend(figure, grid)
    return figure, _numbers(study, pd.concat([found, dit]))


def _lines(study: Chains) -> dict[str, str]:
    """Return how the line of each DiT is drawn, in every figure: solid for the one that is the paper's."""
    others = dict.fromkeys(study.rows.loc[study.rows["family"] == "DiT", "model"])
    return dict(
        zip(dict.fromkeys([base(study, "DiT"), *others]), ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))))
    )


def smoothed(study: Chains) -> tuple[Figure, pd.DataFrame]:
    """Return the images of the same noises at a fixed number of blocks, a row for each number of steps, and one of a DiT
    that spends as much (figure 5)."""
    rows, blocks = fixed(study)
    rows = rows[rows["reuse"] == True].sort_values(["seed", "each"]).drop_duplicates("each")  # noqa: E712
    dit = study.rows[
        (study.rows["model"] == base(study, "DiT")) & study.rows["plain"] & (study.rows["method"] == "ddim")
    ]
    rows = pd.concat([rows, dit[dit["block_evals"] == blocks].sort_values("seed").iloc[:1]])
    figure, grid = axes(max(len(rows), 1), 12, 0.15 + figures.WIDTH / 13 * len(rows))
    for line, row in zip(grid, rows.itertuples()):
        kept = np.load(row.folder / "iterates.npz")
        for ax, image, diverged in zip(line, kept[f"image_{row.position}"], kept[f"diverged_{row.position}"]):
            figures.picture(ax, image, marked=bool(diverged))
        name = "DiT" if row.family == "DiT" else f"{row.each:.3g} its"
        line[0].set_ylabel(f"{name},\n{row.steps} steps", fontsize=6, rotation=0, ha="right", va="center")
    return figure, _numbers(study, rows)


def fixed(study: Chains) -> tuple[pd.DataFrame, float]:
    """Return the rows of constant budgets at the number of blocks that was spent over the most numbers of steps."""
    rows = study.rows[study.rows["plain"] & (study.rows["model"] == base(study))]
    rows = rows[(rows["budget"] == "constant") & (rows["method"] == "ddim")]
    if rows.empty:
        return rows, 0.0
    blocks = rows.groupby("blocks")["steps"].nunique().idxmax()
    return rows[rows["blocks"] == blocks], float(blocks)


def base(study: Chains, family: str = "FPDM") -> str:
    """Return the model of a family that was sampled in the most ways; nothing without any."""
    found = study.rows[study.rows["family"] == family].groupby("model", sort=False)["position"].max()
    return found.idxmax() if len(found) else ""


def alike(study: Chains) -> list[pd.DataFrame]:
    """Return the groups of rows that differ in nothing but the kind of budget, the most iterations to be moved first."""
    rows = study.rows[(study.rows["model"] == base(study)) & study.rows["plain"]]
    groups = [
        group
        for _, group in rows.groupby(["method", "steps", "blocks", "reuse"])
        if group["budget"].nunique() > 1
    ]
    return sorted(
        groups, key=lambda group: (group["each"].iloc[0] - 1) * group["steps"].iloc[0], reverse=True
    )


def allocations(study: Chains, confidence: float) -> tuple[Figure, pd.DataFrame]:
    """Return how each kind of budget spreads its iterations over the timesteps (figure 3), what quality it buys next to a
    constant one, and its numbers: the chains that differ in nothing but the kind."""
    groups = alike(study)
    found = study.averaged(pd.concat([*groups, study.rows.iloc[:0]]), confidence)
    figure, grid = axes(1, 2, 2.7, width_ratios=(1, 1))
    for k, (kind, marker) in enumerate(zip(KINDS, "os^D")):
        for rows in groups[:1]:  # where the most iterations are to be moved
            for row in rows[rows["budget"] == kind].sort_values("seed").iloc[:1].itertuples():
                kept = np.load(row.folder / "iterates.npz")
                counts = np.isfinite(kept[f"residual_{row.position}"][1]).sum(1)  # (S,)
                grid[0, 0].plot(
                    np.arange(1, len(counts) + 1), counts, marker=marker, label=kind, color=figures.TONES[k]
                )
                grid[0, 0].set_title(f"{row.steps} steps, {counts.sum():.0f} iterations in all")
    for k, rows in enumerate(groups):
        means = study.averaged(rows, confidence).drop_duplicates("budget").set_index("budget").reindex(KINDS)
        if pd.isna(means.loc["constant", study.distance]):
            continue
        ratio, half = (
            means[name] / means.loc["constant", study.distance]
            for name in (study.distance, f"{study.distance}_half")
        )
        row, place = means.loc["constant"], np.arange(len(KINDS)) + 0.12 * (k - (len(groups) - 1) / 2)
        grid[0, 1].errorbar(
            place,
            ratio,
            yerr=None if half.isna().all() else half,
            marker="vPX*h"[k % 5],
            linestyle="none",
            capsize=2,
            color=figures.GREY,
            alpha=1 - 0.25 * (k % 4),
            label=f"{row['steps']} steps, {row['blocks']:.0f} blocks",
        )
    grid[0, 0].set(xlabel="step, the noisiest first", ylabel="iterations")
    grid[0, 1].set(ylabel=f"{study.score} over that of constant", title=f"ours: {study.samples:,} images")
    grid[0, 1].set_xticks(range(len(KINDS)), KINDS, rotation=30)
    grid[0, 1].set_ylim(
        *(min(grid[0, 1].get_ylim()[0], 0.8), max(grid[0, 1].get_ylim()[1], 1.2))
    )  # small gaps look small
    for axis in (grid[0, 0].xaxis, grid[0, 0].yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    legend(figure, grid)
    return figure, _numbers(study, found)


def convergence(study: Chains) -> tuple[Figure, pd.DataFrame]:
    """Return the residual of each timestep's last iteration, and along the iterations of some timesteps, with and
    without reuse (figures 6b and 6c): medians and 10th to 90th percentile over samples; and its numbers."""
    found = residuals(study)
    found = found[found["seed"] == found["seed"].min()]
    figure, grid = axes(1, 2, 2.9, sharey=True)
    if found.empty:
        return figure, found
    most = longest(found)
    for reuse, rows in found[found["steps"] == most].groupby("reuse", sort=False):
        last = rows.sort_values("iteration").groupby("t").last().reset_index()
        look = {**REUSE[reuse], "markersize": 3}
        grid[0, 0].plot(last["t"], last["residual"], **look)
        grid[0, 0].fill_between(
            last["t"], last["residual_10"], last["residual_90"], color=look["color"], alpha=0.12, linewidth=0
        )
    few = (
        found.loc[found["steps"] >= 4, "steps"].min() if (found["steps"] >= 4).any() else found["steps"].min()
    )  # the first reuses nothing
    shortest = found[found["steps"] == few]
    tones = dict(
        zip(times := sorted(shortest["t"].unique()), colormaps["viridis"](np.linspace(0, 0.9, len(times))))
    )
    for (reuse, t), rows in shortest.groupby(["reuse", "t"], sort=False):
        named = {"color": tones[t], "label": f"t = {t}" if reuse else None, "markersize": 3}
        grid[0, 1].plot(rows["iteration"], rows["residual"], **{**REUSE[reuse], **named})
    for ax, steps in zip(grid[0], (most, few)):
        ax.set_yscale("log")
        ax.set_title(f"{steps} steps of {found.loc[found['steps'] == steps, 'each'].iloc[0]:.3g} iterations")
    grid[0, 0].set(xlabel="timestep t (0: no noise)", ylabel="relative residual")
    grid[0, 1].set(xlabel="iteration (open: without reuse)")
    grid[0, 1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(figure, grid)
    return figure, found


def residuals(study: Chains) -> pd.DataFrame:
    """Return the residual after each iteration at each timestep, with and without reuse, of the chains of equal cost that
    were sampled both ways: the median over samples, and the 10th and 90th percentile."""
    rows, numbers = fixed(study)[0], []
    for row in rows[rows.groupby("steps")["reuse"].transform("nunique") == 2].itertuples():
        kept = np.load(row.folder / "iterates.npz")
        residual, t = kept[f"residual_{row.position}"], kept[f"t_{row.position}"]  # (3, S, K), (S,)
        for s, k in zip(*np.nonzero(np.isfinite(residual[1]))):
            numbers.append(
                (row.seed, row.steps, row.each, row.reuse, t[s], k + 1, *residual[:, s, k][[1, 0, 2]])
            )
    columns = ["seed", "steps", "each", "reuse", "t", "iteration", "residual", "residual_10", "residual_90"]
    return pd.DataFrame(numbers, columns=columns)


def longest(found: pd.DataFrame) -> int:
    """Return the most steps of the chains of `residuals` that take equally many iterations at each, two or more: after one, a
    residual tells how far the start was, and an odd one at some step lowers it there; the most of all if there are none."""
    counts = found.groupby(["steps", "t"])["iteration"].max().groupby("steps").agg(["min", "max"])
    equal = counts[(counts["min"] == counts["max"]) & (counts["min"] > 1)]
    return int((equal if len(equal) else counts).index.max())


def spread(row: Any) -> Figure:
    """Return how a chain's iterations lie along its steps, and its images; `row` is one of `rows`."""
    figure, _ = axes(1, 1, 2.4)
    figure.clear()
    grid, kept = figure.add_gridspec(2, 10), np.load(row.folder / "iterates.npz")
    counts = np.isfinite(kept[f"residual_{row.position}"][1]).sum(1)  # (S,)
    ax = figure.add_subplot(grid[:, :5])
    ax.bar(np.arange(1, len(counts) + 1), counts, color=BLUE)
    ax.set(
        xlabel="step, the noisiest first",
        ylabel="iterations",
        title=f"{row.steps} steps, {counts.sum()} iterations in all",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    for k in range(10):
        marked = bool(kept[f"diverged_{row.position}"][k])
        figures.picture(
            figure.add_subplot(grid[k // 5, 5 + k % 5]), kept[f"image_{row.position}"][k], marked=marked
        )
    return figure


def layers(study: Chains, confidence: float) -> tuple[Figure, pd.DataFrame]:
    """Return quality against blocks for FPDMs that differ in the layers before and after the fixed point (figure 7), and
    its numbers: chains with about as many iterations a step as each model's headline."""
    rows = usual(study)
    same = rows.loc[rows["model"] == base(study), "but_layers"].unique()
    found = study.averaged(rows[rows["but_layers"].isin(same) & (rows["method"] == "ddim")], confidence)
    figure, grid = axes(1, 1, 2.9)
    for k, (layers, one) in enumerate(found.sort_values("pre").groupby("pre")):
        look = {
            "color": figures.TONES[k],
            "marker": "os^Dv"[k % 5],
            "label": f"{layers:.0f} before, {one['post'].iloc[0]:.0f} after",
        }
        curve(grid[0, 0], one.sort_values("block_evals"), "block_evals", study.distance, look)
    grid[0, 0].set(
        title=f"ours: DDIM, {study.samples:,} images",
        xlabel="transformer blocks for an image",
        ylabel=study.score,
    )
    if grid[0, 0].has_data():
        logarithmic(grid[0, 0])
    legend(figure, grid)
    return figure, _numbers(study, found)


def about(study: Chains) -> str:
    """Return in a sentence what the results are of."""
    rows = study.rows.drop_duplicates("run")
    seeds = rows.groupby("model")["seed"].nunique()
    within = lambda values: " to ".join(dict.fromkeys(f"{value:,}" for value in (values.min(), values.max())))  # noqa: E731
    return (
        f"This study: {len(seeds)} denoisers of discrete timesteps, seeds: {within(seeds)}, that saw {within(rows['nimg'])} images. {study.score} "
        f"is measured on {study.samples:,} images against the training images; training images drawn at random reach {study.floor:.3g}."
    )


def costs(study: Chains) -> pd.DataFrame:
    """Return what was measured of the denoisers (tables 1 and 2): parameters, and memory and seconds of a training step at
    the most iterations that training draws; no rows if nothing was measured."""
    path = study.folder / "cost" / "cost.csv"
    measured = (read_table(path) if path.exists() else pd.DataFrame()).reindex(columns=MEASURED)
    rows = measured[measured["what"] == "train"].merge(
        study.rows.drop_duplicates("run")[["run", "model", "family", "parameters"]]
    )
    return rows.drop(columns="what")


def trainings(study: Chains, confidence: float) -> pd.DataFrame:
    """Return the paper's tables 3 to 5 and figure 7 of this study: every model at its headline setting."""
    found = study.averaged(study.rows[study.rows["position"] == 0], confidence)
    half = found[f"{study.distance}_half"].map(
        lambda value: "" if np.isnan(value) else f"\u00a0±\u00a0{value:.2g}"
    )
    shown = found.assign(
        parameters=found["parameters"].map(short), train_flops=found["train_flops"].map(short)
    )
    shown[study.distance] = found[study.distance].map("{:.4g}".format) + half
    names = {
        "label": "run",
        "parameters": "parameters",
        "pre": "pre",
        "post": "post",
        "gradient": "gradient",
        "without": "N",
        "with": "M",
        "weight": "weight",
        "train_flops": "training FLOPs",
        "block_evals": "blocks",
        study.distance: study.score,
        "residual": "residual",
        "diverged": "diverged",
        "n": "seeds",
    }
    return shown[list(names)].rename(columns=names)


def _named(row: pd.Series) -> str:
    return f"{row['family']}, {short(row['parameters'])}"


def _numbers(study: Chains, found: pd.DataFrame) -> pd.DataFrame:
    kept = [
        "label",
        "family",
        "parameters",
        *SETTING,
        "each",
        "block_evals",
        study.distance,
        f"{study.distance}_half",
        "diverged",
        "n",
    ]
    return found[[column for column in kept if column in found]]
