"""Widgets that the notebooks end with: they read the same results as the figures and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from equilab.analysis import activity, chains, figures, students
from equilab.analysis.tables import Tables, short

SETTING = (
    "method",
    "steps",
    "most_iterations",
    "tolerance",
    "pick",
    "init",
)  # what a solver or a sampler is set to


def iterates(tables: Tables) -> widgets.Widget:
    """Return a slider over the iterations of a run: the decoded images, the residual and the norm."""
    found = tables.runs[tables.runs["kind"] == "get"]
    run = widgets.Dropdown(options=dict(zip(found["run"], found["folder"])), description="run")
    with np.load(found["folder"].iloc[0] / "iterates.npz") as kept:
        most = len(kept["images"])
    count = widgets.IntSlider(value=1, min=1, max=most, description="iteration", continuous_update=False)
    picture = widgets.Image(format="png")

    def show(_: Any) -> None:
        with np.load(run.value / "iterates.npz") as kept:
            picture.value = figures.png(figures.iterate(kept, count.value))

    return _board([run, count], [picture], show)


def settings(tables: Tables) -> widgets.Widget:
    """Return a choice of a run and of how it is sampled: its quality, its cost, its measured speed, its images."""
    sweeps = pd.concat([tables.sweeps, tables.teacher]).reset_index(drop=True)

    def options(name: str) -> list[tuple[str, int]]:
        rows = sweeps[sweeps["run"] == name]
        columns = [column for column in SETTING if column in rows and rows[column].nunique(dropna=False) > 1]
        return [(_name(row[columns]), k) for k, row in rows.iterrows()]

    run = widgets.Dropdown(options=list(dict.fromkeys(sweeps["run"])), description="run")
    setting = widgets.Dropdown(options=options(run.value), description="sampled by")
    about, picture = widgets.HTML(), widgets.Image(format="png")

    def show(_: Any) -> None:
        row = sweeps.loc[setting.value]
        with np.load(row["folder"] / "iterates.npz") as kept:
            images = kept["images"]  # (K, N, C, H, W), along the headline setting
        shown = min(int(np.nan_to_num(row["iterations"], nan=len(images))), len(images))
        picture.value = figures.png(_gallery(images[shown - 1]))
        told = {**tables.measures, "nfe": "nfe", "iterations": "iterations", "flops": "FLOPs of an image"}
        found = row[list(told)].dropna().map(short).rename(told)
        found["images per second, measured"] = _speed(tables, row)
        same = row["headline"] or (row["as_headline"] and not pd.isna(row["iterations"]))
        found["images shown"] = (
            f"after {shown} of {len(images)}" if same else "of the first setting; not kept at this one"
        )
        about.value = found.to_frame().to_html(header=False, border=0)

    run.observe(lambda change: setattr(setting, "options", options(change["new"])), "value")
    return _board([run, setting], [about, picture], show)


def budgets(study: chains.Chains) -> widgets.Widget:
    """Return a slider over the number of steps among which a fixed number of blocks is shared, and a choice of how: the
    iterations of each step, the images of the same noises, the quality."""
    rows, blocks = chains.fixed(study)
    rows = pd.concat([rows, *chains.alike(study)]).query("blocks == @blocks and method == 'ddim'")
    rows = rows.drop_duplicates(["steps", "budget", "reuse"]).reset_index(drop=True)
    if rows.empty:
        return widgets.HTML("This study samples no FPDM by DDIM at several numbers of steps.")

    def options(steps: int) -> list[tuple[str, int]]:
        return [
            (f"{row['budget']}, {'with' if row['reuse'] else 'without'} reuse", k)
            for k, row in rows.iterrows()
            if row["steps"] == steps
        ]

    steps = widgets.SelectionSlider(
        options=sorted(rows["steps"].unique().tolist()), description="steps", continuous_update=False
    )
    how = widgets.Dropdown(options=options(steps.value), description="spread")
    about, picture = widgets.HTML(), widgets.Image(format="png")

    def show(_: Any) -> None:
        row = rows.loc[how.value]
        picture.value = figures.png(chains.spread(row))
        about.value = f"{study.score} {row[study.distance]:.3g} at {blocks:.0f} blocks"

    def follow(change: Any) -> None:
        before, how.options = how.label, options(change["new"])
        if before in dict(how.options):
            how.label = before

    steps.observe(follow, "value")
    return _board([steps, how], [about, picture], show)


def one_step(study: students.Students) -> widgets.Widget:
    """Return a slider over noises, and choices of the number of evaluations and of the students' noise levels: the image that
    every model makes of a noise, the teacher in each number of evaluations that it was sampled with."""
    rows = students.first(study, settings=True)
    chosen = lambda nfe: rows if nfe == "all" else rows[rows["nfe"] == nfe]  # noqa: E731
    levels = lambda nfe: ["all", *dict.fromkeys(chosen(nfe)["sigmas"].dropna())]  # noqa: E731
    noise = widgets.IntSlider(
        value=0, min=0, max=students.SHOWN - 1, description="noise", continuous_update=False
    )
    steps = widgets.Dropdown(
        options=["all", *sorted(rows["nfe"].astype(int).unique().tolist())], description="evaluations"
    )
    sigmas = widgets.Dropdown(options=levels("all"), description="sigmas")
    picture = widgets.Image(format="png")

    def show(_: Any) -> None:
        found = chosen(steps.value)
        found = found if sigmas.value == "all" else found[found["sigmas"] == sigmas.value]
        picture.value = figures.png(students.side_by_side(study, found, noise.value))

    steps.observe(lambda change: setattr(sigmas, "options", levels(change["new"])), "value")
    return _board([noise, steps, sigmas], [picture], show)


def layers(found: pd.DataFrame) -> widgets.Widget:
    """Return a choice of a run and a slider over its steps: how active each layer is there."""
    last = found.groupby("run", sort=False)["step"].max()
    run = widgets.Dropdown(options=list(last.index), description="run")
    step = widgets.IntSlider(
        value=1, min=1, max=int(last.iloc[0]), description="step", continuous_update=False
    )
    picture = widgets.Image(format="png")

    def show(_: Any) -> None:
        picture.value = figures.png(activity.at(found, run.value, min(step.value, int(last[run.value]))))

    run.observe(lambda change: setattr(step, "max", int(last[change["new"]])), "value")
    return _board([run, step], [picture], show)


def _gallery(images: np.ndarray) -> Figure:
    """Return up to 16 uint8 images (N, C, H, W) side by side."""
    figure, grid = figures.axes(2, 8, 2)
    for ax, image in zip(grid.flat, images):
        figures.picture(ax, image)
    return figure


def _name(row: pd.Series) -> str:
    """Return how a setting is called in a list, by what tells it from the run's others."""
    return (
        ", ".join(
            f"{c.replace('most_', '')} {row[c]:g}" if isinstance(row[c], float) else str(row[c])
            for c in row.index
            if not pd.isna(row[c])
        )
        or "its only way"
    )


def _speed(tables: Tables, row: pd.Series) -> str:
    """Return the images per second measured for a run at this number of iterations."""
    if tables.costs.empty:
        return "not measured"
    rows = tables.costs[(tables.costs["run"] == row["run"]) & (tables.costs["what"] == "sample")]
    rows = rows[(rows["iterations"] == row["iterations"]) | rows["iterations"].isna() & bool(row["headline"])]
    return f"{rows['images_s'].iloc[0]:,.0f}" if len(rows) and row["as_headline"] else "not measured"


def _board(
    controls: list[widgets.Widget], shown: list[widgets.Widget], show: Callable[[Any], None]
) -> widgets.Widget:
    """Return controls above what `show` writes anew whenever one of them changes."""
    for control in controls:
        control.observe(show, "value")
    show(None)
    return widgets.VBox([widgets.HBox(controls), *shown])
