"""What the two protocols return that models are called by: of a denoiser, and of a generator."""

from __future__ import annotations

from typing import Any, NamedTuple


class Generated(NamedTuple):
    """What `generate(noise, label)` returns: the image (B, C, H, W) in -1..1, and the Solution of an implicit model or None."""

    image: Any
    solution: Any


class Denoised(NamedTuple):
    """What `denoise(x, sigma, label, carry=None)` returns: D(x; sigma) (B, C, H, W), the carry for the next call, the Solution.

    `carry` and `solution` are None for explicit models.
    """

    image: Any
    carry: Any
    solution: Any
