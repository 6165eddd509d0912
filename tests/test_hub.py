"""Datasets of Hugging Face: local folders of every layout, what is refused, and the hub without a network."""

import json

import datasets
import pytest
from pictures import DATASETS, PIXELS, encoded, png, refused, run, settings, write_folder

from equilab.core.config import UserError
from equilab.data import images as data
from equilab.data import reading

READ = {**DATASETS, "image": "img", "label": "label"}


@pytest.fixture(autouse=True)
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def hub(path, held_out=None, classes=2, **changes):
    """Return a config that reads a dataset."""
    given = {"path": str(path), "test": held_out, "image": [3, 4, 5], "classes": classes}
    return settings(source="datasets", datasets={**READ, **changes}, **given)


def rows(count=6, **columns):
    """Return a dataset whose images tell their number by their first pixel."""
    pictures = [{"bytes": encoded(PIXELS[index]), "path": None} for index in range(count)]
    given = {"img": pictures, "label": [index % 2 for index in range(count)], **columns}
    label = datasets.ClassLabel(names=["cat", "dog"]) if "label" not in columns else None
    kinds = {"img": datasets.Image(), "label": label}
    made = datasets.Dataset.from_dict({"img": given.pop("img"), "label": given.pop("label")})
    for name, kind in kinds.items():
        made = made.cast_column(name, kind) if kind else made
    return made


def splits(path):
    """Return the first pixels of the images of both splits, and their labels."""
    found = [data.load(path, split, verify=True) for split in ("train", "test")]
    return [(each.images[:, 0, 0, 0].tolist(), each.labels.tolist()) for each in found]


def write_parquet(path, made, *names):
    for name in names:
        (path / "data").mkdir(parents=True, exist_ok=True)
        made.to_parquet(path / f"data/{name}-00000-of-00001.parquet")
    return path


def write_saved(path, made):
    datasets.DatasetDict(train=made, test=made.select(range(2))).save_to_disk(path)
    return path


def write_arrow(path, made):
    path.mkdir()
    for name in ("train", "test"):
        with datasets.arrow_writer.ArrowWriter(
            path=str(path / f"{name}.arrow"), features=made.features
        ) as writer:
            for row in made.cast_column("img", datasets.Image(decode=False)):
                writer.write(row)
            writer.finalize()
    return path


@pytest.mark.parametrize("layout", ["parquet", "saved", "arrow"])
def test_tables_of_images_are_read_in_their_order(layout, tmp_path, capsys):
    if layout == "parquet":
        path = write_parquet(tmp_path / "made", rows(), "train", "test")
    else:
        path = {"saved": write_saved, "arrow": write_arrow}[layout](tmp_path / "made", rows())
    train, test = splits(run(hub(path)))
    assert train == (list(range(6)), [0, 1, 0, 1, 0, 1]) and test[0] == train[0][: len(test[0])]
    assert "cat, dog" in capsys.readouterr().out
    assert json.loads((tmp_path / "results/data/meta.json").read_text())["class_names"] == ["cat", "dog"]
    assert not list((tmp_path / ".equilab/scratch").iterdir())


def test_class_folders_are_read_by_name(tmp_path):
    files = {
        f"{split}/{name}/{i}.png": encoded(PIXELS[i])
        for split in ("train", "test")
        for name in "ba"
        for i in (1, 2)
    }
    path = write_folder(tmp_path / "imgs", {**files, "notes.txt": b"x", ".hidden/0.png": b"x"})
    assert splits(run(hub(path, image="image"))) == [([1, 2, 1, 2], [0, 0, 1, 1])] * 2


def test_images_are_held_out_where_there_is_no_split_for_testing(tmp_path, capsys):
    path = write_parquet(tmp_path / "made", rows(), "train", "validation")
    out = run(hub(path, held_out=2, test=None))
    assert [len(found[0]) for found in splits(out)] == [4, 2]
    assert "6 rows of the split validation" in capsys.readouterr().out


def test_images_without_labels_are_read(tmp_path):
    path = write_parquet(tmp_path / "made", rows(), "train", "test")
    assert data.load(run(hub(path, classes=0, label=None)), "train").labels is None


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"image": "imgg"}, ["data.datasets.image", "'img'"]),
        ({"image": "label"}, ["data.datasets.image", "no images"]),
        ({"label": "labels"}, ["data.datasets.label", "'label'"]),
        ({"label": "img"}, ["row 0 in the split train"]),
        ({"train": "tain"}, ["data.datasets.train", "'train'"]),
        ({"test": "validation"}, ["data.datasets.test"]),
        ({"revision": "main"}, ["data.datasets.revision", "null"]),
        ({"subset": "large"}, ["data.path", "large"]),
    ],
)
def test_what_a_dataset_does_not_have_is_named(changes, parts, tmp_path):
    path = write_parquet(tmp_path / "made", rows(), "train", "test")
    (sentence,) = refused(hub(path, **changes))
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize("label", [None, "word", 0.5, -1])
def test_labels_that_are_no_classes_are_named(label, tmp_path):
    path = write_parquet(tmp_path / "made", rows(label=[label] * 6), "train", "test")
    (sentence,) = refused(hub(path))
    assert "row 0 in the split train" in sentence and repr(label) in sentence


def test_images_are_refused_as_those_of_files_are(tmp_path):
    pictures = [{"bytes": content, "path": None} for content in (png(16, 2), b"x", encoded(PIXELS[0]))] + [
        None
    ]
    path = write_parquet(tmp_path / "made", rows(4, img=pictures, label=[0, 1, 0, 1]), "train", "test")
    found = refused(hub(path))
    assert len(found) == 2 and "2 of 8 files" in found[0] + found[1] and "4 of 8 files" in found[0] + found[1]
    assert any(reading.REFUSALS["depth"] in sentence for sentence in found)


def test_images_that_datasets_would_pass_over_are_refused(tmp_path):
    files = {f"{name}/a photo {i}.png": encoded(PIXELS[i]) for name in "ab" for i in range(3)}
    path = write_folder(tmp_path / "imgs", {**files, "a/a photo of a train.png": encoded(PIXELS[0])})
    (sentence,) = refused(hub(path, held_out=1, image="image", test=None))
    assert "6 of 7 files" in sentence and reading.REFUSALS["unread"] in sentence


@pytest.mark.parametrize("path", ["./nowhere", "~/nowhere", "/nowhere", "a/b/c", "imgs.zip"])
def test_a_path_that_is_no_folder_and_no_name_of_the_hub_is_told(path, tmp_path):
    (tmp_path / "imgs.zip").write_bytes(b"x")
    with pytest.raises(UserError, match="data.path"):
        run(hub(path))


def test_the_hub_without_a_network_is_told_in_a_sentence(monkeypatch):
    def load_dataset(path, subset, revision):
        raise ConnectionError(f"Couldn't reach {path} on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (sentence,) = refused(hub("someone/images"))
    assert "someone/images" in sentence and "Couldn't reach" in sentence and "network" in sentence


def test_datasets_of_the_hub_are_asked_for_by_name_subset_and_revision(monkeypatch):
    asked = []

    def load_dataset(path, subset, revision):
        asked.append((path, subset, revision))
        return datasets.DatasetDict(train=rows(), test=rows())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert splits(run(hub("someone/images", subset="small", revision="abc")))[1][0] == list(range(6))
    assert asked == [("someone/images", "small", "abc")]
