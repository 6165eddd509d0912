"""What a user gets of a model: images with what was done for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8


@dataclass(frozen=True)
class Samples:
    """Images of a model, 0..255, and what was done for them.

    `residuals` holds the relative residual after each application of the fixed-point map, in the order in which they were
    made, nan where an image needed none; with guidance, the mean of both halves.
    """

    images: UInt8[np.ndarray, "n c h w"]
    labels: Int64[np.ndarray, n] | None  # their classes; None of a model that knows none
    nfe: int  # calls of the network for an image
    iterations: Int64[np.ndarray, n] | None = None  # applications of the map for each; None without one
    residuals: Float32[np.ndarray, "n k"] | None = None
    diverged: Bool[np.ndarray, n] | None = None  # whose solver or chain broke; None where there is neither

    def __len__(self) -> int:
        return len(self.images)


def joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of several batches as one."""
    found = {}
    for field in fields(Samples):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "residuals" and values[0] is not None:
            values = _as_wide(values)
        found[field.name] = np.concatenate(values) if isinstance(values[0], np.ndarray) else values[0]
    return Samples(**found)


def _as_wide(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return arrays (N, K) of the same width, what is missing nan: batches may have needed different numbers of applications."""
    widest = max(array.shape[1] for array in arrays)
    gaps = [((0, 0), (0, widest - array.shape[1])) for array in arrays]
    return [np.pad(array, gap, constant_values=np.nan) for array, gap in zip(arrays, gaps)]
