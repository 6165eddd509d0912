"""Pickles as plain data: an interpreter of the few opcodes that checkpoints consist of, which calls nothing that a file names.

Python's own unpickler is not used, not even held to inert names: an index of its memo takes any amount of memory, the hash of
nested tuples any amount of time, and its registry of extensions goes past `find_class`. Here an opcode that is not listed is
refused, and so is a name that is not.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

MOST_OPCODES = 2_000_000  # in a file; a network of the largest published size has about 100,000
LARGEST_KEY = 2**31  # of a dictionary with numbers for keys: larger ones can be chosen to collide

SCALARS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

# what a damaged pickle may raise
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
)


class Refused(ValueError):
    """Something in a file that no checkpoint needs: the end of a sentence about the file."""


@dataclass(frozen=True)
class Name:
    """A class or a function that a file names, such as "collections.OrderedDict"; never the thing itself."""

    full: str


@dataclass
class Object:
    """An object of a class that a file names, as data: its class and its state."""

    name: str
    state: Any = None


class Reader:
    """Reads the pickles of one file.

    `makers` are functions that make data, by the names that the file calls them; `inert` are the beginnings of other names
    that it may use, calls of which make an `Object` that nothing comes of.
    """

    def __init__(self, makers: Mapping[str, Callable[..., Any]], inert: tuple[str, ...]):
        self.makers, self.inert, self.left = makers, inert, MOST_OPCODES

    def read(self, file: BufferedIOBase, persistent: Callable[[Any], Any] | None = None) -> Any:
        """Return the data of the pickle at which `file` stands, and leave the file at its end.

        `persistent` makes data of a reference to what is stored next to the pickle.

        Raises: Refused for what no checkpoint needs; one of DAMAGE if the pickle is damaged.
        """
        stack, marks, memo = [], [], {}

        def above(start: int) -> list:
            """Take the values from a place on off the stack."""
            if not 0 <= start <= len(stack):
                raise ValueError("values are missing")
            values = stack[start:]
            del stack[start:]
            return values

        for opcode, argument, _ in pickletools.genops(file):
            self.left -= 1
            if self.left < 0:
                raise Refused(f"its pickle has more than {MOST_OPCODES:,} instructions")
            match opcode.name:
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case name if name in SCALARS:
                    stack.append(argument)
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case name if name in EMPTY:
                    stack.append(EMPTY[name]())
                case name if name in TUPLES:
                    stack.append(tuple(above(len(stack) - TUPLES[name])))
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(above(marks.pop())))
                case "APPEND" | "APPENDS" as name:
                    values = above(marks.pop() if name == "APPENDS" else len(stack) - 1)
                    list.extend(stack[-1], values)
                case "SETITEM" | "SETITEMS" as name:
                    values = above(marks.pop() if name == "SETITEMS" else len(stack) - 2)
                    dict.update(stack[-1], zip(map(_checked, values[::2]), values[1::2], strict=True))
                case "ADDITEMS":
                    values = above(marks.pop())
                    set.update(stack[-1], map(_checked, values))
                case "GLOBAL":
                    stack.append(self._name(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(self._name(*above(len(stack) - 2)))
                case "REDUCE" | "NEWOBJ":
                    stack.append(self._made(*above(len(stack) - 2)))
                case "BUILD":
                    _set_state(stack.pop(), stack[-1])
                case "BINPERSID" if persistent:
                    stack.append(persistent(stack.pop()))
                case "STOP":
                    return stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case name:
                    raise Refused(f"its pickle has the instruction {name}, which no checkpoint needs")
        raise ValueError("it has no end")

    def _name(self, module: Any, name: Any) -> Name:
        """Return the name of a global, if it is one that the file may use."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("its pickle asks for something whose name is no word")
        full = f"{module}.{name}"
        if full not in self.makers and not full.startswith(self.inert):
            raise Refused(f"its pickle asks for {full[:80]!r}, which no checkpoint needs")
        return Name(full)

    def _made(self, called: Any, arguments: Any) -> Any:
        """Return the data that a name with arguments stands for."""
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise Refused("its pickle calls something that has no name")
        maker = self.makers.get(called.full)
        return maker(*arguments) if maker else Object(called.full)


def _checked(key: Any) -> Any:
    """Return a key of a dictionary, or an item of a set.

    Raises: Refused unless it is a word, a small number or None: to find the place of anything else may take any time.
    """
    if not isinstance(key, (str, int, type(None))) or (isinstance(key, int) and abs(key) > LARGEST_KEY):
        raise Refused("its pickle has a dictionary whose keys are neither words nor small numbers")
    return key


def _set_state(state: Any, target: Any) -> None:
    """Keep the state of an object; what a dictionary carries besides its items is left out."""
    if isinstance(target, Object):
        target.state = state
    elif not isinstance(target, dict):
        raise Refused("its pickle sets the state of what has none")
