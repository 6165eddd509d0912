"""Images from Hugging Face `datasets`: of the hub by name, or of a local folder (parquet, arrow, images in class folders)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equilab.core.config import Params, UserError, nearest
from equilab.data.reading import HIDDEN, IMAGE, Images, Refusals, RefusedError, decode, expanded, suffix

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of a dataset of the hub
SAVED = ("dataset_dict.json", "state.json")  # of folders that `save_to_disk` wrote


class Datasets(Params):
    """What to read of a dataset: its subset and revision, null for the usual ones; columns of images and, null for none, of
    labels; splits for training and, null to hold images out, for testing."""

    subset: str | None
    revision: str | None  # of the hub: a commit, a tag or a branch; only a commit is always the same images
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
    try:
        found, others = _load(path, config, cache)
    except UserError:
        raise
    except Exception as error:  # one of a dozen types, by what is missing
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.path: the dataset {path} cannot be read ({reason}); correct data.path and data.datasets, mend the folder "
            "or, for the hub, connect to a network and log in where it asks for that"
        ) from None
    names = {"train": config.train, "test": config.test}
    others += {f"rows of the split {name}": len(found[name]) for name in found.keys() - set(names.values())}
    splits = {}
    for key, name in names.items():
        if name is not None:
            _require(f"data.datasets.{key}", name, list(found))
            splits[key] = _images(found[name], f"the split {name} of {path}", config, others)
    return splits


def _load(path: str, config: Datasets, cache: Path) -> tuple[Mapping[str, Any], Counter]:
    """Return the splits of a dataset by their names, and how many files are passed over."""
    import datasets

    if (folder := locate(path)) is None:
        return datasets.load_dataset(path, config.subset, revision=config.revision), Counter()
    if config.revision is not None:
        raise UserError("data.datasets.revision is given, but data.path is a local folder; set it to null")
    if any((folder / name).exists() for name in SAVED):
        saved = datasets.load_from_disk(str(folder))
        return saved if isinstance(saved, dict) else {"train": saved}, Counter()
    builder = datasets.load_dataset_builder(str(folder), config.subset, cache_dir=str(cache))
    others = Counter() if config.subset else _passed_over(folder, builder.config.data_files)
    builder.download_and_prepare()
    return builder.as_dataset(), others


def _passed_over(folder: Path, data_files: Mapping[Any, list[str]]) -> Counter:
    """Return how many files of a local folder are no data, by suffix.

    Raises: UserError if some are of a kind that is data.
    """
    read = {Path(file).resolve() for files in data_files.values() for file in files}
    kinds, others = {suffix(file.name) for file in read}, Counter()
    refusals, files = Refusals(f"data.path ({folder})"), sorted(filter(Path.is_file, folder.rglob("*")))
    for file in files:
        name = file.relative_to(folder)
        if any(map(HIDDEN.match, name.parts)):
            others["hidden"] += 1
        elif file.resolve() not in read:
            others[suffix(file.name)] += 1
            if suffix(file.name) in kinds or IMAGE.search(file.name):
                refusals.add(name.as_posix(), RefusedError("unread"))
    refusals.check(len(files))
    return others


def _images(rows: Any, where: str, config: Datasets, others: Counter) -> Images:
    """Return the images of a split, a `datasets.Dataset`, decoded as those of files are, with their labels."""
    from datasets import ClassLabel, Image

    _require("data.datasets.image", config.image, rows.column_names)
    try:
        pictures = rows.select_columns([config.image]).cast_column(config.image, Image(decode=False))
    except Exception as error:  # as many types as there are kinds of columns
        raise UserError(
            f"data.datasets.image: {config.image} in {where} holds no images ({error}); name another"
        ) from None

    def read(index: int) -> np.ndarray:
        picture = pictures[index][config.image]
        try:
            content = picture["bytes"] or Path(picture["path"]).read_bytes()
        except (OSError, TypeError) as error:  # the latter: an empty place
            raise RefusedError("damaged", error) from None
        return decode(content)

    names = [f"row {index} in {where}" for index in range(len(rows))]
    if config.label is None:
        return Images(names, read, None, None, others)
    _require("data.datasets.label", config.label, rows.column_names)
    labels, feature = list(rows[config.label]), rows.features[config.label]
    for name, label in zip(names, labels):
        if type(label) is not int or label < 0:
            raise UserError(
                f"{name} has the label {label!r}; labels must be whole numbers from 0, as `class_encode_column` of datasets "
                "makes them of words"
            )
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return Images(names, read, np.array(labels, dtype=np.int64), classes, others)


def _require(key: str, name: str, known: list[str]) -> None:
    """Refuse a name that a dataset does not have."""
    if name not in known:
        raise UserError(f"{key}: {name!r} is not in the dataset{nearest(name, known)}")
