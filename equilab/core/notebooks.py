"""Notebooks as files: their code, and what their cell `parameters` says."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equilab.core.config import UserError


def read_notebook(path: Path) -> dict[str, Any]:
    """Return a notebook as it is on the disk.

    Raises: UserError if it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        complete = all({"cell_type", "source", "metadata"} <= cell.keys() for cell in found["cells"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is missing or no notebook ({error!r}); restore it") from None
    if not complete:
        raise UserError(f"{path} is no notebook (a cell lacks its type, source or metadata); restore it")
    return found


def code_of(notebook: Mapping[str, Any]) -> str:
    """Return the code of all cells."""
    return "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def parameters(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names that a notebook's `parameters` cell assigns, with their values there.

    Raises: UserError unless exactly one code cell has the tag.
    """
    tagged = [
        c
        for c in notebook["cells"]
        if c["cell_type"] == "code" and "parameters" in c["metadata"].get("tags", [])
    ]
    if len(tagged) != 1:
        raise UserError(f"a notebook needs one code cell with the tag `parameters`, found {len(tagged)}")
    assigned = [node for node in ast.parse("".join(tagged[0]["source"])).body if isinstance(node, ast.Assign)]
    return {target.id: ast.literal_eval(node.value) for node in assigned for target in node.targets}
