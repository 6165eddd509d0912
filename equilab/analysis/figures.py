"""Figures of the study in one style, each saved with the numbers that it draws; the same data give the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from equilab.analysis import paper, scaling
from equilab.analysis.scaling import BUDGETS, Rule
from equilab.analysis.tables import Tables, replicated, short

BLUE, ORANGE, GREEN, GREY = "#0173b2", "#de8f05", "#029e73", "#6b6b6b"  # told apart by the colour-blind
COLOURS = {"GET": BLUE, "GET as published": BLUE, "ViT": ORANGE, "teacher": GREEN}
TONES = (BLUE, ORANGE, GREEN, "#cc78bc", "#ca9161", "#56b4e9", "#ece133", "#949494")
MARKERS = {"GET": "o", "GET as published": "s", "ViT": "^", "teacher": "D"}
LINES = {"GET": "-", "GET as published": (0, (4, 2)), "ViT": "-", "teacher": ":"}
LABELS = {"ViT-Base": ((0, -10), "center"), "GET-Base+": ((-4, -9), "right"), "GET-Mini": ((-5, -3), "right")}
WIDTH = 7.2  # inches, of all figures
IMAGES = "training images seen"


def style() -> None:
    """Set the look of every figure, whatever the user's own settings are."""
    mpl.rcdefaults()
    sns.set_theme(
        "paper",
        "ticks",
        font="DejaVu Sans",
        rc={
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8.5,
            "xtick.labelsize": 7.5,
            "ytick.labelsize": 7.5,
            "legend.fontsize": 7.5,
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "lines.markersize": 4.5,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "figure.dpi": 150,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
        },
    )


def axes(rows: int, columns: int, height: float, **kw) -> tuple[Figure, np.ndarray]:
    """Return a new figure with a grid of axes (rows, columns) in the study's style."""
    style()
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG of 256 colours, a third of the bytes of all colours; free of dates and versions."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    colours = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def save(folder: str, name: str, figure: Figure, numbers: pd.DataFrame):
    """Write NAME.png and NAME.csv, exactly the numbers drawn; return the picture for the notebook to show."""
    from IPython.display import Image as Shown

    content, path = png(figure), Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}.png").write_bytes(content)
    (path / f"{name}.csv").write_text(numbers.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return Shown(content, width=int(WIDTH * 100))


def logarithmic(ax, x: bool = True, y: bool = True) -> None:
    """Make axes logarithmic, with four to eight plain numbers whatever their range."""
    for chosen, axis, scale in ((x, ax.xaxis, ax.set_xscale), (y, ax.yaxis, ax.set_yscale)):
        if chosen:
            scale("log")
            low, high = axis.get_view_interval()
            decades = np.log10(high / low)
            wide = LogLocator(
                subs=(1, 2, 5) if decades < 1.8 else (1, 3) if decades < 3 else (1,), numticks=9
            )
            axis.set_major_locator(MaxNLocator(4) if decades < 0.8 else wide)
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def nothing(ax, why: str) -> None:
    """Write into axes why they show nothing."""
    ax.text(0.5, 0.6, why, transform=ax.transAxes, ha="center", va="center", fontsize=8, color=GREY)


def _tone(colour: str, share: float) -> tuple[float, ...]:
    """Return a colour: light for the smallest model (share 0), full for the largest (1)."""
    return tuple(np.array(mpl.colors.to_rgb(colour)) * (0.45 + 0.55 * share) + 0.55 * (1 - share))


def looks(models: pd.DataFrame) -> dict[str, dict]:
    """Return for each model how it is drawn: its family's colour and marker, darker with size; its name in legends."""
    found, patches = {}, models["patch"].nunique() > 1
    families = models["family"].map({name: k for k, name in enumerate(COLOURS)})
    for row in models.assign(order=families).sort_values(["order", "parameters"], kind="stable").itertuples():
        sizes = np.sort(models.loc[models["family"] == row.family, "parameters"].unique())
        share = 1.0 if len(sizes) == 1 else np.searchsorted(sizes, row.parameters) / (len(sizes) - 1)
        hollow = {"markerfacecolor": "white"} if row.family == "GET as published" else {}
        name = f"{row.family}, {short(row.parameters)}" + (f", patch {row.patch}" if patches else "")
        found[row.model] = {
            "color": _tone(COLOURS[row.family], share),
            "marker": MARKERS[row.family],
            **hollow,
            "linestyle": LINES[row.family],
            "label": name,
        }
    return found


def legend(figure: Figure, ax, columns: int = 4) -> None:
    """Put one legend below the figure, with every name once."""
    named = {}
    for one in np.ravel(ax):
        named |= {
            label: handle for handle, label in zip(*one.get_legend_handles_labels()) if label not in named
        }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, columnspacing=1.2)


def curve(ax, rows: pd.DataFrame, x: str, measure: str, look: dict) -> None:
    """Draw one line with its interval over seeds where there is one."""
    half = rows[f"{measure}_half"].to_numpy() if f"{measure}_half" in rows else np.full(len(rows), np.nan)
    ax.errorbar(
        rows[x], rows[measure], yerr=None if np.isnan(half).all() else half, capsize=2, elinewidth=0.8, **look
    )


def references(ax, tables: Tables, measure: str) -> None:
    """Draw what cannot be beaten: real images from real ones, and the teacher that is imitated."""
    if measure != tables.distance:
        return
    ax.axhline(tables.floor, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.5)), label="real against real")
    if len(tables.teacher):
        teacher = tables.teacher.iloc[0]
        ax.axhline(
            teacher[measure],
            color=GREEN,
            linewidth=0.9,
            linestyle="-.",
            label=f"teacher, {teacher['nfe']} nfe",
        )


def trained_at(ax, models: pd.DataFrame) -> None:
    """Mark on an axis of iterations how many the models were trained with."""
    for count in models["trained_iterations"].dropna().unique():
        ax.axvline(count, color="#c8c8c8", linewidth=0.9, label="iterations in training", zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def ours(tables: Tables, measure: str, seeds: pd.Series) -> str:
    """Return the title of a panel of ours: what is measured, on how many images, over how many seeds."""
    several = (
        "none"
        if seeds.empty
        else f"{seeds.min()}"
        if seeds.min() == seeds.max()
        else f"{seeds.min()} to {seeds.max()}"
    )
    named = {tables.distance: f"{tables.score}, {tables.samples:,} images", "l1_held_out": "held-out L1"}
    return f"ours: {named.get(measure, measure)} (seeds: {several})"


def _paper_panel(ax, x: str, name: str, rows: pd.DataFrame) -> None:
    """Draw published runs: a point each, sizes named, runs of one size joined."""
    for family, group in rows.groupby("family", sort=False):
        for size, part in group.groupby("size", sort=False):
            part = part.sort_values(x)
            ax.plot(part[x], part["fid"], color=COLOURS[family], marker=MARKERS[family], label=family)
            at, side = LABELS.get(size, ((4, 3), "left"))
            ax.annotate(
                size.split("-")[1],
                (part[x].iloc[0], part["fid"].iloc[0]),
                at,
                textcoords="offset points",
                fontsize=6.5,
                color=COLOURS[family],
                ha=side,
            )
    ax.margins(0.12)
    ax.set(title="paper: CIFAR-10 (one run each)", xlabel=name, ylabel="FID to the training images")
    logarithmic(ax)


def changes(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return what one change does to quality, of all regimes: ratios with their intervals, and its numbers."""
    found = scaling.changes(tables, rule)
    figure, grid = axes(1, len(tables.measures), 0.9 + 0.2 * max(len(found), 3), sharey=True)
    height = np.arange(len(found))[::-1]
    for ax, measure in zip(grid[0], tables.measures):
        for family in found["kind"].unique():
            at, rows = (found["kind"] == family).to_numpy(), found[found["kind"] == family]
            ratio = rows[f"ratio_{measure}"]
            reach = [ratio - rows[f"low_{measure}"], rows[f"high_{measure}"] - ratio]
            ax.errorbar(
                ratio,
                height[at],
                xerr=reach,
                color=COLOURS[family],
                marker=MARKERS[family],
                linestyle="none",
                capsize=2,
                elinewidth=0.8,
            )
        ax.axvline(1, color=GREY, linewidth=0.9)
        if found.empty:
            nothing(ax, "no two models differ in one thing alone")
        title = ours(tables, measure, tables.runs.groupby("model").size()).removeprefix(
            "ours: "
        )  # there is no paper's panel
        ax.set(title=title, xlabel="changed / unchanged; below 1: better")
        logarithmic(ax, y=False)
    named = [f"{row.unchanged}: {row.what}" for row in found.itertuples()]
    grid[0, 0].set_yticks(height, named)
    grid[0, 0].set_ylim(-0.6, len(found) - 0.4)
    return figure, found


def _learning(tables: Tables, regime: str, rule: Rule) -> pd.DataFrame:
    """Return the learning curves of a regime, replicates averaged."""
    kept = tables.curves[tables.curves["regime"] == regime]
    return replicated(kept, ["model", "nimg"], list(tables.measures), rule.confidence)


def training(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against training images, beside the published runs (figure 2a), and its numbers."""
    found = _learning(tables, regime, rule)
    figure, grid = axes(1, 1 + len(tables.measures), 3.2)
    published = paper.runs().query("conditioning == 'none' and pairs == 1")
    _paper_panel(grid[0, 0], "nimg", IMAGES, published)
    look = {"color": GREY, "linewidth": 0.9, "linestyle": "--", "label": "progressive distillation (paper)"}
    grid[0, 0].axhline(paper.PROGRESSIVE_FID, **look)
    _curves(grid[0, 1:], tables, found, "nimg", IMAGES)
    legend(figure, grid)
    return figure, _numbers(tables, found, ["nimg"])


def compute(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against training FLOPs, beside the published runs at compute counted by us (figure 3b), and its
    numbers. Whole trainings of one model of several lengths are joined, whose ends a learning rate that falls makes comparable."""
    found, whole = _learning(tables, regime, rule), scaling.points(tables, regime, "train_flops", rule)
    whole = whole[whole["last"] & (whole.groupby("but_nimg")["nimg"].transform("nunique") > 1)]
    found = pd.concat([found, whole]).drop_duplicates(["model", "nimg"])
    figure, grid = axes(1, 1 + len(tables.measures), 3.2)
    published = paper.runs().query("conditioning == 'none' and pairs == 1").dropna(subset="flops")
    _paper_panel(grid[0, 0], "train_flops", "training FLOPs", published)
    _curves(grid[0, 1:], tables, found, "train_flops", "training FLOPs", whole)
    legend(figure, grid)
    return figure, _numbers(tables, found, ["nimg", "train_flops"])


def _curves(
    row: np.ndarray, tables: Tables, found: pd.DataFrame, x: str, name: str, whole: pd.DataFrame | None = None
) -> None:
    """Draw a learning curve of every model, a panel for each measure; join the ends of the `whole` trainings of one model."""
    named = looks(found.drop_duplicates("model"))
    for ax, (measure, axis) in zip(row, tables.measures.items()):
        for model, look in named.items():
            curve(ax, found[found["model"] == model].sort_values(x), x, measure, look)
        for _, ends in () if whole is None else whole.sort_values(x).groupby("but_nimg"):
            ax.plot(
                ends[x],
                ends[measure],
                color=named[ends["model"].iloc[-1]]["color"],
                linewidth=0.9,
                linestyle=":",
            )
        references(ax, tables, measure)
        ax.set(title=ours(tables, measure, found["n"]), xlabel=name, ylabel=axis)
        logarithmic(ax)


def parameters(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return quality against parameters with power laws, beside the published models (figure 2b), and its numbers."""
    found = scaling.points(tables, regime, "parameters", rule)
    figure, grid = axes(1, 1 + len(tables.measures), 3.2)
    published = paper.runs().query(
        "conditioning == 'none' and pairs == 1 and iterations == 800000 and batch == 128"
    )
    _paper_panel(grid[0, 0], "parameters", "parameters", published)
    for ax, (measure, axis) in zip(grid[0, 1:], tables.measures.items()):
        laws = scaling.fits(tables, regime, measure, rule)
        for family, rows in found.groupby("family", sort=False):
            look = {"color": COLOURS[family], "marker": MARKERS[family], "linestyle": "none"}
            hollow = {"markerfacecolor": "white"} if family == "GET as published" else {}
            curve(ax, rows, "parameters", measure, {**look, **hollow, "label": family})
            if family in laws:
                x = np.geomspace(rows["parameters"].min(), rows["parameters"].max(), 20)
                ax.plot(
                    x, laws[family].factor * x ** laws[family].exponent, color=COLOURS[family], linewidth=0.9
                )
        references(ax, tables, measure)
        ax.set(title=ours(tables, measure, found["n"]), xlabel="parameters", ylabel=axis)
        logarithmic(ax)
    legend(figure, grid, 5)
    return figure, _numbers(tables, found, ["parameters"])


def budgets(tables: Tables, regime: str, rule: Rule) -> tuple[Figure, pd.DataFrame]:
    """Return GET's value over ViT's at equal parameters, training and sampling FLOPs, and its numbers."""
    figure, grid = axes(len(tables.measures), len(BUDGETS), 2.1 * len(tables.measures) + 0.5, sharey="row")
    numbers, named = [], looks(tables.runs[tables.runs["kind"] == "get"].drop_duplicates("model"))
    for row, measure in zip(grid, tables.measures):
        for ax, (budget, name) in zip(row, BUDGETS.items()):
            found = scaling.equal_budget(tables, regime, budget, measure, rule).dropna(subset=["ratio"])
            for family, rows in found.groupby("family"):
                joined = rows.sort_values("cost") if budget != "flops" else rows.iloc[:0]
                ax.plot(
                    joined["cost"],
                    joined["ratio"],
                    color=COLOURS[family],
                    linewidth=0.7,
                    linestyle=LINES[family],
                )
            for model, one in found.groupby("model", sort=False):
                reach = [one["ratio"] - one["low"], one["high"] - one["ratio"]]
                ax.errorbar(one["cost"], one["ratio"], yerr=reach, capsize=2, elinewidth=0.7, **named[model])
            if len(found):
                ax.set_xlim(found["cost"].min() / 1.5, found["cost"].max() * 1.5)
            else:
                nothing(ax, "no GET and no ViT\nof equal cost")
            ax.axhline(1, color=GREY, linewidth=0.9)
            ax.set_xlabel(name if measure == list(tables.measures)[-1] else "")
            numbers.append(
                found.assign(budget=budget, measure=measure)[
                    ["budget", "measure", "label", "family", "cost", measure, "other", "ratio", "low", "high"]
                ].rename(columns={measure: "get", "other": "vit"})
            )
            logarithmic(ax)
        name = tables.score if measure == tables.distance else "held-out L1"
        row[0].set_ylabel(f"{name}, GET / ViT\n(below 1: GET is better)")
    legend(figure, grid)
    return figure, pd.concat(numbers)


def iterates(tables: Tables, regime: str) -> tuple[Figure, pd.DataFrame]:
    """Return norm, residual, direction and drift of the iterates of every GET, and their medians."""
    found = traces(tables, regime)
    figure, grid = axes(1, 4, 2.5)
    names = {
        "norm": "norm of z, per element",
        "residual": "relative residual",
        "direction": "cosine between steps",
        "drift": "way from iterate 1",
    }
    named = looks(_implicit(tables, regime))
    for ax, (name, title) in zip(grid[0], names.items()):
        for _, rows in found.groupby("run", sort=False):
            look = named[rows["model"].iloc[0]] | {"markersize": 2.5}
            ax.plot(rows["iteration"], rows[name], **look)
            band = rows[f"{name}_10"], rows[f"{name}_90"]
            ax.fill_between(rows["iteration"], *band, color=look["color"], alpha=0.12, linewidth=0)
        trained_at(ax, _implicit(tables, regime))
        ax.set(title=title, xlabel="iteration")
        if name == "residual":
            logarithmic(ax, x=False)
        _rounding(ax)
    legend(figure, grid)
    return figure, found.drop(columns="model")


def traces(tables: Tables, regime: str) -> pd.DataFrame:
    """Return median, 10th and 90th percentile over samples of what the iterates of every GET do."""
    rows = []
    for run in _implicit(tables, regime).itertuples():
        kept = np.load(run.folder / "iterates.npz")
        for k in range(kept["norm"].shape[1]):
            row = {"run": run.run, "model": run.model, "iteration": k + 1}
            for name in ("norm", "residual", "direction", "drift"):
                values = kept[name][:, k]
                found = np.percentile(values, (50, 10, 90)) if np.isfinite(values).all() else (np.nan,) * 3
                row |= dict(zip((name, f"{name}_10", f"{name}_90"), found))
            rows.append(row)
    return pd.DataFrame(rows)


def _implicit(tables: Tables, regime: str) -> pd.DataFrame:
    """Return the first seed of every GET of a regime."""
    found = tables.runs[(tables.runs["kind"] == "get") & (tables.runs["regime"] == regime)]
    return found.sort_values(["parameters", "family", "seed"], kind="stable").drop_duplicates("model")


def decoded(tables: Tables, regime: str) -> tuple[Figure, pd.DataFrame]:
    """Return the decoded iterates of every GET for two noises, a row for each model, and the median residuals."""
    shown, rows = (1, 2, 3, 4, 6, 12, 24), []
    models = _implicit(tables, regime)
    figure, grid = axes(
        len(models), 2 * len(shown) + 1, 0.2 + WIDTH / 2 / len(shown) * len(models)
    )  # a gap between the noises
    for first, line, run in zip([True, *[False] * len(grid)], grid, models.itertuples()):
        kept = np.load(run.folder / "iterates.npz")
        line[len(shown)].axis("off")
        for k, ax in enumerate(np.delete(line, len(shown))):
            count, sample = shown[k % len(shown)], k // len(shown)
            picture(ax, kept["images"][count - 1, sample])
            ax.set_title(f"{count}" if first else "", fontsize=7, loc="center")
        line[0].set_ylabel(run.label, fontsize=6.5, rotation=0, ha="right", va="center")
        rows += [
            {"run": run.run, "iterations": c, "residual": np.median(kept["residual"][:, c - 1])}
            for c in shown
        ]
    return figure, pd.DataFrame(rows)


def picture(ax, image: np.ndarray, marked: bool = False) -> None:
    """Show one uint8 image (C, H, W); with a red frame if `marked`, as a sample that diverged is."""
    ax.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=marked, color="red")


def iterate(kept, count: int) -> Figure:
    """Return the images of one iterate, and where it stands in residual and norm; `kept` is an open iterates.npz."""
    figure, _ = axes(1, 1, 2.6)
    figure.clear()
    grid = figure.add_gridspec(2, 8)
    for k, image in enumerate(kept["images"][count - 1, :8]):
        picture(figure.add_subplot(grid[k // 4, k % 4]), image)
    for column, (name, scale) in zip((slice(4, 6), slice(6, 8)), (("residual", "log"), ("norm", "linear"))):
        ax, median = figure.add_subplot(grid[:, column]), np.median(kept[name], 0)
        ax.plot(np.arange(1, len(median) + 1), median, color=BLUE, linewidth=1)
        ax.plot(count, median[count - 1], "o", color=ORANGE, markersize=7)
        ax.set(title=f"{name} {median[count - 1]:.3g}", xlabel="iteration", yscale=scale)
        _rounding(ax)
    return figure


def _rounding(ax) -> None:
    """Do not let rounding fill linear axes, where it is all that is left to see of a normalised state."""
    if ax.get_yscale() == "linear" and np.ptp(ax.dataLim.intervaly) < 1e-3:
        ax.set_ylim(ax.dataLim.y0 - 0.1, ax.dataLim.y1 + 0.1)


def _numbers(tables: Tables, found: pd.DataFrame, at: list[str]) -> pd.DataFrame:
    """Return what a figure of points draws."""
    values = [column for measure in tables.measures for column in (measure, f"{measure}_half")]
    return found[list(dict.fromkeys(["label", "family", "parameters", *at, *values, "n"]))]
