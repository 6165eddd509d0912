"""Runs of published weights that a study can do without: where their files are not there, it has neither them nor what names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def absent_runs(sections: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the runs ("distill/get-m", "teacher") whose weights are optional and not in a study's folder, with their files."""
    found = {}
    for stage, section in sections.items():
        if not isinstance(section, dict):
            continue
        entries = {stage: section, **{f"{stage}/{run}": entry for run, entry in section.items()}}
        for name, entry in entries.items():
            said = entry.get("published") if isinstance(entry, dict) else None
            if (
                isinstance(said, dict)
                and said.get("optional")
                and not (folder / str(said.get("path"))).exists()
            ):
                found[name] = str(said.get("path"))
    return found


def without(sections: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the sections of a study without these runs, and without what names them: settings, places in lists, comparisons."""
    if not names:
        return dict(sections)
    kept = {}
    for stage, section in sections.items():
        if stage in names:
            continue
        if not isinstance(section, dict):
            kept[stage] = section
        elif isinstance(section.get("runs"), list):
            if runs := [name for name in section["runs"] if name not in names]:
                kept[stage] = {**section, "runs": runs}
        else:
            kept[stage] = {
                run: entry
                for run, entry in section.items()
                if f"{stage}/{run}" not in names
                and not (stage in NAMING and names.keys() & set(_words(entry)))
            }
    return kept


NAMING = ("evaluate", "comparisons")  # sections of which an entry goes with a run that it names


def _words(value: Any) -> Iterator[str]:
    """Yield all words in nested keys and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _words(each)
