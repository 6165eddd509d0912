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
from typing import Annotated, NamedTuple

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
# of the operating systems, as are all names that begin with a dot
SYSTEM = ("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information")
LABELS = "dataset.json"
MOST_CLASSES = 1_000_000

# kinds of what is refused: what is wrong with a file, and the remedy
REFUSALS = {
    "damaged": ("cannot be read", "replace, convert or remove them"),
    "encrypted": ("are encrypted", "unpack the zip with its password and pack it without one"),
    "compression": ("are compressed as Python cannot undo", "pack the zip again with the usual deflate"),
    "link": ("are symbolic links in a zip", "pack it again with the files that they lead to"),
    "archive": ("are archives within", "unpack or remove them"),
    "outside": ("have names that lead out of the zip", "pack it again with names relative to one folder"),
    "twice": ("have the name of another file", "give each a name of its own"),
    "format": (
        f"are of a format that is not read ({', '.join(FORMATS)} are)",
        "convert them to PNG or remove them",
    ),
    "frames": ("hold several images each", "save each as a file of its own"),
    "depth": ("have more than 8 bits a channel", "convert them to 8 bits, which drops the rest"),
    "transparent": ("have transparency", "convert them to RGB on a background of your choice"),
    "mode": ("are neither 8-bit grey nor RGB", "convert them to one of these"),
    "shape": (
        "are not as data.image says",
        "correct the key, or make all of one size and number of channels",
    ),
    "unlabelled": (
        f"have no label in {LABELS}",
        "list every image once, or remove it to train without labels",
    ),
    "absent": (
        f"are labelled in {LABELS} but no images that are there",
        "list those that are, and no others",
    ),
    "relabelled": (f"are labelled more than once in {LABELS}", "list every image once"),
    "loose": ("lie in no class folder", f"put each into the folder of its class, or list labels in {LABELS}"),
    "unread": (
        "are passed over by datasets, which takes words such as train and test in names for those of splits",
        "rename or remove them; a folder of images can be read with data.source folder",
    ),
}


class RefusedError(Exception):
    """A file that is not read: of which kind in REFUSALS, and what is known beside it."""

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, str(detail)


class Refusals:
    """Files that are refused, counted by kind, with the first of each."""

    def __init__(self, where: str):
        self.where, self.counts, self.first = where, Counter(), {}

    def add(self, name: str, refused: RefusedError) -> None:
        """Count one more."""
        self.counts[refused.kind] += 1
        self.first.setdefault(refused.kind, f"{name} ({refused.detail})" if refused.detail else name)

    def check(self, total: int) -> None:
        """Refuse them, if there are any, out of `total` files.

        Raises: UserError with a sentence for each kind.
        """
        sentences = []
        for kind, count in self.counts.items():
            problem, remedy = REFUSALS[kind]
            sentences.append(
                f"{self.where}: {count:,} of {total:,} files {problem}, the first is {self.first[kind]}; {remedy}"
            )
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

    `classes` are the names of the classes where the source has names; `others` counts files that are no images.
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
    where = f"{key} ({path})"
    files = find(path, key)
    if not files.images:
        others = f", only {counted(files.others)}" if files.others else ""
        raise UserError(f"{where} holds no image{others}; give another zip or folder")
    labels, classes = _labels(files, where), None
    if labelled and not files.lists:
        labels, classes = _class_folders(files.images, where)

    def read(index: int) -> np.ndarray:
        return decode(files.read(files.images[index]))

    return Images([f"{name} in {path}" for name in files.images], read, labels, classes, files.others)


def find(path: Path, key: str) -> Files:
    """Return what a folder or zip holds: every file but hidden ones and those of the operating systems.

    Raises: UserError if it is not there, is no zip, or has names that are not to be relied on.
    """
    require_path(path, key)
    refusals, found, hidden = Refusals(f"{key} ({path})"), {}, 0
    listed, read = _folder(path, key) if path.is_dir() else _zip(path, key)
    for name, handle in listed:
        parts = name.split("/")
        if any((part.startswith(".") and part != "..") or part.lower() in SYSTEM for part in parts):
            hidden += 1
            continue
        if ".." in parts or re.match("/|[A-Za-z]:/", name):
            refusals.add(name, RefusedError("outside"))
        elif name in found:
            refusals.add(name, RefusedError("twice"))
        elif ARCHIVE.search(name):
            refusals.add(name, RefusedError("archive"))
        found[name] = handle
    refusals.check(len(listed))
    images = sorted(filter(IMAGE.search, found))
    lists = sorted(name for name in found if posixpath.basename(name) == LABELS)
    others = Counter(suffix(name) for name in found.keys() - {*images, *lists})
    others += Counter(hidden=hidden)

    def read_file(name: str) -> bytes:
        try:
            return read(found[name])
        except NotImplementedError as error:
            raise RefusedError("compression", error) from None
        except RefusedError:
            raise
        except Exception as error:  # of a damaged zip one of a dozen types
            raise RefusedError("damaged", error) from None

    return Files(images, lists, read_file, dict(sorted(others.items())))


def expanded(path: str) -> Path:
    """Return a path that params give, `~` replaced by the home folder."""
    return Path(os.path.expanduser(path))


def require_path(path: Path, key: str) -> None:
    """Refuse a path to images where nothing is.

    Raises: UserError naming the key.
    """
    if not path.exists():
        raise UserError(
            f"{key} ({path}) is not there; place the zip or folder of images there or change the key"
        )


def counted(others: Mapping[str, int]) -> str:
    """Return words for files that are no images: "2 .txt, 1 .npy"."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())


def suffix(name: str) -> str:
    """Return what a name ends in, for counts of files."""
    return posixpath.splitext(name)[1].lower() or "without a suffix"


def _name(path: str) -> str:
    """Return the name of a file in the form in which labels name it, whatever system it comes from."""
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def _folder(path: Path, key: str) -> tuple[list[tuple[str, str]], Callable[[str], bytes]]:
    """Return the names of all files in a folder with their paths, links to folders followed, and how one is read."""

    def stop(error: OSError) -> None:
        raise error

    found, visited = [], set()
    for folder, _, names in os.walk(path, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            raise UserError(
                f"{key} ({path}): {folder} leads to a folder that is read already; remove the link"
            )
        visited.add(real)
        below = os.path.relpath(folder, path)
        for name in names:
            relative = os.fsencode(f"{below}/{name}").decode("utf-8", "backslashreplace")
            found.append((_name(relative), os.path.join(folder, name)))

    def read(file: str) -> bytes:
        if not os.path.isfile(file):
            raise RefusedError("damaged", "no file, or a link that leads nowhere")
        return Path(file).read_bytes()

    return found, read


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

    def read(entry: zipfile.ZipInfo) -> bytes:
        if entry.flag_bits & 0x1:
            raise RefusedError("encrypted")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise RefusedError("link")
        return archive.read(entry)

    entries = [entry for entry in archive.infolist() if not entry.filename.endswith(("/", "\\"))]
    return [(_entry_name(entry), entry) for entry in entries], read


def _entry_name(entry: zipfile.ZipInfo) -> str:
    """Return the name of a zip's entry. Some systems write UTF-8 without the flag that says so."""
    name = entry.filename
    if not entry.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return _name(name)


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
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise RefusedError("damaged", reason) from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _require_plain(image) -> None:
    """Refuse an image that is more than 8-bit grey or RGB: Pillow drops bits, transparency and fourth channels without a word."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise RefusedError("frames", frames)
    if image.format not in FORMATS:
        raise RefusedError("format", image.format)
    if image.mode not in ("L", "RGB"):
        raise RefusedError("mode", image.mode)
    if "transparency" in image.info:
        raise RefusedError("transparent", "one colour of it")
    for tile in image.tile:  # how the pixels of each part are stored
        stored = tile[3] if isinstance(tile[3], str) else str(tile[3][0])
        if ";16" in stored:
            raise RefusedError("depth", 16)
        if stored.endswith("X"):
            raise RefusedError("transparent", "a fourth channel")


class _LabelList(BaseModel):
    """The content of dataset.json: {"labels": [[name, label], ...]}, or null for none."""

    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=MOST_CLASSES, strict=True)]]] | None


def _labels(files: Files, where: str) -> np.ndarray | None:
    """Return the labels (N,) of dataset.json in the order of the images, or None; names in it are relative to its folder.

    Raises: UserError if there are several, it is damaged, or it does not list every image once.
    """
    if not files.lists:
        return None
    if len(files.lists) > 1:
        raise UserError(
            f"{where} holds {len(files.lists)} files {LABELS}, such as {files.lists[0]}; leave one"
        )
    pairs = _read_list(files, f"{files.lists[0]} in {where}")
    if pairs is None:
        return None
    folder, images = posixpath.dirname(files.lists[0]), set(files.images)
    refusals, labels = Refusals(where), {}
    for given, label in pairs:
        name = posixpath.join(folder, _name(given))
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
        content = files.read(files.lists[0])
    except RefusedError as error:
        reason = error.detail or error.kind
        raise UserError(f"{where} cannot be read ({reason}); {REFUSALS[error.kind][1]}") from None
    try:
        return _LabelList.model_validate_json(content.removeprefix(codecs.BOM_UTF8)).labels
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in mistake["loc"])
        raise UserError(
            f'{where} is not {{"labels": [[name, label], ...]}} with labels from 0 ({place}: {mistake["msg"]}); '
            "mend or remove it"
        ) from None


def _class_folders(images: Sequence[str], where: str) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels (N,) by the folder that each image lies in, below what all have in common, and the names of the folders
    in the order of their labels; None if there are no such folders.

    Raises: UserError if only some images lie in folders.
    """
    common = posixpath.commonpath({posixpath.dirname(name) for name in images})
    below = [name[len(common) :].lstrip("/").partition("/") for name in images]
    classes = sorted({folder for folder, slash, _ in below if slash})
    if not classes:
        return None, None
    refusals = Refusals(where)
    for name, (_, slash, _) in zip(images, below):
        if not slash:
            refusals.add(name, RefusedError("loose"))
    refusals.check(len(images))
    numbers = {folder: number for number, folder in enumerate(classes)}
    return np.array([numbers[folder] for folder, _, _ in below], dtype=np.int64), tuple(classes)
