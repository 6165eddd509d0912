"""Tensors on disk, with their config and checksum, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from equilab.core.config import Spec, UserError, difference, digest, plain, shown, spec, unreadable, unusable
from equilab.core.files import write
from equilab.models.classifier import CLASSIFIERS
from equilab.models.family import families, family

KEY = "equilab"  # the one metadata key: several would be written in random order
OF_METADATA = "metadata_checksum"  # of all that the metadata say beside it


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
    described = {**plain(metadata), "checksum": checksum(tensors)}
    described[OF_METADATA] = digest(described)
    write(path, save(tensors, {KEY: json.dumps(described, sort_keys=True)}))


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file written by `save_tensors`, verified by their own checksum.

    Raises: UserError if the file is missing, damaged or was not written by equilab.
    """
    return _open(path)[0]


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file written by `save_tensors`, its checksum verified.

    Raises: UserError if the file is missing, damaged or was not written by equilab.
    """
    metadata, tensors = _open(path, True)
    if checksum(tensors) != metadata["checksum"]:
        raise unreadable(path, "its content does not match its checksum")
    return tensors, metadata


def _open(path: Path, content: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if content else {}
    except Exception as error:  # one of a dozen types, by where it is damaged
        raise unreadable(path, error) from None
    if KEY not in metadata:
        raise UserError(
            f"{path} was not written by equilab; read the authors' checkpoints with equilab.published.load"
        )
    try:
        described = json.loads(metadata[KEY])
        written = described.pop(OF_METADATA, None)  # of files that were written before there was one
        intact = written in (None, digest(described)) and "checksum" in described
    except (ValueError, AttributeError, RecursionError) as error:
        raise unreadable(path, error) from None
    if not intact:
        raise unreadable(path, "its metadata do not match their checksum")
    return described, tensors


def load_network(path: Path, config: Any = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that a training stage wrote (evaluation mode), and the metadata kept with its weights.

    `config` is the stage's config in the study's params, if the weights must be of that.

    Raises: UserError if the file is damaged, or holds a network of another configuration or of no known family.
    """
    tensors, metadata = load_tensors(path)
    if config is not None and (differing := difference(metadata.get("config"), plain(config))):
        key, before, now = differing
        raise unusable(path, f"was trained with {key} {shown(before)}, params.yaml gives {shown(now)}")
    network = _network(path, metadata) if config is None else config.network
    net = network.build(tuple(metadata["image"]), metadata["classes"])
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise unusable(path, f"does not fit its own config ({reason})") from None
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last), metadata


def _network(path: Path, metadata: Mapping[str, Any]) -> Spec:
    """Return what builds the network of some weights: their family or, where they name none, a family of their stage; a stage
    that trains no generator trains a classifier."""
    try:
        network, name = metadata["config"]["network"], metadata.get("family")
        known = [family(name)] if name is not None else families(metadata["stage"]).values()
    except (KeyError, TypeError):
        raise unusable(path, "does not say what network it is of") from None
    kinds = {each.kind: each.network for each in known} or CLASSIFIERS
    return spec(kinds, network, f"{path}: network")
