"""The files that authors publish, whatever their format, as weights and the plain settings stored with them."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from equilab.core.config import UserError
from equilab.models.checkpoint import KEY
from equilab.published.files import absent
from equilab.published.pickles import DAMAGE, Object, Refused
from equilab.published.tensors import (
    MAGIC,
    SAFETENSORS,
    Storage,
    StoredTensor,
    read_legacy,
    reader,
    stored,
    tensor,
)
from equilab.sampling.opening import POINTED, POINTER

AVERAGED, RAW = "ema", ("model", "net", "state_dict")  # under which entry of a checkpoint weights are
MOST_LEVELS = 50  # of modules within modules
LARGEST_HEADER = 2**26  # bytes that tell where numbers are: the pickle in an archive, the JSON of safetensors

# how a file begins that is none of the formats: what it is, and the remedy
FOREIGN = {
    POINTER: POINTED,
    b"<": "is a web page that was saved under the name: open its address in a browser and download the file itself",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
}


@dataclass(frozen=True)
class Contents:
    """What a file holds: weights, and what is stored with them."""

    weights: dict[str, Tensor | StoredTensor]
    settings: dict[str, Any] = field(default_factory=dict)  # numbers and words
    module: str | None = None  # the class of the module that the weights are of, if it says
    entry: str | None = None  # of the checkpoint, in which the weights are
    others: tuple[str, ...] = ()  # entries that hold weights as well


def read(path: Path) -> Contents:
    """Return what a published file holds; nothing in it is run, and no tensor is read yet.

    Raises: UserError saying what is wrong with the file, and the remedy.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise UserError(absent(path)) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a file, and make it readable"
        ) from None
    if size == 0:
        raise UserError(f"{path} is empty; download it again")
    header = int.from_bytes(start[:8], "little")
    safetensors = start[8:9] == b"{" and header <= LARGEST_HEADER
    for beginning, what in FOREIGN.items():
        if start.lstrip().startswith(beginning) and not safetensors:
            raise UserError(f"{path} {what}")
    try:
        if safetensors:
            content = _safetensors(path, size, header)
        elif start.startswith(b"PK\x03\x04"):
            content = _zip(path, size)
        elif start.startswith(b"\x80"):
            content = _pickle(path)
        else:
            raise UserError(
                f"{path} is in none of the formats that are read: safetensors, files by torch, pickles by NVIDIA's code"
            )
        return _contents(path, content)
    except Refused as error:
        raise UserError(f"{path} is refused, and nothing in it was run: {error}; do not trust it") from None
    except (*DAMAGE, zipfile.BadZipFile, RuntimeError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is damaged or was cut short ({reason}); download it again") from None


def _safetensors(path: Path, size: int, header: int) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file: JSON of so many bytes that tells their places, then their numbers."""
    with open(path, "rb") as file:
        file.seek(8)
        entries = json.loads(file.read(header))
    if KEY in entries.pop("__metadata__", {}):
        raise UserError(f"{path} holds weights of ours: equilab.load({str(path)!r}) reads them")
    weights = {}
    for name, entry in entries.items():
        dtype = SAFETENSORS[entry["dtype"]]
        begin, end = (8 + header + offset for offset in entry["data_offsets"])
        if not 8 + header <= begin <= end <= size:
            raise ValueError("it ends before its numbers do")
        storage = Storage(dtype, (end - begin) // dtype.itemsize, path, begin)
        weights[name] = tensor(storage, 0, entry["shape"])
    return weights


def _zip(path: Path, size: int) -> Any:
    """Return the data of a file by torch since 1.6: an archive, nothing in it compressed, of a pickle and its storages."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise UserError(f"{path} is a compressed archive, which no file by torch is: unpack it first")
        if sum(member.file_size for member in members.values()) > size:
            raise Refused("its archive holds more than the file does")
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{path} is an archive, but not one by torch: unpack it, and give the file in it")
        folder = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > LARGEST_HEADER:
            raise Refused("its pickle is far larger than that of any checkpoint")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("its numbers are stored with the largest byte first")
        pickled = io.BytesIO(archive.read(pickles[0]))
    with open(path, "rb") as file:

        def persistent(value: Any) -> Storage:
            dtype, key, count = stored(value)
            member = members[f"{folder}data/{key}"]
            if member.file_size != count * dtype.itemsize:
                raise ValueError("a storage has another size than its pickle says")
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))  # lengths: what is stored follows
            start = member.header_offset + 30 + name + extra
            if start + member.file_size > size:
                raise ValueError("it ends before its numbers do")
            return Storage(dtype, count, path, start)

        return reader().read(pickled, persistent)


class _File(io.BufferedReader):
    """A file that is asked for no more than it holds, whatever lengths are written in it."""

    def read(self, size: int) -> bytes:
        """Return so many bytes, or those that are left."""
        if size > 2**16:
            size = min(size, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(size)


def _pickle(path: Path) -> Any:
    """Return the data of a pickle: by torch before 1.6, or of NVIDIA's modules."""
    with _File(io.FileIO(path)) as file:
        pickles = reader()
        content = pickles.read(file)
        return read_legacy(file, path, pickles) if content == MAGIC else content


def _contents(path: Path, content: Any) -> Contents:
    """Return the weights in the data of a file: averaged ones where both are there."""
    entries = content if isinstance(content, dict) else {}
    found = [name for name in (AVERAGED, *RAW) if _is_weights(entries.get(name))]
    entry = found[0] if found else None
    weights = entries[entry] if found else content
    if not _is_weights(weights):
        known = ", ".join(str(name)[:40] for name in list(entries)[:8]) or "none"
        raise UserError(
            f"{path} holds no weights; they are looked for in it and under {AVERAGED}, {', '.join(RAW)}, its entries are {known}"
        )
    settings = _plain(entries.get("args"))
    if not isinstance(weights, Object):
        return Contents(dict(weights), settings, None, entry, tuple(found[1:]))
    settings |= _plain(weights.state.get("_init_kwargs")) | _plain(weights)
    tensors = dict(_tensors(weights, "", MOST_LEVELS, set()))
    return Contents(tensors, settings, weights.name, entry, tuple(found[1:]))


def _is_weights(value: Any) -> bool:
    """Return whether a value is a module, or a dictionary of tensors by their names."""
    if isinstance(value, Object):
        return isinstance(value.state, dict) and "_modules" in value.state
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(each, StoredTensor) for key, each in value.items())


def _tensors(module: Any, prefix: str, levels: int, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a module, and of the modules in it, by the keys of its state dict."""
    if levels == 0 or id(module) in seen:
        raise Refused("its modules lie within each other, or too deep")
    seen.add(id(module))
    for part in ("_parameters", "_buffers"):
        for name, value in module.state.get(part, {}).items():
            if value is None:
                continue
            if not isinstance(value, StoredTensor):
                raise ValueError("a module has a parameter that is no tensor")
            yield f"{prefix}{name}", value
    for name, child in module.state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", levels - 1, seen)


def _plain(settings: Any) -> dict[str, Any]:
    """Return the numbers and words among settings."""
    entries = settings.state if isinstance(settings, Object) else settings
    if not isinstance(entries, dict):
        return {}
    return {name: value for name, value in entries.items() if isinstance(value, (bool, int, float, str))}
