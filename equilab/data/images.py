"""Real images: the stage that writes them as uint8 arrays, their checked reading, and the one conversion of pixels."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator
from tqdm import tqdm

from equilab.core import rng
from equilab.core.checked import read_array
from equilab.core.config import Params, UserError, read_json, unreadable, unusable
from equilab.core.files import publishing, require_disk, scratch, sha256_of, write_array, write_json
from equilab.core.job import Job, Plan, folder_of
from equilab.core.process import is_first
from equilab.core.progress import bar
from equilab.data import reading
from equilab.data.hub import Datasets, locate, open_splits
from equilab.data.reading import Images, Refusals, RefusedError, expanded

# per source, the keys besides `source` that it reads: all of one group, and no others
READS = {
    "digits": [("test",)],
    "cifar10": [("path",)],
    "folder": [("path", "test"), ("path", "test_path")],
    "datasets": [("path", "datasets"), ("path", "test", "datasets")],
}

Size = Annotated[int, Field(ge=1, le=65_536)]  # channels, or pixels along a side


class Config(Params):
    """Where a study's real images come from; a key that the source does not read is null.

    `source`: "digits" (scikit-learn's 1,797 digits, 1x8x8, reads `test`), "cifar10" (torchvision's, reads `path`),
    "folder" (a zip or folder of images with labels in a dataset.json, in class folders, or none; reads `path` and one of
    `test_path` and `test`) or "datasets" (Hugging Face's, reads `path`, `datasets` and, without a split for testing,
    `test`). `path`, `test_path`: relative to the study's folder. `test`: images held out for the test split, drawn by the
    study's seed. `image`: (channels, height, width); `classes`: 0 for images without labels; the stage compares both with
    what it finds. `labels`: how those of generated images are drawn, from all classes alike or as frequently as training
    images have them; null without classes. `resize`: "box" reduces images to the size that `image` says as they are read,
    by `reduce_by_box`; without it they have that size.
    """

    source: Literal["digits", "cifar10", "folder", "datasets"]
    path: str | None
    test_path: str | None
    test: Annotated[int, Field(ge=1, le=10**10)] | None
    image: tuple[Size, Size, Size]
    classes: Annotated[int, Field(ge=0, le=reading.MOST_CLASSES)]
    datasets: Datasets | None
    labels: Literal["uniform", "frequency"] | None
    resize: Literal["box"] | None = None

    @model_validator(mode="after")
    def _reads(self):
        keys = ("path", "test", "test_path", "datasets")
        given = tuple(key for key in keys if getattr(self, key) is not None)
        if given not in READS[self.source]:
            wanted = " or ".join(" and ".join(keys) for keys in READS[self.source])
            raise ValueError(
                f"source {self.source} reads {wanted}, given are {', '.join(given) or 'none'}; "
                "give the keys that it reads and set the others to null"
            )
        if self.datasets is not None and (self.datasets.test is None) != (self.test is not None):
            raise ValueError("give either a split as datasets.test or a number of images to hold out as test")
        if (self.labels is None) != (self.classes == 0):
            raise ValueError(
                "labels says how classes are drawn: give it where there are any, and null where classes is 0"
            )
        if self.resize is not None and self.image[1] != self.image[2]:
            raise ValueError("resize makes square images: give image one height and width, or remove resize")
        return self


class Meta(BaseModel):
    """What meta.json says of the arrays beside it, as far as it is read."""

    counts: dict[Literal["train", "test"], PositiveInt]
    shape: tuple[Size, Size, Size]
    classes: NonNegativeInt
    sha256: dict[str, str]
    label_counts: tuple[PositiveInt, ...] | None = None

    @model_validator(mode="after")
    def _whole(self):
        arrays = ("images", "labels") if self.classes else ("images",)
        wanted = {f"{split}_{what}.npy" for split in ("train", "test") for what in arrays}
        if missing := sorted((wanted - self.sha256.keys()) | ({"train", "test"} - self.counts.keys())):
            raise ValueError(f"it says nothing of {missing[0]}")
        return self


class Dataset(NamedTuple):
    """One split of a study: images (N, C, H, W) memory-mapped, labels (N,) int64 or None, number of classes or 0.

    `label_counts`: how many training images each class has, where labels are drawn by it; None where they are uniform.
    """

    images: UInt8[np.ndarray, "n c h w"]
    labels: np.ndarray | None
    classes: int
    label_counts: tuple[int, ...] | None = None


Splits = dict[str, tuple[Images, np.ndarray]]  # "train" and "test": the images of a source, and which of them


def to_float(image: UInt8[Any, ...]) -> Float[Any, ...]:
    """Return uint8 pixels 0..255 as float32 -1..1: u / 127.5 - 1, for tensors and for arrays.

    Source: EDM, the training loop of NVlabs/edm.
    """
    return (image.astype(np.float32) if isinstance(image, np.ndarray) else image.float()) / 127.5 - 1


def to_uint8(image: Float[Any, ...]) -> UInt8[Any, ...]:
    """Return float pixels -1..1 as uint8, for tensors and for arrays: x * 127.5 + 128 clipped to 0..255 and cut to whole numbers.

    This rounds to the nearest level, so that to_uint8(to_float(u)) is u for every u.

    Raises: UserError for pixels that are not numbers, which no level stands for.
    Source: EDM, the image writer of NVlabs/edm.
    """
    as_array = isinstance(image, np.ndarray)
    level = (image.astype(np.float32) if as_array else image.float()) * 127.5 + 128
    if (level != level).any():
        raise UserError(
            "images hold pixels that are not numbers: what made them has diverged; train its run again at a lower lr"
        )
    return level.clip(0, 255).astype(np.uint8) if as_array else level.clip(0, 255).byte()


def reduce_by_box(image: UInt8[np.ndarray, "c h w"], side: int) -> UInt8[np.ndarray, "c s s"]:
    """Return the square in the middle of an image, each pixel the mean of the k x k pixels that it takes the place of.

    A mean is rounded to the nearest level, halves up. What is left over of the longer side is cut off alike at both ends, an
    odd pixel at the far one.

    Raises: RefusedError if the shorter side is not a whole number k of times `side`.
    """
    height, width = image.shape[1:]
    square = min(height, width)
    if square < side or square % side:
        raise RefusedError("multiple", f"{height} x {width} pixels to {side} x {side}")
    top, left, k = (height - square) // 2, (width - square) // 2, square // side
    boxes = image[:, top : top + square, left : left + square].reshape(-1, side, k, side, k)
    sums = boxes.sum(axis=(2, 4), dtype=np.uint32)
    return ((2 * sums + k * k) // (2 * k * k)).astype(np.uint8)


def load(folder: Path, split: str, verify: bool = False) -> Dataset:
    """Return the split, "train" or "test", that the stage `data` wrote into `folder`.

    Sizes and types are always compared with meta.json; `verify` compares the checksums as well, which reads all bytes.

    Raises: UserError naming the file that is missing, cut short, or not what meta.json says, and what to do.
    """
    folder = Path(folder)
    try:
        meta = Meta.model_validate_json((folder / "meta.json").read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(folder / "meta.json", error) from None
    count = meta.counts[split]

    def array(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return read_array(folder / name, shape, dtype, meta.sha256[name] if verify else None)

    images = array(f"{split}_images.npy", (count, *meta.shape), np.uint8)
    labels = np.array(array(f"{split}_labels.npy", (count,), np.int64)) if meta.classes else None
    return Dataset(images, labels, meta.classes, meta.label_counts)


def require_same(path: Path, made: Mapping[str, Any]) -> None:
    """Compare the data that a result was made of with those of the study, if these are there; `made` is what was kept with it.

    Raises: UserError if they are others.
    """
    data = folder_of("data") / "meta.json"
    kept = made.get("inputs", {}).get("data")
    if kept is not None and data.exists() and kept != sha256_of(data):
        raise unusable(path, f"was made of other images than {data.parent} holds now")


def label_counts(job: Job) -> dict[str, list[int]]:
    """Return how many training images each class has, as `label_counts`, if that decides how labels are drawn; or nothing.

    Raises: UserError if the stage `data` has not written it.
    """
    if job.read("data").labels != "frequency":
        return {}
    counts = read_json(folder_of("data") / "meta.json", label_counts=list[int])["label_counts"]
    return {"label_counts": counts}


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost; how many images there are is not known before they are read.

    Raises: UserError if there is nothing where params say that the images lie.
    """
    if config.source == "datasets":
        locate(config.path)
    if config.source == "folder":
        reading.require_paths({key: path for _, key, path in _paths(config)})
    return partial(Plan, disk=None)


def run(config: Config, job: Job) -> None:
    """Write train_images.npy, train_labels.npy, test_images.npy, test_labels.npy and meta.json into the stage's folder.

    The label files are absent where the source has no labels. The same source and seed give the same bytes. Memory
    does not grow with the number of images, but for their names.

    Raises: UserError naming the key or the file that is wrong, and what to do; images that are refused are counted.
    """
    if not is_first():
        return  # of several processes the first one does it
    with scratch(job) as converted, publishing(job.out, own="*.npy") as fresh:
        splits = _open(config, job.study.seed, converted)
        labels = _labels(config, splits)
        counts = {split: len(indices) for split, (_, indices) in splits.items()}
        require_disk({job.out: sum(counts.values()) * math.prod(config.image)})
        sha256 = _write_splits(config, splits, fresh)
        for split, found in labels.items():
            sha256[f"{split}_labels.npy"] = write_array(fresh / f"{split}_labels.npy", found)
        meta = {
            "source": config.source,
            "shape": config.image,
            "classes": config.classes,
            "counts": counts,
            "sha256": sha256,
        }
        if config.labels == "frequency":
            meta["label_counts"] = np.bincount(labels["train"]).tolist()
        if config.resize is not None:
            meta["resize"] = config.resize
        if (names := splits["train"][0].classes) is not None:
            meta["class_names"] = names
        write_json(fresh / "meta.json", meta)
    _tell(config, splits, labels)


def _open(config: Config, seed: int, converted: Path) -> Splits:
    """Return the splits of the source that params name; what must be converted to be read goes into the folder `converted`."""
    match config.source:
        case "digits":
            images = {"train": _digits()}
        case "cifar10":
            images = {split: _cifar10(config, split) for split in ("train", "test")}
        case "folder":
            images = {
                split: reading.open_images(path, key, bool(config.classes))
                for split, key, path in _paths(config)
            }
        case "datasets":
            images = open_splits(config.path, config.datasets, converted / "datasets")
    if "test" not in images:
        return _hold_out(images["train"], config.test, seed)
    return {split: (found, np.arange(len(found.names))) for split, found in images.items()}


def _paths(config: Config) -> list[tuple[str, str, Path]]:
    """Return the zips or folders of images that params give: their split, key and path."""
    given = [("train", "data.path", config.path), ("test", "data.test_path", config.test_path)]
    return [(split, key, expanded(path)) for split, key, path in given if path is not None]


def _labels(config: Config, splits: Splits) -> dict[str, np.ndarray]:
    """Return the labels of both splits, or none.

    Raises: UserError if only one has them, they mean different classes, or they are not those of params, each with images.
    """
    labels = {
        split: images.labels[items] for split, (images, items) in splits.items() if images.labels is not None
    }
    if len(labels) == 1:
        raise UserError(f"only the {next(iter(labels))} images have labels; give them to both or to none")
    train, test = (images.classes for images, _ in splits.values())
    if train != test:
        raise UserError(
            f"the classes of training images are {_some(train or ['numbers'])}, those of held-out images "
            f"{_some(test or ['numbers'])}; name the class folders of both alike, or give both a dataset.json"
        )
    used = np.unique(labels["train"]) if labels else np.arange(0)
    if labels and len(alone := np.setdiff1d(labels["test"], used)):
        raise UserError(
            f"only held-out images have the labels {_some(alone)}; give training images of these too"
        )
    if labels and used[-1] >= len(used):
        moved = [f"{before} becomes {after}" for after, before in enumerate(used) if before != after]
        empty = np.setdiff1d(np.arange(used[-1]), used)
        raise UserError(
            f"labels go up to {used[-1]}, but no training image has {_some(empty)}, and a "
            f"class without images cannot be drawn; renumber them ({_some(moved)}) and set data.classes to {len(used)}"
        )
    if len(used) != config.classes:
        found = f"the images' labels have {len(used)}" if labels else "the images have no labels"
        raise UserError(
            f"data.classes is {config.classes}, but {found}; set it to {len(used)}, or correct the labels"
        )
    return labels


def _some(values: Iterable[Any]) -> str:
    """Return the first few of some values."""
    values = list(values)
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _write_splits(config: Config, splits: Splits, place: Path) -> dict[str, str]:
    """Write the images of both splits; return the files' sha256 by their names.

    Raises: UserError counting the images that are refused, by reason, in both.
    """
    refusals, seen, sha256 = Refusals("data"), array("Q"), {}
    for split, (images, items) in splits.items():
        file = place / f"{split}_images.npy"
        with bar(f"data: {split}", len(items)) as progress:
            rows = _rows(images, items.tolist(), config, refusals, seen, progress)
            sha256[file.name] = _write_images(file, (len(items), *config.image), rows)
    refusals.check(sum(len(items) for _, items in splits.values()))
    train, test = np.split(np.array(seen), [len(splits["train"][1])])
    repeated, leaked = len(train) - len(np.unique(train)), int(np.isin(test, train).sum())
    if repeated or leaked:
        print(
            f"data: {repeated:,} training images repeat another, {leaked:,} held-out images a training image"
        )
    return sha256


def _rows(
    images: Images,
    indices: Iterable[int],
    config: Config,
    refusals: Refusals,
    seen: array,
    progress: tqdm,
) -> Iterator[np.ndarray]:
    """Yield the images until one is refused; the others are read all the same, to count those that are refused as well.

    `seen` gets a digest of each.
    """
    for index in indices:
        try:
            image = images.read(index)
            if config.resize is not None:
                image = reduce_by_box(image, config.image[1])
            if image.shape != config.image:
                other = "shape" if len(image) == config.image[0] else "channels"
                raise RefusedError(other, list(image.shape))
        except RefusedError as refused:
            refusals.add(images.names[index], refused)
        else:
            seen.frombytes(hashlib.blake2b(image.tobytes(), digest_size=seen.itemsize).digest())
            if not refusals.found:
                yield image
        progress.update()


def _tell(config: Config, splits: Splits, labels: dict[str, np.ndarray]) -> None:
    """Say what was read, and what was passed over."""
    train, test = (len(items) for _, items in splits.values())
    print(f"data: {train:,} training images, {test:,} held out")
    if labels:
        counts, names = np.bincount(labels["train"]), splits["train"][0].classes
        named = f" ({_some(names)})" if names else ""
        drawn = "uniformly" if config.labels == "uniform" else "by these frequencies"
        print(
            f"data: {len(counts)} classes{named} of {counts.min():,} to {counts.max():,} training images; "
            f"labels of generated images are drawn {drawn} (data.labels)"
        )
    for others in {reading.counted(images.others) for images, _ in splits.values()} - {""}:
        print(f"data: passed over: {others}")


def _digits() -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # pixels 0..16
    levels = ((pixels * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)  # to the nearest of 0..255
    return Images([f"digit {i}" for i in range(len(levels))], levels.__getitem__, labels.astype(np.int64))


def _cifar10(config: Config, split: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        source = CIFAR10(expanded(config.path), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not in data.path ({config.path}) and could not be fetched ({error}); place "
            "cifar-10-python.tar.gz there, or the folder cifar-10-batches-py of it"
        ) from error
    pixels = source.data.transpose(0, 3, 1, 2)  # (N, 3, 32, 32)
    names = [f"{split} image {i}" for i in range(len(pixels))]
    return Images(names, pixels.__getitem__, np.array(source.targets, dtype=np.int64))


def _hold_out(images: Images, test: int, seed: int) -> Splits:
    """Return the splits {name: (images, indices)}: `test` images drawn by the seed, the others for training."""
    count = len(images.names)
    if not 0 < test < count:
        raise UserError(
            f"data.test is {test}; it must be between 1 and {count - 1}, as there are {count} images"
        )
    order = rng.generator(seed, "data held out").permutation(count)
    return {"train": (images, np.sort(order[test:])), "test": (images, np.sort(order[:test]))}


def _write_images(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> str:
    """Write uint8 rows as they come into one .npy file; return the file's sha256."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for row in rows:
            file.write(row.tobytes())
    return sha256_of(path)
