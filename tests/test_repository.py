"""The repository agrees with itself: rooms, what stages depend on, graphs, notebooks."""

import ast
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from smoke import ROOT, SMOKE, current_studies, write_study

from equilab import dvc, graph, study
from equilab.cluster.tasks import tasks_of
from equilab.core import code

STUDIES = [ROOT / "params.yaml", *sorted(ROOT.glob("studies/*/params.yaml"))]
HEAVY = {
    "torchdeq": ["equilab.solvers.library"],
    "torch_fidelity": ["equilab.metrics.fidelity"],
    "torchvision": ["equilab.data.images", "equilab.models.feature_networks"],  # a dataset; networks
    "timm": ["equilab.models.feature_networks"],
    "diffusers": ["equilab.data.latents"],
    "datasets": ["equilab.data.hub"],
    "huggingface_hub": ["equilab.sampling.hub"],
}
# a room imports from those on its line and below it
ROOMS = [
    ["__main__"],
    [
        "card",
        "check",
        "compare",
        "doctor",
        "cluster",
        "dvc",
        "planning",
        "score",
        "study",
        "launching",
        "watching",
        "curve",
        "trying",
    ],
    ["stages", "bench"],
    ["tables", "claims", "style", "graph"],
    ["published"],
    ["sampling"],
    ["training"],
    ["metrics"],
    ["data"],
    ["models"],
    ["diffusion"],
    ["solvers"],
    ["core"],
]


def modules():
    """Return every module of the package by its name."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("equilab/**/*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imported(path):
    """Return the names of all that a file imports, anywhere in it: modules, and what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports():
    """Return the modules of the package that each module imports; the front door stands above all rooms."""
    known = modules()
    found = {name: (imported(path) & known.keys()) - {"equilab"} for name, path in known.items()}
    del found["equilab"]
    return found


def line(module):
    """Return on which line of the rooms a module is."""
    room = module.split(".")[1]
    return next(k for k, rooms in enumerate(ROOMS) if room in rooms)


@pytest.mark.parametrize(("library", "places"), HEAVY.items())
def test_a_heavy_library_enters_where_it_is_listed(library, places):
    users = [
        name for name, path in modules().items() if library in {each.split(".")[0] for each in imported(path)}
    ]
    assert sorted(users) == places


def test_no_import_climbs():
    climbing = [f"{a} imports {b}" for a, others in imports().items() for b in others if line(b) < line(a)]
    assert not climbing


def test_no_import_goes_round_in_a_circle():
    left = imports()
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {', '.join(sorted(left))}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("params", STUDIES, ids=lambda params: params.parent.name)
def test_a_study_has_the_graph_of_its_params(params):
    told = f"{params.parent}/dvc.yaml is stale: run `python -m equilab graph`"
    assert (params.parent / "dvc.yaml").read_text() == dvc.text(study.read(params)), told
    assert (params.parent / ".dvc/config").read_text() == (ROOT / ".dvc/config").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", graph.STAGES)
def test_a_stage_depends_on_the_modules_that_it_really_imports(stage):
    script = f"import sys, {graph.STAGES[stage].module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    own = {name for name in loaded if name.split(".")[0] == "equilab"}
    assert own - code.closure([graph.STAGES[stage].module]) <= {"equilab", "equilab.models.registry"}


def test_code_that_means_the_same_is_the_same():
    """Docstrings, comments, layout and quotes do not change what code means; a number, a name or an operator does."""
    text = "def area(r):\n    return 3.14 * r**2\n"
    same = '"""Circles."""\n# as in school\ndef area(r):\n    """Return the area."""\n    return (3.14\n * r ** 2)\n'
    assert code.meaning(text) == code.meaning(same)
    for other in (text.replace("3.14", "3.15"), text.replace("**", "*"), text.replace("area", "size")):
        assert code.meaning(text) != code.meaning(other)
    assert code.meaning('x = "a"') != code.meaning('x = "b"')
    assert code.meaning('f("doc")') != code.meaning("f()")


LISTING = """
import json
from pathlib import Path

from equilab import dvc, study

print(json.dumps(dvc.code_files(study.read(Path("params.yaml")))))
"""


def listings(root):
    """Return what smoke's jobs run, by the code of the package in `root`."""
    folder = write_study(root / "study", {"study.root": str(root)})
    done = subprocess.run(
        [sys.executable, "-c", LISTING],
        cwd=folder,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return {path.removeprefix(f"{study.CODE}/"): text for path, text in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package and its notebooks."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("equilab", "notebooks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def before(copy):
    """What smoke's jobs run by the package as it is."""
    return listings(copy)


@pytest.mark.parametrize(
    ("file", "line", "changed"),
    [
        ("equilab/training/loop.py", "# a comment\n", set()),
        ("equilab/models/get.py", "NUMBER = 1\n", {"families/get.txt"}),
        ("equilab/models/registry.py", "NUMBER = 1\n", set()),
        ("equilab/__init__.py", "def more():\n    from equilab import bench\n", set()),
        ("equilab/stages/relative.py", "NUMBER = 1\n", {"relative.txt"}),
        ("equilab/claims/get.yaml", "# 1\n", {"claims.txt", "report.txt"}),
    ],
)
def test_a_change_of_code_changes_the_jobs_that_run_it(copy, before, file, line, changed):
    """Beside these, notebooks: which of them import what is theirs to say."""
    path = copy / file
    text = path.read_text()
    try:
        path.write_text(text + line)
        after = listings(copy)
    finally:
        path.write_text(text)
    assert after.keys() == before.keys()
    found = {name for name in before if after[name] != before[name]}
    assert {name for name in found if not name.startswith("notebook/")} == changed


def test_a_notebook_depends_on_what_its_cells_import(tmp_path):
    imported = code.of_script(
        "from equilab.models import unet\nimport equilab\nequilab.results('results').runs"
    )
    assert {"equilab.models.unet", "equilab.tables"} <= imported
    assert not code.of_script("import pandas as pd\nresults = pd.read_csv('results.csv')")


def jobs(sections):
    """Return every job of a study as DVC has it, `${item}` resolved, with its params."""
    made = dvc.code_files(sections)
    found = {}
    for name, entry in dvc.graph(sections)["stages"].items():
        for key, item in entry.get("foreach", {"": {}}).items():
            text = yaml.safe_dump(entry.get("do", entry)).replace("${key}", key)
            for word, value in item.items():
                text = text.replace(f"${{item.{word}}}", str(value))
            job = yaml.safe_load(text)
            params = {path: made[path] for path in job["deps"] if path.startswith(f"{study.CODE}/params/")}
            found[f"{name}@{key}" if key else name] = (job, params)
    return found


def changed(folder, changes):
    """Return which jobs of smoke differ, or are there in one alone, when some of its params change."""
    before = jobs(study.read(write_study(folder) / "params.yaml"))
    after = jobs(study.read(write_study(folder, changes) / "params.yaml"))
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_what_does_not_read_a_run_does_not_wait_for_it():
    found = jobs(study.read(SMOKE))
    get, fpdm = "results/distill/get", "results/evaluate/fpdm"
    reads = {name: job["deps"] for name, (job, _) in found.items()}
    assert get in reads["notebook-scaling"] and fpdm not in reads["notebook-scaling"]
    assert fpdm in reads["notebook-reuse_smoothing"] and get not in reads["notebook-reuse_smoothing"]
    for name in ("activation", "cost"):
        listed = {f"results/{of}" for of in study.read(SMOKE).values[name]["runs"]}
        assert listed == {path for path in reads[name] if not path.startswith("results/code/")}
    assert "results/claims/get.csv" in reads["notebook-scaling"]


def test_a_seed_more_is_a_replicate_more_and_nothing_else(tmp_path):
    found = changed(tmp_path, {"distill.get.seeds": [0, 1, 2]})
    assert found == {"distill@get-2", "evaluate@get-2"}


def test_a_run_that_changes_is_the_only_one_that_does(tmp_path):
    found = changed(tmp_path, {"distill.get-noise.equilibrium.iterations": 1})
    assert found == {"distill@get-noise-0"}


def test_a_setting_that_changes_concerns_all_seeds_of_its_run(tmp_path):
    found = changed(tmp_path, {"evaluate.get.batch": 25})
    assert found == {"evaluate@get-0", "evaluate@get-1"}


def test_a_study_without_a_stage_depends_on_none_of_its_results(tmp_path):
    absent = ["features", "gan", "consistency", "progressive", "relative", "activation"]
    runs = ("gdd", "gdd-i-2", "cd", "pd-2", "pd-1")
    changes = dict.fromkeys([*absent, *(f"evaluate.{run}" for run in runs)], ...)
    changes["cost.runs"] = ["teacher", "distill/get"]
    found = jobs(study.read(write_study(tmp_path, changes) / "params.yaml"))
    for name in absent:
        assert not any(each.partition("@")[0] == name for each in found)
        assert not any(f"results/{name}" in str(job) for job, _ in found.values())


def test_what_is_listed_to_run_at_once_needs_only_what_is_listed_before():
    sections = study.read(SMOKE)
    found = {name: job for name, (job, _) in jobs(sections).items()}
    before = ["results/code"]
    for names in dvc.waves(sections):
        made = []
        for name in names:
            outputs = [
                path
                for kind in ("outs", "plots", "metrics")
                for each in found[name].get(kind, [])
                for path in each
            ]
            needs = [path for path in found[name]["deps"] if path.startswith("results/")]
            known = before if len(names) > len({each.partition("@")[0] for each in names}) else before + made
            for path in needs:  # a file, or a folder of files
                assert any(f"{path}/".startswith(f"{one}/") or one.startswith(f"{path}/") for one in known), (
                    name,
                    path,
                )
            made += outputs
        before += made


@pytest.mark.parametrize("params", STUDIES, ids=lambda params: params.parent.name)
def test_every_study_has_an_order_in_which_its_runs_are_made(params):
    sections = study.read(params)
    assert dvc.waves(sections) and tasks_of(sections)


EXECUTED = [path for study in current_studies() for path in sorted(study.glob("results/notebook/*/*.ipynb"))]


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: "/".join(path.parts[-5:-1]))
def test_an_executed_notebook_is_the_notebook_as_it_is(path):
    assert cells(path) == cells(ROOT / "notebooks" / path.name), f"{path} is stale: run `dvc repro`"


def cells(notebook):
    """Return the sources of a notebook's cells, but for the parameters that a run puts in."""
    found = json.loads(notebook.read_text())["cells"]
    tags = [cell["metadata"].get("tags", []) for cell in found]
    return ["".join(cell["source"]) for cell, each in zip(found, tags) if "injected-parameters" not in each]


def test_importing_the_package_loads_no_heavy_library():
    script = "import sys; import equilab; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "scipy", "matplotlib"} & set(done.stdout.split())


def test_shapes_are_checked_while_the_tests_run():
    import jaxtyping
    import torch

    from equilab.diffusion import losses

    with pytest.raises(jaxtyping.TypeCheckError):
        losses.l1(torch.zeros(2, 3), torch.zeros(2, 3))
