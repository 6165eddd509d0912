"""What a one-step generator costs to sample and to train, beside how good it is: figures and the table of the paper."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from equilab.analysis import figures
from equilab.analysis.figures import BLUE, GREY, curve, legend, logarithmic, looks, ours
from equilab.analysis.scaling import Rule, points
from equilab.analysis.tables import Tables, replicated, short

SOLVERS = {"iterate": "plain iteration", "anderson": "Anderson", "broyden": "Broyden"}
WAYS = list(
    zip("osDv^P*X", (BLUE, "#d55e00", "#029e73", "#cc78bc", "#ca9161", "#949494", "#56b4e9", "#ece133"))
)
NAMED = {"textcoords": "offset points", "ha": "center", "fontsize": 6}


def speed(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against measured images per second (figure 3a), circles by parameters, and its numbers."""
    rows = tables.measured("sample")
    seconds = ["images_s", "seconds", "seconds_min", "seconds_max"]
    found = replicated(
        rows[rows["regime"] == regime], ["model", "at"], [*tables.measures, *seconds], rule.confidence
    )
    figure, grid = figures.axes(1, len(tables.measures), 3.4)
    for ax, (measure, name) in zip(grid[0], tables.measures.items()):
        for model, look in looks(found.drop_duplicates("model")).items():
            one = found[found["model"] == model].sort_values("at")
            x, y, share = one["images_s"], one[measure], one["parameters"] / found["parameters"].max()
            reach = [
                x * (1 - one["seconds"] / one["seconds_max"]),
                x * (one["seconds"] / one["seconds_min"] - 1),
            ]
            ax.errorbar(x, y, xerr=reach, elinewidth=0.7, capsize=1.5, **look)
            ax.scatter(x, y, 300 * share, color=look["color"], alpha=0.25, linewidth=0)
            height = 5 if one["family"].iloc[0] == "GET as published" else -11
            for row in one[one["at"].isin((1, 6, 12))].itertuples():
                at = row.images_s, getattr(row, measure)
                ax.annotate(f"{row.at:.0f}", at, (0, height), color=look["color"], **NAMED)
        figures.references(ax, tables, measure)
        ax.set(title=ours(tables, measure, found["n"]), xlabel="images per second, measured", ylabel=name)
        logarithmic(ax)
    legend(figure, grid)
    found = found.rename(columns={"at": "iterations_shown"})
    return figure, found[
        ["label", "family", "parameters", "iterations_shown", *seconds, *tables.measures, "n"]
    ]


def iterations(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality and residual of every GET against its iterations at test time, and its numbers."""
    rows, measures = tables.iterations(), {**tables.measures, "residual": "relative residual, median"}
    found = replicated(
        rows[rows["regime"] == regime], ["model", "most_iterations"], list(measures), rule.confidence
    )
    figure, grid = figures.axes(1, len(measures), 3.0)
    for ax, (measure, name) in zip(grid[0], measures.items()):
        for model, look in looks(found.drop_duplicates("model")).items():
            curve(ax, found[found["model"] == model], "most_iterations", measure, look)
        figures.trained_at(ax, found)
        figures.references(ax, tables, measure)
        ax.set(title=ours(tables, measure, found["n"]), xlabel="iterations at test time", ylabel=name)
        logarithmic(ax, x=False)
    legend(figure, grid)
    values = [column for measure in measures for column in (measure, f"{measure}_half")]
    return figure, found[["label", "family", "parameters", "most_iterations", *values, "n"]]


def solvers(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against applications of f for each way of solving, a panel for each GET that was solved in the
    most ways, and its numbers."""
    rows = tables.sweeps[(tables.sweeps["kind"] == "get") & (tables.sweeps["regime"] == regime)]
    rows = rows.assign(solver=[_solver(row) for row in rows.itertuples()])
    values = [*tables.measures, "iterations"]
    found = replicated(rows, ["model", "solver", "most_iterations"], values, rule.confidence)
    ways = found["model"].map(found.groupby("model")["solver"].nunique())
    found = found[ways == ways.max()].sort_values(["family", "parameters", "iterations"], kind="stable")
    names = sorted(found["solver"].unique(), key=lambda name: (name != SOLVERS["iterate"], name))
    panels = looks(found.drop_duplicates("model"))
    figure, grid = figures.axes(1, len(panels), 3.2)
    for ax, (model, look) in zip(grid[0], panels.items()):
        for name, (marker, colour) in zip(names, WAYS):
            way = {
                "color": colour,
                "marker": marker,
                "label": name,
                "fillstyle": "full" if marker == "o" else "none",
            }
            curve(
                ax,
                found[(found["model"] == model) & (found["solver"] == name)],
                "iterations",
                tables.distance,
                way,
            )
        ax.set(title=look["label"], xlabel="applications of f, mean")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        logarithmic(ax, x=False)
    grid[0, 0].set_ylabel(tables.measures[tables.distance])
    legend(figure, grid)
    kept = [
        "label",
        "family",
        "parameters",
        "solver",
        "most_iterations",
        *values,
        "residual",
        "diverged",
        "n",
    ]
    return figure, found[kept]


def _solver(row) -> str:
    """Return how people call a setting of a solver; a start is named where it is not the headline's."""
    changed = row.tolerance or row.pick == "lowest" or row.method != "iterate" or row.as_headline
    name = SOLVERS.get(row.method, row.method) + ("" if changed else f", {row.init} start")
    name += f", until {row.tolerance:g}" if row.tolerance else ""
    return name + (", lowest residual" if row.pick == "lowest" else "")


def costs(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return the distance against sampling FLOPs, parameters, training memory and training speed, and its numbers."""
    rows = tables.measured("train")
    values = [*tables.measures, "memory_mib", "images_s"]
    steps = replicated(rows[rows["regime"] == regime], ["model", "gradient"], values, rule.confidence)
    counted = {budget: points(tables, regime, budget, rule) for budget in ("flops", "parameters")}
    panels = {
        "flops": ("sampling FLOPs", counted["flops"]),
        "parameters": ("parameters", counted["parameters"]),
        "memory_mib": ("training memory, MiB", steps),
        "images_s": ("training images/s", steps),
    }
    figure, grid = figures.axes(1, len(panels), 3.0, sharey=True)
    for ax, (column, (name, found)) in zip(grid[0], panels.items()):
        for model, look in looks(steps.drop_duplicates("model")).items():
            curve(ax, found[found["model"] == model].sort_values(column), column, tables.distance, look)
        if found is steps:
            o1 = steps[steps["gradient"] == "o1"]
            ring = {
                "facecolors": "none",
                "edgecolors": GREY,
                "linewidths": 0.9,
                "label": "O(1) memory",
                "zorder": 3,
            }
            ax.scatter(o1[column], o1[tables.distance], 45, **ring)
        ax.set_xlabel(name)
        logarithmic(ax)
    title = ours(tables, tables.distance, steps["n"])
    grid[0, 0].set(ylabel=tables.measures[tables.distance], title=title)
    legend(figure, grid)
    numbers = pd.concat(
        [found.assign(cost=column, value=found[column]) for column, (_, found) in panels.items()]
    )
    kept = [
        "cost",
        "label",
        "family",
        "parameters",
        "gradient",
        "most_iterations",
        "value",
        tables.distance,
        "n",
    ]
    return figure, numbers[kept]


def table(tables: Tables, regime: str) -> pd.DataFrame:
    """Return the paper's table 4 of this study: a row for each run and way of training it."""
    found = tables.measured("train")
    found = replicated(found[found["regime"] == regime], ["model", "gradient"], list(tables.measures), 0.5)
    found = found.sort_values(["kind", "parameters", "run"])
    found["run"] = found["label"] + np.where(found["gradient"] == "o1", ", O(1) memory", "")
    found[["parameters", "flops_image"]] = found[["parameters", "flops_image"]].map(short)
    shown = {
        "run": "run",
        tables.distance: tables.score,
        "l1_held_out": "held-out L1",
        "inception_score": "inception score",
        "parameters": "parameters",
        "flops_image": "FLOPs of an image",
        "memory_mib": "training memory (MiB)",
    }
    return found[list(shown)].rename(columns=shown).assign(**{"training speed (it/s)": 1 / found["seconds"]})
