"""`python -m equilab score IMAGES [--params FILE]`: scores of anyone's images, as a study scores those of its runs."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from equilab.core.config import UserError
from equilab.core.job import folder_of
from equilab.core.machine import device_of
from equilab.core.progress import bar
from equilab.data import reading
from equilab.data.images import load
from equilab.data.reading import REFUSALS, RefusedError, expanded, open_images
from equilab.metrics.fidelity import BATCH, CACHE, SPLITS, Images, Scorer
from equilab.study import Replicate, job_of, open_study

ACCEPTED = "a folder or zip of images, an .npz with the images as arr_0, or an .npy"


def command(arguments: list[str]) -> int:
    """Score images on the evaluator of a study, against its training images and those held out."""
    parser = argparse.ArgumentParser(prog="equilab score", description=__doc__)
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        help=ACCEPTED,
    )
    parser.add_argument(
        "--params", metavar="FILE", type=Path, default=Path("params.yaml"), help="the study's params"
    )
    given = parser.parse_args(arguments)
    for name, value in score(given.images, given.params).items():
        print(f"{name:<16} {value:.6g}")
    return 0


def score(path: Path, params: Path) -> dict[str, float]:
    """Return the scores of images as `Scorer.scores` names them: precision and recall are against training images.

    Raises: UserError if the images cannot be read, are too few or of another shape than the study's, or the study has not
        run its stages `data` and `evaluator`.
    """
    path = expanded(str(path)).absolute()
    found = _opened(path)
    sections = open_study(params)
    os.chdir(params.absolute().parent)
    job = job_of(sections, "evaluator", Replicate())
    config = job.read("evaluator")
    _require_stages(params)
    shape = load(folder_of("data"), "train").images.shape[1:]
    count, images = _arrays(path, found, shape) if isinstance(found, np.ndarray) else _files(found, shape)
    if count < SPLITS:
        raise UserError(f"{path} holds {count} images, scores need {SPLITS} or more; give more")
    if count != config.samples:
        print(
            f"equilab: the study scores {config.samples:,} images of a run, these are {count:,}; only scores of equally many "
            "images can be compared",
            file=sys.stderr,
        )
    scorer = Scorer(folder_of("evaluator"), folder_of("data"), CACHE, device_of(job), config)
    return scorer.scores(images)


def _opened(path: Path) -> np.ndarray | reading.Images:
    """Return the array in a file of numpy's, in an .npz that called `arr_0`; or the images in a folder or zip.

    Raises: UserError if it is none of these, or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} is not there; give {ACCEPTED}")
    if path.suffix not in (".npz", ".npy"):
        if not path.is_dir() and path.suffix != ".zip" and not zipfile.is_zipfile(path):
            raise UserError(f"{path} is none of what is scored; give {ACCEPTED}")
        return open_images(path, "IMAGES", labelled=False)
    try:
        found = np.load(path, mmap_mode="r")
        return found if isinstance(found, np.ndarray) else found["arr_0"]
    except KeyError:
        raise UserError(
            f"{path} has no arr_0, in which the images are looked for; rename the array"
        ) from None
    except Exception as error:  # a damaged file raises what its damage leads to
        raise UserError(
            f"{path} cannot be read ({error}); write it again, by numpy.savez or numpy.save"
        ) from None


def _require_stages(params: Path) -> None:
    """Refuse a study, whose folder is the current one, that has not run the stages which scores need.

    Raises: UserError naming the commands that run them.
    """
    results = {
        "data": folder_of("data") / "meta.json",
        "evaluator": folder_of("evaluator") / "weights.safetensors",
    }
    missing = [stage for stage, result in results.items() if not result.exists()]
    if missing:
        commands = " and ".join(f"`python -m equilab {stage} --params {params}`" for stage in missing)
        raise UserError(f"{params}: {results[missing[0]]} is not there; run {commands} first")


def _arrays(path: Path, images: np.ndarray, shape: tuple[int, ...]) -> tuple[int, Images]:
    """Return the number of images in an array, and the images (N, C, H, W); the channels may come last."""
    if images.ndim == 4 and images.shape[1:] != shape:
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise UserError(
            f"{path} holds {images.dtype} {images.shape}; the study scores uint8 images of channels, height and width {shape}, "
            "in an .npz with the channels last"
        )
    return len(images), images


def _files(images: reading.Images, shape: tuple[int, ...]) -> tuple[int, Images]:
    """Return the number of images in a folder or zip, and batches of them."""
    count = len(images.names)

    def batches() -> Iterator[np.ndarray]:
        with bar("images", count, delay=5) as progress:
            for start in range(0, count, BATCH):
                numbers = range(start, min(start + BATCH, count))
                yield np.stack([_image(images, number, shape) for number in numbers])
                progress.update(len(numbers))

    return count, batches()


def _image(images: reading.Images, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image.

    Raises: UserError if it cannot be read, or has another shape.
    """
    try:
        image = images.read(number)
        if image.shape != shape:
            raise RefusedError("shape", list(image.shape))
    except RefusedError as refused:
        where, why = f"{images.names[number]}{refused.detail}", REFUSALS[refused.reason]
        raise UserError(f"{where} is refused: such images {why}") from None
    return image
