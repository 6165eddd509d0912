"""Images from folders and zips: which files they are, what each holds, their labels; what is not read rightly is refused."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import posixpath
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, Field, ValidationError

from equilab.core.config import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # read, with 8 bits a channel
# whose names say that they are images: each is read or refused
IMAGE = re.compile(
    r"\.(a?png|jpe?g|jpe|jfif|webp|bmp|dib|tiff?|gif|avif|hei[cf]|jp2|jxl|ico|tga|p[bgnp]m|psd|svg|exr)$",
    re.I,
)
ARCHIVE = re.compile(r"\.(zip|tar|t?gz|bz2|xz|zst|7z|rar)$", re.I)
# hidden files, and those of operating systems
HIDDEN = re.compile(r"\.(?!\.?$)|(__macosx|thumbs\.db|desktop\.ini|\$recycle\.bin)$", re.I)
LABELS = "dataset.json"
MOST_CLASSES = 1_000_000

# why files are refused, and the remedy
REFUSALS = {
    "damaged": "cannot be read; replace, convert or remove them",
    "encrypted": "are encrypted; unpack the zip with its password and pack it without one",
    "compression": "are compressed as Python cannot undo; pack the zip again with the usual deflate",
    "link": "are symbolic links in a zip; pack it again with the files that they lead to",
    "archive": "are archives within; unpack or remove them",
    "again": "are folders that are read already, by links that lead to them; remove the links",
    "outside": "have names that lead out of the zip; pack it again with names below one folder",
    "twice": "have the name of another file; give each a name of its own",
    "format": f"are of a format that is not read ({', '.join(FORMATS)} are); convert them to PNG or remove them",
    "frames": "hold several images each; save each as a file of its own",
    "depth": "have more than 8 bits a channel; convert them to 8 bits, which drops the others",
    "transparent": "have transparency; convert them to RGB on a background of your choice",
    "mode": "are neither 8-bit grey nor RGB; convert them to one of these",
    "channels": "have another number of channels than data.image says; correct the key, or convert them",
    "shape": "are not as data.image says; correct the key, or make all of one size and number of channels",
    "multiple": "cannot be reduced by whole pixels, as data.resize says; give images whose shorter side is a multiple of the side "
    "in data.image, or another data.image",
    "unlabelled": f"have no label in {LABELS}; list every image once, or remove it to train without labels",
    "absent": f"are labelled in {LABELS} but no images that are there; list those that are, and no others",
    "relabelled": f"are labelled more than once in {LABELS}; list every image once",
    "loose": f"lie in no class folder; put each into the folder of its class, or list labels in {LABELS}",
    "unread": "are passed over by datasets, which takes words in names, such as test, for splits; rename or remove them",
}


class RefusedError(Exception):
    """A file that is not read: why, as a key of REFUSALS, and a detail for the message."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, f" ({detail})" if str(detail) else ""


class Refusals:
    """Files that are refused, by reason."""

    def __init__(self, where: str):
        self.where, self.found = where, {}

    def add(self, name: str, refused: RefusedError) -> None:
        """Add one more."""
        self.found.setdefault(refused.reason, []).append(f"{name}{refused.detail}")

    def check(self, total: int) -> None:
        """Refuse them, if there are any, out of `total` files.

        Raises: UserError with a sentence for each reason.
        """
        sentences = [
            f"{self.where}: {len(files):,} of {total:,} files, the first {files[0]}, {REFUSALS[reason]}"
            for reason, files in self.found.items()
        ]
        if sentences:
            raise UserError("\n".join(sentences))


class Files(NamedTuple):
    """What a folder or zip holds: names of images in their order and of lists of labels, how one is read (or refused), and
    how many files are neither, by suffix."""

    images: list[str]
    lists: list[str]
    read: Callable[[str], bytes]
    others: Mapping[str, int]


class Images(NamedTuple):
    """A source as read: `read(i)` gives image i as uint8 (C, H, W), `names[i]` is what a message calls it.

    `classes` are the names of the classes where the source has names; `others` counts what is passed over.
    """

    names: Sequence[str]
    read: Callable[[int], np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None = None
    others: Mapping[str, int] = {}


def open_images(path: Path, key: str, labelled: bool) -> Images:
    """Return the images of a zip or folder by name; with `labelled`, without a dataset.json, their folders are classes.

    Raises: UserError if the path is not there or no zip, or names or labels are not to be relied on.
    """
    where, files = f"{key} ({path})", find_files(path, key)
    if not files.images:
        raise UserError(
            f"{where} holds no image ({counted(files.others) or 'nothing'}); give another zip or folder"
        )
    labels, classes = _labels(files, where), None
    if labelled and not files.lists:
        labels, classes = _class_folders(files.images, where)

    def read(index: int) -> np.ndarray:
        return decode(files.read(files.images[index]))

    return Images([f"{name} in {path}" for name in files.images], read, labels, classes, files.others)


def find_files(path: Path, key: str) -> Files:
    """Return what a folder or zip holds, without what is hidden or an operating system's.

    Raises: UserError if it is not there, is no zip, or has names that are not to be relied on.
    """
    require_paths({key: path})
    refusals, found, others = Refusals(f"{key} ({path})"), {}, Counter()
    listed, read = _folder(path, refusals) if path.is_dir() else _zip(path, key)
    for name, handle in listed:
        parts = name.split("/")
        if any(map(HIDDEN.match, parts)):
            others["hidden"] += 1
        elif ".." in parts or re.match("/|[A-Za-z]:/", name):
            refusals.add(name, RefusedError("outside"))
        elif name in found:
            refusals.add(name, RefusedError("twice"))
        elif ARCHIVE.search(name):
            refusals.add(name, RefusedError("archive"))
        else:
            found[name] = handle
    refusals.check(len(listed))
    images = sorted(filter(IMAGE.search, found))
    lists = sorted(name for name in found if posixpath.basename(name) == LABELS)
    others.update(suffix(name) for name in found.keys() - {*images, *lists})

    def read_file(name: str) -> bytes:
        try:
            return read(found[name])
        except NotImplementedError as error:
            raise RefusedError("compression", error) from None
        except RefusedError:
            raise
        except Exception as error:  # of a damaged zip one of a dozen types
            raise RefusedError("damaged", error) from None

    return Files(images, lists, read_file, others)


def expanded(path: str) -> Path:
    """Return a path that params give, `~` replaced by the home folder."""
    return Path(os.path.expanduser(path))


def require_paths(paths: Mapping[str, Path]) -> None:
    """Refuse paths to images, by their keys, where nothing is.

    Raises: UserError with a sentence for each.
    """
    absent = [f"{key} ({path}) is not there" for key, path in paths.items() if not path.exists()]
    if absent:
        raise UserError(
            "\n".join(f"{each}; place the zip or folder of images there or change the key" for each in absent)
        )


def counted(others: Mapping[str, int]) -> str:
    """Return words for what is passed over: "2 .txt, 1 hidden"."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(others.items()))


def suffix(name: str) -> str:
    """Return what a name ends in, for counts of files."""
    return posixpath.splitext(name)[1].lower() or "without a suffix"


def _name(path: str) -> str:
    """Return the name of a file as labels name it, whatever system it comes from."""
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def _folder(path: Path, refusals: Refusals) -> tuple[list[tuple[str, str]], Callable[[str], bytes]]:
    """Return the names of all files in a folder with their paths, links to folders followed, and how one is read; links to
    folders that are read already are refused."""

    def stop(error: OSError) -> None:
        raise error

    listed, visited = [], set()
    for folder, within, names in os.walk(path, onerror=stop, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            refusals.add(folder, RefusedError("again"))
            within.clear()  # which walk would go on into
            continue
        visited.add(real)
        below = os.path.relpath(folder, path)
        for name in names:  # that need not be UTF-8
            readable = os.fsencode(_name(f"{below}/{name}")).decode("utf-8", "backslashreplace")
            listed.append((readable, f"{folder}/{name}"))

    def read(file: str) -> bytes:
        if not os.path.isfile(file):
            raise RefusedError("damaged", "no file, or a link that leads nowhere")
        return Path(file).read_bytes()

    return listed, read


def _zip(
    path: Path, key: str
) -> tuple[list[tuple[str, zipfile.ZipInfo]], Callable[[zipfile.ZipInfo], bytes]]:
    """Return the names of all files in a zip with their entries, and how one is read."""
    try:
        archive = zipfile.ZipFile(path)
    except PermissionError:
        raise
    except Exception as error:  # one of a dozen types, by where it is damaged
        raise UserError(
            f"{key} ({path}) is not a readable zip ({error}); fetch or pack it again, or give a folder"
        ) from None
    listed = []
    for entry in archive.infolist():
        name = entry.filename
        if not entry.flag_bits & 0x800:  # said to be no UTF-8, which macOS writes all the same
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        if not name.endswith(("/", "\\")):
            listed.append((_name(name), entry))

    def read(entry: zipfile.ZipInfo) -> bytes:
        if entry.flag_bits & 0x1:
            raise RefusedError("encrypted")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise RefusedError("link")
        return archive.read(entry)

    return listed, read


def decode(content: bytes) -> UInt8[np.ndarray, "c h w"]:
    """Return the image that a file holds: 1 channel for grey, 3 for RGB, turned as its EXIF says.

    Raises: RefusedError if it is damaged, or something of it would be dropped or altered.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            _require_plain(image)
            pixels = np.array(ImageOps.exif_transpose(image))
    except RefusedError:
        raise
    except Exception as error:  # one of a dozen types, by where it is damaged
        unknown = isinstance(error, UnidentifiedImageError)
        raise RefusedError("damaged", "of no known format" if unknown else error) from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _require_plain(image: Any) -> None:
    """Refuse an image that is more than 8-bit grey or RGB: Pillow drops bits, transparency and fourth channels silently."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise RefusedError("frames", frames)
    if image.format not in FORMATS:
        raise RefusedError("format", image.format)
    if image.mode not in ("L", "RGB"):
        raise RefusedError("mode", image.mode)
    if "transparency" in image.info:
        raise RefusedError("transparent", "one colour of it")
    for _, _, _, stored in image.tile:  # how the pixels of each part are stored
        stored = stored if isinstance(stored, str) else str(stored[0])
        if ";16" in stored:
            raise RefusedError("depth", 16)
        if stored.endswith("X"):
            raise RefusedError("transparent", "a fourth channel")


class LabelList(BaseModel):
    """The content of dataset.json: {"labels": [[name, label], ...]}, or null for none."""

    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=MOST_CLASSES, strict=True)]]] | None


def _labels(files: Files, where: str) -> np.ndarray | None:
    """Return the labels (N,) of dataset.json in the order of the images, or None; names in it are relative to its folder.

    Raises: UserError if there are several, it is damaged, or it does not list every image once.
    """
    if len(files.lists) > 1:
        raise UserError(
            f"{where} holds {len(files.lists)} files {LABELS}, such as {files.lists[0]}; leave one"
        )
    pairs = _read_list(files, where) if files.lists else None
    if pairs is None:
        return None
    refusals, images, labels = Refusals(where), set(files.images), {}
    for given, label in pairs:
        name = posixpath.join(posixpath.dirname(files.lists[0]), _name(given))
        if name in labels:
            refusals.add(name, RefusedError("relabelled"))
        elif name not in images:
            refusals.add(name, RefusedError("absent"))
        labels[name] = label
    for name in files.images:
        if name not in labels:
            refusals.add(name, RefusedError("unlabelled"))
    refusals.check(len(files.images))
    return np.array([labels[name] for name in files.images], dtype=np.int64)


def _read_list(files: Files, where: str) -> list[tuple[str, int]] | None:
    """Return the pairs of name and label of a dataset.json; None if it says that there are none."""
    try:
        content = files.read(files.lists[0]).removeprefix(codecs.BOM_UTF8)
        return LabelList.model_validate_json(content).labels
    except RefusedError as error:
        problem = f"{error.reason}{error.detail}"
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, mistake['loc']))} {mistake['msg']}"
    raise UserError(
        f'{files.lists[0]} in {where} is not {{"labels": [[name, label], ...]}} with labels from 0 ({problem}); '
        "mend or remove it"
    )


def _class_folders(images: Sequence[str], where: str) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels (N,) by the folder that each image lies in, below what all have in common, and the names of the folders
    in the order of their labels; None if there are no such folders.

    Raises: UserError if only some images lie in folders.
    """
    common = posixpath.commonpath({posixpath.dirname(name) for name in images})
    below = [name[len(common) :].lstrip("/").rpartition("/")[0] for name in images]
    folders = [folder.partition("/")[0] for folder in below]
    classes = sorted(set(folders) - {""})
    if not classes:
        return None, None
    refusals = Refusals(where)
    for name, folder in zip(images, folders):
        if not folder:
            refusals.add(name, RefusedError("loose"))
    refusals.check(len(images))
    numbers = {folder: number for number, folder in enumerate(classes)}
    return np.array([numbers[folder] for folder in folders], dtype=np.int64), tuple(classes)
