"""`like: NAME` in params: a group of keys that has all keys of another, but for those that it gives itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from equilab.core import config
from equilab.core.config import MOST_NODES, UserError, did_you_mean, failures, shown, size_of

LIKE, SHARED = "like", "shared"  # SHARED: the section of groups that no stage reads, and others are like
MOST_LEVELS = 50  # of groups each like the next


def read(params: Path) -> dict[str, Any]:
    """Return the sections of a params file with all that `like` says written out.

    Raises: UserError if it is missing, is not YAML of sections, or a `like` of it is mistaken.
    """
    return written_out(config.read(params), str(params))


def written_out(sections: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the sections of a params file with all that `like` says written out, and without the section `shared`.

    A name without a dot is that of a group beside the one that is like it; one with dots a path from the top of the file.
    A group within a group goes on with the keys of its counterpart, unless it says `like` itself or is of another `kind`.
    Whatever else is given, null and lists among them, replaces. `where` is the file, for messages.

    Raises: UserError with a sentence for each `like` that leads nowhere or back to itself, or for a group of `shared` that nothing
    is like.
    """
    likes = _Likes(sections, where)
    entries = [
        (name, key) for name, section in sections.items() if isinstance(section, dict) for key in section
    ]
    checks = [partial(likes.value, sections[name][key], (name, key)) for name, key in entries if key != LIKE]
    checks += [partial(likes.value, section, (name,)) for name, section in sections.items()]
    if mistakes := failures(checks) or failures([likes.refuse_unused]):
        raise UserError("\n".join(mistakes))
    found = {name: likes.value(section, (name,)) for name, section in sections.items()}
    _refuse_growth(found, where)
    found.pop(SHARED, None)
    return found


class _Likes:
    """The sections of one file; where `like` has led so far, and where it leads now."""

    def __init__(self, sections: Mapping[str, Any], where: str):
        self.sections, self.where = sections, where
        self.known: dict[tuple, dict[str, Any]] = {}  # groups that say `like`, written out, by their paths
        self.open: list[tuple] = []  # those that are being written out
        self.used: set[tuple] = set()  # the groups that others are like

    def value(self, raw: Any, path: tuple) -> Any:
        """Return the value at a path with each `like` in it written out."""
        if isinstance(raw, list):
            return [self.value(each, (*path, index)) for index, each in enumerate(raw)]
        if not isinstance(raw, dict):
            return raw
        if LIKE in raw and len(path) == 1:
            raise UserError(
                f"{self._told(path)}: {LIKE} stands in a group of a section, not in the section itself"
            )
        if LIKE not in raw:
            return {key: self.value(each, (*path, key)) for key, each in raw.items()}
        if path not in self.known:
            with self._opened(path):
                own = {key: each for key, each in raw.items() if key != LIKE}
                self.known[path] = self._merged(self._other(raw[LIKE], path), own, path)
        return self.known[path]

    def _merged(self, other: Mapping[str, Any], own: Mapping[str, Any], path: tuple) -> dict[str, Any]:
        """Return the keys of another group and a group's own, which go before."""
        found = dict(other)
        for key, raw in own.items():
            before = other.get(key)
            goes_on = isinstance(raw, dict) and isinstance(before, dict) and LIKE not in raw
            if goes_on and raw.get("kind", before.get("kind")) == before.get("kind"):
                found[key] = self._merged(before, raw, (*path, key))
            else:
                found[key] = self.value(raw, (*path, key))
        return found

    def _other(self, name: Any, path: tuple) -> dict[str, Any]:
        """Return the group that the one at `path` is like, written out."""
        said = f"{self._told((*path, LIKE))}: "
        if not isinstance(name, str):
            raise UserError(f"{said}expected the name of a group of keys, got {shown(name)}")
        target = tuple(name.split(".")) if "." in name else (*path[:-1], name)
        found, at = self.sections, ()
        for key in target:
            if not isinstance(found, dict) or key not in found:
                raise UserError(f"{said}there is no {_dotted(target)!r}{self._nearest(name, path)}")
            at = (*at, key)
            self.used.add(at)
            found = found[key]
            if isinstance(found, dict) and LIKE in found:
                found = self.value(found, at)
        if not isinstance(found, dict):
            raise UserError(f"{said}{_dotted(target)} is no group of keys, but {shown(found)}")
        if at == path[: len(at)]:
            raise UserError(f"{said}{_dotted(target)} holds what is to be like it; name another group")
        with self._opened(at):
            return self.value(found, at)

    @contextlib.contextmanager
    def _opened(self, path: tuple) -> Iterator[None]:
        """Refuse to begin with a group that is begun already: it is like itself."""
        if path in self.open:
            circle = list(map(_dotted, self.open[self.open.index(path) :]))
            start = circle.index(min(circle))  # the same sentence, wherever it is entered
            names = [*circle[start:], *circle[: start + 1]]
            said = f"{names[0]} is like {', which is like '.join(names[1:])}"
            raise UserError(f"{self.where}: {said}; give one of them its own keys")
        if len(self.open) >= MOST_LEVELS:
            raise UserError(
                f"{self.where}: more than {MOST_LEVELS} groups are each like the next; be like the last"
            )
        self.open.append(path)
        try:
            yield
        finally:
            self.open.pop()

    def refuse_unused(self) -> None:
        """Refuse groups of the section `shared` that nothing is like."""
        section = self.sections.get(SHARED)
        for name in section if isinstance(section, dict) else ():
            if (SHARED, name) not in self.used:
                raise UserError(f"{self.where}: {SHARED}.{name}: nothing is like it; remove it")

    def _nearest(self, name: str, path: tuple) -> str:
        """Return the end of a sentence about a name that leads nowhere: the nearest group beside, or anywhere in the file."""
        groups = [group for group in _groups(self.sections, ()) if group[: len(path)] != path]
        if "." not in name:
            beside = [group[-1] for group in groups if group[:-1] == path[:-1]]
            of_that_name = [_dotted(group) for group in groups if group[-1] == name][:1]
            return did_you_mean(name, beside) or did_you_mean(name, of_that_name)
        return did_you_mean(name, map(_dotted, groups))

    def _told(self, path: tuple) -> str:
        return f"{self.where}: {_dotted(path)}"


def _groups(value: Any, path: tuple) -> Iterator[tuple]:
    """Yield the paths of all groups of keys below one."""
    for key, each in value.items():
        if isinstance(each, dict):
            yield (*path, key)
            yield from _groups(each, (*path, key))


def _dotted(path: tuple) -> str:
    """Return a path as messages have it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def _refuse_growth(sections: Mapping[str, Any], where: str) -> None:
    """Refuse params that are small as a file, and too large when they are written out."""

    def parts(value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            return value.values()
        return value if isinstance(value, list) else ()

    if size_of(sections, parts, {}) >= MOST_NODES:
        raise UserError(f"{where}: it is too large when each `{LIKE}` is written out; take some of them away")
