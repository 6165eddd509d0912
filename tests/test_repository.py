"""The repository agrees with itself: graph, imports, notebooks."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_importing_the_package_loads_no_heavy_library():
    script = "import sys; import equilab; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "pandas", "scipy", "matplotlib"} & set(loaded)


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
