"""The graph of stages, once: what each reads and writes; `dvc.yaml` is written from it, with the modules it depends on."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from equilab.core import config

PACKAGE = Path(__file__).parent
HEADER = """# Written by `python -m equilab graph` from the sections of params.yaml. A stage depends on the modules that it imports,
# on its section of params.yaml and on the results that it reads. `study.root` leads to the repository. The stage `code`
# turns the modules of each stage into one file and params.yaml into JSON, on which the stages depend: DVC reads a list of
# modules, and YAML, anew for every run, for seconds. What a stage wrote stays until it writes anew (persist).
"""


@dataclass(frozen=True)
class Stage:
    """A stage: its module, what it reads, what it writes into its results folder.

    `{run}` stands for the run where the section is a dictionary of runs (`each`). Paths are relative to the study.
    `cached` results are kept by DVC, `committed` ones by git.
    """

    module: str
    reads: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()
    each: bool = False
    params: tuple[str, ...] = ()
    optional: bool = False  # a study may do without


TRAINED = {"cached": ("weights.safetensors", "snapshots"), "committed": ("log.csv", "summary.json")}
STAGES = {
    "data": Stage("equilab.data.images", cached=("",)),
    "evaluator": Stage(
        "equilab.training.evaluator",
        reads=("results/data",),
        cached=("weights.safetensors",),
        committed=("log.csv", "summary.json"),
    ),
    "teacher": Stage("equilab.training.teacher", reads=("results/data",), optional=True, **TRAINED),
    "pairs": Stage(
        "equilab.stages.pairs", reads=("results/teacher/weights.safetensors",), cached=("",), optional=True
    ),
    "latents": Stage(
        "equilab.data.latents", reads=("results/data", "${latents.vae}"), cached=("",), optional=True
    ),
    "distill": Stage(
        "equilab.training.distill", reads=("results/pairs",), each=True, optional=True, **TRAINED
    ),
    "diffusion": Stage(
        "equilab.training.diffusion",
        reads=("results/data", "results/latents"),
        each=True,
        params=("latents",),
        optional=True,
        **TRAINED,
    ),
    "features": Stage(
        "equilab.training.features",
        reads=("results/data",),
        cached=("weights.safetensors",),
        committed=("log.csv", "summary.json"),
        optional=True,
    ),
    "gan": Stage(
        "equilab.training.gan",
        reads=("results/data", "results/teacher/weights.safetensors", "results/features/weights.safetensors"),
        each=True,
        optional=True,
        **TRAINED,
    ),
    "consistency": Stage(
        "equilab.training.consistency",
        reads=("results/data", "results/teacher/weights.safetensors"),
        each=True,
        optional=True,
        **TRAINED,
    ),
    "evaluate": Stage(
        "equilab.stages.evaluate",
        reads=("results/data", "results/evaluator", "results/pairs", "results/${item.of}", "${latents.vae}"),
        cached=("samples.npy",),
        committed=("metrics.json", "sweep.csv", "curve.csv", "iterates.npz"),
        each=True,
        params=("latents",),
    ),
    "relative": Stage(
        "equilab.stages.relative",
        reads=("results/data", "results/evaluator", "results/evaluate"),
        committed=("relative.csv",),
        optional=True,
    ),
    "activation": Stage(
        "equilab.stages.activation",
        reads=(
            "results/teacher",
            "results/distill",
            "results/diffusion",
            "results/gan",
            "results/consistency",
        ),
        committed=("activation.csv",),
        optional=True,
    ),
    "cost": Stage(
        "equilab.stages.cost",
        reads=(
            "results/teacher",
            "results/distill",
            "results/diffusion",
            "results/gan",
            "results/consistency",
        ),
        committed=("cost.csv", "cost.json"),
    ),
    "claims": Stage(
        "equilab.stages.claims",
        reads=(
            "${study.root}/equilab/claims.yaml",
            "results/teacher/summary.json",
            "results/pairs/meta.json",
            "results/evaluator/summary.json",
            "results/distill",
            "results/diffusion",
            "results/gan",
            "results/consistency",
            "results/evaluate",
            "results/relative",
            "results/activation",
            "results/cost",
        ),
        committed=("../claims.csv", "../claims.md", "../measured.csv", "../measured.md"),
    ),
    "notebook": Stage(
        "equilab.stages.notebook",
        reads=(
            "${study.root}/notebooks/{run}.ipynb",
            "results/teacher/summary.json",
            "results/evaluator/summary.json",
            "results/distill",
            "results/diffusion",
            "results/gan",
            "results/consistency",
            "results/evaluate",
            "results/relative",
            "results/activation",
            "results/cost",
            "results/claims.csv",
            "results/measured.csv",
        ),
        committed=("",),
        each=True,
    ),
    "report": Stage(
        "equilab.stages.report",
        reads=("results/notebook", "results/claims.md", "results/measured.md"),
        committed=("index.html",),
    ),
}


def closure(module: str) -> list[str]:
    """Return the modules of the package that `module` imports, at any depth and anywhere in it, with the packages that they
    are in, itself included.

    A class named as "equilab.module:Class" in a string is imported as well.
    """
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += [*_imports(_file(name)), *filter(None, [name.rpartition(".")[0]])]
    return sorted(found)


def code(module: str) -> str:
    """Return a digest of the modules that `module` imports, itself included: it changes when their text does."""
    return hashlib.sha256(listed(module).encode()).hexdigest()[:16]


def listed(module: str) -> str:
    """Return a line for each module that `module` imports, itself included: its name and the digest of what it means."""
    return "".join(f"{name} {meaning(_file(name).read_text(encoding='utf-8'))}\n" for name in closure(module))


def meaning(source: str) -> str:
    """Return a digest of what Python code means: equal for code that differs in docstrings, comments or layout alone."""
    return hashlib.sha256(repr(_tree(ast.parse(source))).encode()).hexdigest()


def _tree(node: Any) -> Any:
    """Return a syntax tree as nested tuples without docstrings and places; what is empty is left out, since versions
    of Python differ in that."""
    if isinstance(node, list):
        return [_tree(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        fields["body"] = node.body[ast.get_docstring(node, clean=False) is not None :]
    return type(node).__name__, [
        (name, _tree(value)) for name, value in fields.items() if value not in (None, [])
    ]


def _file(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"^(equilab[.\w]*):\w+$", node.value))
    return {name for name in names if name.split(".")[0] == "equilab" and _file(name).exists()}


def dvc(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of dvc.yaml for a study with these sections: a stage without one is left out."""
    modules = [
        f"${{study.root}}/{path.relative_to(PACKAGE.parent)}" for path in sorted(PACKAGE.rglob("*.py"))
    ]
    kept = lambda path, **options: {path: {**options, "persist": True}}  # noqa: E731
    stages = {
        "code": {
            "cmd": "python -m equilab code",
            "deps": ["params.yaml", *modules],
            "outs": [kept("results/code")],
        }
    }
    absent = [name for name in STAGES if not sections.get(name)]
    there = lambda path: (
        not re.match(rf"(results/|\$\{{)({'|'.join(absent)})(/|\.|$)", path) if absent else True
    )
    for name, stage in STAGES.items():
        if name in absent:
            continue
        run = "${key}" if stage.each else ""
        out = f"results/{name}/{run}".rstrip("/")
        place = lambda file: os.path.normpath(f"{out}/{file}")  # noqa: E731
        section = f"{name}.{run}" if stage.each else name
        entry = {
            "cmd": f"python -m equilab {name} {run}".strip(),
            "deps": [f"results/code/{name}.txt"]
            + [path.replace("{run}", run) for path in stage.reads if there(path)],
            "params": [
                {
                    "results/code/params.json": [
                        "study.device",
                        "study.seed",
                        "study.run_threads" if stage.each else "study.threads",
                        section,
                        *(key for key in stage.params if key not in absent),
                    ]
                }
            ],
        }
        if stage.cached:
            entry["outs"] = [kept(place(file)) for file in stage.cached]
        if stage.committed:
            files = [place(file) for file in stage.committed]
            entry["plots"] = [kept(file, cache=False) for file in files if not file.endswith(".json")]
            entry["metrics"] = [kept(file, cache=False) for file in files if file.endswith(".json")]
            entry = {key: value for key, value in entry.items() if value}
        stages[name] = {"foreach": f"${{{name}}}", "do": entry} if stage.each else entry
    return {"stages": stages}


def write(root: Path) -> list[Path]:
    """Write dvc.yaml beside the params.yaml of the repository's root and of every study; return the paths.

    Every study is a repository of DVC's own, which at each start reads all graphs of a repository, for seconds.
    """
    from equilab.core import files

    studies = [root / "params.yaml", *sorted(root.glob("studies/*/params.yaml"))]
    for params in studies:
        for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
            files.write(params.parent / name, (root / name).read_text())
        text = HEADER + yaml.safe_dump(dvc(config.read(params)), sort_keys=False, width=120)
        params.with_name("dvc.yaml").write_text(text)
    return [params.with_name("dvc.yaml") for params in studies]
