"""Tensors on disk, with their config and checksum, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from equilab.core.config import Spec, UserError, parse, plain
from equilab.core.files import write

KEY = "equilab"  # the one metadata key: several would be written in random order


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
        raise UserError(
            f"{path} is damaged: its content does not match its checksum; delete it and run its stage again"
        )
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
        raise UserError(
            f"{path} was not written by equilab; read the authors' checkpoints with equilab.published.load"
        )
    return json.loads(metadata[KEY]), tensors


def load_network(
    path: Path, kinds: Mapping[str, str], config: Any = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that a training stage wrote (evaluation mode), and the metadata kept with its weights.

    `kinds` are the networks that may be built: {name in params: "module:Class"}. `config` is the stage's config in the
    study's params, if the weights must be of that.

    Raises: UserError if the file is damaged, or holds a network of another kind, sizes or configuration.
    """
    tensors, metadata = load_tensors(path)
    if config is not None and plain(config) != metadata["config"]:
        raise UserError(
            f"{path} was trained under another configuration than params.yaml gives now; run its stage again"
        )
    network = dict(metadata["config"]["network"])
    if network["kind"] not in kinds:
        raise UserError(f"{path} holds a {network['kind']}; expected one of {', '.join(kinds)}")
    spec = parse(Annotated[Spec, tuple(kinds.items())], network, f"{path}: network")
    net = spec.build(tuple(metadata["image"]), metadata["classes"])
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its own config ({str(error).splitlines()[-1].strip()}); train it again"
        ) from None
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last), metadata
