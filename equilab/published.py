"""Reads the authors' checkpoints into our models, without running anything in them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# family -> where its `from_published(weights, **config) -> (module, {published key: our key})` lives
FAMILIES = {
    "dit": "equilab.models.dit",
    "edm": "equilab.models.precond",
    "fpdm": "equilab.models.fpdm",
    "gdd": "equilab.models.gdd",
    "get": "equilab.models.get",
    "vit": "equilab.models.vit",
}


def load(family: str, weights: str | Path | Mapping[str, Tensor], **config) -> nn.Module:
    """Build the model of `family` that published weights describe and fill it; returned in evaluation mode, float32.

    `weights` is a safetensors file or a mapping from published key names to tensors. Sizes are inferred from the
    tensors where these determine them and taken from `config` (our words: `heads`, ...) where they do not.

    Raises: ValueError for an unknown family, a missing, unexpected or misshapen key (with the nearest one), or a
        `config` entry that the family does not take; FileNotFoundError for a path that is not there.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, 1, 0)
        raise ValueError(f"unknown family {family!r}; known are {', '.join(FAMILIES)} (nearest: {near[0]})")
    if not isinstance(weights, Mapping):
        weights = _read(Path(weights))
    builder = importlib.import_module(FAMILIES[family]).from_published
    _check_config(family, builder, config)
    model, names = builder(weights, **config)
    own = model.state_dict()
    _check_keys(weights, names)
    for published, ours in names.items():
        if weights[published].shape != own[ours].shape:
            raise ValueError(
                f"published key {published!r} has shape {tuple(weights[published].shape)}, "
                f"the {family} model built here needs {tuple(own[ours].shape)}; check the sizes given as config"
            )
    with torch.no_grad():
        for published, ours in names.items():
            own[ours].copy_(weights[published])
    return model.eval().requires_grad_(True)


def need(weights: Mapping[str, Tensor], key: str, dimensions: int | None = None) -> Tensor:
    """Return weights[key], of so many dimensions.

    Raises: ValueError naming the nearest key there is, if the key is missing, or its shape, if it has other dimensions.
    """
    if key not in weights:
        raise ValueError(f"published key {key!r} is missing from the weights{_nearest(key, weights)}")
    if dimensions is not None and (weights[key].ndim != dimensions or 0 in weights[key].shape):
        shape = tuple(weights[key].shape)
        raise ValueError(
            f"published key {key!r} has shape {shape}, which tells no size; it should have {dimensions} dimensions"
        )
    return weights[key]


def _check_config(family: str, builder, config: Mapping) -> None:
    entries = list(inspect.signature(builder).parameters.values())[1:]
    known = [entry.name for entry in entries]
    for name in config:
        if name not in known:
            raise ValueError(
                f"{family} takes no {name!r}{_nearest(name, known)}; it takes {', '.join(known) or 'nothing'}"
            )
    for entry in entries:
        if entry.default is entry.empty and entry.name not in config:
            raise ValueError(
                f"{family} needs {entry.name}, which its tensors do not determine; give {entry.name}=..."
            )


def _check_keys(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    for key in names:
        need(weights, key)
    for key in weights:
        if key not in names:
            raise ValueError(f"unexpected key {key!r} in the published weights{_nearest(key, names)}")


def _nearest(key: str, keys) -> str:
    near = difflib.get_close_matches(key, list(keys), 1, 0.3)
    return f"; the nearest is {near[0]!r}" if near else ""


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give the path of a safetensors file")
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); convert the checkpoint first"
        ) from None
