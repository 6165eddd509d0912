"""Stage `report`: a study as pages that need no network: what it found, its figures, a page for each run and each notebook."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, Field
from scipy import stats

from equilab.claims.tests import SEEDS, mean, named, short
from equilab.core.config import Params, UserError, read_json, unreadable
from equilab.core.files import publishing, write
from equilab.core.job import Job, Plan
from equilab.models.family import family
from equilab.stages.scoreboard import EFFECTS
from equilab.tables import SCORES, Results, results

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 0 auto; padding: 1rem; }
a { color: #0173b2; } h1 { border-bottom: 2px solid #0173b2; } h2 { margin-top: 2.2rem; } .anchor-link { display: none; }
nav, pre, th { background: #f5f6f8; } nav, pre { padding: .6rem 1rem; overflow-x: auto; } nav a { margin-right: 1rem; }
pre { font-size: 13px; } img { max-width: 100%; height: auto; } .equation { text-align: center; }
img.curve { width: 27rem; } img.samples { display: block; width: 32rem; margin-bottom: .8rem; image-rendering: pixelated; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; min-width: 4rem; }
.holds { color: #00693e; font-weight: 600; } .fails { color: #a5320b; font-weight: 600; }
figure { margin: 1.5rem 0; } figcaption { border-left: 3px solid #0173b2; padding: .1rem 1rem; margin: .4rem 0 1rem; }
details { margin: .4rem 0; } summary { color: #777; font-size: 12px; cursor: pointer; } #effects li { overflow-wrap: anywhere; font-size: 14px; }
@media (max-width: 40rem) {
  body { font-size: 15px; } th, td { padding: .2rem .35rem; } h1 { font-size: 1.4rem; }
  .scoreboard thead, .scoreboard td:nth-child(n+3):not(:last-child) { display: none; } /* what its last column says, too */
  .scoreboard tr, .scoreboard td { display: block; border: 0; } .scoreboard tr { border-bottom: 1px solid #ddd; padding: .4rem 0; }
  .scoreboard td:first-child, .scoreboard td:last-child { font-weight: 600; }
}
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; } nav, details { display: none; } a { color: inherit; }
  table { display: table; font-size: 8pt; } th, td { min-width: 0; } pre { white-space: pre-wrap; font-size: 8pt; }
  tr, figure, img { break-inside: avoid; } h1, h2, h3 { break-after: avoid; }
}
"""
# TeX that matplotlib does not set, and what it does
MATHTEXT = {
    r"\s+": " ",
    r"\\[lr]Vert": r"\\Vert",
    r"\\(math\w+|boldsymbol)\b ?(\\\w+|\w)": r"\\\1{\2}",
    r"\\(tilde|hat|bar) ?(\\\w+\{\w\}|\w)": r"\\\1{\2}",
}


class Cell(BaseModel):
    """A cell of an executed notebook, as far as a page shows it."""

    cell_type: str
    source: str | list[str]
    metadata: dict[str, Any]
    outputs: list[dict[str, Any]] = []


Cells = Annotated[list[Cell], Field(min_length=1)]


class Config(Params):
    """The params section `report`."""

    title: str
    figures: tuple[str, ...] = ()  # on the first page: NOTEBOOK/FIGURE each


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: no networks.

    Raises: UserError if a figure is of a notebook that the study does not execute.
    """
    for figure in config.figures:
        try:
            job.read("notebook", figure.partition("/")[0])
        except UserError as error:
            raise UserError(f"report.figures: {figure}: {error}") from None
    return Plan


def run(config: Config, job: Job) -> None:
    """Write `index.html`, and a page for each run and each notebook beside it.

    The first page opens with the scoreboard, or without one with the study's claims, and the figures that params name. Figures are
    those of results/notebook: copied as a whole, the folder results stays in order.

    Raises: UserError naming the file, if a result is missing or damaged, or a figure that params name is not there.
    """
    import matplotlib

    matplotlib.use("agg")
    from equilab import style  # brings pyplot along, which takes seconds

    style.use()  # also of equations
    study = results("results")
    notebooks = {name: _notebook(study.folder / "notebook" / name) for name in study.params["notebook"]}
    figures = {}
    for name, (_, drawn) in notebooks.items():
        figures |= {f"{name}/{figure}": shown for figure, shown in drawn.items()}
    pages = {"index": (config.title, _index(config.title, study, config.figures, figures))}
    pages |= {f"notebook-{name}": (name, body) for name, (body, _) in notebooks.items()}
    pages |= {_page_of(of): (of, _run(study, of)) for of in study.runs["of"].unique()}
    with publishing(job.out, own="*.html") as fresh:
        for name, (title, body) in pages.items():
            write(fresh / f"{name}.html", _page(title, body, study, top=name == "index"))
    print(f"report: {job.out / 'index.html'}")


def _page(title: str, body: str, study: Results, top: bool) -> str:
    """Return a page in full."""
    back = "" if top else f'<nav><a href="index.html">{html.escape(study.study)}</a></nav>'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{back}\n{body}\n</body></html>\n"
    )


def _page_of(of: str) -> str:
    return f"run-{of.replace('/', '-')}"


def _index(title: str, study: Results, chosen: Sequence[str], figures: Mapping[str, str]) -> str:
    """Return the body of the first page: what was found, the figures chosen, links to all runs and notebooks."""
    if missing := [figure for figure in chosen if figure not in figures]:
        known = ", ".join(figures)
        raise UserError(f"report.figures: no notebook of the study drew {missing[0]}; it has {known}")
    scoreboard = study.folder / "scoreboard.md"
    own = [study.folder / "claims.md", study.folder / "measured.md"]
    text = "\n".join(_text(path) for path in ([scoreboard] if scoreboard.exists() else own))
    found, _, effects = text.partition(EFFECTS)  # of a scoreboard
    kind = "scoreboard" if scoreboard.exists() else "claims"
    links = [f'<li><a href="notebook-{name}.html">{name}</a></li>' for name in study.params["notebook"]]
    sections = {
        "claims": f'<div class="{kind}">{_marked(_markdown(found))}</div>',
        "figures": "".join(f"<figure>{figures[name]}</figure>" for name in chosen),
        "effects": _markdown(effects),
        "runs": _runs(study),
        "notebooks": f"<ul>{''.join(links)}</ul>",
    }
    present = {name: content for name, content in sections.items() if content}
    contents = "".join(f'<a href="#{name}">{name}</a>' for name in present)
    parts = [f"<h1>{html.escape(title)}</h1><nav>{contents}</nav>"]
    for name, content in present.items():
        heading = "" if name == "claims" else f"<h1>{name.capitalize()}</h1>"  # claims have their own
        parts.append(f'<section id="{name}">{heading}{content}</section>')
    return "\n".join(parts)


def _marked(page: str) -> str:
    """Return a page with the verdicts in its tables marked."""
    return re.sub("<td([^>]*)>(holds|fails)</td>", r'<td\1 class="\2">\2</td>', page)


def _runs(study: Results) -> str:
    """Return a table of all runs, means over seeds, each with a link to its page."""
    distances = [study.distance, study.distance.replace("train", "test")]
    rows = []
    for of, seeds in study.runs.groupby("of", sort=False):
        link = f'<a href="{_page_of(of)}.html">{html.escape(of)}</a>'
        about = {"run": link, "model": seeds["label"].iloc[0], "seeds": len(seeds)}
        counted = {"parameters": seeds["parameters"].iloc[0], "images seen": seeds["nimg"].iloc[0]}
        rows.append(about | counted | {named(column): mean(seeds[column]) for column in distances})
    return _table(pd.DataFrame(rows))


def _run(study: Results, of: str) -> str:
    """Return the body of a run's page: what it is, how it was trained, what it makes, how good that is and what it costs."""
    rows = study.runs[study.runs["of"] == of]
    summaries = {seed: study.summary(of, seed) for seed in rows["seed"]}
    first = next(iter(summaries.values()))
    config = {key: value for key, value in first["config"].items() if key != "seed"}
    pictures = [_samples(study.samples(of, seed), f"images of seed {seed}") for seed in rows["seed"]]
    origin = [
        {"seed": seed, **each.get("environment", {}), **each.get("inputs", {})}
        for seed, each in summaries.items()
    ]
    at = study.folder / of
    alone = f"<p>Fewer than {SEEDS} seeds give no interval.</p>" if len(rows) < SEEDS else ""
    return "\n".join(
        [
            f"<h1>{html.escape(of)}</h1>",
            f"<p>{html.escape(family(rows['family'].iloc[0]).label)} of the study {html.escape(study.study)}.</p>",
            f"<h2>Scores</h2>{_table(_scores(study, rows))}{alone}",
            f"<h2>Samples</h2><p>The same noises for every run, a picture for each seed.</p>{''.join(pictures)}",
            f"<h2>Training</h2>{_curves(study, rows)}",
            f"<h2>Cost</h2>{_table(_cost(rows))}{_measured(study, of)}",
            f"<h2>Configuration</h2><pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre>",
            f"<h2>Provenance</h2>{_table(pd.DataFrame(origin))}",
            f"<p>The code is that of the commit which holds these results: <code>git log -1 {at.as_posix()}</code>.</p>",
        ]
    )


def _scores(study: Results, rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each score at the headline setting: its mean over seeds with its interval, and every seed."""
    confidence = study.params["claims"]["confidence"]
    table = []
    for column in rows:
        if column.startswith(SCORES) and rows[column].notna().all():
            low, high = interval(rows[column], confidence)
            bounds = "" if np.isnan(low) else f"{low:.3g} to {high:.3g}"
            about = {"score": named(column), "mean": mean(rows[column]), f"{confidence:.0%} interval": bounds}
            table.append(about | {f"seed {seed}": value for seed, value in zip(rows["seed"], rows[column])})
    return pd.DataFrame(table)


def interval(values: pd.Series, confidence: float) -> tuple[float, float]:
    """Return between which bounds the mean over seeds lies, geometric where all are positive, by Student's t; nan with fewer than
    three seeds."""
    if len(values) < SEEDS:
        return np.nan, np.nan
    positive = (values > 0).all()
    taken = np.log(values) if positive else values
    reach = taken.sem() * stats.t.ppf((1 + confidence) / 2, len(taken) - 1)
    low, high = taken.mean() - reach, taken.mean() + reach
    return (np.exp(low), np.exp(high)) if positive else (low, high)


def _cost(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what a run costs, as it is counted."""
    names = {
        "parameters": "parameters",
        "parameters_trained": "parameters trained",
        "nimg": "images seen",
        "train_flops": "FLOPs of the training",
        "teacher_calls": "evaluations of the teacher for it",
        "nfe": "calls of the network for an image",
        "iterations": "iterations for an image",
        "block_evals": "blocks applied for an image",
        "flops": "FLOPs of an image",
    }
    means = rows[[name for name in names if name in rows]].mean().dropna()
    return pd.DataFrame(
        {"counted": [names[name] for name in means.index], "value": means.map(short).to_list()}
    )


def _measured(study: Results, of: str) -> str:
    """Return what was measured of a run, or nothing where the stage cost leaves it out."""
    names = {
        "what": "measured",
        "gradient": "gradient",
        "most_iterations": "iterations",
        "batch": "images",
        "seconds": "seconds, median",
        "seconds_min": "fastest",
        "seconds_max": "slowest",
        "memory_mib": "MiB",
    }
    rows = study.costs[study.costs["of"] == of]
    return _table(rows[list(names)].dropna(axis=1, how="all").rename(columns=names)) if len(rows) else ""


def _curves(study: Results, rows: pd.DataFrame) -> str:
    """Return the learning curves of all seeds as pictures: the loss, and the distances where there are snapshots."""
    from matplotlib import pyplot

    of, colour = rows["of"].iloc[0], family(rows["family"].iloc[0]).colour
    look = {"figsize": (3.6, 2.4), "layout": "constrained"}
    figure, ax = pyplot.subplots(**look)
    for seed in rows["seed"]:
        log = study.log(of, seed)
        ax.plot(log["nimg"], log["loss"], color=colour)
    ax.set(xlabel="training images seen", ylabel="loss")
    pictures = [_drawing(figure, "the loss")]
    kept = study.snapshots[study.snapshots["of"] == of]
    if kept["nimg"].nunique() > 1:
        figure, ax = pyplot.subplots(**look)
        for end, line in (("train", "-"), ("test", ":")):
            column = study.distance.replace("train", end)
            for _, points in kept.groupby("seed"):
                ax.plot(points["nimg"], points[column], line, marker=".", color=colour)
            ax.plot([], [], line, color=colour, label=named(column))
        ax.set(xlabel="training images seen", ylabel=study.score, yscale="log")
        ax.legend()
        pictures.append(_drawing(figure, "the distance to real images"))
    return "".join(pictures)


def _drawing(figure: Any, name: str) -> str:
    """Return a figure as a picture of few colours: the same figure gives the same bytes."""
    from matplotlib import pyplot
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(32).save(small, "png", optimize=True)
    return f'<img class="curve" alt="{name} over training" src="{_embedded(small.getvalue())}">'


def _samples(images: np.ndarray, name: str) -> str:
    """Return images (N, C, H, W) uint8 as a picture, eight in a line."""
    from PIL import Image

    margins = (0, -len(images) % 8), (0, 0), (0, 1), (0, 1)  # the last line filled; white between images
    tiles = np.pad(images, margins, constant_values=255).transpose(0, 2, 3, 1)  # (N, H, W, C)
    lines = [np.concatenate(list(tiles[k : k + 8]), axis=1) for k in range(0, len(tiles), 8)]
    grid = np.concatenate(lines)  # (N / 8 H, 8 W, C)
    drawn = io.BytesIO()
    Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid).save(drawn, "png", optimize=True)
    return f'<img class="samples" alt="{html.escape(name)}" src="{_embedded(drawn.getvalue())}">'


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(frame: pd.DataFrame) -> str:
    """Return a table as HTML; numbers in four digits, missing ones empty, other cells as they are."""
    from equilab.style import number

    shown = pd.DataFrame({column: frame[column].map(number) for column in frame})
    return shown.to_html(index=False, border=0, escape=False, na_rep="", justify="left")


def _notebook(folder: Path) -> tuple[str, dict[str, str]]:
    """Return an executed notebook as HTML: prose, pictures and tables, its code folded away; and each of its figures with its
    caption, by name.

    Raises: UserError if it is missing or damaged.
    """
    drawn = {path.read_bytes(): path.stem for path in sorted(folder.glob("*.png"))}
    parts, figures, last = [], {}, []
    for cell in read_json(folder / f"{folder.name}.ipynb", cells=Cells)["cells"]:
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        if cell["cell_type"] == "markdown":
            parts.append(_markdown(source))
        elif "caption" in cell["metadata"].get("tags", []):
            captions = [f"<figcaption>{_output(output)}</figcaption>" for output in outputs if _says(output)]
            parts += captions
            figures |= {name: figures[name] + "".join(captions) for name in last}
        elif cell["cell_type"] == "code":
            parts.append(f"<details><summary>code</summary><pre>{html.escape(source)}</pre></details>")
            last = []
            for output in outputs:
                name = drawn.get(_png(output))
                if name is None:
                    parts.append(_output(output))
                else:
                    last.append(name)
                    figures[name] = f'<img alt="{name}" src="../notebook/{folder.name}/{name}.png">'
                    parts.append(figures[name])
    return "\n".join(parts), figures


def _png(output: Mapping[str, Any]) -> bytes:
    """Return the picture that a cell shows; nothing where it shows something else."""
    return base64.b64decode("".join(output.get("data", {}).get("image/png", "")))


def _says(output: Mapping[str, Any]) -> bool:
    """Return whether the caption of a figure says something of this study."""
    return bool("".join(output.get("data", {}).get("text/markdown", "")).strip())


def _output(output: Mapping[str, Any]) -> str:
    data = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
    if "image/png" in data:
        return f'<img alt="figure" src="{_embedded(_png(output))}">'
    if "text/markdown" in data:
        return _markdown(data["text/markdown"])
    text = data.get("text/plain", "".join(output.get("text", "")))
    return data.get("text/html") or f"<pre>{html.escape(text)}</pre>"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def _markdown(text: str) -> str:
    """Return Markdown as HTML, its equations as pictures: a page without a network has nothing that sets them."""
    from nbconvert.filters import markdown2html  # takes seconds

    text = re.sub(
        r"\$\$(.+?)\$\$", lambda found: f'<p class="equation">{_equation(found[1])}</p>', text, flags=re.S
    )
    return markdown2html(re.sub(r"\$([^$\n]+)\$", lambda found: _equation(found[1]), text))


def _equation(tex: str) -> str:
    """Return an equation as an <img>, its baseline on that of the text."""
    from matplotlib import mathtext, rc_context
    from PIL import Image

    for known, other in MATHTEXT.items():
        tex = re.sub(known, other, tex)
    drawn = io.BytesIO()
    with rc_context({"mathtext.fontset": "cm", "savefig.transparent": True, "font.size": 12}):
        depth = mathtext.math_to_image(f"${tex}$", drawn, dpi=192, format="png")  # in points
    width = Image.open(drawn).width // 2  # of 96 to an inch
    style = f"vertical-align: {-depth * 4 / 3:.1f}px"
    return (
        f'<img alt="{html.escape(tex)}" width="{width}" style="{style}" src="{_embedded(drawn.getvalue())}">'
    )
