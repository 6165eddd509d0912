"""Notebooks: sources keep the rules, run on any results, with the same bytes each time; a failing one loses nothing."""

import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from made import SOLVER, write_study
from nbclient.output_widget import OutputWidget

from equilab import study as studies
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.stages import claims, notebook

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDIES = [ROOT, *(path.parent for path in sorted(ROOT.glob("studies/*/params.yaml")))]
DRAWS = ("style.save(", "style.images(")
LINES = 15  # of a cell that draws


def job(stage, run=None, root=ROOT):
    study = Study(name="made-by-hand", root=str(root), seed=0, threads=1, run_threads=1, device="cpu")
    return Job(study, stage, run, None, (1, 8, 8), 10, "", print, lambda stage, run: (0,))


def code(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def pictures(folder):
    """Return the figures in a folder, each of which has its numbers beside it."""
    found = {path.stem for path in folder.glob("*.png")}
    assert found == {path.stem for path in folder.glob("*.csv")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_what_running_it_adds(path):
    source = nbformat.read(path, 4)
    nbformat.validate(source)
    assert source.metadata.kernelspec.name == "python3"
    assert set(source.metadata) == {"kernelspec", "language_info"}
    for cell in code(path):
        assert not cell.outputs and cell.execution_count is None, "run `jupyter nbconvert --clear-output`"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_cell_that_draws_can_be_read_at_a_glance(path):
    for cell in code(path):
        if any(word in cell.source for word in DRAWS):
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert len(lines) <= LINES, cell.source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_opens_the_committed_results_and_ends_in_a_widget(path):
    known = notebook.parameters(nbformat.read(path, 4))
    assert (ROOT / "notebooks" / known["results"]).resolve() == ROOT / "results"
    assert "interact(" in code(path)[-1].source


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_gives_its_notebooks_parameters_that_they_have(study, monkeypatch):
    monkeypatch.chdir(study)
    for name, entry in yaml.safe_load(Path("params.yaml").read_text())["notebook"].items():
        notebook.plan(notebook.Config(**entry), job("notebook", name))


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_all_cells_run_on_what_dvc_says_they_read_in_a_fresh_clone_which_has_no_weights(
    path, tmp_path, monkeypatch
):
    sections = studies.read(ROOT / "params.yaml")
    for read in sections.named("notebook", path.stem):
        copy(read.path, tmp_path)
    copy("results/evaluator/summary.json", tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    notebook.run(notebook.Config(parameters={}), job("notebook", path.stem))
    drawn, committed = (folder / "results/notebook" / path.stem for folder in (tmp_path, ROOT))
    assert {*pictures(drawn)} == {*pictures(committed)}


def copy(path, folder):
    """Copy a file or folder of the default study, as git has it, into that of another."""
    small = shutil.ignore_patterns("*.safetensors", "*.npy")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if (ROOT / path).is_dir():
        shutil.copytree(ROOT / path, folder / path, ignore=small)
    else:
        shutil.copy(ROOT / path, folder / path)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Stand in the folder of a study whose results are made by hand, claims included."""
    iterations = [{**SOLVER, "most_iterations": count, "pick": "last"} for count in (6, 1)]
    traces = {name: np.geomspace(1.0, 0.1, 24)[None] * np.ones((4, 1)) for name in ("norm", "residual")}
    traces |= {"direction": np.ones((4, 24)), "images": np.zeros((24, 12, 1, 8, 8), np.uint8)}
    curve = [{"nimg": 500, "times": 3.0}]
    wide = {"width": 48, "depth": 2, "normalise": True}
    get = {"settings": iterations, "curve": curve, "arrays": traces, "l1": 0.125}
    vit = {"curve": curve, "l1": 0.125, "config": {"network": {"width": 64, "depth": 4}}}
    runs = {
        "teacher": {"fd": [1.0]},
        "distill/get": {"fd": [2.0, 2.2, 2.4], **get, "config": {"network": wide}},
        "distill/get-published": {"fd": [2.1], **get, "config": {"network": {**wide, "normalise": False}}},
        "distill/vit": {"fd": [3.0, 3.3, 3.6], **vit},
        "distill/vit-l": {"fd": [2.9], **vit, "parameters": 4000},
    }
    comparisons = {"get against vit, parameters": {"runs": ["distill/get"], "baseline": ["distill/vit"]}}
    write_study(tmp_path, runs, comparisons=comparisons)
    monkeypatch.chdir(tmp_path)
    claims.run(claims.Config(confidence=0.95), job("claims"))
    return tmp_path


def parts(images):
    """Return runs of a study that has little: a ViT, or an FPDM sampled with reuse and without."""
    chain = {"method": "ddim", "steps": 5, "blocks": 20, "budget": "constant", "reuse": True}
    arrays = {"residual": np.full((3, 5, 2), 0.1), "t": np.arange(5), "image": images[0]}
    along = {f"{name}_{k}": array for name, array in arrays.items() for k in (0, 1)}
    return {
        "distill/vit": {"arrays": {"images": images}, "config": {"network": {"width": 64, "depth": 4}}},
        "diffusion/fpdm": {
            "settings": [chain, {**chain, "reuse": False}],
            "arrays": {"images": images, **along},
            "config": {"network": {"pre": 1}},
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("of", ["distill/vit", "diffusion/fpdm"])
@pytest.mark.parametrize("path", SOURCES[1:], ids=lambda path: path.stem)
def test_a_notebook_says_what_a_study_lacks_and_draws_the_rest(path, of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, {of: {"fd": [2.0], **parts(np.zeros((24, 12, 1, 8, 8), np.uint8))[of]}})
    done = nbformat.reads(executed(path.stem)[path.name].decode(), 4)
    told = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert "Not shown: this study has no" in told


def executed(name):
    notebook.run(notebook.Config(parameters={}), job("notebook", name))
    return {path.name: path.read_bytes() for path in sorted(Path(f"results/notebook/{name}").iterdir())}


@pytest.mark.slow
def test_a_notebook_executes_twice_to_the_same_bytes(study):
    first = executed("scaling")
    assert executed("scaling") == first
    drawn = pictures(Path("results/notebook/scaling"))
    assert {"training", "parameters", "iterates", "decoded"} <= drawn
    assert "compute" not in drawn  # no model was trained with several amounts of it
    assert not list(Path(".equilab").rglob("*.failed.ipynb"))
    done = nbformat.reads(first["scaling.ipynb"].decode(), 4)
    nbformat.validate(done)
    assert done.cells[-1].outputs[0].data["text/markdown"] == notebook.NOTE
    injected = next(cell for cell in done.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert 'out = "results/notebook/scaling"' in injected.source


def book(root, source):
    """Write a notebook of two cells into the repository at `root`."""
    cells = [
        nbformat.v4.new_code_cell('results = out = ""\nscale = 1.0', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / "notebooks/one.ipynb")


@pytest.mark.slow
def test_start_up_files_of_the_user_are_not_run(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("mine = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "mine.py"))
    book(tmp_path, "print('mine' in globals())")
    notebook.run(notebook.Config(parameters={}), job("notebook", "one", "."))
    done = nbformat.read("results/notebook/one/one.ipynb", 4)
    assert done.cells[-1].outputs[0].text == "False\n"


@pytest.mark.slow
def test_a_failing_cell_keeps_what_was_there_and_is_named_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book(tmp_path, 'open(out + "/new.csv", "w").close()\n1 / 0')
    kept = tmp_path / "results/notebook/one/old.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    with pytest.raises(UserError, match=r"one\.ipynb .*cell 3: ZeroDivisionError.*one\.failed\.ipynb"):
        notebook.run(notebook.Config(parameters={"scale": 2.0}), job("notebook", "one", "."))
    assert [path.name for path in kept.parent.iterdir()] == ["old.csv"]
    failed = nbformat.read(".equilab/notebook/one.failed.ipynb", 4)
    assert "scale = 2.0" in failed.cells[-2].source or any(
        "scale = 2.0" in cell.source for cell in failed.cells
    )


@pytest.mark.slow
def test_what_a_widget_shows_is_not_sent_back_to_the_kernel(tmp_path, monkeypatch):
    """On the socket that awaits the reply of a cell it would make the reply go unnoticed now and then, and the notebook hang."""
    sent = []
    monkeypatch.setattr(OutputWidget, "send", lambda widget, data: sent.append(data))
    monkeypatch.chdir(tmp_path)
    book(tmp_path, "import ipywidgets\nipywidgets.interact(lambda text: print(text), text='shown');")
    notebook.run(notebook.Config(parameters={}), job("notebook", "one", "."))
    done = nbformat.read("results/notebook/one/one.ipynb", 4)
    assert done.cells[-1].outputs[0].data["text/markdown"] == notebook.NOTE
    assert not sent


def test_a_missing_notebook_and_an_unknown_parameter_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book(tmp_path, "pass")
    with pytest.raises(UserError, match="notebooks/ones.ipynb .*'one'"):
        notebook.plan(notebook.Config(parameters={}), job("notebook", "ones", "."))
    with pytest.raises(UserError, match=r"^notebook\.one\.parameters\.scael: .*'scale'"):
        notebook.run(notebook.Config(parameters={"scael": 1.0}), job("notebook", "one", "."))
    assert not Path("results").exists()


def shows(folder, names):
    """Write a notebook that shows these results."""
    book(folder, "pass")
    path = folder / "notebooks/one.ipynb"
    written = nbformat.read(path, 4)
    written.cells[0].source += f"\nshows = {names!r}"
    nbformat.write(written, path)


def test_results_that_a_notebook_shows_and_no_stage_writes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"study": {"name": "a", "root": ".", "seed": 0, "threads": 1, "run_threads": 1, "device": "cpu"}}
    sections = studies.Sections(values, "params.yaml", tmp_path)
    for names, told in (
        (["distil"], "'distil' .*'distill'"),
        ("distill", ".* list .*'distill'"),
    ):
        shows(tmp_path, names)
        with pytest.raises(UserError, match=f"one.ipynb: shows: {told}"):
            sections.shown("one")
    shows(tmp_path, ["claims/gte"])
    with pytest.raises(UserError, match="'claims/gte'.*'claims/get'"):
        notebook.plan(notebook.Config(parameters={}), job("notebook", "one", "."))
    shows(tmp_path, ["claims/get"])
    notebook.plan(notebook.Config(parameters={}), job("notebook", "one", "."))


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
