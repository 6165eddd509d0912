"""Images from Hugging Face `datasets`: of the hub by name, or of a local folder (parquet, arrow, images in class folders)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equilab.core.config import Params, UserError, nearest
from equilab.data.reading import Images, Refusals, RefusedError, decode, expanded

if TYPE_CHECKING:
    from datasets import Dataset

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of a dataset of the hub


class Datasets(Params):
    """What to read of a dataset: its subset and revision, null for the usual ones; columns of images and, null for none, of
    labels; splits for training and, null to hold images out, for testing."""

    subset: str | None
    revision: (
        str | None
    )  # of the hub: a commit, a tag or a branch; the former alone gives the same images for ever
    image: str
    label: str | None
    train: str
    test: str | None


def locate(path: str) -> Path | None:
    """Return the folder that `data.path` leads to, or None if it is the name of a dataset of the hub.

    Raises: UserError if it can be neither.
    """
    folder = expanded(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not NAME.fullmatch(path):
        raise UserError(
            f"data.path ({path}) is no folder and no name of a dataset of the Hugging Face hub; correct the key"
        )
    return None


def open_splits(path: str, config: Datasets, cache: Path) -> dict[str, Images]:
    """Return the images of the splits: "train" and, if params name one, "test". A local folder is converted in `cache`.

    Raises: UserError if the dataset cannot be had or lacks what params name, or files of it would be passed over.
    """
    folder = locate(path)
    if folder is not None and config.revision is not None:
        raise UserError(
            f"data.datasets.revision is given, but data.path ({path}) is a local folder; set it to null"
        )
    found, others = _load(path, folder, config, cache)
    splits = {}
    for key, name in (("train", config.train), ("test", config.test)):
        if name is not None:
            if name not in found:
                raise UserError(
                    f"data.datasets.{key}: {path} has no split {name!r}{nearest(name, list(found))}"
                )
            splits[key] = _images(found[name], name, path, config)._replace(others=others)
    return splits


def _load(
    path: str, folder: Path | None, config: Datasets, cache: Path
) -> tuple[dict[str, Dataset], dict[str, int]]:
    """Return the splits of a dataset by their names, and how many files and rows are passed over."""
    import datasets

    try:
        if folder is not None and any(
            (folder / name).exists() for name in ("dataset_dict.json", "state.json")
        ):
            saved = datasets.load_from_disk(str(folder))
            found, others = (saved if isinstance(saved, dict) else {"train": saved}), Counter()
        else:
            given = {"name": config.subset, "revision": config.revision}
            if folder is not None:
                given["cache_dir"] = str(cache)
            builder = datasets.load_dataset_builder(path if folder is None else str(folder), **given)
            others = _passed_over(folder, builder, config)
            builder.download_and_prepare()
            found = builder.as_dataset()
    except UserError:
        raise
    except Exception as error:  # one of a dozen types, by what is missing
        reason = str(error).partition("\n")[0]
        remedy = "mend the folder" if folder else "connect to a network, log in, or give a local folder"
        raise UserError(
            f"data.path: the dataset {path} cannot be read ({type(error).__name__}: {reason}); {remedy}"
        ) from None
    for name in found.keys() - {config.train, config.test}:
        others[f"rows of the split {name}"] += len(found[name])
    return found, dict(sorted(others.items()))


def _passed_over(folder: Path | None, builder: Any, config: Datasets) -> Counter:
    """Return how many files of a local folder are no data, by suffix.

    Raises: UserError if some are of a kind that is data.
    """
    others, refusals = Counter(), Refusals(f"data.path ({folder})")
    if folder is None or config.subset is not None:
        return others
    read = {Path(file).resolve() for files in builder.config.data_files.values() for file in files}
    data = {suffix(file.name) for file in read}
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(file for file in files if file.resolve() not in read):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if suffix(file.name) in data or IMAGE.search(file.name):
            refusals.add(name.as_posix(), RefusedError("unread"))
        others[suffix(file.name)] += 1
    refusals.check(len(files))
    return others


def _images(rows: Dataset, split: str, path: str, config: Datasets) -> Images:
    """Return the images of a split, read as those of files are, with their labels."""
    from datasets import ClassLabel, Image

    for key in ("image", "label"):
        column = getattr(config, key)
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"data.datasets.{key}: {path} has no column {column!r}{nearest(column, rows.column_names)}"
            )
    try:
        pictures = rows.select_columns([config.image]).cast_column(config.image, Image(decode=False))
    except Exception as error:  # as many types as there are columns
        raise UserError(
            f"data.datasets.image: the column {config.image!r} of {path} holds {rows.features[config.image]}, not images "
            f"({error}); name another"
        ) from None

    def read(index: int) -> np.ndarray:
        picture = pictures[index][config.image]
        if picture is None:
            raise RefusedError("damaged", "empty")
        if picture["bytes"] is not None:
            return decode(picture["bytes"])
        try:
            return decode(Path(picture["path"]).read_bytes())
        except OSError as error:
            raise RefusedError("damaged", error) from None

    names = [f"row {i} of the split {split} of {path}" for i in range(len(rows))]
    if config.label is None:
        return Images(names, read, None)
    labels, feature = list(rows[config.label]), rows.features[config.label]
    for name, label in zip(names, labels):
        if type(label) is not int or label < 0:
            raise UserError(
                f"{name} has the label {label!r}; labels must be whole numbers from 0, into which `class_encode_column` of "
                "datasets turns words"
            )
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return Images(names, read, np.array(labels, dtype=np.int64), classes)
