"""Strict YAML to frozen models: every mistake is a sentence that names the key, what is wrong with it, and the nearest name."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import itertools
import json
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticCustomError


class UserError(Exception):
    """What a user can mend: one sentence that names the key or the file and the remedy."""


def failures(checks: Iterable[Callable[[], Any]]) -> list[str]:
    """Return the sentences of all checks that fail, each once."""
    found: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            found |= dict.fromkeys(str(error).splitlines())
    return list(found)


class Params(BaseModel):
    """A group of keys in params, checked: none is unknown, missing, mistyped or out of its range; frozen once read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=BaseModel)
Size = Annotated[int, Field(ge=1, le=16_384)]  # of a network: of what it is wide
Depth = Annotated[int, Field(ge=0, le=256)]  # and deep


def _scalar(value: Any) -> Any:
    if isinstance(value, (dict, tuple)):
        raise ValueError(f"expected a single value, got {shown(value)}")
    return value


Scalar = Annotated[bool | int | float | str | None, PlainValidator(_scalar)]

MOST_NODES, MOST_LEVELS = 1_000_000, 100  # of a params file, aliases followed and each `like` written out


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
        sections = load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not there; run in the folder of a study, or give --params FILE") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
        raise UserError(f"{path} is not valid YAML: {told}") from None
    if not isinstance(sections, dict):
        raise UserError(f"{path} must hold sections (study:, data:, ...), not {type(sections).__name__}")
    return sections


def load(text: str) -> Any:
    """Return the content of YAML.

    Raises: YAMLError if it is none, or nested deeper, or grown by aliases larger, than any params are, or a value does not fit
        its type.
    """
    try:
        _require_shallow(text)
        loader = _Loader(text)
        try:
            if (node := loader.get_single_node()) is None:
                return None
            if size_of(node, _parts, {}) >= MOST_NODES:
                raise yaml.YAMLError("its aliases make it too large")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # a month 13, !!bool x
        raise yaml.YAMLError(f"a value does not fit its type ({error})") from None


def _require_shallow(text: str) -> None:
    """Refuse YAML that is nested too deeply, or has an alias of an anchor that does not stand before it."""
    depth, anchors = 0, set()
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            _require_anchor(event, anchors)
        elif isinstance(event, yaml.NodeEvent):
            anchors.add(event.anchor)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS:
            raise yaml.YAMLError(f"it is nested too deeply, line {event.start_mark.line + 1}")


def _require_anchor(alias: yaml.AliasEvent, anchors: set[str | None]) -> None:
    """Refuse an alias of an anchor that does not stand before it."""
    name, line = alias.anchor, alias.start_mark.line + 1
    if name not in anchors:
        known = did_you_mean(name, filter(None, anchors))
        raise yaml.YAMLError(f"there is no anchor &{name} before the alias *{name}, line {line}{known}")


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    """Return the nodes that one holds."""
    if isinstance(node, yaml.MappingNode):
        return itertools.chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def size_of(value: Any, parts: Callable[[Any], Iterable[Any]], known: dict[int, int]) -> int:
    """Return how many values one holds, itself among them, and what is there once and stands in several places each time it
    stands; at least MOST_NODES of one that holds itself. `known` are the sizes of those that are counted."""
    if id(value) not in known:
        known[id(value)] = MOST_NODES  # until it is counted: one that holds itself has no end
        known[id(value)] = 1 + sum(size_of(part, parts, known) for part in parts(value))
    return known[id(value)]


def read_json(path: Path, **types: Any) -> dict[str, Any]:
    """Return a JSON file of results that has these keys, each with a value of its type, as pydantic knows types; one that may
    be None may be missing.

    Raises: UserError if it is missing, damaged, or lacks one.
    """
    expected = _content(**types)
    try:
        content = path.read_bytes()
        value = json.loads(content)
        expected.model_validate_json(content)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        lacks = f"it has no {place}" if detail["type"] == "missing" else f"{place}: {detail['msg']}"
        raise unreadable(path, lacks.removeprefix(": ")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    return value


@functools.cache
def _content(**types: Any) -> type[BaseModel]:
    """Return the model of a JSON file of which these keys are read."""
    settings = ConfigDict(extra="allow", strict=True)
    fields = {
        name: (kind, None if type(None) in typing.get_args(kind) else ...) for name, kind in types.items()
    }
    return create_model("Content", __config__=settings, **fields)


def unreadable(path: Path, reason: object = "") -> UserError:
    """Return what to say of a result that cannot be read: that it is not there, or that it is damaged, and the remedy."""
    if not path.exists():
        return UserError(f"{path} is not there; {_remedy(path)} first")
    details = " ".join(str(reason).split())
    return unusable(path, f"is damaged ({details})" if details else "is damaged")


def unusable(path: Path, how: str) -> UserError:
    """Return what to say of a result that is not as it must be: how it is, and the remedy."""
    return UserError(f"{path} {how}; {_remedy(path)} again")


def _remedy(path: Path) -> str:
    """Return what brings a result: the command that writes it, as its path says it, results/STAGE[/RUN[/SEED]]/...; of
    unfinished work (.equilab/scratch/JOB/...) the one that clears it, and the one after it."""
    if path.parts[:2] == (".equilab", "scratch"):
        return f"run `python -m equilab clean {path.parts[2]}`, which removes it, and the same command"
    folders = [name for name in path.parts[:-1] if name != "snapshots"]
    if "results" not in folders:  # a run that was given away, for one
        return "run the stage that writes it, or fetch it"
    while "results" in folders:
        folders = folders[folders.index("results") + 1 :]
    stage, *run = folders or ["claims"]  # which alone writes beside the folders of stages
    if stage == "imported":
        return "run `python -m equilab import`"
    seed = ["--seed", run.pop()] if len(run) == 2 else []
    return f"run `{' '.join(['python -m equilab', stage, *run, *seed])}`"


def parse(kind: type[Kind], value: Any, path: str) -> Kind:
    """Return `value`, as YAML gives it, as a model of this kind.

    Raises: UserError with a sentence for each mistake, each with the path of its key.
    """
    given = _tuples(mapping(value, path))
    try:
        return kind.model_validate(given, context={"path": path})
    except ValidationError as error:
        raise UserError("\n".join(sentences(kind, error, path))) from None


def _tuples(value: Any) -> Any:
    """Return a value of YAML with its lists as tuples, which nobody can change."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value


# what YAML has for the types of pydantic's errors, and for the bounds that it names
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "is_instance_of": "a list",  # a Sequence
    "sequence_str": "a list",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}
BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def sentences(kind: type[BaseModel], error: ValidationError, path: str) -> list[str]:
    """Return what is wrong, a sentence for each mistake: a key that is mistyped is not told as missing as well."""
    details = error.errors(include_url=False)
    missing = {each["loc"] for each in details if each["type"] == "missing"}
    for each in details:
        if each["type"] == "extra_forbidden":
            *above, key = each["loc"]
            missing.discard((*above, near(key, _keys(kind, tuple(above)))))
    told = [each for each in details if each["type"] != "missing" or each["loc"] in missing]
    told = [each for each in told if not _counts_mistakes(each)]
    return list(dict.fromkeys(_sentence(kind, each, path) for each in told))


def _counts_mistakes(detail: ErrorDetails) -> bool:
    """Return whether a list is told to be too short only because some of its values are mistaken, which is told as well."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _sentence(kind: type[BaseModel], detail: ErrorDetails, path: str) -> str:
    loc, context, given = detail["loc"], detail.get("ctx", {}), shown(detail["input"])
    where = _path(path, loc)
    match detail["type"]:
        case "missing" if isinstance(loc[-1], int):
            return f"{_path(path, loc[:-1])}: too few values, got {given}"
        case "missing":
            return f"{where}: missing key"
        case "extra_forbidden":
            return f"{where}: unknown key{nearest(loc[-1], _keys(kind, loc[:-1]))}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
            return (
                f"{where}: {given} is not one of {', '.join(allowed)}{did_you_mean(detail['input'], allowed)}"
            )
        case "value_error":
            return f"{where}: {context['error']}"
        case "spec":
            return "\n".join(f"{where}{line}" for line in context["sentences"])
        case "too_short":
            return f"{where}: too few values, give at least {context['min_length']}, got {given}"
        case "too_long":
            return f"{where}: too many values, give at most {context['max_length']}, got {given}"
        case bound if bound in BOUNDS:
            words, key = BOUNDS[bound]
            return f"{where}: must be {words} {context[key]}, got {given}"
        case other if other in EXPECTED:
            return f"{where}: expected {EXPECTED[other]}, got {given}"
        case _:
            return f"{where}: {detail['msg']}, got {given}"


def shown(value: Any) -> str:
    """Return a value for a sentence, as YAML has it, a long one cut short."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(plain(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


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
        except ValueError as error:
            raise UserError(f"{self._where}: {str(error).partition(chr(10))[0]}") from None
        except (RuntimeError, ArithmeticError, MemoryError) as error:  # of torch's own
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self._where}: its sizes cannot be built ({reason}); change them") from None

    @property
    def _where(self) -> str:
        return f"{self.path}: {self.kind}" if self.path else self.kind


def choice(kinds: Callable[[], Mapping[str, type]], new: str = "") -> Any:
    """Return the type of a field `{kind: NAME, **arguments}` that is read as a Spec: `kinds()` are the classes by name, the
    arguments those that a class takes by keyword alone; `new` says in a message where a new class is entered."""

    def read(value: Any, info: Any) -> Spec:
        if isinstance(value, Spec):
            return value
        try:
            found = spec(kinds(), value, "", new)
        except UserError as error:
            raise PydanticCustomError("spec", "mistaken", {"sentences": str(error).splitlines()}) from None
        path = (info.context or {}).get("path", "")
        return replace(found, path=f"{path}.{info.field_name}")

    return Annotated[Spec, PlainValidator(read)]


def spec(kinds: Mapping[str, type], value: Any, path: str, new: str = "") -> Spec:
    """Return `{kind: NAME, **arguments}`, as YAML or JSON gives it, as a Spec of one of these classes; `new` says in a message
    where a new one is entered.

    Raises: UserError with a sentence for each mistake, each with the path of its key.
    """
    kind = mapping(value, path).get("kind")
    if kind not in [*kinds]:
        known = f"{', '.join(kinds)}{did_you_mean(kind, kinds)}"
        raise UserError(f"{path}.kind: {shown(kind)} is not one of {known}{f' ({new})' if new else ''}")
    checked = parse(_keywords(kinds[kind]), {key: each for key, each in value.items() if key != "kind"}, path)
    arguments = {key: getattr(checked, key) for key in value if key != "kind"}
    return Spec(kind, arguments, kinds[kind], path)


@functools.cache
def _keywords(target: type) -> type[Params]:
    """Return the model of the arguments that a class takes by keyword alone; one that is an `int`, and no more is said of it,
    is a Size."""
    hints = typing.get_type_hints(target.__init__, include_extras=True)
    hints |= {name: Size for name, hint in hints.items() if hint is int}
    named = [
        p.name for p in inspect.signature(target.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    return create_model(target.__name__, __base__=Params, **{name: (hints[name], ...) for name in named})


def mapping(value: Any, path: str) -> Mapping[str, Any]:
    """Return `value`, which must be keys with values.

    Raises: UserError naming `path` if it is not.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys with values, got {shown(value)}")
    return value


def near(name: Any, known: Iterable[Any], similarity: float = 0.5) -> str | None:
    """Return the known name nearest to an unknown one, if any is near; names that are alike have a similarity of 1."""
    if not isinstance(name, str):
        return None
    found = difflib.get_close_matches(name, [str(each) for each in known], 1, similarity)
    return found[0] if found else None


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, if any is near."""
    found = near(name, known)
    return f"; did you mean {found!r}?" if found else ""


def nearest(name: Any, known: Collection[Any]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or all of them."""
    all_known = f"; known are {', '.join(map(str, known))}" if known else ""
    return did_you_mean(name, known) or all_known


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


def difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return the first key in which two plain configs differ, joined by dots, and the values of both, null where one lacks it."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else (key, before, now)
    for name in {**before, **now}:
        found = difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        if found:
            return found
    return None


def digest(*values: Any) -> str:
    """Return 16 hexadecimal digits that change whenever any of the values does."""
    return hashlib.sha256(json.dumps([plain(v) for v in values], sort_keys=True).encode()).hexdigest()[:16]
