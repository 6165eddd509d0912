"""Notebooks: sources keep the rules, executions have the same bytes, a failing one loses nothing, the book is offline."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from test_analysis import VITS, get, write_study

from equilab import graph
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.stages import notebook, report

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
RULE = {"confidence": 0.95, "margin_distance": 0.15, "margin_l1": 0.05, "equal_budget": 0.05, "ranked": 300.0}


def job(stage, run=None, root=ROOT):
    study = Study(name="made by hand", root=str(root), seed=0, threads=1, run_threads=1, device="cpu")
    return Job(study, stage, run, (1, 8, 8), 10, "", print)


def code(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Stand in the folder of a study whose results are made by hand, claims included."""
    from equilab.analysis.scaling import Rule
    from equilab.stages import claims

    monkeypatch.chdir(tmp_path)
    write_study(
        tmp_path / "results",
        [*VITS, get(2.0), get(3.0, 4000), {**get(2.5), "name": "published", "normalise": False}],
    )
    claims.run(claims.Config(Rule(**RULE), larger=5.0, keeps=0.7, iterations=(2, 6)), job("claims"))
    return tmp_path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_short_stripped_and_thin(path):
    source, cells = nbformat.read(path, 4), code(path)
    nbformat.validate(source)
    assert len(cells) <= 12 and sum(len(cell.source.splitlines()) for cell in cells) <= 80
    assert source.metadata.kernelspec.name == "python3" and set(source.metadata) == {
        "kernelspec",
        "language_info",
    }
    assert [cell.id for cell in source.cells] == [f"cell-{k:03d}" for k in range(len(source.cells))]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), (
        "run `jupyter nbconvert --clear-output`"
    )
    logic = (
        ast.FunctionDef,
        ast.ClassDef,
        ast.Lambda,
        ast.If,
        ast.IfExp,
        ast.For,
        ast.While,
        ast.With,
        ast.Try,
    )
    for cell in cells:
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, logic)], cell.source
    assert source.cells[0].cell_type == "markdown" and "explore." in cells[-1].source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_opens_the_committed_results_and_its_parameters_are_those_of_every_study(path):
    defaults = {
        t.id: ast.literal_eval(node.value)
        for node in ast.parse(code(path)[0].source).body
        for t in node.targets
    }
    assert defaults == notebook.parameters(nbformat.read(path, 4))
    assert (ROOT / "notebooks" / defaults.pop("results")).resolve() == ROOT / "results"
    assert ".equilab" in defaults.pop("out")
    for params in (ROOT / "params.yaml", *ROOT.glob("studies/*/params.yaml")):
        sections = yaml.safe_load(params.read_text())
        given = sections["notebook"].get(path.stem)
        needs = {"reuse_smoothing": "diffusion", "one_step": "gan", "layer_activation": "activation"}.get(
            path.stem, "distill"
        )
        needed = sections.get(needs)
        if path.stem == "sampling_speed":  # where a generator is run in several ways
            needed = needed and any(len(entry["solver"]) > 1 for entry in sections["evaluate"].values())
        assert given["parameters"] == defaults if given else not needed, params


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_stage_depends_on_the_modules_that_a_notebook_imports(path, tmp_path):
    (tmp_path / "cells.py").write_text("\n".join(cell.source for cell in code(path)))
    found = graph._imports(tmp_path / "cells.py")
    assert found and found <= {*graph.closure("equilab.stages.notebook"), "equilab.analysis"}


def executed(name):
    notebook.run(notebook.Config(RULE), job("notebook", name))
    return {path.name: path.read_bytes() for path in sorted(Path(f"results/notebook/{name}").iterdir())}


def test_a_notebook_executes_twice_to_the_same_bytes_and_the_book_of_all_is_offline(study):
    first = executed("scaling")
    assert executed("scaling") == first
    text = first["scaling.ipynb"].decode()
    assert "seconds" not in text.replace("depends on measured seconds", "") and "images_s" not in text
    stems = lambda kind: [name.rpartition(".")[0] for name in first if name.endswith(kind)]  # noqa: E731
    assert len(stems(".png")) == 7 and sorted(first) == sorted(
        [f"{s}{e}" for s in stems(".png") for e in (".png", ".csv")] + ["scaling.ipynb"]
    )
    assert not list(Path(".equilab").rglob("*.failed.ipynb"))
    done = nbformat.reads(text, 4)
    nbformat.validate(done)
    assert done.cells[-1].outputs[0].data["text/markdown"] == notebook.NOTE
    injected = next(cell for cell in done.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert 'out = "results/notebook/scaling"' in injected.source

    report.run(report.Config("a book"), job("report"))
    page = Path("results/report/index.html").read_text()
    assert len(page) < 2_000_000 and page.count("data:image/png;base64,") == 7
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    targets = re.findall(r'href="#(\w+)"', page)
    assert len(targets) == len(set(targets)) >= 8 and all(f'id="{target}"' in page for target in targets)


def book(root, source):
    """Write a notebook of two cells into the repository at `root`."""
    cells = [
        nbformat.v4.new_code_cell('results = out = ""\nscale = 1.0', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / "notebooks/one.ipynb")


def test_a_failing_cell_keeps_what_was_there_and_is_named_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book(tmp_path, 'open(out + "/new.csv", "w").close()\n1 / 0')
    kept = tmp_path / "results/notebook/one/old.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    with pytest.raises(
        UserError,
        match=r"failed in cell 3: ZeroDivisionError: division by zero; it is kept in .*one\.failed\.ipynb",
    ):
        notebook.run(notebook.Config({"scale": 2.0}), job("notebook", "one", "."))
    assert [path.name for path in kept.parent.iterdir()] == ["old.csv"]
    failed = nbformat.read(".equilab/notebook/one.failed.ipynb", 4)
    assert "scale = 2.0" in failed.cells[-2].source or any(
        "scale = 2.0" in cell.source for cell in failed.cells
    )


def test_a_missing_notebook_and_an_unknown_parameter_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book(tmp_path, "pass")
    with pytest.raises(UserError, match="did you mean 'one'"):
        notebook.plan(notebook.Config({}), job("notebook", "ones", "."), print)
    with pytest.raises(
        UserError, match=r"notebook.one.parameters.scael: unknown parameter; did you mean 'scale'"
    ):
        notebook.run(notebook.Config({"scael": 1.0}), job("notebook", "one", "."))
    assert not Path("results").exists()


def test_what_changes_from_run_to_run_is_taken_out():
    output = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell(
        "x",
        execution_count=1,
        metadata={"papermill": {"duration": 1}, "tags": ["t"]},
        outputs=[
            output("stream", name="stderr", text="12%"),
            output("stream", name="stdout", text="<f at 0x7f12ab34cd56>"),
            output("display_data", data={notebook.WIDGET: {"model_id": "a"}, "text/plain": "Box()"}),
            output(
                "execute_result",
                data={"text/plain": "<g at 0x7f12ab34cd56>", "image/png": "0x7f12ab34cd56"},
                execution_count=1,
            ),
        ],
    )
    source = nbformat.v4.new_notebook(
        cells=[cell],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "papermill": {}},
    )
    done = notebook.normalised(source)
    assert set(done.metadata) == {"kernelspec", "language_info"} and done.cells[0].metadata == {"tags": ["t"]}
    assert [o.get("text") for o in done.cells[0].outputs[:1]] == ["<f at 0x>"]
    assert done.cells[0].outputs[1].data == {"text/markdown": notebook.NOTE}
    assert done.cells[0].outputs[2].data == {"text/plain": "<g at 0x>", "image/png": "0x7f12ab34cd56"}
