"""What a one-step generator costs to sample and to train, beside how good it is: figures and the table of the paper."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from equilab.analysis.figures import COLOURS, GREY, axes, curve, legend, logarithmic, looks, ours, references
from equilab.analysis.scaling import Rule, points
from equilab.analysis.tables import Tables, replicated, short

SOLVERS = {"iterate": "plain iteration", "anderson": "Anderson", "broyden": "Broyden"}


def sampled(tables: Tables, regime: str, rule: Rule) -> pd.DataFrame:
    """Return measured images per second of every model at every number of iterations, with its quality."""
    rows = tables.measured("sample")
    values = [*tables.measures, "images_s", "seconds", "seconds_min", "seconds_max"]
    return replicated(rows[rows["regime"] == regime], ["model", "at"], values, rule.confidence)


def speed(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against measured images per second (figure 3a), circles by parameters, and its numbers."""
    found = sampled(tables, regime, rule)
    figure, grid = axes(1, len(tables.measures), 3.4)
    for ax, (measure, name) in zip(grid[0], tables.measures.items()):
        for model, look in looks(found.drop_duplicates("model")).items():
            one = found[found["model"] == model].sort_values("at")
            reach = [one["images_s"] * (1 - one["seconds"] / one["seconds_max"]), one["images_s"] * (one["seconds"] / one["seconds_min"] - 1)]
            ax.errorbar(one["images_s"], one[measure], xerr=reach, elinewidth=0.7, capsize=1.5, **look)
            ax.scatter(one["images_s"], one[measure], 300 * one["parameters"] / found["parameters"].max(), color=look["color"], alpha=0.25, linewidth=0)
            above = one["family"].iloc[0] == "GET as published"
            for row in one[one["at"].isin((1, 6, 12))].itertuples():
                ax.annotate(f"{row.at:.0f}", (row.images_s, getattr(row, measure)), (0, 5 if above else -11), textcoords="offset points",
                            ha="center", fontsize=6, color=look["color"])  # fmt: skip
        references(ax, tables, measure)
        ax.set(title=ours(tables, measure, found["n"]), xlabel="images per second, measured", ylabel=name)
        logarithmic(ax)
    legend(figure, grid)
    kept = ["label", "family", "parameters", "at", "images_s", "seconds", "seconds_min", "seconds_max", *tables.measures, "n"]
    return figure, found[kept].rename(columns={"at": "iterations"})


def iterations(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality and residual of every GET against its iterations at test time, and its numbers."""
    rows = tables.iterations()
    measures = {**tables.measures, "residual": "relative residual, median"}
    found = replicated(rows[rows["regime"] == regime], ["model", "most_iterations"], list(measures), rule.confidence)
    figure, grid = axes(1, len(measures), 3.0)
    for ax, (measure, name) in zip(grid[0], measures.items()):
        for model, look in looks(found.drop_duplicates("model")).items():
            curve(ax, found[found["model"] == model], "most_iterations", measure, look)
        for count in found["trained_iterations"].unique():
            ax.axvline(count, color="#c8c8c8", linewidth=0.9, label="iterations in training", zorder=0)
        references(ax, tables, measure)
        ax.set(title="ours: residual" if measure == "residual" else ours(tables, measure, found["n"]), xlabel="iterations at test time", ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        logarithmic(ax, x=False)
    legend(figure, grid)
    values = [column for measure in measures for column in (measure, f"{measure}_half")]
    return figure, found[["label", "family", "parameters", "most_iterations", *values, "n"]]


def solvers(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against applications of f for each way of solving, a panel for each GET that was solved in
    several ways, and its numbers."""
    rows = tables.sweeps[(tables.sweeps["kind"] == "get") & (tables.sweeps["regime"] == regime)].copy()
    rows["solver"] = [_solver(row) for row in rows.itertuples()]
    found = replicated(rows, ["model", "solver", "most_iterations"], [*tables.measures, "iterations"], rule.confidence)
    several = found.groupby("model")["solver"].nunique()
    found = found[found["model"].map(several) == several.max()].sort_values(["family", "parameters", "iterations"], kind="stable")
    named = looks(found.drop_duplicates("model"))
    figure, grid = axes(1, len(named), 3.2)
    names = list(dict.fromkeys(sorted(found["solver"], key=lambda name: (name != SOLVERS["iterate"], name))))
    marks = dict(zip(names, zip("osDv^P*X", [COLOURS["GET"], *("#d55e00", "#029e73", "#cc78bc", "#ca9161", "#949494", "#56b4e9", "#ece133")])))
    for ax, (model, look) in zip(grid[0], named.items()):
        one = found[found["model"] == model]
        for name, part in one.groupby("solver", sort=False):
            marker, colour = marks[name]
            curve(ax, part, "iterations", tables.distance, {"color": colour, "marker": marker, "label": name, "markerfacecolor": "white" if marker != "o" else colour})
        ax.set(title=look["label"], xlabel="applications of f, mean")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        logarithmic(ax, x=False)
    grid[0, 0].set_ylabel(tables.measures[tables.distance])
    legend(figure, grid)
    return figure, found[["label", "family", "parameters", "solver", "most_iterations", "iterations", *tables.measures, "residual", "diverged", "n"]]


def _solver(row) -> str:
    """Return how people call a setting of a solver."""
    name = SOLVERS.get(row.method, row.method)
    name += f", until {row.tolerance:g}" if row.tolerance else ""
    name += ", lowest residual" if row.pick == "lowest" else ""
    return name if row.as_headline or row.method != "iterate" or row.tolerance or row.pick == "lowest" else f"{name}, {row.init} start"


def costs(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return the distance against sampling FLOPs, parameters, training memory and training speed, and its numbers."""
    trained = tables.measured("train")
    trained = replicated(trained[trained["regime"] == regime], ["model", "gradient"], [*tables.measures, "memory_mib", "images_s"], rule.confidence)
    steps = points(tables, regime, "flops", rule)
    figure, grid = axes(1, 4, 3.0, sharey=True)
    panels = [("flops", "sampling FLOPs", steps), ("parameters", "parameters", points(tables, regime, "parameters", rule)),
              ("memory_mib", "training memory, MiB", trained), ("images_s", "training images/s", trained)]  # fmt: skip
    for ax, (column, name, rows) in zip(grid[0], panels):
        for model, look in looks(tables.runs[tables.runs["regime"] == regime]).items():
            one = rows[rows["model"] == model].sort_values(column)
            curve(ax, one, column, tables.distance, look)
            if rows is trained:
                o1 = one[one["gradient"] == "o1"]
                ax.scatter(o1[column], o1[tables.distance], 45, facecolors="none", edgecolors=GREY, linewidths=0.9, label="O(1) memory", zorder=3)
        ax.set_xlabel(name)
        logarithmic(ax)
    grid[0, 0].set(ylabel=tables.measures[tables.distance], title=ours(tables, tables.distance, steps["n"]))
    legend(figure, grid)
    numbers = [rows.assign(cost=column, value=rows[column]) for column, _, rows in panels]
    return figure, pd.concat(numbers)[["cost", "label", "family", "parameters", "gradient", "most_iterations", "value", tables.distance]]


def table(tables: Tables, regime: str) -> pd.DataFrame:
    """Return the paper's table 4 of this study: a row for each run and way of training it."""
    rows = tables.measured("train")
    rows = rows[rows["regime"] == regime].sort_values(["kind", "parameters", "run"])
    quality = {f"{tables.score}": rows[tables.distance], **({"held-out L1": rows["l1_held_out"]} if "l1_held_out" in tables.measures else {})}
    return pd.DataFrame({
        "run": rows["run"] + np.where(rows["gradient"] == "o1", ", O(1) memory", ""), **quality,
        "inception score": rows["inception_score"], "parameters": rows["parameters"].map(short),
        "FLOPs of an image": rows["flops_image"].map(short), "training memory (MiB)": rows["memory_mib"],
        "training speed (it/s)": 1 / rows["seconds"],
    })  # fmt: skip
