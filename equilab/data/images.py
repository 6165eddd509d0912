"""Real images: the stage that writes them as uint8 arrays, their checked reading, and the one conversion of pixels."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveInt, model_validator
from tqdm import tqdm

from equilab.core import rng
from equilab.core.config import Params, UserError
from equilab.core.files import remove_others, require_disk, scratch, sha256_of, write_array, write_json
from equilab.core.job import Job, Plan
from equilab.core.progress import bar

# per source, the keys beside `source` that it reads: all of one group, and no others
READS = {"digits": [("test",)], "cifar10": [("path",)], "folder": [("path", "test"), ("path", "test_path")]}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

Size = Annotated[int, Field(ge=1, le=65_536)]  # channels, or pixels along a side


class Config(Params):
    """Where a study's real images come from; a key that the source does not read is null.

    `source`: "digits" (scikit-learn's 1,797 digits, 1x8x8, reads `test`), "cifar10" (torchvision's, reads `path`) or
    "folder" (a zip or folder of PNG or JPEG images with an optional dataset.json of labels, reads `path` and one of
    `test_path` and `test`). `path`, `test_path`: relative to the study's folder. `test`: images held out for the test
    split, drawn by the study's seed. `image`: (channels, height, width); `classes`: 0 for images without
    labels; the stage compares both with what it finds.
    """

    source: Literal["digits", "cifar10", "folder"]
    path: str | None
    test_path: str | None
    test: PositiveInt | None
    image: tuple[Size, Size, Size]
    classes: Annotated[int, Field(ge=0, le=1_000_000)]

    @model_validator(mode="after")
    def _reads(self):
        given = tuple(key for key in ("path", "test", "test_path") if getattr(self, key) is not None)
        if given not in READS[self.source]:
            wanted = " or ".join(" and ".join(keys) for keys in READS[self.source])
            raise ValueError(
                f"source {self.source} reads {wanted}, given are {', '.join(given) or 'none'}; "
                "give the keys that it reads and set the others to null"
            )
        return self


class Dataset(NamedTuple):
    """One split of a study: images (N, C, H, W) memory-mapped, labels (N,) int64 or None, number of classes or 0."""

    images: UInt8[np.ndarray, "n c h w"]
    labels: np.ndarray | None
    classes: int


class Images(NamedTuple):
    """A source as read: `read(i)` gives image i as uint8 (C, H, W), `names[i]` is what a message calls it."""

    names: Sequence[str]
    read: Callable[[int], np.ndarray]
    labels: np.ndarray | None


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


def load(folder: Path, split: str, verify: bool = False) -> Dataset:
    """Return the split, "train" or "test", that the stage `data` wrote into `folder`.

    Sizes and types are always compared with meta.json; `verify` compares the checksums as well, which reads all bytes.

    Raises: UserError naming the file that is missing, cut short, or not what meta.json says, and what to do.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        count, shape, classes, sha256 = meta["counts"][split], meta["shape"], meta["classes"], meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/meta.json is missing or damaged ({error!r}); run the stage data again"
        ) from error
    images = _read_array(
        folder / f"{split}_images.npy", (count, *shape), np.uint8, sha256 if verify else None
    )
    labels = None
    if classes:
        labels = np.array(
            _read_array(folder / f"{split}_labels.npy", (count,), np.int64, sha256 if verify else None)
        )
    return Dataset(images, labels, classes)


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Return what estimates the stage's cost; how many images there are is not known before they are read."""
    return partial(Plan, disk=None)


def run(config: Config, job: Job) -> None:
    """Write train_images.npy, train_labels.npy, test_images.npy, test_labels.npy and meta.json into the stage's folder.

    The label files are absent where the source has no labels. The same source and seed give the same bytes. Memory
    does not grow with the number of images.

    Raises: UserError naming the key or the file that is wrong, and what to do.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes the first one does it
    splits = {"digits": _digits, "cifar10": _cifar10, "folder": _folder}[config.source](
        config, job.study.seed
    )
    labels = {
        split: images.labels[indices]
        for split, (images, indices) in splits.items()
        if images.labels is not None
    }
    if len(labels) == 1:
        raise UserError(
            f"only the {next(iter(labels))} images have labels; give dataset.json to both or to none"
        )
    classes = 1 + max((int(found.max()) for found in labels.values()), default=-1)
    if classes != config.classes:
        raise UserError(
            f"data.classes is {config.classes}, the images' labels have {classes}; set it to {classes}"
        )
    counts = {split: len(indices) for split, (_, indices) in splits.items()}
    require_disk(job.out, sum(counts.values()) * math.prod(config.image))
    sha256 = {}
    with scratch(job) as place:  # what is there stays until everything new is
        for split, (images, indices) in splits.items():
            file = place / f"{split}_images.npy"
            with bar(f"data: {split}", len(indices)) as progress:
                rows = _rows(images, indices.tolist(), config.image, progress)
                sha256[file.name] = _write_images(file, (len(indices), *config.image), rows)
        for split, found in labels.items():
            sha256[f"{split}_labels.npy"] = write_array(place / f"{split}_labels.npy", found)
        meta = {
            "source": config.source,
            "shape": config.image,
            "classes": classes,
            "counts": counts,
            "sha256": sha256,
        }
        job.out.mkdir(parents=True, exist_ok=True)
        for name in sha256:
            os.replace(place / name, job.out / name)
    write_json(job.out / "meta.json", meta)
    remove_others(job.out, sha256, "*.npy")


def _digits(config: Config, seed: int) -> dict:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # pixels 0..16
    levels = ((pixels * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)  # to the nearest of 0..255
    images = Images([f"digit {i}" for i in range(len(levels))], levels.__getitem__, labels.astype(np.int64))
    return _hold_out(images, config.test, seed)


def _cifar10(config: Config, seed: int) -> dict:
    from torchvision.datasets import CIFAR10

    splits = {}
    for split in ("train", "test"):
        try:
            source = CIFAR10(config.path, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 is not in data.path ({config.path}) and could not be fetched ({error}); place "
                "cifar-10-python.tar.gz there, or the folder cifar-10-batches-py of it"
            ) from error
        pixels = source.data.transpose(0, 3, 1, 2)  # (N, 3, 32, 32)
        names = [f"{split} image {i}" for i in range(len(pixels))]
        images = Images(names, pixels.__getitem__, np.array(source.targets, dtype=np.int64))
        splits[split] = (images, np.arange(len(names)))
    return splits


def _folder(config: Config, seed: int) -> dict:
    train = _open_images(Path(config.path), "data.path")
    if config.test_path is None:
        return _hold_out(train, config.test, seed)
    test = _open_images(Path(config.test_path), "data.test_path")
    return {"train": (train, np.arange(len(train.names))), "test": (test, np.arange(len(test.names)))}


def _hold_out(images: Images, test: int, seed: int) -> dict:
    """Return the splits {name: (images, indices)}: `test` images drawn by the seed, the others for training."""
    count = len(images.names)
    if not 0 < test < count:
        raise UserError(
            f"data.test is {test}; it must be between 1 and {count - 1}, as there are {count} images"
        )
    order = rng.generator(seed, "data held out").permutation(count)
    return {"train": (images, np.sort(order[test:])), "test": (images, np.sort(order[:test]))}


def _open_images(path: Path, key: str) -> Images:
    """Return the images of a zip or folder by name, with the labels of its dataset.json if it has one."""
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]

        def read_bytes(name: str) -> bytes:
            return (path / name).read_bytes()
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{key} ({path}) is not a readable zip ({error}); fetch or pack it again"
            ) from error
        files, read_bytes = archive.namelist(), archive.read
    else:
        raise UserError(
            f"{key} ({path}) is not there; place the zip or folder of images there or change the key"
        )
    names = sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and "__MACOSX" not in name)
    if not names:
        raise UserError(
            f"{key} ({path}) holds no image ({', '.join(IMAGE_SUFFIXES)}); give another zip or folder"
        )
    labels = _read_labels(read_bytes, names, path) if "dataset.json" in files else None

    def read(index: int) -> np.ndarray:
        return _decode(read_bytes, names[index], path)

    return Images([f"{name} in {path}" for name in names], read, labels)


def _read_labels(read_bytes: Callable[[str], bytes], names: Sequence[str], path: Path) -> np.ndarray | None:
    """Return the labels (N,) of dataset.json, {"labels": [[name, label], ...]}, in the order of `names`, or None."""
    where = f"dataset.json in {path}"
    try:
        pairs = json.loads(read_bytes("dataset.json"))["labels"]
        labels = None if pairs is None else dict(pairs)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f'{where} is not {{"labels": [[name, label], ...]}} ({error!r}); mend or remove it'
        ) from error
    if labels is None:
        return None
    for name in sorted(labels.keys() ^ set(names))[:1]:
        fault = "labels an image that is not there:" if name in labels else "has no label for"
        raise UserError(
            f"{where} {fault} {name}; list every image once, or remove it to train without labels"
        )
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{where} gives {name} the label {label!r}; labels must be whole numbers from 0")
    return np.array([labels[name] for name in names], dtype=np.int64)


def _decode(read_bytes: Callable[[str], bytes], name: str, path: Path) -> np.ndarray:
    """Return the image as uint8 (C, H, W), 1 channel for grey and 3 for RGB; no other mode is converted silently."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(read_bytes(name)))
        pixels = np.array(image)
    except (
        Exception
    ) as error:  # a damaged image or zip entry raises one of a dozen types, by where it is damaged
        raise UserError(
            f"{name} in {path} cannot be read ({error}); replace it or fetch the file again"
        ) from error
    if image.mode not in ("L", "RGB"):
        raise UserError(
            f"{name} in {path} has the mode {image.mode}; convert it to 8-bit grey or RGB "
            "(a palette or transparency is not dropped silently)"
        )
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)


def _rows(
    images: Images, indices: Iterable[int], shape: tuple[int, ...], progress: tqdm
) -> Iterator[np.ndarray]:
    for index in indices:
        image = images.read(index)
        if image.shape != shape:
            raise UserError(
                f"{images.names[index]} is {image.shape}, data.image is {shape} (channels, height, width); "
                "correct the key, or make all images the same size and mode"
            )
        yield image
        progress.update()


def _write_images(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> str:
    """Write uint8 rows as they come into one .npy file, which appears when it is whole; returns the file's sha256."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for data in itertools.chain([header.getvalue()], map(np.ndarray.tobytes, rows)):
                digest.update(data)
                file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def _read_array(path: Path, shape: tuple[int, ...], dtype: type, sha256: dict[str, str] | None) -> np.ndarray:
    """Return the array memory-mapped if the file has this shape, type, size and, where given, checksum."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is missing, cut short or damaged ({error}); run the stage data again"
        ) from error
    if array.shape != shape or array.dtype != dtype or path.stat().st_size != array.offset + array.nbytes:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape} in {path.stat().st_size} bytes, meta.json says "
            f"{np.dtype(dtype)} {shape}; run the stage data again"
        )
    if sha256 is not None and sha256_of(path) != sha256[path.name]:
        raise UserError(
            f"{path} is damaged, its checksum is not the one in meta.json; run the stage data again"
        )
    return array
