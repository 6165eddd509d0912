"""A setting of `evaluate` as tables have it, whether params give it or a sampler was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting_columns(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return a setting of `evaluate`, as params give it, by its columns in the table `settings`, its method first."""
    columns = dict(setting)
    if "iterations" in columns:  # the table's `iterations` are those that were made
        columns["most_iterations"] = columns.pop("iterations")
    guidance, fixed_point = (columns.pop(key, None) or {} for key in ("guidance", "fixed_point"))
    columns |= {f"guidance_{key}": value for key, value in guidance.items()}
    columns |= {"solver" if key == "method" else key: value for key, value in fixed_point.items()}
    if isinstance(columns.get("budget"), (list, tuple)):  # the iterations of each step
        columns["budget"] = " ".join(map(str, columns["budget"]))
    return columns
