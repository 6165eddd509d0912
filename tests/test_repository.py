"""The repository agrees with itself: lock file, README, environment, graph, layers, sizes."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from equilab import graph

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in (ROOT / "equilab").rglob("*.py")
)

HEAVY = {
    "torchdeq": ["equilab.solvers.library"],
    "torch_fidelity": ["equilab.metrics.fidelity"],
    "torchvision": ["equilab.data.images", "equilab.models.discriminators"],  # a dataset; networks
    "timm": ["equilab.models.discriminators"],
    "diffusers": ["equilab.data.latents"],
}


def imported(module):
    """Return the top-level names of everything that a module imports, at any place in it."""
    tree = ast.parse(graph._file(module).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize(("library", "places"), HEAVY.items())
def test_a_heavy_library_enters_where_it_is_listed(library, places):
    users = [m for m in MODULES if any((name or "").split(".")[0] == library for name in imported(m))]
    assert users == places


def test_every_study_has_the_graph_that_the_table_describes(tmp_path):
    (tmp_path / "studies").mkdir()
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    for params in ROOT.glob("studies/*/params.yaml"):
        (tmp_path / "studies" / params.parent.name).mkdir()
        shutil.copy(params, tmp_path / "studies" / params.parent.name)
    for written in graph.write(tmp_path):
        committed = ROOT / written.relative_to(tmp_path)
        assert committed.read_text() == written.read_text(), (
            f"{committed} is stale: run `python -m equilab graph`"
        )
        assert (committed.parent / ".dvc/config").read_text() == (ROOT / ".dvc/config").read_text()


def test_a_stage_depends_on_the_modules_that_it_really_imports():
    """What a stage has loaded after its import is in its closure."""
    modules = [stage.module for stage in graph.STAGES.values()]
    script = f"""if True:
        import importlib, os, sys
        import diffusers, IPython.display, scipy.stats, seaborn, sklearn, timm, torch, torch_fidelity, torchdeq.solver, torchvision  # once
        for module in {modules}:
            if (child := os.fork()) == 0:
                importlib.import_module(module)
                print(*[m for m in sys.modules if m.split(".")[0] == "equilab"], flush=True)
                os._exit(0)
            os.waitpid(child, 0)"""
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(told) == len(modules)
    for (name, stage), found in zip(graph.STAGES.items(), map(str.split, told)):
        missing = set(found) - set(graph.closure(stage.module))
        assert not missing, f"{name} loads {missing}, which its closure lacks"


def test_the_lock_file_pins_what_the_project_asks_for_and_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^    "([\w-]+)', project, re.M) + re.findall(
        r'"([\w-]+)"', re.search(r"dev = \[(.*)\]", project)[1]
    )
    assert len(wanted) > 20
    for name in wanted:
        assert re.search(rf"^{name}==", lock, re.M | re.I), (
            f"{name} is not in requirements.lock: run `make lock`"
        )
    assert "http" not in lock.replace("httpx", "").replace("httpcore", "").replace("dvc-http", "").replace(
        "aiohttp", ""
    )
    installed = {line.split("==")[0]: line for line in re.findall(r"^[\w.-]+==[\w.+]+", lock, re.M)}
    assert len(installed) > 200 and lock.count("--hash=sha256:") > 1000


def test_the_lock_file_keeps_the_bounds_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(r'^    "([^"]+)",', project, re.M) + re.findall(
        r'"([^"]+)"', re.search(r"dev = \[(.*)\]", project)[1]
    )
    locked = dict(re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "requirements.lock").read_text(), re.M))
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    for wanted in map(Requirement, asked):
        version = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version, prereleases=True), (
            f"{wanted} is locked at {version}: run `make lock`"
        )


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("**/results/notebook/*/*.ipynb")), ids=lambda path: "/".join(path.parts[-5:-1])
)
def test_an_executed_notebook_is_the_notebook_as_it_is(path):
    cells = lambda file: [  # noqa: E731
        "".join(cell["source"])
        for cell in json.loads(file.read_text())["cells"]
        if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    assert cells(path) == cells(ROOT / "notebooks" / path.name), f"{path} is stale: run `dvc repro`"


def test_the_conda_environment_installs_the_lock_file():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert pip == ["--require-hashes -r requirements.lock"]
    supported = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"python {supported}" in content["dependencies"]


def test_the_commands_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"\bmake ([a-z]+)", readme):
        assert target in targets, f"README names `make {target}`, the Makefile does not"
    assert {"study", "test", "bench", "lab"} <= set(re.findall(r"\bmake ([a-z]+)", readme))
    for command in re.findall(r"python -m equilab ([a-z]+)", readme):
        assert command in [*graph.STAGES, "check", "graph"]
    for path in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / path).exists(), f"README links to {path}, which is not there"
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_importing_the_package_costs_nothing():
    script = "import sys, time; t = time.perf_counter(); import equilab; print(time.perf_counter() - t, 'torch' in sys.modules)"
    seconds, torch_loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    ).stdout.split()
    assert torch_loaded == "False" and float(seconds) < 0.2


def test_shapes_are_checked_while_the_tests_run():
    import jaxtyping
    import torch

    from equilab.diffusion import losses

    with pytest.raises(jaxtyping.TypeCheckError):
        losses.l1(torch.zeros(2, 3), torch.zeros(2, 3))


def test_code_that_means_the_same_is_the_same():
    """Docstrings, comments, layout and quotes do not change a stage's code; a number, a name or an operator does."""
    code = "def area(r):\n    return 3.14 * r**2\n"
    same = '"""Circles."""\n# as in school\ndef area(r):\n    """Return the area."""\n    return (3.14\n * r ** 2)\n'
    assert graph.meaning(code) == graph.meaning(same)
    for other in (
        "def area(r):\n    return 3.15 * r**2\n",
        "def area(r):\n    return 3.14 * r * 2\n",
        "def size(r):\n    return 3.14 * r**2\n",
    ):
        assert graph.meaning(code) != graph.meaning(other)
    assert graph.meaning('x = "a"') != graph.meaning('x = "b"') and graph.meaning(
        'f("doc")'
    ) != graph.meaning("f()")
