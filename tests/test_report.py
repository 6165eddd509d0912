"""The report: it opens with what was found, needs no network, leads nowhere that is not there, and has a page for each run."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from made import table, write_study
from PIL import Image

from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.stages import claims, report

ROOT = Path(__file__).parent.parent
RUNS = {
    "teacher": {"fd": [1.0]},
    "distill/get": {"fd": [2.0, 2.2, 2.4], "curve": [{"nimg": 500, "times": 3.0}]},
    "distill/vit": {"fd": [3.0, 3.3, 3.6]},
}
COMPARISONS = {"get against vit, parameters": {"runs": ["distill/get"], "baseline": ["distill/vit"]}}


def job(stage, read=print):
    study = Study(name="made", root=str(ROOT), seed=0, threads=1, run_threads=1, device="cpu")
    return Job(study, stage, None, None, (1, 8, 8), 10, "", read, lambda stage, run: (0, 1, 2))


def picture(grey):
    drawn = io.BytesIO()
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(drawn, "png")
    return drawn.getvalue()


def cell(source, *outputs, kind="code", tags=()):
    return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}, "outputs": list(outputs)}


def shown(**data):
    return {
        "output_type": "display_data",
        "data": {key.replace("_", "/"): each for key, each in data.items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a study with its claims, its costs and one executed notebook, and with a page of a run that it had before."""
    study = tmp_path_factory.mktemp("study")
    results = write_study(
        study,
        RUNS,
        comparisons=COMPARISONS,
        notebook={"one": {"parameters": {}}},
        claims={"confidence": 0.95},
    )
    cost = {
        "of": "distill/get",
        "seed": 0,
        "family": "get",
        "what": "train",
        "as_trained": True,
        "gradient": "o1",
    }
    cost |= {"iterations": None, "batch": 8, "seconds": 1.5, "seconds_min": 1.0, "seconds_max": 2.0}
    table(results / "cost/cost.csv", [{**cost, "memory_mib": 12.0}])
    (results / "report").mkdir()
    (results / "report/run-distill-gone.html").write_text("old")
    at = results / "notebook/one"
    at.mkdir(parents=True)
    (at / "drawn.png").write_bytes(picture(0))
    encoded = [base64.b64encode(picture(grey)).decode() for grey in (0, 200)]
    cells = [
        cell("# One\nwith $x^2$", kind="markdown"),
        cell("draw()", shown(image_png=encoded[0])),
        cell("caption()", shown(text_markdown="What **drawn** shows."), tags=["caption"]),
        cell("show()", shown(image_png=encoded[1]), {"output_type": "stream", "text": ["a <b>\n"]}),
    ]
    (at / "one.ipynb").write_text(json.dumps({"cells": cells}))
    return study


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def pages(folder):
    """The pages of the report by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        claims.run(claims.Config(confidence=0.95), job("claims"))
        report.run(report.Config(title="A & B", figures=("one/drawn",)), job("report"))
    return {path.name: path.read_text() for path in (folder / "results/report").iterdir()}


def test_there_is_a_page_for_each_run_and_each_notebook_and_none_of_before(pages):
    runs = {"run-teacher.html", "run-distill-get.html", "run-distill-vit.html"}
    assert pages.keys() == {"index.html", "notebook-one.html", *runs}


def offline(page):
    return not re.search(r"(src|href)=\"https?:|<script|<link|@import|url\(", page)


def broken(path):
    """Return where the links of a page lead that is not there."""
    targets = re.findall(r'(?:src|href)="(?!data:|#)([^"#]+)', path.read_text())
    return [target for target in targets if not (path.parent / target).exists()]


def test_it_needs_no_network_and_its_links_lead_within_the_results(pages):
    for name, page in pages.items():
        assert offline(page) and 'name="viewport"' in page and "@media print" in page
        assert not broken(Path("results/report", name))
        assert not re.search(r'(src|href)="(\.\./\.\./|/)', page), "results is copied as a whole"


def test_the_first_page_opens_with_the_claims_and_the_figures_that_params_name(pages):
    page = pages["index.html"]
    found, figure, runs = (
        page.index(word) for word in ("GET-1", "../notebook/one/drawn.png", "run-distill-get.html")
    )
    assert found < figure < runs
    assert "What <strong>drawn</strong> shows." in page[figure:runs]
    assert "A &amp; B" in page


def test_a_study_with_a_scoreboard_opens_with_it(pages, monkeypatch):
    (Path("results/scoreboard.md")).write_text("# Scoreboard\n\nall studies\n\n## Effects\n\n- an effect\n")
    try:
        report.run(report.Config(title="t", figures=("one/drawn",)), job("report"))
    finally:
        Path("results/scoreboard.md").unlink()
    page = Path("results/report/index.html").read_text()
    assert page.index("all studies") < page.index("drawn.png") < page.index("an effect")
    assert "GET-1" not in page


def test_a_notebook_shows_prose_equations_figures_and_captions_with_its_code_folded(pages):
    page = pages["notebook-one.html"]
    assert 'src="../notebook/one/drawn.png"' in page, "a figure is linked, not copied"
    assert "What <strong>drawn</strong> shows." in page and "a &lt;b&gt;" in page
    assert 'alt="x^2"' in page and "$x^2$" not in page
    assert page.count("<details>") == 2, "captions have no code to show"


def test_a_runs_page_says_how_it_was_made_what_it_makes_how_good_it_is_and_what_it_costs(pages):
    page = pages["run-distill-get.html"]
    assert page.count('class="curve"') == 2 and page.count('class="samples"') == 3
    mean, half = np.log([2.0, 2.2, 2.4]).mean(), 4.302653 * np.log([2.0, 2.2, 2.4]).std(ddof=1) / 3**0.5
    low, high = np.exp(mean - half), np.exp(mean + half)
    assert f"{low:.3g} to {high:.3g}" in page and f"{np.exp(mean):.4g}" in page
    for words in ("lr: 0.1", "pairs: 100", "torch", "0f", "o1", "git log -1 results/distill/get"):
        assert words in page, words
    assert pages["run-teacher.html"].count('class="curve"') == 1, "no snapshots, no curve of distances"
    assert "give no interval" in pages["run-teacher.html"] and "give no interval" not in page


def test_the_same_results_give_the_same_bytes(pages):
    report.run(report.Config(title="A & B", figures=("one/drawn",)), job("report"))
    assert {path.name: path.read_text() for path in Path("results/report").iterdir()} == pages


def test_a_figure_that_is_not_there_is_named(pages):
    with pytest.raises(UserError, match=r"report\.figures: .*one/missing; it has one/drawn"):
        report.run(report.Config(title="t", figures=("one/missing",)), job("report"))


def test_a_figure_of_a_notebook_that_the_study_does_not_have_is_refused_before_anything_runs():
    def read(stage, run):
        raise UserError(f"{stage}: no run {run!r}; did you mean 'one'?")

    with pytest.raises(UserError, match=r"report\.figures: two/drawn: .*'two'; did you mean 'one'"):
        report.plan(report.Config(title="t", figures=("two/drawn",)), job("report", read))


def test_a_notebook_that_was_not_executed_is_named(pages):
    book = Path("results/notebook/one/one.ipynb")
    text = book.read_text()
    try:
        book.write_text(text[:50])
        with pytest.raises(UserError, match="one.ipynb is missing or damaged"):
            report.run(report.Config(title="t"), job("report"))
    finally:
        book.write_text(text)


def test_the_committed_report_is_whole():
    folder = ROOT / "results/report"
    pages = {path: path.read_text() for path in folder.glob("*.html")}
    assert all(offline(page) for page in pages.values()) and not [
        each for path in pages for each in broken(path)
    ]
    shown = {name for page in pages.values() for name in re.findall(r'src="\.\./notebook/([^"]+)"', page)}
    assert shown == {
        path.relative_to(ROOT / "results/notebook").as_posix()
        for path in ROOT.glob("results/notebook/*/*.png")
    }
