"""Real images: sources, the written arrays, their checks, and the conversion of pixels."""

import io
import json
import os
import re
import struct
import sys
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import smoke
import torch
from pictures import (
    DATASETS,
    FILES,
    FIRST,
    LABELS,
    PIXELS,
    colour_files,
    encoded,
    folder,
    png,
    refused,
    run,
    settings,
    write_folder,
    write_zip,
)
from PIL import Image

from equilab import __main__
from equilab.core import like
from equilab.core.config import UserError
from equilab.data import images as data
from equilab.data import reading
from equilab.data.pairset import labels


@pytest.fixture(autouse=True)
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_digits(seed=0):
    return run(settings(), seed)


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
    source = (write_zip if packed else write_folder)(tmp_path / "images", files)
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


def test_a_box_filter_takes_means_of_whole_pixels_of_the_square_in_the_middle():
    image = np.zeros((1, 4, 7), np.uint8)
    image[0, :, 1:5] = [[0, 1, 10, 20], [0, 1, 30, 40], [255, 255, 1, 1], [255, 255, 1, 2]]
    # means 0.5, 25, 255 and 1.25; a column is cut off at the left, two are at the right
    np.testing.assert_array_equal(data.reduce_by_box(image, 2), [[[1, 25], [255, 1]]])
    np.testing.assert_array_equal(data.reduce_by_box(image[:, :, 1:5], 4), image[:, :, 1:5])


def test_a_box_filter_is_that_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX)).astype(int)
    ours = data.reduce_by_box(pixels.transpose(2, 0, 1), 16).transpose(1, 2, 0)
    assert np.abs(theirs - ours).max() <= 1  # it rounds after each direction


def test_images_are_reduced_as_they_are_read_and_the_recipe_is_kept(tmp_path):
    files, pixels = colour_files()
    source = write_folder(tmp_path / "images", files)
    out = run(folder(source, test_path=source, image=[3, 2, 2], resize="box"))
    reduced = [data.reduce_by_box(pixels[i].transpose(2, 0, 1), 2) for i in (0, 2, 4, 1, 3, 5)]  # by name
    np.testing.assert_array_equal(data.load(out, "train", verify=True).images, reduced)
    assert json.loads((out / "meta.json").read_text())["resize"] == "box"


def test_what_a_box_filter_cannot_reduce_is_refused(tmp_path):
    source = write_zip(tmp_path / "images.zip", colour_files()[0])
    with pytest.raises(UserError, match="data.resize"):
        run(folder(source, test=2, image=[3, 3, 3], resize="box"))
    with pytest.raises(UserError, match="image"):
        folder(source, test=2, image=[3, 2, 4], resize="box")


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


def tiff(bits, samples):
    """Return a grey or colour image of 5x4 pixels with any number of bits and of samples a pixel, without compression."""
    size = 20 * samples * bits // 8
    entries = [
        (256, 5),
        (257, 4),
        (258, bits),
        (259, 1),
        (262, 2),
        (273, 150),
        (277, samples),
        (278, 4),
        (279, size),
    ]
    if samples > 3:
        entries.append((338, 0))  # the fourth has no meaning that is said
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    start = b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 0)
    start = start.replace(struct.pack("<HHII", 258, 4, 1, bits), struct.pack("<HHII", 258, 3, samples, 140))
    return start.ljust(140, b"\0") + struct.pack("<5H", *[bits] * 5) + bytes(size)


def several(format):
    """Return a file of two images."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(pixels) for pixels in PIXELS[:2]]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def transparent(format="PNG"):
    """Return an image whose alpha is not the same everywhere."""
    image = Image.fromarray(PIXELS[0])
    image.putalpha(Image.fromarray(PIXELS[1, ..., 0]))
    buffer = io.BytesIO()
    image.save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


def turned(pixels, format, orientation):
    """Return an image that its EXIF says to turn before it is shown."""
    exif = Image.Exif()
    exif[0x112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    {
        "png": encoded(PIXELS[0]),
        "tif": encoded(PIXELS[0], "TIFF"),
        "bmp": encoded(PIXELS[0], "BMP"),
        "PNG named as another": encoded(PIXELS[0]),
        "turned": turned(np.rot90(PIXELS[0]).copy(), "PNG", 6),
        "turned jpeg, not turned": turned(PIXELS[0], "PNG", 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_images_are_read_as_they_are_shown(content):
    np.testing.assert_array_equal(reading.decode(content[1]), PIXELS[0].transpose(2, 0, 1))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_images_are_read_as_they_are_decoded(format):
    smooth = np.full((8, 8, 3), [40, 120, 200], np.uint8)
    options = {"progressive": True} if format == "JPEG" else {}
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, format, **options)
    np.testing.assert_allclose(reading.decode(buffer.getvalue()), smooth.transpose(2, 0, 1), atol=6)


def test_interlaced_images_and_few_levels_are_read():
    assert reading.decode(png(8, 2, interlaced=1)).shape == (3, 4, 5)
    assert reading.decode(png(4, 0)).shape == (1, 4, 5)


@pytest.mark.parametrize(
    "reason, content",
    [
        ("depth", png(16, 2)),
        ("mode", png(16, 0)),
        ("mode", png(1, 0)),
        ("mode", png(16, 4)),
        ("transparent", png(8, 2, (b"tRNS", bytes(6)))),
        ("transparent", png(8, 0, (b"tRNS", bytes(2)))),
        ("mode", transparent()),
        ("mode", transparent("WEBP")),
        ("transparent", transparent("BMP")),
        ("mode", encoded(PIXELS[0], mode="P")),
        ("mode", encoded(PIXELS[0], mode="LA")),
        ("mode", encoded(PIXELS[0], "JPEG", mode="CMYK")),
        ("depth", tiff(16, 3)),
        ("transparent", tiff(8, 4)),
        ("frames", several("PNG")),
        ("frames", several("TIFF")),
        ("frames", several("WEBP")),
        ("frames", several("GIF")),
        ("frames", several("MPO")),
        ("format", encoded(PIXELS[0], "GIF")),
        ("format", encoded(PIXELS[0], "PPM")),
        ("format", encoded(PIXELS[0], "JPEG2000")),
        ("damaged", encoded(PIXELS[0])[:60]),
        ("damaged", encoded(np.zeros((64, 64, 3), np.uint8), "JPEG")[:-30]),
        ("damaged", b""),
        ("damaged", b"<svg></svg>"),
    ],
)
def test_what_would_be_dropped_or_altered_is_refused(reason, content):
    with pytest.raises(reading.RefusedError) as error:
        reading.decode(content)
    assert error.value.reason == reason


def test_tiffs_of_these_tests_are_read_without_the_fault():
    assert reading.decode(tiff(8, 3)).shape == (3, 4, 5)


def test_all_refused_images_are_counted_by_reason_with_the_first_of_each(tmp_path):
    files = {f"{i:02d}.png": encoded(PIXELS[i % 6]) for i in range(24)}
    for i in (3, 4, 5, 6):
        files[f"{i:02d}.png"] = png(16, 2)
    for i in (7, 8, 9):
        files[f"{i:02d}.png"] = encoded(PIXELS[0, :3])
    for i in (10, 11):
        files[f"{i:02d}.png"] = encoded(PIXELS[0, ..., 0])
    files["12.png"] = files["12.png"][:50]
    found = refused(folder(write_zip(tmp_path / "a.zip", files), test=6, classes=0))
    assert len(found) == 4 and all("of 24 files" in sentence for sentence in found)
    counts = {sentence.split(": ")[1].split(" of ")[0] for sentence in found}
    assert counts == {"4", "3", "2", "1"}
    for sentence in found:
        assert re.search(r"the first \d\d\.png in .*a\.zip \(", sentence)


def test_files_that_are_no_images_and_hidden_ones_are_passed_over_and_told(tmp_path, capsys):
    source = write_folder(tmp_path / "imgs", {f"{i}.png": encoded(PIXELS[i]) for i in range(6)})
    more = {
        ".ipynb_checkpoints/0-checkpoint.png": b"x",
        "._0.png": b"x",
        "Thumbs.db": b"x",
        "a/.DS_Store": b"x",
    }
    write_folder(source, {**more, "__MACOSX/0.png": b"x", "README": b"x", "notes.txt": b"x", "b.txt": b"x"})
    out = run(folder(source, test=1, classes=0))
    assert json.loads((out / "meta.json").read_text())["counts"] == {"train": 5, "test": 1}
    told = capsys.readouterr().out
    assert "5 hidden" in told and "2 .txt" in told and "1 without a suffix" in told


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "name, reason",
    [("more.zip", "archives"), ("a.gif", "format"), ("a.heic", "damaged"), ("a.svg", "damaged")],
)
def test_images_that_are_not_read_are_refused_not_passed_over(name, reason, packed, tmp_path):
    files = {**FILES, name: encoded(PIXELS[0], "GIF") if name == "a.gif" else b"x"}
    del files["dataset.json"]
    source = (write_zip if packed else write_folder)(tmp_path / "imgs", files)
    (sentence,) = refused(folder(source, test=2, classes=0))
    problem = reading.REFUSALS.get(reason, reason)
    assert f"1 of {len(files)} files" in sentence and name in sentence and problem in sentence


def test_equal_images_are_told(tmp_path, capsys):
    files = {f"{i}.png": encoded(PIXELS[0]) for i in range(3)}
    run(folder(write_zip(tmp_path / "a.zip", files), test=1, classes=0))
    assert "1 training images repeat another, 1 held-out images a training image" in capsys.readouterr().out


def test_links_are_followed_and_those_that_lead_nowhere_or_round_are_refused(tmp_path):
    files = {f"{i}.png": encoded(PIXELS[i]) for i in range(6)}
    write_folder(tmp_path / "elsewhere/more", files)
    source = tmp_path / "imgs"
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (source / "z.png").symlink_to(tmp_path / "elsewhere/more/0.png")
    out = run(folder(source, test=2, classes=0))
    assert json.loads((out / "meta.json").read_text())["counts"] == {"train": 5, "test": 2}
    (out / "meta.json").unlink()
    (source / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert "gone.png" in refused(folder(source, test=2, classes=0))[0]
    (tmp_path / "elsewhere/round").symlink_to(source, target_is_directory=True)
    (source / "more.zip").touch()
    again, archive = refused(folder(source, test=2, classes=0))
    assert "more.zip" in archive and "round" in again


def entry(name, content=b"x", **attributes):
    """Return an entry of a zip, with attributes that other systems give it."""
    info = zipfile.ZipInfo("x")
    info.filename = name
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def write_entries(path, *entries):
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there already
        for info, content in entries:
            archive.writestr(info, content)
    return path


def test_names_of_other_systems_are_read_as_paths(tmp_path):
    names = ["imgs\\b\\0.png", "imgs\\a\\ä.png", "imgs/c/./2.png", "imgs/A/ä.PNG"]
    pairs = [["b/0.png", 0], ["a\\a\u0308.png", 1], ["c/2.png", 2], ["A/ä.PNG", 1]]
    entries = [entry(name, encoded(PIXELS[i])) for i, name in enumerate(names)]
    listed = entry("imgs\\dataset.json", json.dumps({"labels": pairs}).encode("utf-8-sig"))
    source = write_entries(tmp_path / "a.zip", *entries, listed, entry("imgs\\empty\\"))
    out = run(folder(source, test_path=source))
    train = data.load(out, "train")  # by name: A/ä.PNG, a/ä.png, b/0.png, c/2.png
    assert train.images[:, 0, 0, 0].tolist() == [3, 1, 0, 2] and train.labels.tolist() == [1, 1, 0, 2]


def test_utf8_names_without_the_flag_that_says_so_are_read(tmp_path):
    files = {f"ä{i}.png": encoded(PIXELS[i]) for i in range(3)}
    labels = {"labels": [[name, i] for i, name in enumerate(files)]}
    source = write_zip(tmp_path / "a.zip", {**files, "dataset.json": json.dumps(labels)})
    content = source.read_bytes()
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        parts = content.split(signature)
        content = signature.join(
            [parts[0], *(part[: place - 4] + b"\0\0" + part[place - 2 :] for part in parts[1:])]
        )
    source.write_bytes(content)
    assert not any(info.flag_bits & 0x800 for info in zipfile.ZipFile(source).infolist())
    out = run(folder(source, test_path=source))
    assert data.load(out, "train").labels.tolist() == [0, 1, 2]


def test_file_names_that_are_no_utf8_are_read_and_told(tmp_path, capsys):
    source = write_folder(tmp_path / "imgs", {f"{i}.png": encoded(PIXELS[i]) for i in range(6)})
    (source / os.fsdecode(b"\xe4.png")).write_bytes(b"x")
    (source / os.fsdecode(b"\xe4.t\xe4t")).write_bytes(b"x")
    assert "\\xe4.png" in refused(folder(source, test=2, classes=0))[0]
    (source / os.fsdecode(b"\xe4.png")).write_bytes(encoded(PIXELS[0]))
    run(folder(source, test=2, classes=0))
    assert "1 .t\\xe4t" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reason, entries",
    [
        ("twice", [entry("a.png"), entry("a.png")]),
        ("twice", [entry("b/a.png"), entry("b\\a.png")]),
        ("outside", [entry("../a.png")]),
        ("outside", [entry("/a.png")]),
        ("outside", [entry("C:\\a.png")]),
    ],
)
def test_names_in_a_zip_that_are_not_to_be_relied_on_are_refused(reason, entries, tmp_path):
    source = write_entries(tmp_path / "a.zip", *entries, entry("0.png", encoded(PIXELS[0])))
    (sentence,) = refused(folder(source, test=1, classes=0))
    assert "a.png" in sentence and reading.REFUSALS[reason] in sentence


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("reason", ["encrypted", "compression", "link"])
def test_entries_of_a_zip_that_cannot_be_read_are_refused(reason, listed, tmp_path):
    name = "dataset.json" if listed else "00/00002.png"
    source = write_zip(tmp_path / "a.zip", FILES)
    content = bytearray(source.read_bytes())
    header = content.rindex(name.encode()) - 46  # in the list at the end of the zip
    local = struct.unpack_from("<I", content, header + 42)[0]
    for place, at in ((header, 0), (local, -2)):
        if reason == "encrypted":
            content[place + 8 + at] |= 1
        elif reason == "compression":
            content[place + 10 + at] = 9  # deflate64, of large zips by Windows
    if reason == "link":
        content[header + 5] = 3  # made by Unix
        struct.pack_into("<I", content, header + 38, 0o120777 << 16)
    source.write_bytes(content)
    (sentence,) = refused(folder(source, test=2))
    assert name in sentence and "a.zip" in sentence
    assert (reason if listed else reading.REFUSALS[reason]) in sentence


def test_a_damaged_zip_is_named(tmp_path):
    source = write_zip(tmp_path / "images.zip", FILES)
    whole = source.read_bytes()
    for content in (whole[: len(whole) // 2], encoded(PIXELS[0]), b""):
        source.write_bytes(content)
        assert re.search("images.zip.* is not a readable zip", refused(folder(source, test=2))[0])
    at = whole.index(FILES["01/00003.png"]) + 60
    source.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    assert re.search("01/00003.png in .*images.zip .*CRC", refused(folder(source, test=2))[0])


def small_study(place, **changes):
    """Write a study of one run with other keys in its section `data`."""
    absent = (
        "teacher",
        "pairs",
        "distill",
        "features",
        "gan",
        "consistency",
        "progressive",
        "relative",
        "activation",
    )
    entries = {key: {"dit": like.read(smoke.SMOKE)[key]["dit"]} for key in ("diffusion", "evaluate")}
    entries |= {"cost.runs": ["diffusion/dit"], "comparisons": {}, **dict.fromkeys(absent, ...)}
    return smoke.write_study(place, entries | {f"data.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("command", [["check"], ["data", "--dry-run"], ["data"]])
def test_paths_that_are_not_there_are_told_before_any_work(command, tmp_path, capsys, monkeypatch):
    path = small_study(tmp_path / "study", source="folder", path="nowhere/imgs", test_path=None, test=6)
    monkeypatch.chdir(path)
    assert __main__.main(command) == 2
    err = capsys.readouterr().err
    assert "data.path (nowhere/imgs) is not there" in err and "Traceback" not in err


@pytest.mark.parametrize("key", ["path", "test_path"])
def test_both_paths_are_looked_for_and_begin_in_the_home_folder_where_they_say_so(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "imgs", {"0.png": encoded(PIXELS[0])})
    run(folder("~/imgs", test_path="~/imgs", classes=0))
    paths = {"path": "~/imgs", "test_path": "~/imgs", key: "~/nowhere"}
    with pytest.raises(UserError, match=f"data.{key} .*/nowhere.* is not there"):
        run(folder(**paths))


def test_a_missing_label_list_is_named(tmp_path):
    labelled = write_zip(tmp_path / "a.zip", FILES)
    bare = write_zip(tmp_path / "b.zip", colour_files(labels=None)[0])
    with pytest.raises(UserError, match="only the train images have labels"):
        run(folder(labelled, test_path=bare))


def listed(labels):
    return {**FILES, "dataset.json": labels if isinstance(labels, bytes) else json.dumps({"labels": labels})}


@pytest.mark.parametrize(
    "files, parts",
    [
        (listed(LABELS[2:]), ["2 of 6", reading.REFUSALS["unlabelled"], FIRST]),
        (listed([*LABELS, ["x.png", 1], ["y.png", 1]]), ["2 of 6", reading.REFUSALS["absent"], "x.png"]),
        (listed([*LABELS, [FIRST, 1]]), ["1 of 6", reading.REFUSALS["relabelled"], FIRST]),
        (listed([[FIRST, 0.5], *LABELS[1:]]), ["dataset.json", "0.1"]),
        (listed([[FIRST, True], *LABELS[1:]]), ["dataset.json", "0.1"]),
        (listed([[FIRST, -1], *LABELS[1:]]), ["dataset.json", "0.1"]),
        (listed([[FIRST, 2**63], *LABELS[1:]]), ["dataset.json", "0.1"]),
        (listed([[3, 1], *LABELS]), ["dataset.json", "0.0"]),
        (listed([[FIRST, [0, 1]], *LABELS[1:]]), ["dataset.json", "0.1"]),
        (listed(b"{"), ["dataset.json"]),
        (listed(b"{}"), ["dataset.json", "labels"]),
        (listed(b"[" * 100_000), ["dataset.json"]),
        (listed(b"\xff\xfe"), ["dataset.json"]),
        ({**FILES, "00/dataset.json": b"{}"}, ["2 files", "00/dataset.json"]),
        (
            listed([[name, 3] for name, _ in LABELS]),
            ["up to 3", "0, 1, 2", "3 becomes 0", "data.classes to 1"],
        ),
        (
            listed([[name, 1 + label] for name, label in LABELS]),
            ["has 0", "1 becomes 0, 2 becomes 1", "to 3"],
        ),
        (
            listed([[name, label % 2] for name, label in LABELS]),
            ["data.classes is 3", "have 2", "set it to 2"],
        ),
        ({"readme.txt": b"none"}, ["no image", "1 .txt"]),
    ],
)
def test_a_wrong_label_list_is_named(files, parts, tmp_path):
    source = write_zip(tmp_path / "images.zip", files)
    (sentence,) = refused(folder(source, test_path=source))
    assert all(part in sentence for part in parts), sentence


def test_a_label_list_is_found_below_a_top_folder(tmp_path):
    source = write_zip(tmp_path / "a.zip", {f"imgs/train/{name}": content for name, content in FILES.items()})
    labels = data.load(run(folder(source, test_path=source)), "train").labels
    assert labels.tolist() == [0, 2, 1, 1, 0, 2]


def test_classes_that_only_held_out_images_have_are_named(tmp_path):
    train = write_zip(tmp_path / "a.zip", listed([[name, label % 2] for name, label in LABELS]))
    test = write_zip(tmp_path / "b.zip", FILES)
    (sentence,) = refused(folder(train, test_path=test, classes=2))
    assert "only held-out images have the labels 2" in sentence


def class_folders(*classes, top=""):
    return {f"{top}{name}/deep/{i}.png": encoded(PIXELS[i]) for i in range(3) for name in classes}


@pytest.mark.parametrize("top", ["", "imgs/"])
@pytest.mark.parametrize("packed", [True, False])
def test_folders_are_classes_where_params_say_that_there_are_some(top, packed, tmp_path, capsys):
    source = (write_zip if packed else write_folder)(tmp_path / "a", class_folders("dog", "cat", top=top))
    out = run(folder(source, test_path=source, classes=2))
    train = data.load(out, "train")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.classes == 2
    assert json.loads((out / "meta.json").read_text())["class_names"] == ["cat", "dog"]
    assert "cat, dog" in capsys.readouterr().out
    assert data.load(run(folder(source, test_path=source, classes=0)), "train").labels is None


def test_class_folders_that_differ_or_hold_some_images_alone_are_named(tmp_path):
    train = write_folder(tmp_path / "a", class_folders("dog", "cat"))
    test = write_folder(tmp_path / "b", class_folders("dog", "bird"))
    (sentence,) = refused(folder(train, test_path=test, classes=2))
    assert "cat, dog" in sentence and "bird, dog" in sentence
    assert "have 2" in refused(folder(train, test_path=train, classes=3))[0]
    write_folder(train, {"loose.png": encoded(PIXELS[0])})
    (sentence,) = refused(folder(train, test=2, classes=2))
    assert "loose.png" in sentence and reading.REFUSALS["loose"] in sentence
    flat = write_folder(tmp_path / "c", {"imgs/0.png": encoded(PIXELS[0]), "imgs/1.png": encoded(PIXELS[1])})
    assert "data.classes is 3" in refused(folder(flat, test=1))[0]


def test_labels_are_drawn_uniformly_or_as_frequently_as_training_images_have_them(tmp_path, capsys):
    files = {f"{int(i >= 18)}/{i:02d}.png": encoded(PIXELS[i % 6]) for i in range(20)}
    source = write_folder(tmp_path / "a", files)
    out = run(folder(source, test_path=source, classes=2))
    assert data.load(out, "train").label_counts is None and "uniformly" in capsys.readouterr().out
    out = run(folder(source, test_path=source, classes=2, labels="frequency"))
    assert data.load(out, "train").label_counts == (18, 2) and "frequencies" in capsys.readouterr().out
    uniform, frequent = labels(0, range(2000), 2), labels(0, range(2000), 2, counts=(18, 2))
    assert abs(uniform.double().mean() - 0.5) < 0.04 and abs(frequent.double().mean() - 0.1) < 0.03
    assert torch.equal(frequent[500:600], labels(0, range(500, 600), 2, counts=(18, 2)))
    assert set(labels(0, range(500), 4, counts=(0, 3, 0, 1)).tolist()) == {1, 3}


def test_frequencies_need_classes():
    with pytest.raises(UserError, match="data: labels .* null where classes is 0"):
        settings(classes=0, labels="frequency")


@pytest.mark.parametrize("test", [0, 6, -1])
def test_an_impossible_number_of_held_out_images_is_refused(test, tmp_path):
    with pytest.raises(UserError, match="data.test"):
        run(folder(write_zip(tmp_path / "images.zip", FILES), test=test))


@pytest.mark.parametrize(
    "change",
    [
        {"test": None},
        {"path": "x"},
        {"source": "cifar10"},
        {"source": "folder"},
        {"path": "x", "test_path": "y"},
        {"datasets": DATASETS},
        {"source": "datasets", "path": "x", "datasets": DATASETS},
        {"source": "datasets", "path": "x", "test": None, "datasets": {**DATASETS, "test": None}},
    ],
)
def test_keys_that_the_source_does_not_read_are_refused(change):
    with pytest.raises(UserError, match="data: (source .* reads|give either)"):
        settings(**change)


def cifar10(path, classes):
    return settings(source="cifar10", path=str(path), test=None, image=[3, 32, 32], classes=classes)


def test_cifar10_comes_from_torchvision_in_its_own_splits(tmp_path, monkeypatch):
    def CIFAR10(root, train, download):
        pixels = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
        return SimpleNamespace(data=pixels, targets=[i % 2 for i in range(len(pixels))])

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR10=CIFAR10))
    out = run(cifar10(tmp_path, 2))
    assert data.load(out, "train").images.shape == (4, 3, 32, 32)
    assert data.load(out, "test", verify=True).labels.tolist() == [0, 1]


def test_cifar10_without_a_network_says_what_to_place_where(tmp_path, monkeypatch):
    def CIFAR10(root, train, download):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR10=CIFAR10))
    with pytest.raises(UserError, match="place cifar-10-python.tar.gz there"):
        run(cifar10(tmp_path, 10))


@pytest.mark.parametrize("name", ["meta.json", "train_images.npy", "train_labels.npy"])
@pytest.mark.parametrize("fault", ["missing", "cut short", "longer", "garbage", "a zip", "another object"])
def test_a_file_that_is_missing_or_of_another_size_is_named(name, fault, digits, tmp_path):
    for file in digits.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_zip(tmp_path / "a.zip", FILES)
    whole = (tmp_path / name).read_bytes()
    changed = {
        "missing": b"",
        "cut short": whole[:-20],
        "longer": whole + b"x",
        "garbage": b"\x00" * 99,
        "a zip": (tmp_path / "a.zip").read_bytes(),
        "another object": b'{"counts": {"train": "many"}, "shape": 3, "classes": 10, "sha256": []}',
    }
    (tmp_path / name).write_bytes(changed[fault])
    if fault == "missing":
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} .*run the stage that writes it, or fetch it (first|again)"):
        data.load(tmp_path, "train")


def test_a_changed_byte_is_found_by_the_checksum(digits, tmp_path):
    for file in digits.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "train_images.npy").read_bytes())
    content[5000] ^= 1
    (tmp_path / "train_images.npy").write_bytes(content)
    data.load(tmp_path, "train")
    with pytest.raises(UserError, match=r"train_images.npy is damaged \(its checksum"):
        data.load(tmp_path, "train", verify=True)
