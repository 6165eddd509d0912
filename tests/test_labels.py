"""Labels of generated images: uniform, or as frequent as training images have them, from the data to the samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import smoke
from pictures import encoded, write_folder

from equilab import __main__
from equilab.core import config, like
from equilab.data import images as data
from equilab.data.pairset import PairSet
from equilab.sampling.generators import load
from equilab.training import gan

COUNTS = [54, 6]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The folder of a study with a frequent and a rare class, whose teacher and pairs are small."""
    pixels = np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8)
    files = {f"{int(i >= COUNTS[0])}/{i:02d}.png": encoded(pixels[i]) for i in range(60)}
    source = str(write_folder(tmp_path / "imgs", files))
    keys = {
        "source": "folder",
        "path": source,
        "test_path": source,
        "test": None,
        "classes": 2,
        "labels": "frequency",
    }
    changes = {f"data.{key}": value for key, value in keys.items()}
    monkeypatch.chdir(smoke.write_study(tmp_path / "study", changes))
    return tmp_path / "study"


def run(*commands):
    for command in commands:
        assert __main__.main(command.split()) == 0


@pytest.mark.slow
def test_pairs_players_and_samples_draw_labels_as_frequently_as_training_images_have_them(study, capsys):
    run("data", "teacher", "pairs")
    assert json.loads(Path("results/data/meta.json").read_text())["label_counts"] == COUNTS
    drawn = PairSet(Path("results/pairs")).read(np.arange(240)).label
    assert 0.03 < drawn.double().mean() < 0.2
    inputs = load("teacher").inputs(0, np.arange(1000), None)
    assert 0.06 < inputs.label.double().mean() < 0.14
    loaded = data.load(Path("results/data"), "train")
    entry = like.read(Path("params.yaml"))["gan"]
    name = next(iter(entry))
    keys = {("seed" if key == "seeds" else key): value for key, value in entry[name].items()} | {"seed": 0}
    batch = gan.batch_of(config.parse(gan.Config, keys, "gan"), loaded, range(1000))
    assert 0.06 < batch.of_generator.label.double().mean() < 0.14
    assert 0.06 < batch.of_discriminator.label.double().mean() < 0.14
    sections = like.read(Path("params.yaml"))
    sections["data"]["labels"] = "uniform"
    smoke.write_study(study, {"data": sections["data"]})
    assert __main__.main(["distill", "vit"]) == 2
    assert "data.labels is uniform" in capsys.readouterr().err
