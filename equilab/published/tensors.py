"""Tensors as checkpoints store them, and the names by which pickles make them: data until they are asked for."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilab.published.pickles import Name, Object, Reader, Refused, checked_key

MAGIC = (
    0x1950A86A20F9469CFC6C  # the first pickle of a file by torch before 1.6, and of a storage within a pickle
)
MOST_DIMENSIONS = 8

STORED = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
NUMBERS = {
    "f8": "<d",
    "f4": "<f",
    "i8": "<q",
    "i4": "<i",
    "b1": "?",
}  # numpy's types in the words of `struct`


@dataclass
class Storage:
    """Numbers of one type in a row, in a file or in bytes, from `start` on."""

    dtype: torch.dtype
    count: int
    source: Path | bytes
    start: int | None = None  # None while it is not found

    def read(self, first: int, count: int) -> Tensor:
        """Return `count` of the numbers, in memory of their own."""
        start, length = self.start + first * self.dtype.itemsize, count * self.dtype.itemsize
        if isinstance(self.source, bytes):
            content = np.frombuffer(self.source, np.uint8, length, start).copy()
        else:
            content = np.fromfile(self.source, np.uint8, length, offset=start)
        return torch.from_numpy(content).view(self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self.storage.dtype

    @property
    def extent(self) -> int:
        """How many stored numbers there are from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own."""
        if self.extent == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        content = self.storage.read(self.offset, self.extent)
        return content.as_strided(self.shape, self.stride).contiguous()


def stored(value: Any) -> tuple[torch.dtype, str, int]:
    """Return type, key and count of the storage to which a pickle by torch refers.

    Raises: Refused for anything else, or for a type that no weights have.
    """
    kind, name, key, _, count, *view = value
    if kind != "storage" or any(view) or type(key) is not str or type(count) is not int or count < 0:
        raise Refused("its pickle refers to something that is no storage")
    full = name.name if isinstance(name, Name) else ""
    dtype = STORED.get(full.removeprefix("torch.").removeprefix("cuda.").removesuffix("Storage"))
    if dtype is None:
        raise Refused(f"its pickle stores numbers as {full[:80]!r}, which no checkpoint needs")
    return dtype, key, count


def read_legacy(file: BufferedIOBase, source: Path | bytes, reader: Reader) -> Any:
    """Return the data in a file by torch before 1.6 whose first pickle, MAGIC, is read: more pickles, then the storages.

    Raises: Refused for what no checkpoint needs; one of DAMAGE if it is damaged.
    """
    reader.read(file)  # the version of the format
    if reader.read(file)["little_endian"] is not True:
        raise Refused("its numbers are stored with the largest byte first")
    storages: dict[str, Storage] = {}

    def persistent(value: Any) -> Storage:
        dtype, key, count = stored(value)
        return storages.setdefault(key, Storage(dtype, count, source))

    content = reader.read(file, persistent)
    for key in reader.read(file):
        storage = storages.pop(checked_key(key))
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count:
            raise ValueError("a storage has another size than its pickle says")
        storage.start = file.tell()
        file.seek(count * storage.dtype.itemsize, io.SEEK_CUR)
    end = file.tell()
    if storages or end > file.seek(0, io.SEEK_END):
        raise ValueError("it ends before its numbers do")
    return content


def reader() -> Reader:
    """Return what reads the pickles of one checkpoint."""
    found = Reader(dict(MAKERS))

    def storage(content: Any) -> Any:
        """Return a storage from the bytes in which a pickle holds it: a file by torch before 1.6."""
        del found.makers["torch.storage._load_from_bytes"]  # none within another
        file = io.BytesIO(content)
        if found.read(file) != MAGIC:
            raise Refused("its pickle holds bytes that are no storage")
        read = read_legacy(file, content, found)
        found.makers["torch.storage._load_from_bytes"] = storage
        return read

    found.makers["torch.storage._load_from_bytes"] = storage
    return found


def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Return a tensor of stored numbers.

    Raises: Refused or ValueError for one that the storage cannot hold.
    """
    if not isinstance(storage, Storage):
        raise Refused("its pickle makes a tensor of something that is no storage")
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if len(numbers) > 1 + 2 * MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor has a shape that none can have")
    found = StoredTensor(storage, offset, shape, stride)
    if math.prod(shape) > found.extent or offset + found.extent > storage.count:
        raise ValueError("a tensor is larger than what is stored of it")
    return found


def _first(value: Any, *_: Any) -> Any:
    """Return the tensor that a parameter is."""
    return value


def _dictionary(pairs: Any = ()) -> dict:
    return {checked_key(key): value for key, value in pairs}


def _set(items: Any = ()) -> set:
    return set(map(checked_key, items))


def _number(dtype: Any, content: Any) -> Any:
    """Return a number of numpy's as one of Python's."""
    (number,) = struct.unpack(NUMBERS[dtype.arguments[0]], content)
    return number


def _bytes(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise Refused("its pickle encodes text")
    return text.encode("latin1")


def _module(meta: Any) -> Object:
    """Return a module by NVIDIA's persistence; the source code that is kept with it is left alone."""
    if not isinstance(meta["class_name"], str):
        raise Refused("its pickle makes a module of a class without a name")
    return Object(meta["class_name"], (), meta["state"])


def _object(name: str) -> Callable[..., Object]:
    def make(*arguments: Any) -> Object:
        return Object(name, arguments)

    return make


MAKERS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _dictionary,
    "dnnlib.util.EasyDict": _dictionary,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch_utils.persistence._reconstruct_persistent_obj": _module,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "_codecs.encode": _bytes,
    "torch.Size": tuple,
    "torch.nn.modules.": None,
    **{name: _object(name) for name in ("argparse.Namespace", "torch.device", "numpy.dtype")},
    **{f"torch.{kind}Storage": None for kind in STORED},
    **{f"torch.cuda.{kind}Storage": None for kind in STORED},
    **{str(dtype): None for dtype in STORED.values()},
}
