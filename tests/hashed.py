"""Weights that are a function of their key: what the full-size reference values were computed with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from equilab import published
from equilab.models import dit
from equilab.models.layers import sine_cosine_table


def signed_uniform(key: str, count: int) -> np.ndarray:
    """Return `count` float64 values in -1..1: splitmix64 of (element + crc32(key) * 2^32), its top 24 bits."""
    z = np.arange(count, dtype=np.uint64) + (np.uint64(zlib.crc32(key.encode())) << np.uint64(32))
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def hashed_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return float32 tensors of the given shapes by the hash rule, under the same (published) keys.

    Fixed tables (`pos_embed`, `resample_filter`) keep their normal values: leave them out and add them afterwards.
    """
    return {key: torch.from_numpy(_value(key, shape).astype(np.float32)) for key, shape in shapes.items()}


def _value(key: str, shape: Sequence[int]) -> np.ndarray:
    s = signed_uniform(key, math.prod(shape)).reshape(tuple(shape))
    if key.endswith("freqs"):
        return 16 * s
    if len(shape) >= 2:
        return s * np.sqrt(3 / math.prod(shape[1:]))
    return 1 + 0.1 * s if key.endswith("weight") else 0.1 * s


def hashed_model(family: str, kind, image: Sequence[int], classes: int, sizes: Mapping, **config):
    """Return the DiT or FPDM (`kind`) of these sizes, loaded by `family` and `config` from weights by the hash rule."""
    with torch.device("meta"):
        model = kind(tuple(image), classes, **sizes)
    state, names = model.state_dict(), dit.published_keys(model)
    shapes = {key: state[ours].shape for key, ours in names.items() if key != "pos_embed"}
    table = sine_cosine_table(sizes["width"], image[1] // sizes["patch"], image[2] // sizes["patch"])
    return published.load(
        family, hashed_weights(shapes) | {"pos_embed": table}, heads=sizes["heads"], **config
    )
