"""Real images: sources, the written arrays, their checks, and the conversion of pixels."""

import io
import json
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from equilab.core import config
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.data import images as data

DIGITS = {"source": "digits", "path": None, "test_path": None, "test": 360, "image": [1, 8, 8], "classes": 10}


@pytest.fixture(autouse=True)
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(settings, seed=0):
    """Run the stage in the working folder and return the folder of its results."""
    job = Job(Study("test", ".", seed, 1, 1, "cpu"), "data", None, (1, 8, 8), 10, "", print)
    data.run(settings, job)
    return job.out


def run_digits(seed=0):
    return run(config.parse(data.Config, DIGITS, "data"), seed)


def folder(path, test=None, test_path=None, image=(3, 4, 5), classes=3):
    return data.Config(
        "folder", str(path), None if test_path is None else str(test_path), test, image, classes
    )


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


def colour_files(count=6, labels="all"):
    """Return {name: bytes} of PNG images whose first pixel tells their number, as the EDM format names them."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 4, 5, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    files = {f"{i % 2:02d}/{i:05d}.png": encoded(pixels[i]) for i in range(count)}
    if labels == "all":
        labels = [[f"{i % 2:02d}/{i:05d}.png", i % 3] for i in range(count)]
    return {**files, "dataset.json": json.dumps({"labels": labels})}, pixels


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("digits"))
        return run_digits().resolve()


def test_every_level_survives_the_conversion_to_float_and_back():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(data.to_uint8(data.to_float(levels)), levels)
    tensor = torch.from_numpy(levels)
    torch.testing.assert_close(data.to_uint8(data.to_float(tensor)), tensor, rtol=0, atol=0)
    torch.testing.assert_close(data.to_float(tensor).numpy(), data.to_float(levels), rtol=0, atol=0)
    assert data.to_float(levels)[[0, 255]].tolist() == [-1, 1]


def test_floats_go_to_the_nearest_level_and_are_clipped():
    pixels = torch.tensor([-3.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 3.0, float("inf")])
    assert data.to_uint8(pixels).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert data.to_uint8(pixels.numpy()).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_pixels_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match="not numbers"):
        data.to_uint8(torch.tensor([0.0, float("nan")]))


def test_digits_are_split_by_the_seed_and_scaled_to_the_full_range(digits, tmp_path):
    train, test = data.load(digits, "train", verify=True), data.load(digits, "test", verify=True)
    assert train.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert (train.classes, train.images.min(), train.images.max()) == (10, 0, 255)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    ours = np.concatenate([train.images, test.images]).reshape(-1, 64)
    keep = np.lexsort(ours.T), np.lexsort(np.rint(pixels * 255 / 16 + 1e-6).T)
    np.testing.assert_array_equal(ours[keep[0]], np.rint(pixels * 255 / 16 + 1e-6)[keep[1]])
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels])[keep[0]], labels[keep[1]])
    assert (data.load(run_digits(seed=1), "test").images != test.images).any()


def test_the_same_seed_writes_the_same_bytes(digits, tmp_path):
    again = run_digits()
    names = sorted(file.name for file in again.iterdir())
    assert names == [
        "meta.json",
        "test_images.npy",
        "test_labels.npy",
        "train_images.npy",
        "train_labels.npy",
    ]
    assert all((again / name).read_bytes() == (digits / name).read_bytes() for name in names)


def test_written_arrays_are_plain_npy_files(digits):
    images = np.load(digits / "train_images.npy")
    np.save(digits.parent / "again.npy", images)
    assert (digits / "train_images.npy").read_bytes() == (digits.parent / "again.npy").read_bytes()
    assert isinstance(data.load(digits, "train").images, np.memmap)


@pytest.mark.parametrize("packed", [True, False])
def test_a_zip_and_a_folder_give_the_same_images_and_labels(packed, tmp_path):
    files, pixels = colour_files()
    if packed:
        source = write_zip(tmp_path / "images.zip", files)
    else:
        source = tmp_path / "images"
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = run(folder(source, test_path=source))
    train = data.load(out, "train", verify=True)
    order = train.images[:, 0, 0, 0]  # sorted by name: 00/00000, 00/00002, ..., 01/00001, ...
    assert order.tolist() == [0, 2, 4, 1, 3, 5]
    np.testing.assert_array_equal(train.images, pixels[order].transpose(0, 3, 1, 2))
    assert train.labels.tolist() == [i % 3 for i in order] and train.classes == 3
    np.testing.assert_array_equal(data.load(out, "test").images, train.images)


def test_held_out_images_are_not_trained_on(tmp_path):
    source = write_zip(tmp_path / "images.zip", colour_files(20)[0])
    out = run(folder(source, test=5))
    train, test = data.load(out, "train"), data.load(out, "test")
    assert sorted([*train.images[:, 0, 0, 0], *test.images[:, 0, 0, 0]]) == list(range(20))
    assert len(test.images) == 5


@pytest.mark.parametrize("labels", [None, "absent"])
def test_images_without_labels_have_no_classes_and_no_label_files(labels, tmp_path):
    files, _ = colour_files(labels=labels)
    if labels == "absent":
        del files["dataset.json"]
    out = run(folder(write_zip(tmp_path / "images.zip", files), test=2, classes=0))
    train = data.load(out, "train", verify=True)
    assert train.labels is None and train.classes == 0
    assert not (out / "train_labels.npy").exists()


def test_what_the_data_were_before_leaves_no_file(tmp_path):
    files, _ = colour_files()
    write_zip(tmp_path / "a.zip", files)
    run(folder("a.zip", test=2))
    assert (tmp_path / "results/data/train_labels.npy").exists()
    del files["dataset.json"]
    write_zip(tmp_path / "a.zip", files)
    run(folder("a.zip", test=2, classes=0))
    assert {path.name for path in (tmp_path / "results/data").iterdir()} == {
        "meta.json",
        "train_images.npy",
        "test_images.npy",
    }


def test_grey_jpeg_images_have_one_channel(tmp_path):
    files = {f"{i}.jpg": encoded(np.full((8, 8), 40 * i, np.uint8), "JPEG") for i in range(4)}
    out = run(folder(write_zip(tmp_path / "images.zip", files), test=1, image=(1, 8, 8), classes=0))
    assert data.load(out, "train").images.shape == (3, 1, 8, 8)


def damaged(files, name):
    content = bytearray(files[name])
    return {**files, name: bytes(content[: len(content) // 2])}


FILES, PIXELS = colour_files()
FIRST = "00/00000.png"
LABELS = json.loads(FILES["dataset.json"])["labels"]


@pytest.mark.parametrize(
    "files, message",
    [
        (damaged(FILES, "00/00002.png"), "00/00002.png in .*cannot be read"),
        (
            {**FILES, "00/00002.png": encoded(PIXELS[2][:3])},
            r"00/00002.png .* is \(3, 3, 5\), .* \(3, 4, 5\)",
        ),
        ({**FILES, "00/00002.png": encoded(PIXELS[2][..., 0])}, "00/00002.png .*same size and mode"),
        ({**FILES, "00/00002.png": encoded(PIXELS[2], mode="RGBA")}, "00/00002.png .*mode RGBA; convert"),
        ({**FILES, "00/00002.png": encoded(PIXELS[2], mode="P")}, "00/00002.png .*mode P; convert"),
        ({**FILES, "dataset.json": json.dumps({"labels": LABELS[1:]})}, f"has no label for {FIRST}"),
        (
            {**FILES, "dataset.json": json.dumps({"labels": [*LABELS, ["x.png", 1]]})},
            "labels an image .* x.png",
        ),
        (
            {**FILES, "dataset.json": json.dumps({"labels": [[FIRST, 0.5], *LABELS[1:]]})},
            f"{FIRST} the label 0.5",
        ),
        ({**FILES, "dataset.json": "{"}, "dataset.json in .* is not"),
        ({**FILES, "dataset.json": "{}"}, "dataset.json in .* is not"),
        (
            {**FILES, "dataset.json": json.dumps({"labels": [[n, 3] for n, _ in LABELS]})},
            "classes is 3, .* to 4",
        ),
        ({"readme.txt": "none"}, "holds no image"),
    ],
)
def test_a_wrong_image_or_label_list_is_named(files, message, tmp_path):
    source = write_zip(tmp_path / "images.zip", files)
    with pytest.raises(UserError, match=message):
        run(folder(source, test=2))
    assert not (tmp_path / "results/data/meta.json").exists()


def test_a_damaged_zip_is_named(tmp_path):
    source = write_zip(tmp_path / "images.zip", FILES)
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="images.zip.* is not a readable zip"):
        run(folder(source, test=2))
    at = whole.index(FILES["01/00003.png"]) + 60
    source.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(UserError, match="01/00003.png in .*images.zip cannot be read.*CRC"):
        run(folder(source, test=2))


def test_a_missing_source_or_label_list_is_named(tmp_path):
    with pytest.raises(UserError, match="data.path .*nowhere.zip.* is not there"):
        run(folder(tmp_path / "nowhere.zip", test=2))
    labelled = write_zip(tmp_path / "a.zip", FILES)
    bare = write_zip(tmp_path / "b.zip", colour_files(labels=None)[0])
    with pytest.raises(UserError, match="only the train images have labels"):
        run(folder(labelled, test_path=bare))


@pytest.mark.parametrize("test", [0, 6, -1])
def test_an_impossible_number_of_held_out_images_is_refused(test, tmp_path):
    with pytest.raises(UserError, match=f"data.test is {test}; it must be between 1 and 5"):
        run(folder(write_zip(tmp_path / "images.zip", FILES), test=test))


@pytest.mark.parametrize(
    "change",
    [
        {"test": None},
        {"path": "x"},
        {"source": "cifar10"},
        {"source": "folder"},
        {"path": "x", "test_path": "y"},
    ],
)
def test_keys_that_the_source_does_not_read_are_refused(change):
    with pytest.raises(UserError, match="data: source .* reads"):
        config.parse(data.Config, {**DIGITS, **change}, "data")


def test_cifar10_comes_from_torchvision_in_its_own_splits(tmp_path, monkeypatch):
    def CIFAR10(root, train, download):
        pixels = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
        return SimpleNamespace(data=pixels, targets=[1] * len(pixels))

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR10=CIFAR10))
    out = run(data.Config("cifar10", str(tmp_path), None, None, (3, 32, 32), 2))
    assert data.load(out, "train").images.shape == (4, 3, 32, 32)
    assert data.load(out, "test", verify=True).labels.tolist() == [1, 1]


def test_cifar10_without_a_network_says_what_to_place_where(tmp_path, monkeypatch):
    def CIFAR10(root, train, download):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR10=CIFAR10))
    with pytest.raises(UserError, match="place cifar-10-python.tar.gz there"):
        run(data.Config("cifar10", str(tmp_path), None, None, (3, 32, 32), 10))


@pytest.mark.parametrize("name", ["meta.json", "train_images.npy", "train_labels.npy"])
@pytest.mark.parametrize("fault", ["missing", "cut short", "longer", "garbage"])
def test_a_file_that_is_missing_or_of_another_size_is_named(name, fault, digits, tmp_path):
    for file in digits.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / name).read_bytes()
    changed = {"missing": b"", "cut short": whole[:-20], "longer": whole + b"x", "garbage": b"\x00" * 99}[
        fault
    ]
    (tmp_path / name).write_bytes(changed)
    if fault == "missing":
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} .*run the stage data again"):
        data.load(tmp_path, "train")


def test_a_changed_byte_is_found_by_the_checksum(digits, tmp_path):
    for file in digits.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "train_images.npy").read_bytes())
    content[5000] ^= 1
    (tmp_path / "train_images.npy").write_bytes(content)
    data.load(tmp_path, "train")
    with pytest.raises(UserError, match="train_images.npy is damaged, its checksum"):
        data.load(tmp_path, "train", verify=True)
