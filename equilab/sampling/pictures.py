"""Samples as files: a grid to look at, an image a file, or what the evaluators of this field read."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from equilab.core.config import UserError
from equilab.core.files import write, write_arrays
from equilab.sampling.samples import Samples

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
    rows = np.split(padded, len(padded) // columns)  # (columns, C, H + GAP, W + GAP) each
    wide = [np.concatenate(row, 2) for row in rows]  # (C, H + GAP, columns (W + GAP)) each
    return picture(np.concatenate(wide, 1)[:, :-GAP, :-GAP])


def require_place(out: Path) -> None:
    """Refuse a place for samples that `save` could not write, before they are made.

    Raises: UserError saying which places can be.
    """
    if out.suffix.lower() not in (".png", ".npz", ""):
        raise UserError(
            f"{out} is none of GRID.png, ARRAYS.npz and a folder for an image a file; give one of these"
        )
    for above in out.parents:
        if above.exists() and not above.is_dir():
            raise UserError(f"{above} is a file, not a folder; give another place than {out}")
    empty = not out.suffix and out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty:
        raise UserError(f"{out} is there already; give a new name, or remove it")


def require_images(images: Any, columns: Any = None) -> None:
    """Refuse what `grid` could not show.

    Raises: UserError saying what it is, and what can be shown.
    """
    is_array = isinstance(images, np.ndarray)
    fits = is_array and images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
    if not fits or images.size == 0:
        what = f"{images.dtype} of shape {images.shape}" if is_array else type(images).__name__
        raise UserError(
            f"the images are {what}; give samples of a model, or an array of uint8 of shape (count, channels, height, width), "
            "of 1 or 3 channels"
        )
    if columns is not None and (not isinstance(columns, (int, np.integer)) or columns < 1):
        raise UserError(f"columns is {columns!r}; give a whole number from 1 on")


def save(samples: Samples, out: Path) -> None:
    """Write samples: NAME.png is a grid; NAME.npz holds `arr_0`, the images (N, H, W, C), and their classes, if they have any, as
    `arr_1`; a name without a suffix is a folder of a PNG for each image.

    Raises: UserError if it cannot be written.
    Source: the layout of .npz is that of guided-diffusion (Dhariwal 2021), whose evaluator and others read it.
    """
    require_place(out)
    if out.suffix.lower() == ".npz":
        arrays = {"arr_0": samples.images.transpose(0, 2, 3, 1), "arr_1": samples.labels}
        write_arrays(out, {name: array for name, array in arrays.items() if array is not None})
    elif out.suffix:
        write(out, png(grid(samples.images)))
    else:
        for number, image in enumerate(samples.images):
            write(out / f"{number:06d}.png", png(picture(image)))


def png(image: Image.Image) -> bytes:
    """Return a picture as a file of PNG."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def picture(image: UInt8[np.ndarray, "c h w"]) -> Image.Image:
    """Return an image, grey or of three channels, as Pillow has it."""
    from PIL import Image

    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
