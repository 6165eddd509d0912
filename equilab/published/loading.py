"""A model filled with published weights: every tensor of the checkpoint is used, and every one of the model filled."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from equilab.models.family import family as family_of
from equilab.models.published_keys import nearest_key, need
from equilab.models.registry import FAMILIES


def load(family: str, weights: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Build the model of `family` that published weights describe and fill it; returned in evaluation mode, float32.

    `weights` is a safetensors file or a mapping from published key names to tensors. Sizes are inferred from the
    tensors where these determine them and taken from `config` (our words: `heads`, ...) where they do not.

    Raises: ValueError for an unknown family, a missing, unexpected or misshapen key (with the nearest one), or a
        `config` entry that the family does not take; FileNotFoundError for a path that is not there.
    """
    build = _builder(family)
    if not isinstance(weights, Mapping):
        weights = _read(Path(weights))
    _check_config(family, build, config)
    model, keys = build(weights, **config)
    _fill(family, model, keys, weights)
    return model.eval().requires_grad_(True)


def _builder(family: str) -> Callable[..., tuple[nn.Module, dict[str, str]]]:
    known = [name for name in FAMILIES if family_of(name).published is not None]
    if family not in known:
        near = difflib.get_close_matches(family, known, 1, 0)[0]
        raise ValueError(f"unknown family {family!r}; known are {', '.join(known)} (nearest: {near})")
    return family_of(family).published


def _check_config(family: str, build: Callable, config: Mapping[str, Any]) -> None:
    entries = list(inspect.signature(build).parameters.values())[1:]
    known = [entry.name for entry in entries]
    for name in config:
        if name not in known:
            raise ValueError(
                f"{family} takes no {name!r}{nearest_key(name, known)}; it takes {', '.join(known) or 'nothing'}"
            )
    for entry in entries:
        if entry.default is entry.empty and entry.name not in config:
            raise ValueError(
                f"{family} needs {entry.name}, which its tensors do not determine; give {entry.name}=..."
            )


@torch.no_grad()
def _fill(family: str, model: nn.Module, keys: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Copy the published tensors into the model, after a look at all of them."""
    own = model.state_dict()
    for published in keys:
        need(weights, published)
    for published in weights:
        if published not in keys:
            raise ValueError(
                f"unexpected key {published!r} in the published weights{nearest_key(published, keys)}"
            )
    for published, ours in keys.items():
        if weights[published].shape != own[ours].shape:
            raise ValueError(
                f"published key {published!r} has shape {tuple(weights[published].shape)}, "
                f"the {family} model built here needs {tuple(own[ours].shape)}; check the sizes given as config"
            )
    for published, ours in keys.items():
        own[ours].copy_(weights[published])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give the path of a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); convert the checkpoint first"
        ) from None
