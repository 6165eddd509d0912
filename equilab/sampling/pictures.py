"""Images as pictures: one grid of them to look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL import Image

SIDE = 64  # pixels: smaller images are enlarged in a grid, a whole number of times
GAP = 2  # pixels between images


def grid(images: UInt8[np.ndarray, "n c h w"], columns: int | None = None) -> Image.Image:
    """Return images side by side in one picture, row by row; by default in as many rows as columns."""
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    times = max(1, SIDE // max(height, width))
    large = images.repeat(times, 2).repeat(times, 3)  # (N, C, H, W)
    missing = -count % columns
    padded = np.pad(large, ((0, missing), (0, 0), (0, GAP), (0, GAP)), constant_values=255)
    rows = [
        np.concatenate(row, 2) for row in np.split(padded, len(padded) // columns)
    ]  # (C, H, columns W) each
    return picture(np.concatenate(rows, 1)[:, :-GAP, :-GAP])


def picture(image: UInt8[np.ndarray, "c h w"]) -> Image.Image:
    """Return an image, grey or of three channels, as Pillow has it."""
    from PIL import Image

    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
