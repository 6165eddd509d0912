"""Stage `report`: the executed notebooks and the claims as one page that needs no network."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from pathlib import Path

from equilab.core.config import Params, UserError, unreadable
from equilab.core.files import write
from equilab.core.job import Job, Plan

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
nav, pre, th { background: #f5f6f8; } nav { padding: .8rem 1.2rem; } nav ul { margin: .2rem 0; padding-left: 1.2rem; }
h1 { margin-top: 3.5rem; border-bottom: 2px solid #0173b2; } h2 { margin-top: 2.2rem; } a { color: #0173b2; }
img { max-width: 100%; height: auto; } pre { padding: .7rem; overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }
figcaption { border-left: 3px solid #0173b2; padding: .1rem 1rem; margin: .4rem 0 1rem; } .equation { text-align: center; }
details { margin: .4rem 0; } summary { color: #888; font-size: 12px; cursor: pointer; }
"""


# TeX that matplotlib does not set, and what it does
MATHTEXT = {
    r"\s+": " ",
    r"\\[lr]Vert": r"\\Vert",
    r"\\(math\w+|boldsymbol)\b ?(\\\w+|\w)": r"\\\1{\2}",
    r"\\(tilde|hat|bar) ?(\\\w+\{\w\}|\w)": r"\\\1{\2}",
}


class Config(Params):
    """The params section `report`."""

    title: str


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Return what estimates the stage's cost: nothing to speak of."""
    return Plan


def run(config: Config, job: Job) -> None:
    """Write `index.html`: contents, the executed notebooks, the claims.

    Raises: UserError naming the file, if one of these is missing or damaged.
    """
    chapters = [_notebook(path) for path in sorted(Path("results/notebook").glob("*/*.ipynb"))]
    chapters += [_markdown(_text(Path(f"results/{name}.md"))) for name in ("claims", "measured")]
    body, contents = [], []
    for chapter in chapters:
        chapter, headings = _anchored(chapter, len(contents))
        body.append(f"<section>{chapter}</section>")
        contents += headings
    title = html.escape(config.title)
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    )
    page = f"<h1>{title}</h1><nav><ul>{''.join(contents)}</ul></nav>{''.join(body)}"
    write(job.out / "index.html", f"{head}<body>{page}</body></html>\n")
    print(f"report: {job.out / 'index.html'}")


def _anchored(chapter: str, start: int) -> tuple[str, list[str]]:
    """Return a chapter whose headings have names, and an entry of the contents for each."""
    entries = []

    def name(match: re.Match) -> str:
        level, text, key = (
            match[1],
            re.sub("<.*?>", "", match[2]).replace("¶", ""),
            f"h{start + len(entries)}",
        )
        entries.append(f'<li style="margin-left:{2 * int(level) - 2}em"><a href="#{key}">{text}</a></li>')
        return f'<h{level} id="{key}">{text}</h{level}>'

    return re.sub(r"<h([12])[^>]*>(.*?)</h\1>", name, chapter, flags=re.S), entries


def _notebook(path: Path) -> str:
    """Return a notebook as HTML: prose, pictures and tables, its code folded away."""
    import nbformat  # takes seconds

    parts = []
    try:
        cells = list(nbformat.reads(_text(path), 4).cells)
    except UserError:
        raise
    except Exception as error:  # nbformat raises whatever a damaged file leads it to
        raise unreadable(path, error) from None
    for cell in cells:
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source))
        elif "caption" in cell.metadata.get("tags", []):
            parts += [
                f"<figcaption>{_output(output)}</figcaption>" for output in cell.outputs if _says(output)
            ]
        elif cell.cell_type == "code":
            parts.append(f"<details><summary>code</summary><pre>{html.escape(cell.source)}</pre></details>")
            parts += [_output(output) for output in cell.outputs]
    return "\n".join(parts)


def _says(output: dict) -> bool:
    """Return whether the caption of a figure says something of this study."""
    return bool(output.get("data", {}).get("text/markdown", "").strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def _output(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/markdown" in data:
        return _markdown(data["text/markdown"])
    return (
        data.get("text/html") or f"<pre>{html.escape(data.get('text/plain', output.get('text', '')))}</pre>"
    )


def _markdown(text: str) -> str:
    """Return Markdown as HTML, its equations as pictures: a page without a network has nothing that sets them."""
    from nbconvert.filters import markdown2html

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
    with rc_context({"mathtext.fontset": "cm", "savefig.transparent": True}):
        depth = mathtext.math_to_image(f"${tex}$", drawn, dpi=192, format="png")  # in points
    width = Image.open(drawn).width // 2  # of 96 to an inch
    source = base64.b64encode(drawn.getvalue()).decode()
    style = f"vertical-align: {-depth * 4 / 3:.1f}px"
    return (
        f'<img alt="{html.escape(tex)}" width="{width}" style="{style}" src="data:image/png;base64,{source}">'
    )
