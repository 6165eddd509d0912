"""The look of every figure, whichever notebook draws it; saving with the numbers drawn; grids of images."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from equilab.models.family import family
from equilab.models.registry import FAMILIES

WIDTH = 7.2  # inches: the text of a printed page
DPI = 150
DASHES = ("", (3, 1.2), (1, 1), (5, 1, 1, 1))  # of the runs of a family
# arguments of seaborn's `lineplot`: bars that span all seeds
SPREAD = {"errorbar": ("pi", 100), "err_style": "bars", "err_kws": {"capsize": 2, "elinewidth": 0.8}}


def use() -> None:
    """Give every figure from now on the same look, whatever the user's own settings are."""
    mpl.rcdefaults()
    sns.set_theme("paper", "ticks", font="DejaVu Sans")
    mpl.rcParams.update(
        {
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8.5,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "xtick.labelsize": 7.5,
            "ytick.labelsize": 7.5,
            "legend.fontsize": 7.5,
            "legend.title_fontsize": 7.5,
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "lines.markersize": 5,
            "lines.markeredgewidth": 0.5,
            "savefig.dpi": DPI,
        }
    )


def panels(columns: int, height: float = 2.8, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure as wide as a page, so many inches high, and its axes: one, or an array; `options` are those of
    `plt.subplots`."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def by_family() -> dict[str, Any]:
    """Return the arguments of seaborn's `lineplot` that draw each `label` in its family's colour and with its marker."""
    known = [family(name) for name in FAMILIES]
    return {
        "hue": "label",
        "style": "label",
        "palette": {each.label: each.colour for each in known},
        "markers": {each.label: each.marker for each in known},
        "dashes": False,
    }


def by_run(runs: pd.DataFrame, name: str = "run") -> dict[str, Any]:
    """Return the arguments of seaborn's `lineplot` that draw each run (or what else the column `name` holds) by itself.

    The runs of a family share its marker and its hue; they differ in dashes and are darker the more parameters they have.
    """
    look = by_family()
    palette, markers, dashes = {}, {}, {}
    for label, colour in look["palette"].items():
        sizes = runs[runs["label"] == label].groupby(name)["parameters"].min().sort_values(kind="stable")
        palette |= dict(zip(sizes.index, _shades(colour, len(sizes))))
        markers |= dict.fromkeys(sizes.index, look["markers"][label])
        dashes |= dict(zip(sizes.index, itertools.cycle(DASHES)))
    return {
        "hue": name,
        "style": name,
        "hue_order": list(palette),
        "style_order": list(palette),
        "palette": palette,
        "markers": markers,
        "dashes": dashes,
    }


def _shades(colour: str, count: int) -> list[Any]:
    """Return so many shades of a colour, from light to dark; a single one is the colour itself."""
    light, dark = sns.light_palette(colour, 3)[1], sns.dark_palette(colour, 4)[2]
    return [colour] if count == 1 else sns.blend_palette([light, colour, dark], count)


def legend(figure: Figure, title: str = "", columns: int = 4) -> None:
    """Put one legend below all panels, with every name once, to be read line by line."""
    handles = {}
    for ax in figure.axes:
        if ax.get_legend():
            ax.get_legend().remove()
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    # matplotlib fills columns, one after another
    names = [name for first in range(columns) for name in list(handles)[first::columns]]
    shown = [handles[name] for name in names]
    figure.legend(shown, names, loc="outside lower center", ncols=columns, title=title)


def can_draw(data: pd.DataFrame, what: str) -> bool:
    """Return whether there are rows to draw; if not, say what the study lacks."""
    if data.empty:
        print(f"Not shown: this study has no {what}.")
    return not data.empty


def table(data: pd.DataFrame) -> None:
    """Show a table without its index; numbers in four digits, missing ones empty."""
    from IPython.display import Markdown, display

    shown = pd.DataFrame({column: data[column].map(number) for column in data})
    display(Markdown(shown.to_markdown(index=False, disable_numparse=True)))


def number(value: Any) -> Any:
    """Return a number as a table shows it, in four digits, a missing one empty; anything else as it is."""
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        return value
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


def save(figure: Figure, folder: Path | str, name: str, data: pd.DataFrame) -> None:
    """Show a figure and write NAME.png and the numbers drawn, NAME.csv: the same data give the same bytes."""
    from IPython.display import display

    shown = picture(figure)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{name}.png").write_bytes(shown.data)
    numbers = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    Path(folder, f"{name}.csv").write_text(numbers, encoding="utf-8")
    display(shown)


def picture(figure: Figure) -> Any:
    """Return a figure as a notebook shows it, and close it: the same data give the same bytes."""
    from IPython.display import Image

    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log":
                _plain_numbers(axis)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)  # Jupyter would show it once more
    return Image(drawn.getvalue(), width=round(100 * figure.get_figwidth()))


def _plain_numbers(axis: Axis) -> None:
    """Mark a logarithmic axis with a few plain numbers, such as 20k, whatever its range."""
    axis.set_major_locator(FixedLocator(_ticks(*sorted(axis.get_view_interval()))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain_number))


def _ticks(low: float, high: float) -> np.ndarray:
    """Return the roundest numbers of which three or more, and no more than nine, lie between two others."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    for steps in (1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7):
        ticks = np.outer(decades, steps).ravel()
        ticks = ticks[(low <= ticks) & (ticks <= high)]
        if len(ticks) > 2:
            return ticks[:: -(-len(ticks) // 9)]
    return MaxNLocator(4).tick_values(low, high)


def _plain_number(value: float, _: int) -> str:
    if value < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return EngFormatter(sep="")(value) if value >= 1000 else f"{value:.4g}"


def images(array: np.ndarray, rows: Sequence[str], columns: Sequence[str] = ()) -> Figure:
    """Return a grid of images (R, N, C, H, W) uint8 with names for its rows and columns."""
    count = array.shape[1]
    side = (WIDTH - 1.0) / max(count, 8)  # inches; an inch for the names
    figure, grid = panels(count, side * len(array) + 0.25, len(array), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.04, hspace=0.04, rect=(0.005, 0, 0.99, 1))
    for line, row, name in zip(grid, array, rows):
        for ax, image in zip(line, row):
            ax.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for ax, name in zip(grid[0], columns):
        ax.set_title(name, loc="center", fontsize=7)
    return figure
