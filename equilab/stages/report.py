"""Stage `report`: the executed notebooks and the claims as one page that needs no network."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

from equilab.core.config import Params, UserError
from equilab.core.files import write
from equilab.core.job import Job, Plan

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
nav, pre, th { background: #f5f6f8; } nav { padding: .8rem 1.2rem; } nav ul { margin: .2rem 0; padding-left: 1.2rem; }
h1 { margin-top: 3.5rem; border-bottom: 2px solid #0173b2; } h2 { margin-top: 2.2rem; } a { color: #0173b2; }
img { max-width: 100%; height: auto; } pre { padding: .7rem; overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }
details { margin: .4rem 0; } summary { color: #888; font-size: 12px; cursor: pointer; }
"""


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
    except Exception:  # nbformat raises whatever a damaged file leads it to
        raise _damaged(path) from None
    for cell in cells:
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source))
        elif cell.cell_type == "code":
            parts.append(f"<details><summary>code</summary><pre>{html.escape(cell.source)}</pre></details>")
            parts += [_output(output) for output in cell.outputs]
    return "\n".join(parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is missing or damaged; run the stage that writes it again")


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
    from nbconvert.filters import markdown2html

    return markdown2html(text)
