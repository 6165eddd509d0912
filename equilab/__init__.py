"""equilab: one-step and equilibrium generators on one teacher, one data path, one metric and one cost currency.

>>> import equilab
>>> model = equilab.load("models/get")
>>> samples = model.sample(16, label=3, seed=0, iterations=6)
>>> equilab.show(samples)
"""

from __future__ import annotations

import sys

if sys.orig_argv[1:3] == ["-m", "equilab"]:  # a command, of which this is what Python runs first
    from equilab import launching

    sys.excepthook = launching.say

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import pandas as pd

    from equilab import published, style
    from equilab.core.config import UserError
    from equilab.sampling.generators import Generator
    from equilab.sampling.samples import Samples
    from equilab.tables import Results

__version__ = "0.1.0"
__all__ = [
    "Generator",
    "Results",
    "Samples",
    "UserError",
    "load",
    "published",
    "published_numbers",
    "push",
    "results",
    "show",
    "style",
    "watch",
]

# where the names lead that are no functions of this module; each is imported when it is first asked for
ELSEWHERE = {
    "Generator": "equilab.sampling.generators",
    "Results": "equilab.tables",
    "Samples": "equilab.sampling.samples",
    "UserError": "equilab.core.config",
    "published": "",
    "style": "",
}


def load(
    path: Path | str,
    *,
    seed: int | None = None,
    device: str = "auto",
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
    vae: Path | str | None = None,
) -> Generator:
    """Return a trained run as a model that draws images, by the path of its folder.

    The folder is that of a run ("results/distill/get-m"; its first seed, or `seed`), of one of its seeds, of the teacher, or
    one that was given away, here or on the Hugging Face Hub ("hf://owner/name"); a file of weights, such as a snapshot,
    will do too. `device` is "cpu", "cuda" or "auto"; `vae` the folder of the autoencoder of a model that makes latents,
    where its study does not say it.

    >>> equilab.load("models/get").sample(16, label=3, iterations=6)

    Raises: UserError if the weights are missing or damaged, or `seed`, `precision` or `vae` does not fit them.
    """
    from equilab.sampling.opening import open_run  # torch, which takes seconds

    return open_run(path, seed=seed, device=device, precision=precision, vae=vae)


def push(path: Path | str, name: str) -> str:
    """Put a run on the Hugging Face Hub under "owner/name", with a card that says what it is; return its address.

    `path` is the folder of a run, or one that `python -m equilab card` wrote, whose card may have been edited.

    >>> equilab.push("results/distill/get-m", "owner/get-digits")

    Raises: UserError if there are no weights, there is no network, or the hub does not let you write there.
    """
    import tempfile

    from equilab.card import give
    from equilab.sampling.hub import checked_name, upload

    checked_name(name)
    if (Path(path) / "config.json").exists():
        return upload(Path(path), name)
    with tempfile.TemporaryDirectory() as folder:
        give(path, Path(folder))
        return upload(Path(folder), name)


def show(samples: Samples | np.ndarray, columns: int | None = None) -> None:
    """Show samples of a model, or images (N, C, H, W) uint8, side by side in a notebook.

    >>> equilab.show(model.sample(16))

    Raises: UserError for anything else.
    """
    from IPython.display import Image, display

    from equilab.sampling.pictures import grid, png, require_images

    images = getattr(samples, "images", samples)
    require_images(images, columns)
    display(Image(png(grid(images, columns))))


def watch(path: Path | str, seconds: float | int = 5) -> None:
    """Draw the loss of a run's seeds in a notebook, and again every so many seconds as long as one of them trains.

    `path` is the folder of a run, whether it has results already or not.

    >>> equilab.watch("results/distill/get-m")

    Raises: UserError if the run has reported nothing yet.
    """
    from equilab.curve import watch  # pandas and more

    watch(path, seconds)


def results(folder: Path | str = "results", shows: Iterable[str] | None = None) -> Results:
    """Return a study's results folder as tidy tables: runs, settings, snapshots, costs.

    >>> equilab.results("results").runs[["of", "seed", "parameters", "fd_train"]]

    `shows`, for notebooks that a study executes: what of the results the tables hold, such as ["distill", "cost", "claims/get"].

    Raises: UserError if it holds no evaluated run, or `shows` names what no stage writes.
    """
    from equilab.tables import results  # pandas, needed for this alone

    return results(folder, shows)


def published_numbers(name: str) -> pd.DataFrame:
    """Return a table of the papers' numbers by its name, such as "get_runs" (the CSV files of equilab/claims).

    >>> equilab.published_numbers("get_runs")

    Raises: UserError naming the nearest, if there is none of that name.
    """
    from equilab.claims import published

    return published(name)


def __getattr__(name: str) -> Any:
    """Return what is imported when it is first asked for."""
    if name not in ELSEWHERE:
        raise AttributeError(f"module 'equilab' has no attribute {name!r}")
    place = ELSEWHERE[name]
    return (
        getattr(importlib.import_module(place), name) if place else importlib.import_module(f"equilab.{name}")
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
