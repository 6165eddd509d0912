"""Images in files of every kind for tests, and the stage that reads them, called in the current folder."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equilab.core import config
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.data import images as data

DIGITS = {"source": "digits", "path": None, "test_path": None, "test": 360, "image": [1, 8, 8], "classes": 10}
DIGITS |= {"datasets": None, "labels": "uniform"}
DATASETS = {
    "subset": None,
    "revision": None,
    "image": "image",
    "label": None,
    "train": "train",
    "test": "test",
}


def run(settings, seed=0):
    """Run the stage in the working folder and return the folder of its results."""
    shared = {"name": "t", "root": ".", "seed": seed, "threads": 1, "run_threads": 1, "device": "cpu"}
    study = config.parse(Study, shared, "study")
    job = Job(study, "data", None, None, (1, 8, 8), 10, "", print, print)
    data.plan(settings, job)
    data.run(settings, job)
    return job.out


def settings(**changes):
    """Return a config of the stage: that of the digits with some keys changed."""
    given = {**DIGITS, **changes}
    if not given["classes"]:
        given["labels"] = changes.get("labels")
    return config.parse(data.Config, given, "data")


def folder(path, test=None, test_path=None, image=(3, 4, 5), classes=3, **more):
    """Return a config that reads a folder or a zip."""
    test_path = None if test_path is None else str(test_path)
    given = {"path": str(path), "test_path": test_path, "test": test, "image": list(image)}
    return settings(source="folder", classes=classes, **given, **more)


def refused(settings):
    """Return the sentences with which the stage refuses what it finds; nothing is written."""
    with pytest.raises(UserError) as error:
        run(settings)
    assert not Path("results/data/meta.json").exists()
    return str(error.value).splitlines()


def encoded(pixels, format="PNG", mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format)
    return buffer.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def colour_files(count=6, labels="all"):
    """Return {name: bytes} of PNG images whose first pixel tells their number, as the EDM format names them."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 4, 5, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    files = {f"{i % 2:02d}/{i:05d}.png": encoded(pixels[i]) for i in range(count)}
    if labels == "all":
        labels = [[f"{i % 2:02d}/{i:05d}.png", i % 3] for i in range(count)]
    return {**files, "dataset.json": json.dumps({"labels": labels})}, pixels


FILES, PIXELS = colour_files()
FIRST = "00/00000.png"
LABELS = json.loads(FILES["dataset.json"])["labels"]


def png(bits, colour, *chunks, interlaced=0):
    """Return an image of 5x4 pixels, of a bit depth and a colour type that Pillow does not write."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes(-(-5 * channels * bits // 8))

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 5, 4, bits, colour, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(row * 12)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
