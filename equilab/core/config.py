"""Strict YAML to frozen dataclasses: an unknown, missing or mistyped key is an error that names its path."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml


class UserError(Exception):
    """What a user can mend: one sentence that names the key or the file and the remedy."""


@dataclass(frozen=True)
class Spec:
    """A class by its name in params (`kind`) with the keyword arguments that params give it."""

    kind: str
    target: str
    arguments: Mapping[str, Any]
    path: str = field(default="model", compare=False)  # where params give it

    def build(self, *given):
        """Return the object: what the data determines comes in `given`, the rest from params.

        Raises: UserError with the class's own sentence if the arguments do not fit each other.
        """
        try:
            return _imported(self.target)(*given, **self.arguments)
        except (ValueError, RuntimeError, MemoryError) as error:  # torch refuses some sizes by itself
            raise UserError(f"{self.path} ({self.kind}): {str(error).partition(chr(10))[0]}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (1e-3 is one), and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.tag != "tag:yaml.org,2002:str":
                    raise yaml.YAMLError(f"a key must be a word, line {key.start_mark.line + 1}")
                if key.value in seen:
                    raise yaml.YAMLError(f"key {key.value!r} is given twice, line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read(path: Path) -> dict[str, Any]:
    """Return the sections of a params file.

    Raises: UserError if it is missing, is not YAML or is not a mapping of sections.
    """
    try:
        sections = yaml.load(path.read_text(), _Loader)
        json.dumps(sections, default=str)  # a section that is part of itself is none
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not there; run in the folder of a study, or give --params FILE") from None
    except (yaml.YAMLError, ValueError) as error:  # a month 13 is a ValueError
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict):
        raise UserError(f"{path} must hold sections (study:, data:, ...), not {type(sections).__name__}")
    return sections


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return a JSON file of results that has `keys`.

    Raises: UserError if it is missing, damaged, or lacks one.
    """
    try:
        value = json.loads(path.read_text())
        [value[key] for key in keys]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path} is missing or damaged; run the stage that writes it again") from None
    return value


def parse(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`: a dataclass, a builtin, a Literal, an optional, tuple[X, ...], dict[str, X] or a Spec.

    Raises: UserError naming `path`, what is wrong with it, and the nearest valid name.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _spec(dict(arguments[1]), value, path)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        first = next(a for a in arguments if a is not type(None))
        return parse(str if isinstance(value, str) and str in arguments else first, value, path)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}{nearest(value, arguments)}"
            )
        return value
    if origin is collections.abc.Sequence:
        origin, arguments = tuple, (arguments[0], Ellipsis)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a list, got {value!r}")
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise UserError(f"{path}: expected {len(arguments)} values, got {len(value)}")
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else arguments
        return tuple(parse(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if origin is dict:
        return {k: parse(arguments[1], v, f"{path}.{k}") for k, v in mapping(value, path).items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return _call(kind, {f.name: hints[f.name] for f in dataclasses.fields(kind)}, value, path)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}: expected {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path}: expected a finite number, got {value!r}")
    return value


def _call(make, hints: Mapping[str, Any], value: Any, path: str):
    value = mapping(value, path)
    for key in value:
        if key not in hints:
            raise UserError(f"{path}.{key}: unknown key{nearest(key, hints)}")
    for key in hints:
        if key not in value:
            raise UserError(f"{path}.{key}: missing key{nearest(key, [k for k in value if k not in hints])}")
    arguments = {key: parse(hints[key], value[key], f"{path}.{key}") for key in hints}
    try:
        return make(**arguments)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _spec(targets: Mapping[str, str], value: Any, path: str) -> Spec:
    value = dict(mapping(value, path))
    kind = parse(Literal[tuple(targets)], value.pop("kind", None), f"{path}.kind")
    constructor = _imported(targets[kind]).__init__
    hints = typing.get_type_hints(constructor)
    named = [p.name for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY]
    arguments = _call(dict, {name: hints[name] for name in named}, value, path)
    return Spec(kind, targets[kind], arguments, path)


def _imported(target: str):
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def mapping(value: Any, path: str) -> Mapping[str, Any]:
    """Return `value`, which must be keys with values.

    Raises: UserError naming `path` if it is not.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys with values, got {value!r}")
    return value


def nearest(name: Any, known) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], 1, 0.5)
    return (
        f"; did you mean {near[0]!r}?"
        if near
        else f"; known are {', '.join(map(str, known))}"
        if known
        else ""
    )


def plain(config: Any) -> Any:
    """Return a config as dictionaries, lists and scalars, as JSON can hold it."""
    if isinstance(config, Spec):
        return {"kind": config.kind, **plain(dict(config.arguments))}
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    return config


def digest(*values: Any) -> str:
    """Return 16 hexadecimal digits that change whenever any of the values does."""
    return hashlib.sha256(json.dumps([plain(v) for v in values], sort_keys=True).encode()).hexdigest()[:16]
