"""How a family is read from the weights that its authors published: its sizes, its keys, and sentences about those that do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Described(NamedTuple):
    """The model that published weights describe."""

    image: tuple[int, int, int]  # with `classes` and `sizes`, what its family's network is built with
    classes: int
    sizes: dict[str, Any]
    settings: dict[str, Any]  # what params say of such a model beside its network


@dataclass(frozen=True)
class Published:
    """How a family is read from published weights, whose keys are those within the network, without what all begin with."""

    describe: Callable[..., Described]  # (weights, **config), where config is what the weights do not tell
    keys: Callable[[nn.Module], dict[str, str]]  # network -> {published key: our key}
    signs: tuple[str, ...]  # beginnings of keys that all weights of the family have
    config: Callable[[Mapping[str, Any]], dict[str, Any]]  # the authors' settings -> those of `describe`
    module: str | None = None  # the authors' class around the network; with another it is another model


def heads_of(sizes: Mapping[str, Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a `config` that says the heads of the model which the settings name, if it is among these by its name."""

    def config(settings: Mapping[str, Any]) -> dict[str, Any]:
        found = sizes.get(settings.get("model"))
        return {"heads": found["heads"]} if found else {}

    return config


def need(weights: Mapping[str, Tensor], key: str, dimensions: int | None = None) -> Tensor:
    """Return weights[key], of so many dimensions.

    Raises: ValueError naming the nearest key there is, if the key is missing, or its shape, if it has other dimensions.
    """
    if key not in weights:
        raise ValueError(f"published key {key!r} is missing from the weights{nearest_key(key, weights)}")
    tensor = weights[key]
    if dimensions is not None and (tensor.ndim != dimensions or 0 in tensor.shape):
        raise ValueError(
            f"published key {key!r} has shape {tuple(tensor.shape)}, which tells no size; "
            f"it should have {dimensions} dimensions"
        )
    return tensor


def blocks_of(weights: Mapping[str, Tensor], stack: str) -> int:
    """Return how many blocks of a stack the weights are of; their keys begin with `stack`, a dot and the block's number."""
    return len({key.split(".")[1] for key in weights if key.startswith(f"{stack}.")})


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown key: the nearest known one, if any is near."""
    near = difflib.get_close_matches(key, list(known), 1, 0.3)
    return f"; the nearest is {near[0]!r}" if near else ""
