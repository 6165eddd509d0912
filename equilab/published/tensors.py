"""Tensors as checkpoints store them, and the names by which pickles make them: data until they are read."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilab.published.pickles import Name, Object, Reader, Refused

# the first pickle of a file by torch before 1.6, and of a storage within a pickle
MAGIC = 0x1950A86A20F9469CFC6C
MOST_DIMENSIONS = 8

# names in those of torch's storages, and in safetensors
TYPES = (
    ("Double", "F64", torch.float64),
    ("Float", "F32", torch.float32),
    ("Half", "F16", torch.float16),
    ("BFloat16", "BF16", torch.bfloat16),
    ("Long", "I64", torch.int64),
    ("Int", "I32", torch.int32),
    ("Short", "I16", torch.int16),
    ("Char", "I8", torch.int8),
    ("Byte", "U8", torch.uint8),
    ("Bool", "BOOL", torch.bool),
)
SAFETENSORS = {name: dtype for _, name, dtype in TYPES}
STORAGES = {f"torch.{name}Storage": dtype for name, _, dtype in TYPES}
STORAGES |= {f"torch.cuda.{name}Storage": dtype for name, _, dtype in TYPES}

# what a checkpoint may name besides tensors: modules, options and their values, of which nothing but the state is looked at
INERT = (
    *("torch.nn.modules.", "torch.Size", "torch.device", "argparse.Namespace"),
    *("builtins.set", "__builtin__.set"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *STORAGES,
    *map(str, SAFETENSORS.values()),
)


@dataclass
class Storage:
    """Numbers of one type in a row, in a file or in bytes, from `start` on."""

    dtype: torch.dtype
    count: int
    source: Path | bytes
    start: int

    def read(self, first: int, count: int) -> Tensor:
        """Return `count` of the numbers, in memory of their own."""
        start, length = self.start + first * self.dtype.itemsize, count * self.dtype.itemsize
        if isinstance(self.source, bytes):
            return torch.from_numpy(np.frombuffer(self.source, np.uint8, length, start).copy()).view(
                self.dtype
            )
        content = torch.empty(length, dtype=torch.uint8)
        with open(
            self.source, "rb", buffering=0
        ) as file:  # straight into the tensor, in half the time of np.fromfile
            file.seek(start)
            if file.readinto(content.numpy()) != length:
                raise ValueError("it ends before its numbers do")
        return content.view(self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many stored numbers there are from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        """How many bytes of the storage it needs."""
        return self.extent * self.storage.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own."""
        if self.extent == 0:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        content = self.storage.read(self.offset, self.extent)
        return content.as_strided(self.shape, self.stride).contiguous()


def tensor(storage: Any, offset: Any, shape: Any, stride: Any = None, *_: Any) -> StoredTensor:
    """Return a tensor of stored numbers, one after another unless a stride is given.

    Raises: Refused or ValueError for one that the storage cannot hold.
    """
    if not isinstance(storage, Storage):
        raise Refused("its pickle makes a tensor of something that is no storage")
    shape = tuple(shape[: MOST_DIMENSIONS + 1])
    if stride is None:
        stride = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    stride = tuple(stride[: MOST_DIMENSIONS + 1])
    if len(shape) > MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor has a shape that none can have")
    found = StoredTensor(storage, offset, shape, stride)
    if math.prod(shape) > found.extent or offset + found.extent > storage.count:
        raise ValueError("a tensor is larger than what is stored of it")
    return found


def stored(value: Any) -> tuple[torch.dtype, str, int]:
    """Return type, key and count of the storage to which a pickle by torch refers.

    Raises: Refused for anything else, or for a type that no weights have.
    """
    kind, name, key, _, count, *view = value
    if kind != "storage" or any(view) or type(key) is not str or type(count) is not int or count < 0:
        raise Refused("its pickle refers to something that is no storage")
    if not isinstance(name, Name) or name.full not in STORAGES:
        raise Refused("its pickle stores numbers of a type that no checkpoint has")
    return STORAGES[name.full], key, count


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
        return storages.setdefault(key, Storage(dtype, count, source, 0))

    content = reader.read(file, persistent)
    for key in reader.read(file):
        if not isinstance(key, str):
            raise ValueError("a storage has no name")
        storage = storages.pop(key)
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

    def storage(content: Any) -> Any:
        """Return a storage from the bytes in which a pickle holds it: a file by torch before 1.6."""
        del found.makers["torch.storage._load_from_bytes"]  # none within another
        file = io.BytesIO(content)
        if found.read(file) != MAGIC:
            raise Refused("its pickle holds bytes that are no storage")
        read = read_legacy(file, content, found)
        found.makers["torch.storage._load_from_bytes"] = storage
        return read

    makers = {
        "collections.OrderedDict": _dictionary,
        "dnnlib.util.EasyDict": _dictionary,
        "_codecs.encode": _bytes,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": storage,
        "torch_utils.persistence._reconstruct_persistent_obj": _module,
    }
    found = Reader(makers, INERT)
    return found


def _dictionary() -> dict:
    return {}


def _bytes(text: Any, encoding: Any) -> bytes:
    """Return bytes as pickles of protocol 2 hold them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("its pickle encodes something that is no text")
    return text.encode("latin1")


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _module(meta: Mapping[str, Any]) -> Object:
    """Return a module by NVIDIA's persistence; the source code that is kept with it is left alone."""
    if not isinstance(meta["class_name"], str):
        raise Refused("its pickle has a module of a class without a name")
    return Object(meta["class_name"], meta["state"])
