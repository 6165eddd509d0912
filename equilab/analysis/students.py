"""Students of the teacher, GDD and CD, beside the teacher, GET and ViT: quality by images, ablations, rel-FD, images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from equilab.analysis import figures, paper
from equilab.analysis.figures import BLUE, GREEN, GREY, IMAGES, ORANGE, axes, curve, legend, logarithmic
from equilab.analysis.tables import TUNED, Results, evaluated, first_seeds, read_table, replicated
from equilab.core.config import UserError, digest, read_json

FROZEN = {
    "gdd": "GDD",
    "gdd_i": "GDD-I",
    "gdd_i_qkv": "GDD-I, QKV frozen",
    "gdd_i_qkv_skip": "GDD-I, QKV and skips frozen",
}
JUDGES = {"projected": "projected", "each": "LPIPS", "last": "VGG16-like"}  # mixing -> the row of table 1a
LOOKS = {
    "GDD": {"color": BLUE, "marker": "o"},
    "GDD-I": {"color": "#56b4e9", "marker": "s"},
    "GDD-I, QKV frozen": {"color": "#56b4e9", "marker": "^", "linestyle": "--"},
    "GDD-I, QKV and skips frozen": {"color": "#56b4e9", "marker": "v", "linestyle": ":"},
    "CD": {"color": "#cc78bc", "marker": "v"},
    "CD-I": {"color": "#cc78bc", "marker": "^", "linestyle": "--"},
    "GDD + CD": {"color": BLUE, "marker": "X", "linestyle": "--"},
    "GDD-I + CD": {"color": "#56b4e9", "marker": "P", "linestyle": "--"},
    "GET": {"color": ORANGE, "marker": "D"},
    "ViT": {"color": "#ca9161", "marker": "P"},
}
COMPARED = ("GDD", "GDD-I", "CD", "CD-I", "GET", "ViT")  # families of figure 1 A
SHOWN = 12  # noises of which every model's image is shown


@dataclass(frozen=True)
class Students(Results):
    """What a study found about its students: `rows`, one for each run, and for each setting of the teacher; `curves`, one
    for each snapshot; `relative`, the distance between the images of runs, empty if it was not measured."""

    rows: pd.DataFrame
    curves: pd.DataFrame
    relative: pd.DataFrame

    def averaged(self, rows: pd.DataFrame, confidence: float, at: tuple[str, ...] = ()) -> pd.DataFrame:
        """Return rows with the seeds of a model averaged (at each value of the columns `at`)."""
        values = [v for v in (self.distance, "inception_score", "precision", "recall") if v in rows]
        found = replicated(rows, ["model", *at], values, confidence)
        return found.sort_values(["order", "label", *at], kind="stable").reset_index(drop=True)

    def students(self) -> pd.DataFrame:
        """Return the rows of the stages gan and consistency."""
        return self.rows[self.rows["stage"].isin(("gan", "consistency"))]

    def headline(self, family: str) -> str | None:
        """Return the model of a family: of students, of one step, from the teacher, and of these the one that most others vary;
        of GET and ViT the best."""
        found = self.rows[(self.rows["family"] == family) & (self.rows["plain"])].sort_values(
            ["position", "run"]
        )
        if found.empty:
            return None
        if (found["stage"] == "distill").all():
            return found.groupby("model", sort=False)[self.distance].mean().idxmin()
        keys = [key for key in self.rows if key.startswith("but_")]
        like = [sum((self.rows[key] == row[key]).sum() for key in keys) for _, row in found.iterrows()]
        return found["model"].iloc[int(np.argmax(like))]


def read(folder: Path | str) -> Students:
    """Return what a study found about its students.

    Raises: UserError if it has evaluated none.
    """
    folder = Path(folder)
    if not evaluated(folder, "gan") + evaluated(folder, "consistency"):
        raise UserError(
            f"{folder} holds no evaluated run of gan or consistency; run `dvc repro`, or give another results folder"
        )
    rows, curves = [], []
    for path in sorted(folder.glob("evaluate/*/metrics.json")):
        of = read_json(path, "of", "kind", "run")["of"]
        stage, sweep = of.partition("/")[0], read_table(path.with_name("sweep.csv"))
        if stage == "diffusion":
            continue
        about = _about(folder / of / "summary.json", stage)
        for k, row in (sweep if stage == "teacher" else sweep.iloc[:1]).iterrows():
            told = (
                {"model": f"teacher {row['nfe']:.0f}", "label": f"teacher, {row['nfe']:.0f} nfe"}
                if stage == "teacher"
                else {}
            )
            row["nfe"] = int(row["nfe"])
            rows.append(
                {
                    **row[[c for c in sweep if c not in about]],
                    **about,
                    **told,
                    "position": k,
                    "folder": path.parent,
                }
            )
        snapshots = read_table(path.with_name("curve.csv"))
        curves += (
            [snapshots.assign(**{k: v for k, v in about.items() if k not in snapshots})]
            if len(snapshots)
            else []
        )
    rows = pd.DataFrame(rows)
    curves = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=[*rows, "nimg"])
    first = first_seeds(rows[rows["stage"] != "teacher"])
    rows["label"] = rows["model"].map(first).fillna(rows["label"])
    curves["label"] = curves["model"].map(first)
    path = folder / "relative" / "relative.csv"
    relative = read_table(path) if path.exists() else pd.DataFrame()
    return Students(*Results.measure(folder, rows), rows, curves, relative)


def _about(path: Path, stage: str) -> dict[str, Any]:
    """Return what the run of a summary is, and for each ablation its config without what the ablation changes."""
    summary = read_json(path, "run", "config", "parameters", "nimg")
    config, order = summary["config"], ("teacher", "distill", "consistency", "gan").index(stage)
    seedless = {**config, "seed": None}
    about = {
        "run": summary["run"] or "teacher",
        "stage": stage,
        "seed": config.get("seed", 0),
        "model": digest(seedless),
        "label": "",
        "nimg": summary["nimg"],
        "parameters": summary["parameters"],
        "order": order,
        "steps": 1,
        "plain": True,
        "parameters_trained": summary.get("parameters_trained", summary["parameters"]),
    }
    network = config["network"]
    if stage in ("teacher", "distill"):
        return about | {"family": {"unet": "teacher", "get": "GET", "vit": "ViT"}[network["kind"]]}
    student, steps = config["student"], len(config["student"]["sigmas"])
    base = {
        key: name.replace("GDD", "CD") if stage == "consistency" else name for key, name in FROZEN.items()
    }[student["freeze"]]
    extra = bool(config.get("consistency"))
    judge = config.get("discriminator", {})
    r1 = config.get("r1") or {}
    tuned = {key: value for key, value in config["optimisation"].items() if key not in TUNED}
    rest = {
        key: value for key, value in seedless.items() if key not in ("student", "consistency", "optimisation")
    }
    beside = (config.get("consistency"), tuned)  # what only its own ablation changes
    without = lambda name: {key: value for key, value in student.items() if key != name}  # noqa: E731
    but = lambda *names: {key: value for key, value in rest.items() if key not in names}  # noqa: E731
    return about | {
        "family": base + " + CD" * extra,
        "steps": steps,
        "sigmas": " ".join(f"{s:g}" for s in student["sigmas"]),
        "plain": steps == 1
        and student["start"] == "teacher"
        and config.get("augment", "none") == "none"
        and not extra
        and (not judge or judge.get("mixing") == "projected"),
        "start": student["start"],
        "freeze": student["freeze"],
        "gamma": r1.get("gamma", 0.0),
        "augment": config.get("augment"),
        "judge": JUDGES.get(judge.get("mixing"), "StyleGAN2 from scratch" if judge else None),
        "but_freeze": digest(rest, beside, without("freeze")),
        "but_consistency": digest(rest, tuned, student),
        "but_judge": digest(but("discriminator", "features"), beside, student),
        "but_penalty": digest(but("r1", "augment", "adaptive"), beside, student),
        "but_steps": digest(rest, beside, without("sigmas")),
        "sigma_min": student["sigma_min"],
    }


def about(study: Students) -> str:
    """Return in Markdown what the study trained and how its quality is measured."""
    found = study.students()
    teacher = study.rows[study.rows["stage"] == "teacher"]
    reached = ", ".join(
        f"{getattr(row, study.distance):.3g} in {row.nfe:.0f} evaluations" for row in teacher.itertuples()
    )
    return (
        f"This study: {found['model'].nunique()} students in {len(found)} runs, of {found['parameters'].iloc[0]:,} parameters, trained on up to "
        f"{found['nimg'].max():,} images. {study.score} is measured on {study.samples:,} images against the training images; training "
        f"images drawn at random reach {study.floor:.3g}" + (f", the teacher {reached}." if reached else ".")
    )


def methods(study: Students, confidence: float) -> pd.DataFrame:
    """Return every model at its headline, as tables 3 and 4: distance, inception score, precision, recall, cost."""
    found = study.averaged(study.rows, confidence)
    kept = {
        "family": "method",
        "label": "run",
        "n": "seeds",
        "nfe": "nfe",
        "nimg": "images seen",
        "parameters": "parameters",
        "parameters_trained": "trained",
        study.distance: study.score,
        "inception_score": "inception score",
        "precision": "precision",
        "recall": "recall",
    }
    return found[[column for column in kept if column in found]].rename(columns=kept)


def images(study: Students, confidence: float) -> tuple[Figure, pd.DataFrame]:
    """Return quality against training images beside the paper's (figure 1 A, table 3), and its numbers."""
    figure, grid = axes(1, 2, 3.0)
    for row in paper.GDD_METHODS.dropna(subset=["nimg"]).itertuples():
        look = LOOKS.get(row.method, {"color": GREY, "marker": "X"})
        grid[0, 0].plot(
            [row.nimg], [row.fid], linestyle="none", **{k: v for k, v in look.items() if k != "linestyle"}
        )
        place = {"GDD": ((6, 2), "left"), "GDD-I": ((6, -7), "left")}.get(row.method, ((-6, -3), "right"))
        grid[0, 0].annotate(
            row.method, (row.nimg, row.fid), place[0], textcoords="offset points", fontsize=7, ha=place[1]
        )
    (teacher,) = paper.GDD_METHODS.loc[paper.GDD_METHODS["method"] == "EDM", "fid"]
    grid[0, 0].axhline(teacher, color=GREEN, linestyle=":", linewidth=1)
    grid[0, 0].annotate(
        "EDM, 35 nfe", (6e8, teacher), (0, 3), textcoords="offset points", fontsize=7, color=GREEN, ha="right"
    )
    grid[0, 0].set(xlim=(3e6, 7e8), ylim=(1.2, 12))
    grid[0, 0].set(title="paper: CIFAR-10", xlabel=IMAGES, ylabel="FID")
    chosen = study.curves[study.curves["model"].isin([study.headline(name) for name in COMPARED])]
    found = study.averaged(chosen, confidence, ("nimg",))
    for family, rows in found.groupby("family", sort=False):
        curve(
            grid[0, 1],
            rows,
            "nimg",
            study.distance,
            {**LOOKS[family], "label": f"{family} ({rows['label'].iloc[0]})"},
        )
    _teacher(grid[0, 1], study)
    grid[0, 1].set(title=f"ours: {study.samples:,} images", xlabel=IMAGES, ylabel=study.score)
    for ax in grid[0]:
        logarithmic(ax)
    legend(figure, grid)
    return figure, _numbers(study, found, ["nimg"])


def _teacher(ax, study: Students) -> None:
    """Draw the teacher at each of its settings, and the floor, as lines."""
    for row, line in zip(study.rows[study.rows["stage"] == "teacher"].itertuples(), (":", "-.", (0, (1, 3)))):
        ax.axhline(
            getattr(row, study.distance),
            color=GREEN,
            linestyle=line,
            linewidth=1,
            label=f"teacher, {row.nfe:.0f} nfe",
        )
    ax.axhline(study.floor, color=GREY, linestyle="--", linewidth=0.8, label="real images")


def changed(study: Students, confidence: float, names: dict[str, list[str]]) -> tuple[Figure, pd.DataFrame]:
    """Return quality against training images of the students of one step in each list of families, a panel each."""
    figure, grid = axes(1, len(names), 2.8)
    rows = study.curves[study.curves["stage"].isin(("gan", "consistency")) & (study.curves["steps"] == 1)]
    parts = []
    for ax, (title, families) in zip(grid[0], names.items()):
        chosen = [m for m in (variant(study, family) for family in families) if m]
        found = study.averaged(rows[rows["model"].isin(chosen)], confidence, ("nimg",))
        for family in families:
            if len(line := found[found["family"] == family]):
                curve(ax, line, "nimg", study.distance, {**LOOKS[family], "label": family})
        if len(found):
            _teacher(ax, study)
            logarithmic(ax)
        ax.set(title=title, xlabel=IMAGES, ylabel=study.score)
        parts.append(found.assign(panel=title))
    legend(figure, grid, 3)
    return figure, _numbers(study, pd.concat(parts), ["panel", "nimg"])


def variant(study: Students, family: str) -> str | None:
    """Return the model of a family that differs from GDD (or from CD) in nothing else."""
    rows = study.students()
    base = study.headline("CD" if family.startswith("CD") else "GDD")
    if base is None:
        return None
    like = rows[rows["model"] == base].iloc[0]
    rows = rows[(rows["family"] == family) & (rows["steps"] == 1) & (rows["start"] == "teacher")]
    key = "but_consistency" if family.endswith("+ CD") else "but_freeze"
    if family.endswith("+ CD") and (plain := variant(study, family.removesuffix(" + CD"))):
        like = study.rows[study.rows["model"] == plain].iloc[0]
    rows = rows[rows[key] == like[key]]
    return rows["model"].iloc[0] if len(rows) else None


def ablation(study: Students, averaged: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return of all averaged models the students that differ from GDD in `what`: "judge" (table 1a), "penalty" (table 1b) or
    "freeze" (table 2)."""
    base, key = study.headline("GDD"), f"but_{what}"
    if base is None:
        return averaged.iloc[:0].reindex(columns=[*averaged, *{"judge", "augment", "gamma"} - set(averaged)])
    (like,) = averaged.loc[averaged["model"] == base, key]
    return averaged[averaged[key] == like]


def shown(study: Students, found: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Return rows for a table: columns by their names, then the distance."""
    kept = {**columns, "label": "run", "n": "seeds", study.distance: study.score, "recall": "recall"}
    return found[[c for c in kept if c in found]].rename(columns=kept) if len(found) else found


def relatives(study: Students) -> pd.DataFrame:
    """Return for each student of several steps its distance to the one-step student like it (rel), and to the training
    images (abs); the seeds of a model are rows of their own."""
    if study.relative.empty:
        return pd.DataFrame()
    rows = study.students()
    one = rows[(rows["steps"] == 1) & rows["run"].isin(study.relative["first"])]
    found = study.relative[study.relative["first"].isin(one["run"])].rename(
        columns={"second": "run", "distance": "relative"}
    )
    kept = ["run", "seed", "model", "steps", "sigmas", "sigma_min", "family", "but_steps", study.distance]
    found = found.merge(rows[kept], on="run")
    like = one[["run", "seed", "but_steps"]].rename(columns={"run": "first"})
    found = found[found["steps"] > 1].merge(
        like, on=["first", "seed", "but_steps"]
    )  # alike in all but the steps
    found["middle"] = [
        float(s.split()[1]) if n == 2 else np.nan for s, n in zip(found["sigmas"], found["steps"])
    ]
    return found.sort_values(["steps", "middle", "seed"]).reset_index(drop=True)


def distances(study: Students) -> tuple[Figure, pd.DataFrame]:
    """Return rel-FD and abs-FD of students by their steps, and of two steps by their middle noise level (figure 2)."""
    found = relatives(study)
    figure, grid = axes(1, 2, 2.7 if len(found) else 0.9)
    for ax, x, title in (
        (grid[0, 0], "steps", "steps"),
        (grid[0, 1], "middle", "sigma of the middle of two steps"),
    ):
        if found.empty:
            ax.set_axis_off()
            ax.text(
                0.5, 0.5, f"no students of several steps\nby {title}", ha="center", va="center", color=GREY
            )
            continue
        rows = found.dropna(subset=[x]) if x == "middle" else evenly(found)
        mean = rows.groupby(x)[["relative", study.distance]].mean()
        ax.plot(mean.index, mean["relative"], color=BLUE, marker="o", label=f"rel-{study.score}: to one step")
        ax.plot(
            mean.index,
            mean[study.distance],
            color=GREY,
            marker="s",
            label=f"abs-{study.score}: to training images",
        )
        one = study.students().set_index("run").loc[rows["first"].unique(), study.distance].mean()
        ax.axhline(one, color=GREY, linestyle=":", linewidth=1, label=f"abs-{study.score} of one step")
        ax.scatter(rows[x], rows["relative"], color=BLUE, s=6, alpha=0.5)
        ax.scatter(rows[x], rows[study.distance], color=GREY, s=6, alpha=0.5)
        ax.set(xlabel=title, ylabel=study.score, title=f"ours: {study.samples:,} images", ylim=(0, None))
        ax.set_xscale("log")
        figures.logarithmic(ax, y=False)
        ax.set_xticks(mean.index, [f"{at:g}" for at in mean.index])
    legend(figure, grid)
    kept = ["run", "first", "seed", "steps", "sigmas", "relative", study.distance]
    return figure, found[kept] if len(found) else found


def pairs(study: Students) -> pd.DataFrame:
    """Return the distance between the images of each pair of students, a table with a row and a column for each."""
    if study.relative.empty:
        return pd.DataFrame()
    both = pd.concat([study.relative, study.relative.rename(columns={"first": "second", "second": "first"})])
    names = list(dict.fromkeys([*study.relative["first"], *study.relative["second"]]))
    table = both.pivot_table(index="first", columns="second", values="distance").reindex(
        index=names, columns=names
    )
    return table.rename_axis(None, axis=1).rename_axis(f"rel-{study.score}").reset_index()


def evenly(found: pd.DataFrame) -> pd.DataFrame:
    """Return of the students of two steps only those whose middle level is spaced as the levels of more steps: T(1, 2) of
    GDD's equation (5)."""
    ends = found["sigmas"].str.split().str[0].astype(float), found["sigma_min"]
    usual = (sum(end ** (1 / 7) for end in ends) / 2) ** 7  # rho is 7, as EDM's
    off = np.log(found["middle"] / usual).abs()
    return found[(found["steps"] != 2) | (off == off.min())]


def gallery(study: Students) -> tuple[Figure, pd.DataFrame]:
    """Return the images that every model makes of the same noises (figures 5 to 19), a row for each model."""
    rows = first(study)
    figure, grid = axes(max(len(rows), 1), SHOWN, 0.15 + figures.WIDTH / (SHOWN + 2.4) * len(rows))
    for line, row in zip(grid, rows.itertuples()):
        for ax, image in zip(line, final(row.folder)):
            figures.picture(ax, image)
        name = row.family if row.family == "teacher" else f"{row.family}\n{row.run}"
        line[0].set_ylabel(f"{name}, {row.nfe:.0f} nfe", fontsize=6, rotation=0, ha="right", va="center")
    return figure, rows[["family", "run", "nfe", study.distance]]


def first(study: Students, settings: bool = False) -> pd.DataFrame:
    """Return the first seed of every student, the teacher's headline (or all its settings), and one GET and one ViT."""
    rows = (
        study.rows[(study.rows["position"] == 0) | settings]
        .sort_values(["order", "run", "seed"], kind="stable")
        .drop_duplicates("model")
    )
    return rows[
        (rows["stage"] != "distill") | rows["model"].isin([study.headline(name) for name in ("GET", "ViT")])
    ]


def side_by_side(study: Students, rows: pd.DataFrame, noise: int) -> Figure:
    """Return the image that each model of `rows` makes of one noise, six in a row."""
    height = -(-len(rows) // 6)
    figure, grid = axes(max(height, 1), 6, 1.55 * max(height, 1))
    for ax in grid.flat:
        ax.set_visible(False)
    for ax, row in zip(grid.flat, rows.itertuples()):
        ax.set_visible(True)
        figures.picture(ax, final(row.folder, row.position)[noise])
        ax.set_title(
            f"{row.family}, {row.nfe:.0f} nfe\n{study.score} {getattr(row, study.distance):.3g}", fontsize=6.5
        )
    return figure


def final(folder: Path, position: int = 0) -> np.ndarray:
    """Return the images (N, C, H, W) uint8 that a run made of the noises all runs share, at one of its settings."""
    with np.load(folder / "iterates.npz") as kept:
        if position:
            return kept[f"image_{position}"]
        count = read_table(folder / "sweep.csv").get("iterations")
        images = kept["images"]  # (K, N, C, H, W); an implicit generator's go on beyond its iterations
        last = (
            len(images)
            if count is None or pd.isna(count.iloc[0])
            else min(int(round(count.iloc[0])), len(images))
        )
        return images[last - 1]


def _numbers(study: Students, found: pd.DataFrame, at: list[str]) -> pd.DataFrame:
    """Return the columns that a figure draws."""
    columns = [*at, "family", "label", "n", study.distance, f"{study.distance}_half"]
    return found[[c for c in columns if c in found]]
