"""The keys of published weights: finding one, and the sentence about one that is missing or does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from torch import Tensor


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


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown key: the nearest known one, if any is near."""
    near = difflib.get_close_matches(key, list(known), 1, 0.3)
    return f"; the nearest is {near[0]!r}" if near else ""
