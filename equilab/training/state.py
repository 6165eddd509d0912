"""What is kept on disk: tensors with their config and checksum, written atomically; scratch folders with a lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from equilab.config import Spec, UserError, parse, plain

KEY = "equilab"  # the one metadata key: several would be written in random order


def write(path: Path, content: bytes | str) -> None:
    """Write a file in full or not at all: what was there stays until the new content is on disk.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}); free disk space or change its permissions") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON, atomically."""
    write(path, json.dumps(plain(value), indent=1, sort_keys=True) + "\n")


def write_array(path: Path, array: np.ndarray) -> str:
    """Write one `.npy` file atomically; return the sha256 of the file."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def whole(path: Path) -> bool:
    """Return whether a file is there, with the sha256 that was written beside it."""
    stamp = path.with_suffix(".sha256")
    return path.exists() and stamp.exists() and stamp.read_bytes() == sha256_of(path).encode()


def link(path: Path, folder: Path) -> None:
    """Put a file into a folder as well, without a second copy where the disk allows it."""
    (folder / path.name).unlink(missing_ok=True)
    try:
        os.link(path, folder / path.name)
    except OSError:  # another disk
        shutil.copyfile(path, folder / path.name)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, types, shapes and bytes of the tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors with their metadata and checksum as safetensors, atomically and with the same bytes every time."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps({**plain(metadata), "checksum": checksum(tensors)}, sort_keys=True)
    write(path, save(tensors, {KEY: described}))


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file written by `save_tensors`.

    Raises: UserError if the file is missing, damaged or was not written by equilab.
    """
    return _open(path)[0]


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file written by `save_tensors`, its checksum verified.

    Raises: UserError if the file is missing, damaged or was not written by equilab.
    """
    metadata, tensors = _open(path, True)
    if checksum(tensors) != metadata["checksum"]:
        raise UserError(f"{path} is damaged: its content does not match its checksum; delete it and run its stage again")
    return tensors, metadata


def _open(path: Path, content: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise UserError(f"{path} is not there; run the stage that writes it first (`dvc repro` runs all)")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if content else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run its stage again") from None
    if KEY not in metadata:
        raise UserError(f"{path} was not written by equilab; read the authors' checkpoints with equilab.published.load")
    return json.loads(metadata[KEY]), tensors


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a stage's run, for one process at a time (the first one of a distributed run holds it for all).

    Raises: UserError if another process holds it, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(".equilab") / "locks" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); change its permissions, or what is in its way") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working on {name}; wait for it or stop it") from None
        yield


@contextlib.contextmanager
def scratch(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Give a folder for unfinished work; removed when the work is finished, unless `keep`.

    Raises: UserError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); change its permissions, or what is in its way") from None
    yield folder
    if not keep and os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)


def require_disk(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `folder`.

    Raises: UserError if they do not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free; free disk space first")


def load_network(path: Path, kinds: Mapping[str, str], config: Any = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that a training stage wrote (evaluation mode), and the metadata kept with its weights.

    `kinds` are the networks that may be built: {name in params: "module:Class"}. `config` is the stage's config in the
    study's params, if the weights must be of that.

    Raises: UserError if the file is damaged, or holds a network of another kind, sizes or configuration.
    """
    tensors, metadata = load_tensors(path)
    if config is not None and plain(config) != metadata["config"]:
        raise UserError(f"{path} was trained under another configuration than params.yaml gives now; run its stage again")
    network = dict(metadata["config"]["network"])
    if network["kind"] not in kinds:
        raise UserError(f"{path} holds a {network['kind']}; expected one of {', '.join(kinds)}")
    spec = parse(Annotated[Spec, tuple(kinds.items())], network, f"{path}: network")
    net = spec.build(tuple(metadata["image"]), metadata["classes"])
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own config ({str(error).splitlines()[-1].strip()}); train it again") from None
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last), metadata
