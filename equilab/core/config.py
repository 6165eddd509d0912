"""Strict YAML to frozen models: every mistake is a sentence that names the key, what is wrong with it, and the nearest name."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticCustomError


class UserError(Exception):
    """What a user can mend: one sentence that names the key or the file and the remedy."""


class Params(BaseModel):
    """A group of keys in params, checked: none is unknown, missing, mistyped or out of its range; frozen once read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=BaseModel)
Size = Annotated[int, Field(ge=1, le=16_384)]  # of a network: of what it is wide
Depth = Annotated[int, Field(ge=0, le=256)]  # and deep


MOST_NODES, MOST_LEVELS = 1_000_000, 100  # of a params file, aliases followed


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
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
        sections = _load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not there; run in the folder of a study, or give --params FILE") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # a month 13, !!bool x
        raise UserError(f"{path} is not valid YAML: a value does not fit its type ({error})") from None
    if not isinstance(sections, dict):
        raise UserError(f"{path} must hold sections (study:, data:, ...), not {type(sections).__name__}")
    return sections


def _load(text: str) -> Any:
    """Return the content of YAML that is nested no deeper, and does not grow by aliases larger, than any params are."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS:
            raise yaml.YAMLError(f"it is nested too deeply, line {event.start_mark.line + 1}")
    loader = _Loader(text)
    try:
        if (node := loader.get_single_node()) is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes one holds, those behind aliases each time they stand.

    Raises: YAMLError if there are too many, or one holds itself.
    """
    if id(node) not in known:
        known[id(node)] = MOST_NODES  # until it is counted: one that holds itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [each for pair in parts for each in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    if known[id(node)] >= MOST_NODES:
        raise yaml.YAMLError(f"its aliases make it too large, line {node.start_mark.line + 1}")
    return known[id(node)]


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return a JSON file of results that has `keys`.

    Raises: UserError if it is missing, damaged, or lacks one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        [value[key] for key in keys]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path} is missing or damaged; run the stage that writes it again") from None
    return value


def parse(kind: type[Kind], value: Any, path: str) -> Kind:
    """Return `value`, as YAML gives it, as a model of this kind.

    Raises: UserError with a sentence for each mistake, each with the path of its key.
    """
    given = _tuples(mapping(value, path))
    try:
        return kind.model_validate(given, context={"path": path})
    except ValidationError as error:
        raise UserError("\n".join(_sentences(kind, error, path))) from None


def _tuples(value: Any) -> Any:
    """Return a value of YAML with its lists as tuples, which nobody can change."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value


def _sentences(kind: type[BaseModel], error: ValidationError, path: str) -> list[str]:
    """Return what is wrong, a sentence for each mistake."""
    details = error.errors(include_url=False)
    unknown = [each["loc"] for each in details if each["type"] == "extra_forbidden"]
    return [_sentence(kind, each, path, unknown) for each in details]


def _sentence(kind: type[BaseModel], detail: ErrorDetails, path: str, unknown: list[tuple]) -> str:
    where, given = _path(path, detail["loc"]), detail["input"]
    match detail["type"]:
        case "missing":
            near = [loc[-1] for loc in unknown if loc[:-1] == detail["loc"][:-1]]
            return f"{where}: missing key{nearest(detail['loc'][-1], near)}"
        case "extra_forbidden":
            return f"{where}: unknown key{nearest(detail['loc'][-1], _keys(kind, detail['loc'][:-1]))}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) or [detail["ctx"]["expected"]]
            return f"{where}: {given!r} is not one of {', '.join(allowed)}{nearest(given, allowed)}"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case "spec":
            return "\n".join(f"{where}{line}" for line in detail["ctx"]["sentences"])
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{where}: expected keys with values, got {given!r}"
        case "tuple_type":
            return f"{where}: expected a list, got {given!r}"
        case _:
            expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            return f"{where}: expected {expected}, got {given!r}"


def _path(path: str, loc: tuple[int | str, ...]) -> str:
    return path + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc)


def _keys(kind: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the model at a place within `kind` has."""
    for key in loc:
        parts = typing.get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(key)].annotation
        elif parts:
            kind = parts[-1] if typing.get_origin(kind) is dict else parts[0]
    models = [
        each
        for each in (kind, *typing.get_args(kind))
        if isinstance(each, type) and issubclass(each, BaseModel)
    ]
    return list(models[0].model_fields) if models else []


@dataclass(frozen=True)
class Spec:
    """A class by its name in params (`kind`) with the keyword arguments that params give it."""

    kind: str
    arguments: Mapping[str, Any] = field(hash=False)
    target: type = field(compare=False)
    path: str = field(default="", compare=False)  # of its key, for messages

    def build(self, *given: Any) -> Any:
        """Return the object: what the data determines comes in `given`, the rest from params.

        Raises: UserError with the class's own sentence if the arguments do not fit each other.
        """
        try:
            return self.target(*given, **self.arguments)
        except (ValueError, RuntimeError, MemoryError) as error:  # torch refuses some sizes by itself
            where = f"{self.path}: {self.kind}" if self.path else self.kind
            raise UserError(f"{where}: {str(error).partition(chr(10))[0]}") from None


def choice(kinds: Callable[[], Mapping[str, type]]) -> Any:
    """Return the type of a field `{kind: NAME, **arguments}` that is read as a Spec: `kinds()` are the classes by name, the
    arguments those that a class takes by keyword alone."""

    def read(value: Any, info: Any) -> Spec:
        if isinstance(value, Spec):
            return value
        try:
            found = spec(kinds(), value, "")
        except UserError as error:
            raise PydanticCustomError("spec", "mistaken", {"sentences": str(error).splitlines()}) from None
        path = (info.context or {}).get("path", "")
        return replace(found, path=f"{path}.{info.field_name}")

    return Annotated[Spec, PlainValidator(read)]


def spec(kinds: Mapping[str, type], value: Any, path: str) -> Spec:
    """Return `{kind: NAME, **arguments}`, as YAML or JSON gives it, as a Spec of one of these classes.

    Raises: UserError with a sentence for each mistake, each with the path of its key.
    """
    kind = mapping(value, path).get("kind")
    if kind not in kinds:
        raise UserError(f"{path}.kind: {kind!r} is not one of {', '.join(kinds)}{nearest(kind, kinds)}")
    checked = parse(_keywords(kinds[kind]), {key: each for key, each in value.items() if key != "kind"}, path)
    arguments = {key: getattr(checked, key) for key in value if key != "kind"}
    return Spec(kind, arguments, kinds[kind], path)


@functools.cache
def _keywords(target: type) -> type[Params]:
    """Return the model of the arguments that a class takes by keyword alone."""
    hints = typing.get_type_hints(target.__init__, include_extras=True)
    named = [
        p.name for p in inspect.signature(target.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    return create_model(target.__name__, __base__=Params, **{name: (hints[name], ...) for name in named})


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
        return {"kind": config.kind, **plain(config.arguments)}
    if isinstance(config, BaseModel):
        return {name: plain(getattr(config, name)) for name in type(config).model_fields}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def digest(*values: Any) -> str:
    """Return 16 hexadecimal digits that change whenever any of the values does."""
    return hashlib.sha256(json.dumps([plain(v) for v in values], sort_keys=True).encode()).hexdigest()[:16]
