"""How active layers are along noise levels, timesteps or iterations: curves normalised layer by layer, and their peaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from equilab.analysis import figures
from equilab.analysis.figures import axes
from equilab.analysis.tables import read_table
from equilab.analysis.verdicts import ordered
from equilab.core.config import UserError

UNETS = ("unet", "student")
AXES = {
    "unet": "step, from sigma_max to sigma_min",
    "student": "step, from sigma_max to sigma_min",
    "dit": "step, from the noisiest timestep",
    "fpdm": "step, from the noisiest timestep",
    "get": "iteration",
}
AT = {
    "unet": "sigma",
    "student": "sigma",
    "dit": "timestep",
    "fpdm": "timestep",
    "get": "iteration",
}  # what a step is at


def read(folder: Path | str, value: str) -> pd.DataFrame:
    """Return the activity of every layer, with `level`: its `value`, "mean" or "rms", min-max normalised over the steps of the
    layer; `part`: "encoder" or "decoder" of a U-Net, else "layers"; `deep`: 0 for the layers next to image and noise.

    Raises: UserError if the study has not measured any.
    Source: GDD (Zheng 2024), section 4.1, the normalisation.
    """
    path = Path(folder) / "activation" / "activation.csv"
    if not path.exists():
        raise UserError(f"{path} is not there; run the stage activation, or give another results folder")
    found = read_table(path)
    by = found.groupby(["run", "layer"], sort=False)[value]
    low, high = by.transform("min"), by.transform("max")
    part = found["layer"].str.split(".").str[0].map({"enc": "encoder", "dec": "decoder"}).fillna("layers")
    found = found.assign(level=(found[value] - low) / (high - low).where(high > low), part=part)
    order = found.groupby(["run", "part"], sort=False)["depth"].transform(
        lambda depth: depth.rank(method="dense") - 1
    )
    last = found.groupby(["run", "part"], sort=False)["depth"].transform("nunique") - 1
    return found.assign(deep=np.where(part == "decoder", last - order, order).astype(int))


def peaks(found: pd.DataFrame) -> pd.DataFrame:
    """Return for each layer where it is most active: the step, and the noise level, timestep or iteration there."""
    found = found.dropna(subset=["level"])
    rows = found.loc[found.groupby(["run", "layer"], sort=False)["level"].idxmax()]
    return rows[["run", "family", "part", "layer", "deep", "step", "at"]].reset_index(drop=True)


def order(found: pd.DataFrame) -> pd.DataFrame:
    """Return for each U-Net and part the rank correlation of a layer's depth with the noise level of its peak: above 0 where
    deep layers are active early and shallow ones late, as published."""
    rows = []
    tops = peaks(found)
    tops = tops[tops["family"].isin(UNETS)]
    for run, both in tops.groupby("run", sort=False):
        for part, one in (("all", both), *both.groupby("part", sort=False)):
            rho, p = ordered(one["deep"], one["at"])
            rows.append({"run": run, "part": part, "layers": len(one), "rank correlation": rho, "p": p})
    return pd.DataFrame(rows)


def unets(found: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Return the curves of every U-Net's encoder and decoder (figure 3), a row for each: the teacher, then its students."""
    chosen = found[found["family"].isin(UNETS)]
    return _drawn(chosen, [("encoder", "shallow to deep"), ("decoder", "deep to shallow")])


def transformers(found: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Return the curves of a DiT's blocks and of the iterations of FPDM and GET, a row for each."""
    return _drawn(found[~found["family"].isin(UNETS)], [("layers", "first to last")])


def _drawn(found: pd.DataFrame, parts: list[tuple[str, str]]) -> tuple[Figure, pd.DataFrame]:
    runs = list(dict.fromkeys(found["run"]))
    figure, grid = axes(max(len(runs), 1), len(parts), 2.1 * max(len(runs), 1))
    for line, run in zip(grid, runs):
        for ax, (part, told) in zip(line, parts):
            rows = found[(found["run"] == run) & (found["part"] == part)]
            count = max(rows["deep"].max(), 1) if len(rows) else 1
            for layer, one in rows.groupby("layer", sort=False):
                colour = colormaps["coolwarm_r"](
                    one["deep"].iloc[0] / count
                )  # red: shallow, blue: deep, as published
                ax.plot(
                    one["at" if one["family"].iloc[0] == "get" else "step"],
                    one["level"],
                    color=colour,
                    label=layer.partition(".")[2] or layer,
                )
            family = rows["family"].iloc[0] if len(rows) else "unet"
            ax.set(
                title=f"{run}, {part}: {told}" if len(parts) > 1 else f"{run}: {told}",
                xlabel=AXES[family],
                ylabel="activity, 0 to 1",
            )
            ax.legend(fontsize=5.5, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure, found[["run", "layer", "deep", "step", "at", "mean", "rms", "level"]]


def at(found: pd.DataFrame, run: str, step: int) -> Figure:
    """Return how active each layer of a run is at one step, in the order of their use."""
    rows = found[(found["run"] == run) & (found["step"] == step)].sort_values("depth")
    figure, grid = axes(1, 1, 2.4)
    grid[0, 0].bar(rows["layer"], rows["level"].fillna(0), color=figures.BLUE)
    grid[0, 0].set(
        ylim=(0, 1.05),
        ylabel="activity, 0 to 1",
        title=f"{run}, step {step}: {AT[rows['family'].iloc[0]]} {rows['at'].iloc[0]:.3g}",
    )
    grid[0, 0].tick_params(axis="x", rotation=60)
    return figure
