"""What code means: the modules behind a module, and a digest of each that comments, docstrings and layout do not change."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
DATA = ("*.yaml", "*.csv")  # read by the modules that they lie beside
FRONT_DOOR = PACKAGE.name  # its functions import what they need, for those who call them
# what changes in them does not change what a stage computes: functions for others, and which name leads where
IGNORED = (FRONT_DOOR, f"{PACKAGE.name}.models.registry")


def listing(modules: Iterable[str]) -> str:
    """Return a line for each file behind these modules, themselves included: its path and the digest of what it means."""
    files = sorted({file for module in closure(modules) for file in _files(module)})
    return "".join(f"{file.relative_to(PACKAGE.parent).as_posix()} {_digest(file)}\n" for file in files)


def closure(modules: Iterable[str]) -> set[str]:
    """Return these modules, those of the package that they import, at any depth and anywhere in them, and the packages that
    all of them are in."""
    found, waiting = set(), list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _behind(module)
    return found


def of_script(source: str) -> set[str]:
    """Return the modules of the package that a script imports, those behind the functions of the front door that it names
    (`equilab.load`) included."""
    nodes = list(ast.walk(ast.parse(source)))
    named = _names(nodes) | {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    found = _imports(nodes)
    for node in ast.parse(_file(FRONT_DOOR).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and f"{FRONT_DOOR}.{node.name}" in named:
            found |= {FRONT_DOOR, *_imports(ast.walk(node))}
    return found


def meaning(source: str) -> str:
    """Return a digest of what Python code means: equal for code that differs in docstrings, comments or layout alone."""
    return hashlib.sha256(repr(_bare(ast.parse(source))).encode("utf-8")).hexdigest()


def files() -> list[Path]:
    """Return the files of the package that a listing may name."""
    return sorted(file for pattern in ("*.py", *DATA) for file in PACKAGE.rglob(pattern))


def _bare(node: Any) -> Any:
    """Return a syntax tree as nested tuples without docstrings and places; what is empty is left out, since versions
    of Python differ in that."""
    if isinstance(node, list):
        return [_bare(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        fields["body"] = node.body[ast.get_docstring(node, clean=False) is not None :]
    return type(node).__name__, [
        (name, _bare(value)) for name, value in fields.items() if value not in (None, [])
    ]


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names of all that is imported, modules or what is in them."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the modules of the package that are imported."""
    return {name for name in _names(nodes) if name.split(".")[0] == PACKAGE.name and _file(name).exists()}


@functools.cache
def _behind(module: str) -> set[str]:
    """Return the modules that one imports, anywhere in it, but the front door above its functions; and its package."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    nodes = tree.body if module == FRONT_DOOR else ast.walk(tree)
    return {module.rpartition(".")[0], *_imports(nodes)} - {"", *IGNORED}


def _files(module: str) -> list[Path]:
    """Return the file of a module, and of a package the data beside it."""
    file = _file(module)
    if file.name != "__init__.py":
        return [file]
    return [file, *(data for pattern in DATA for data in file.parent.glob(pattern))]


@functools.cache
def _digest(file: Path) -> str:
    if file.suffix == ".py":
        return meaning(file.read_text(encoding="utf-8"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _file(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
